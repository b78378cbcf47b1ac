"""Trains the miniature testbed's VAE: 64x64 pictures to 4x16x16 latents and back.

Input: the image folder that scripts/unpack_mini.py writes (its train and heldout halves).
Output: <out>, a diffusers AutoencoderKL folder (config.json with the measured scaling_factor,
fp16 safetensors), and in it vae_training.json; --preview names a picture of held-out originals
above their reconstructions. Everything starts from the pictures alone: no other weights are used.

    python scripts/train_mini_vae.py --data-path data/mini --out assets/mini/vae

The loss is L1 + L1 of the image gradients + 1e-4 * KL (KL per latent element, in nats), the
weights that are kept are an exponential moving average, and the learning rate follows a cosine
over --steps or --max-minutes, whichever ends first.
"""

import argparse
import copy
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from training import arguments, distributed

MAX_SHIFT = 4  # pixels; the pictures stand on white, which also fills what a shift uncovers
CHANNEL_SWAP = 0.15  # share of pictures whose R, G, B are permuted: rare colours get more cover
EMA_DECAY = 0.999
WARMUP_STEPS = 200


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.parser(__doc__)
    add = parser.add_argument
    add("--data-path", type=Path, default=Path("data/mini"), help="with train/ and heldout/")
    add("--out", type=Path, default=Path("assets/mini/vae"), help="folder to write")
    add("--preview", type=Path, help="PNG to write (unset: none)")
    add("--steps", type=arguments.positive, default=8_000, help="optimiser steps")
    add("--batch-size", type=arguments.positive, default=128, help="pictures a step")
    add("--lr", type=arguments.rate, default=8e-4, help="peak, after the warm-up")
    add("--kl-weight", type=arguments.weight, default=1e-4, help="of the KL term in the loss")
    add(
        "--max-minutes",
        type=arguments.rate,
        help="training anneals and ends by then, compilation included, with steps left "
        "(unset: no limit)",
    )
    add("--seed", type=arguments.seed, default=0, help="of weights, order and augmentation")
    add("--device", help="cuda, cuda:1 or cpu (unset: CUDA where there is any)")
    add("--no-compile", action="store_true", help="without torch.compile on CUDA")
    return parser.parse_args(argv)


def read_images(folder: Path) -> torch.Tensor:
    """All pictures below a folder in path order, uint8 [N, 3, H, W]."""
    paths = sorted(folder.glob("*/*.png"))
    if not paths:
        raise FileNotFoundError(
            f"{folder} holds no <class>/*.png: run python scripts/unpack_mini.py --out "
            f"{folder.parent} first"
        )
    pictures = []
    for path in paths:
        with Image.open(path) as image:
            pictures.append(np.asarray(image.convert("RGB")))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def build_vae() -> torch.nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 128),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=64,
        force_upcast=False,
    )


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """uint8 [B, 3, H, W] to float -1..1: mirrors, shifts, mild colour changes that keep white."""
    B, _, H, W = images.shape
    device = images.device

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    # Shift and mirror in one gather: index arithmetic on the padded picture.
    padded = F.pad(images, (MAX_SHIFT,) * 4, value=255)
    top, left = (draw(2, B) * (2 * MAX_SHIFT + 1)).long()
    rows = top[:, None] + torch.arange(H, device=device)  # [B, H]
    columns = torch.arange(W, device=device).expand(B, W)
    columns = torch.where(draw(B, 1) < 0.5, columns, W - 1 - columns) + left[:, None]
    batch = torch.arange(B, device=device)[:, None, None]
    x = padded[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

    # Colours are changed as ink on white: ink 0 is the background and stays as it is.
    ink = 1 - x.float() / 255
    order = torch.argsort(draw(B, 3), dim=1)
    order = torch.where(draw(B, 1) < CHANNEL_SWAP, order, torch.arange(3, device=device))
    mix = F.one_hot(order, 3).float()
    mix = mix * (0.9 + 0.2 * draw(B, 3, 1))  # strength of each colour
    grey = mix.mean(dim=1, keepdim=True)
    mix = grey + (mix - grey) * (0.85 + 0.3 * draw(B, 1, 1))  # saturation
    ink = torch.einsum("boc,bchw->bohw", mix, ink).clamp(0, 1)
    return 1 - 2 * ink


def autoencode(
    vae: torch.nn.Module, images: torch.Tensor, noise: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Reconstruction [B, 3, H, W], posterior mean and log-variance [B, C, h, w]."""
    mean, logvar = vae.quant_conv(vae.encoder(images)).float().chunk(2, dim=1)
    logvar = logvar.clamp(-30, 20)
    latents = mean + torch.exp(0.5 * logvar) * noise
    return vae.decoder(vae.post_quant_conv(latents)).float(), mean, logvar


def loss_terms(
    vae: torch.nn.Module, images: torch.Tensor, noise: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reconstruction error and KL, both scalars."""
    out, mean, logvar = autoencode(vae, images, noise)
    error = out - images
    fit = (
        error.abs().mean()
        + error.diff(dim=2).abs().mean()  # = L1 between the two pictures' vertical gradients
        + error.diff(dim=3).abs().mean()
    )
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return fit, kl


@torch.no_grad()
def encode_means(vae: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    chunks = (images[i : i + 128].float() / 127.5 - 1 for i in range(0, len(images), 128))
    return torch.cat([vae.encode(chunk).latent_dist.mean for chunk in chunks])


@torch.no_grad()
def reconstruct(vae: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """uint8 [N, 3, H, W] through the posterior mean and back, rounded to uint8."""
    out = []
    for latents in encode_means(vae, images).split(128):
        out.append((vae.decode(latents).sample * 127.5 + 127.5).round().clamp(0, 255).byte())
    return torch.cat(out)


def psnr(images: torch.Tensor, copies: torch.Tensor) -> dict[str, float]:
    """In dB of uint8 pictures: of the mean squared error, and the mean over pictures."""
    mse = (images.float() - copies.float()).square().mean(dim=(1, 2, 3)).clamp(min=1e-2)
    return {
        "of_mean_mse": round(10 * math.log10(255**2 / mse.mean().item()), 3),
        "mean": round((10 * torch.log10(255**2 / mse)).mean().item(), 3),
    }


@torch.no_grad()
def equalise_latents(vae: torch.nn.Module, means: torch.Tensor) -> None:
    """Gives every latent channel mean 0 and the same spread, without changing any reconstruction.

    The two 1x1 convolutions around the latents absorb the change: the encoder's is divided by,
    the decoder's multiplied by the same channel factors. means [N, C, h, w].
    """
    C = means.shape[1]
    shift = means.mean(dim=(0, 2, 3))
    spread = means.std(dim=(0, 2, 3))
    factor = spread / spread.square().mean().sqrt()
    into, back = vae.quant_conv, vae.post_quant_conv
    back.bias += back.weight[:, :, 0, 0] @ shift
    back.weight *= factor[None, :, None, None]
    into.weight[:C] /= factor[:, None, None, None]
    into.bias[:C] = (into.bias[:C] - shift) / factor
    into.bias[C:] -= 2 * factor.log()  # log-variance of a divided variable


def save_preview(path: Path, images: torch.Tensor, copies: torch.Tensor, columns: int = 16) -> None:
    """Rows of originals, each above the row of its reconstructions."""
    picked = torch.linspace(0, len(images) - 1, 4 * columns).long()
    rows = []
    for chunk in picked.split(columns):
        rows += [torch.cat(list(images[chunk]), dim=2), torch.cat(list(copies[chunk]), dim=2)]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(torch.cat(rows, dim=1).permute(1, 2, 0).numpy()).save(path)


def main(args: argparse.Namespace) -> None:
    start = time.monotonic()
    device = distributed.start(args.device).device
    torch.manual_seed(args.seed)
    generator = torch.Generator(device).manual_seed(args.seed)
    bf16 = torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")

    train = read_images(args.data_path / "train").to(device)
    heldout = read_images(args.data_path / "heldout").to(device)
    vae = build_vae().to(device, memory_format=torch.channels_last)
    parameters = sum(p.numel() for p in vae.parameters())
    print(
        f"{len(train)} train, {len(heldout)} heldout pictures; {parameters:,} parameters",
        flush=True,
    )

    ema = copy.deepcopy(vae).requires_grad_(False).eval()
    weights, ema_weights = list(vae.parameters()), list(ema.parameters())
    optimizer = torch.optim.AdamW(
        weights, lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=device.type == "cuda"
    )
    compiled = device.type == "cuda" and not args.no_compile
    terms = torch.compile(loss_terms) if compiled else loss_terms
    latent_side = train.shape[-1] // 2 ** (len(vae.config.block_out_channels) - 1)

    budget = math.inf if args.max_minutes is None else 60 * args.max_minutes
    steps = 0
    while steps < args.steps:
        # The clock counts too, so that the rate has reached its end whichever limit is met.
        progress = max(steps / args.steps, (time.monotonic() - start) / budget)
        if progress >= 1:
            break
        rate = 0.5 * (1 + math.cos(math.pi * progress)) * min(1.0, (steps + 1) / WARMUP_STEPS)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * rate

        picked = torch.randint(len(train), (args.batch_size,), generator=generator, device=device)
        images = augment(train[picked], generator).contiguous(memory_format=torch.channels_last)
        shape = (args.batch_size, vae.config.latent_channels, latent_side, latent_side)
        noise = torch.randn(shape, generator=generator, device=device)
        with bf16:
            fit, kl = terms(vae, images, noise)
        loss = fit + args.kl_weight * kl
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        steps += 1
        decay = min(EMA_DECAY, (1 + steps) / (10 + steps))
        with torch.no_grad():
            torch._foreach_lerp_(ema_weights, weights, 1 - decay)

        if steps % 500 == 0 or steps == 1:
            if not math.isfinite(loss.item()):
                raise ValueError(f"the loss is {loss.item()} at step {steps}: lower --lr {args.lr}")
            note = f"step {steps} fit {fit.item():.4f} kl {kl.item():.3f}"
            if steps % 2000 == 0:
                note += f" heldout {psnr(heldout, reconstruct(ema, heldout))['mean']:.2f} dB"
            print(f"{note} ({time.monotonic() - start:.0f} s)", flush=True)
    training_seconds = time.monotonic() - start

    equalise_latents(ema, encode_means(ema, train))
    args.out.mkdir(parents=True, exist_ok=True)
    # Rounded to fp16 first and measured afterwards: the figures are those of the saved weights.
    vae = ema.half().float()
    means = encode_means(vae, train)
    scale = 1 / means.std().item()
    vae.register_to_config(scaling_factor=scale)
    vae.half().save_pretrained(args.out, safe_serialization=True)

    vae = type(vae).from_pretrained(args.out, torch_dtype=torch.float32).to(device).eval()
    copies = reconstruct(vae, heldout)
    report = {
        "settings": {k: v for k, v in vars(args).items() if not isinstance(v, Path)},
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "steps": steps,
        "seconds": round(training_seconds, 1),
        "parameters": parameters,
        "train_pictures": len(train),
        "heldout_pictures": len(heldout),
        "psnr_train_db": psnr(train, reconstruct(vae, train)),
        "psnr_heldout_db": psnr(heldout, copies),
        "scaling_factor": scale,
        "latent_channel_std": [round(v, 4) for v in (means * scale).std(dim=(0, 2, 3)).tolist()],
    }
    (args.out / "vae_training.json").write_text(json.dumps(report, indent=2) + "\n")
    if args.preview:
        save_preview(args.preview, heldout.cpu(), copies.cpu())
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    distributed.run(main, parse_args())
