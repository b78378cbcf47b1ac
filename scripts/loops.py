"""What benchmark.py times: steps made of this repository's parts, and the style they replace.

The published style stands for public DiT training and sampling code, in our own writing: eager
modules under autocast, AdamW by PyTorch's default, DistributedDataParallel, an average updated
parameter by parameter, the loss read back every step, images through the VAE one at a time. It
shares our arithmetic of the diffusion, which uploads no coefficients; that makes it faster than
what it stands for.

Not a command.
"""

import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from diffusion import create_diffusion, noise
from diffusion.gaussian import reverse_update
from latents.codec import Codec
from latents.store import LatentStore
from models.dit import DiT
from models.graft_plan import GraftPlan
from models.grafting import build_grafted
from models.inference import quicken
from models.operators.accelerators import accelerate
from models.recompute import recompute
from models.selection import GatedDiT, LayerGates, settle
from training import distributed, precision
from training.compilation import compile_functions, compile_models, graphed
from training.distributed import World
from training.draws import draw
from training.ema import Ema
from training.lora import add_lora
from training.optimizer import StepGuard, adamw
from training.runlog import Means
from training.working import with_copies

Step = Callable[[], None]
TAU, SCALING = 1.0, 10.0
GRAFTED = (".graft.", ".grafts.")


@dataclass(frozen=True)
class Setting:
    """What both sides of a comparison share."""

    world: World
    dtype: torch.dtype
    plan: GraftPlan
    batch: int
    compile: bool
    kernels: str
    grad_checkpoint: bool = False  # here, not in the published style
    exchange: str = "fp32"  # here, see arguments.add_exchange


def random_dit(plan: GraftPlan, device: torch.device, pairs: bool = False) -> DiT:
    """A plan's model with random weights, no layer at zero: products of zeros run faster."""
    with device:
        model, _ = build_grafted(plan, weights=False, pairs=pairs)
    model.to(device)
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and not layer.weight.any():
            nn.init.normal_(layer.weight, std=0.02)
    return model


def trainable(setting: Setting, selection: bool) -> tuple[nn.Module, LayerGates | None]:
    """The module a training step runs: a DiT, or one with gates and LoRA as selection has it."""
    model = random_dit(setting.plan, setting.world.device, pairs=selection)
    if not selection:
        return model.to(setting.world.device).train(), None
    blocks = setting.plan.grafted_blocks()
    open_blocks = [[1] if block in blocks else [] for block in range(setting.plan.depth)]
    gates = LayerGates(setting.plan.depth, variants=open_blocks)
    settle(model, gates.settled())
    add_lora(model, 32, 64, exclude=GRAFTED)
    for name, parameter in model.named_parameters():
        trained = "lora_" in name or any(text in name for text in GRAFTED)
        parameter.requires_grad_(trained and name != "pos_embed")
    return GatedDiT(model, gates).to(setting.world.device).train(), gates


def published_training(setting: Setting, selection: bool) -> Step:
    """A training step in the published style."""
    device, B = setting.world.device, setting.batch
    net, gates = trainable(setting, selection)
    wrapped = net if setting.world.size == 1 else DistributedDataParallel(net)
    diffusion = create_diffusion("")
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-4)
    average = {name: p.detach().clone() for name, p in net.named_parameters()}
    size = setting.plan.input_size
    options = 0 if gates is None else sum(o.shape[0] for o in gates.options)

    def step() -> None:
        x = torch.randn(B, 4, size, size, device=device)
        t = torch.randint(diffusion.num_timesteps, (B,), device=device)
        inputs = {"y": torch.randint(setting.plan.num_classes, (B,), device=device)}
        if selection:
            uniform = torch.rand(B, options, device=device)
            inputs |= {"uniform": uniform, "tau": TAU, "scaling": SCALING}
        with precision.autocast(device, setting.dtype):
            loss = diffusion.training_losses(wrapped, x, t, inputs)["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                average[name].mul_(0.9999).add_(parameter, alpha=1e-4)
        loss.item()

    return step


def training(setting: Setting, selection: bool) -> Step:
    """A training step as finetune_tinyfusion.py or prune_by_learning.py takes it."""
    world, device, B = setting.world, setting.world.device, setting.batch
    net, gates = trainable(setting, selection)
    model = net.dit if selection else net
    if setting.grad_checkpoint:
        recompute(model)
    accelerate(model, device, setting.dtype, model.num_tokens, setting.kernels)
    groups = [{"params": [p for p in model.parameters() if p.requires_grad], "lr": 1e-4}]
    if gates is not None:
        groups.append({"params": [*gates.parameters()], "lr": 1e-3})
    optimizer = adamw(groups, 0.0)
    guard = StepGuard(optimizer, 1.0, Ema(net, 0.9999), setting.kernels)
    store = random_store(setting.plan, B)
    latents, draws_of, uniform = compile_functions(
        world, setting.compile, store.latents, draw, noise.uniform
    )
    compile_models(world, setting.compile, net)
    flags = Namespace(
        grad_accum=1, grad_checkpoint=setting.grad_checkpoint, exchange=setting.exchange
    )
    distributed.start_alike(world, net)
    working, _ = with_copies(world, net, setting.dtype, guard, flags)
    wrapped = distributed.wrap(world, working)
    diffusion = create_diffusion("")
    moments = torch.randn(B, 2, 8, *store.shape[1:], device=device).half()
    index = torch.arange(B, device=device)
    labels = torch.randint(setting.plan.num_classes, (B,), device=device)
    options = 0 if gates is None else sum(o.shape[0] for o in gates.options)
    means = Means(world, ["loss"])
    steps = 0

    def on_device(x, t, noise, **inputs):
        guard.zero_grad()
        with precision.autocast(device, setting.dtype):
            terms = diffusion.training_losses(wrapped, x, t, inputs, noise=noise)
        loss = terms["loss"].mean()
        loss.backward()
        guard.step()
        return loss.detach()[None]

    take_step = graphed(world, setting.compile, on_device)

    def step() -> None:
        nonlocal steps
        epoch = steps
        x = latents(moments, index, 0, epoch)  # [B,C,H,W]
        draws = draws_of(0, epoch, index, x.shape[1:], diffusion.num_timesteps, 0.1)
        inputs = {"x": x, "y": labels, **draws._asdict()}
        if selection:
            inputs["uniform"] = uniform(0, noise.GATE, index, (options,), step=epoch)
            inputs["tau"] = torch.full((), TAU, device=device)
            inputs["scaling"] = torch.full((), SCALING, device=device)
        guard.set_rates()
        means.add(take_step(**inputs))
        steps += 1

    return step


def random_store(plan: GraftPlan, count: int) -> LatentStore:
    """A latent store of `count` images without files behind it, for its `latents`."""
    manifest = {
        "kind": "moments",
        "shape": [4, plan.input_size, plan.input_size],
        "scale": 0.18215,
        "mirrors": 2,
        "class_names": [],
    }
    rows = SimpleNamespace(labels=np.zeros(count, np.int64))
    return LatentStore(plan.path, manifest, rows, plan.num_classes)


def published_sampling(setting: Setting) -> Step:
    """One guided reverse step of DDPM in the published style."""
    model = random_dit(setting.plan, setting.world.device)
    return _sampling(setting, model, torch.randn_like, cfg_scale=1.5)


def sampling(setting: Setting, fp8: bool = False) -> Step:
    """One guided reverse step of DDPM as sample_ddp_finetuned.py takes it."""
    world = setting.world
    model = random_dit(setting.plan, world.device).eval()
    accelerate(model, world.device, setting.dtype, model.num_tokens, setting.kernels)
    for line in quicken(model, setting.dtype, fp8):
        print(line, file=sys.stderr)
    (normal,) = compile_functions(world, setting.compile, noise.normal)
    compile_models(world, setting.compile, model)
    index = torch.arange(setting.batch, device=world.device)
    step = 0

    def step_noise(x: torch.Tensor) -> torch.Tensor:
        nonlocal step
        step += 1
        return normal(0, noise.STEP, index, tuple(x.shape[1:]), step=step)

    return _sampling(setting, model, step_noise, cfg_scale=1.5, graph=setting.compile)


def _sampling(
    setting: Setting,
    model: DiT,
    step_noise: Callable[[torch.Tensor], torch.Tensor],
    cfg_scale: float,
    graph: bool = False,
) -> Step:
    device, B = setting.world.device, setting.batch
    model = model.to(device).eval()
    diffusion = create_diffusion("250")
    rows, timesteps = diffusion.ancestral_rows(device), diffusion.timesteps(device)
    size = setting.plan.input_size
    state = {"x": torch.randn(B, 4, size, size, device=device), "i": 0}
    labels = torch.randint(setting.plan.num_classes, (B,), device=device)
    both = torch.cat([labels, torch.full_like(labels, setting.plan.num_classes)])

    def guided(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        with precision.autocast(device, setting.dtype):
            return model.forward_with_cfg(torch.cat([x, x]), t, both, cfg_scale)[:B].float()

    evaluate = graphed(setting.world, graph, guided, reduces=False)

    @torch.no_grad()
    def step() -> None:
        i = diffusion.num_timesteps - 1 - state["i"] % diffusion.num_timesteps
        x = state["x"]
        out = evaluate(x=x, t=timesteps[i].expand(2 * B))
        state["x"] = reverse_update(x, out, rows[i], step_noise(x)).clamp(-5, 5)
        state["i"] += 1

    return step


def random_codec(device: torch.device, dtype: torch.dtype, tiny: bool) -> Codec:
    """The VAE of Stable Diffusion with random weights; `tiny`: a small one, for the CPU."""
    from diffusers import AutoencoderKL

    widths = (32, 32) if tiny else (128, 256, 512, 512)
    vae = AutoencoderKL(
        block_out_channels=widths,
        layers_per_block=1 if tiny else 2,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        latent_channels=4,
    )
    vae = vae.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    return Codec(vae, 0.18215, 2 ** (len(widths) - 1), 4, "random", "", device, dtype)


def published_coding(codec: Codec, images: torch.Tensor, latents: torch.Tensor) -> dict[str, Step]:
    """Encoding and decoding one image at a time, in float32."""
    single = replace(codec, dtype=torch.float32)

    def encode() -> None:
        for image in images:
            single.encode(image[None])

    def decode() -> None:
        for one in latents:
            single.decode(one[None])

    return {"encode": encode, "decode": decode}


def coding(codec: Codec, images: torch.Tensor, latents: torch.Tensor) -> dict[str, Step]:
    """Encoding as in extract_features.py and decoding as in sample_ddp_finetuned.py."""
    return {"encode": lambda: codec.encode(images), "decode": lambda: codec.decode(latents)}
