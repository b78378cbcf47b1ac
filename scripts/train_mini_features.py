"""Trains the miniature testbed's feature network, from the testbed's pictures alone.

In:  --data-path with train/ and heldout/ folders of 64x64 pictures (scripts/unpack_mini.py),
     --labels, the table that names the class and the subgroup of each picture.
Out: --out, the weights in float16, and beside them <name>.json: how they were made and what the
     distances between clean and damaged pictures are. Exit status 1 when a check fails.

The network learns four things at once from augmented and damaged pictures: the class, the
subgroup, how much of each kind of damage there is, and an 8x8 thumbnail of what it is shown.
Damage therefore moves a picture in feature space, and not its class alone.
The heldout pictures are never trained on; they check that new clean pictures stay close.

    python scripts/train_mini_features.py --data-path data/mini    # about a minute on a GPU
"""

import argparse
import csv
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evaluation.features import gather_stats
from evaluation.metrics import frechet_distance
from evaluation.mini_net import DIM, SIZE, MiniFeatures, MiniNet, save_weights
from training import arguments, distributed

DAMAGES = ("blur", "noise", "shuffle", "warp", "blend", "colour", "erase")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.parser(__doc__)
    add = parser.add_argument
    add("--data-path", type=Path, default=Path("data/mini"), help="with train/ and heldout/")
    add("--labels", type=Path, default=Path("assets/mini/images/labels.csv"), help="the table")
    add("--out", type=Path, default=Path("assets/mini/feature_net.safetensors"), help="weights")
    add("--steps", type=arguments.positive, default=3000, help="optimiser steps")
    add("--batch-size", type=arguments.positive, default=256, help="pictures a step")
    add("--lr", type=arguments.rate, default=2e-3, help="peak of the cosine")
    add("--seed", type=arguments.seed, default=0, help="of weights, order and augmentation")
    add("--max-minutes", type=arguments.rate, help="shortens the schedule (unset: no limit)")
    add("--device", help="cuda, cuda:1 or cpu (unset: CUDA where there is any)")
    add("--no-compile", action="store_true", help="without torch.compile on CUDA")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    started = time.monotonic()
    torch.backends.cudnn.allow_tf32 = False  # the checks are in float32; training is in bfloat16
    torch.manual_seed(args.seed)
    device = distributed.start(args.device).device
    dice = torch.Generator(device).manual_seed(args.seed)

    rows = read_labels(args.labels)
    train, train_labels = read_split(args.data_path / "train", rows, device)
    heldout, heldout_labels = read_split(args.data_path / "heldout", rows, device)
    num_classes, num_subgroups = (1 + max(row[i] for row in rows.values()) for i in (0, 1))
    print(f"{len(train)} train and {len(heldout)} heldout pictures, {num_classes} classes, "
          f"{num_subgroups} subgroups")  # fmt: skip

    net = MiniNet().to(device, memory_format=torch.channels_last).train()
    sizes = {"class": num_classes, "subgroup": num_subgroups, "damage": len(DAMAGES), "thumb": 192}
    heads = nn.ModuleDict({name: nn.Linear(DIM, size) for name, size in sizes.items()}).to(device)
    compiled = device.type == "cuda" and not args.no_compile
    forward = torch.compile(net) if compiled else net
    groups = [{"params": list(net.parameters())}, {"params": list(heads.parameters())}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, weight_decay=0.05, betas=(0.9, 0.99))

    deadline = None if args.max_minutes is None else started + 60 * args.max_minutes
    steps, step, loop_started = args.steps, 0, time.monotonic()
    while step < steps:
        progress = step / steps
        rate = min(1.0, (step + 1) / (0.05 * steps)) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * rate

        index = torch.randint(len(train), (args.batch_size,), device=device, generator=dice)
        images = augment(train[index], dice)
        levels = draw_levels(len(images), dice, device)
        images = damage(images, levels, dice)
        labels = train_labels[index]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            features = forward(images.contiguous(memory_format=torch.channels_last))
        features = features.float()
        thumbs = F.avg_pool2d(images, 8).flatten(1)
        losses = {
            "class": F.cross_entropy(heads["class"](features), labels[:, 0], label_smoothing=0.1),
            "subgroup": F.cross_entropy(
                heads["subgroup"](features), labels[:, 1], label_smoothing=0.1
            ),
            "damage": 8 * F.mse_loss(heads["damage"](features), levels),
            "thumb": 8 * F.mse_loss(heads["thumb"](features), thumbs),
        }
        loss = sum(losses.values())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimizer.step()
        step += 1
        if step % max(1, args.steps // 20) == 0 or step == steps:
            text = " ".join(f"{name} {value.item():.3f}" for name, value in losses.items())
            elapsed = time.monotonic() - loop_started
            print(f"step {step}/{steps} {text} ({elapsed:.0f} s)", flush=True)
            if deadline is not None:  # leave a tenth of the time for the checks
                per_step = elapsed / step
                room = 0.9 * (deadline - time.monotonic()) / per_step
                if step + room < steps:
                    steps = step + max(0, int(room))
                    print(f"the schedule now ends at step {steps}: --max-minutes")

    net.eval()
    accuracy = {}
    with torch.inference_mode():
        for name, images, labels in (
            ("train", train, train_labels),
            ("heldout", heldout, heldout_labels),
        ):
            features = torch.cat([net(chunk.float() / 255) for chunk in images.split(128)])
            for i, head in enumerate(("class", "subgroup")):
                right = heads[head](features).argmax(1) == labels[:, i]
                accuracy[f"{name}_{head}"] = round(right.float().mean().item(), 4)
    print("accuracy", accuracy)

    save_weights(net, args.out, seed=args.seed, steps=step, batch_size=args.batch_size)
    features = MiniFeatures(args.out, device)  # the checks see what a reader of the file sees
    distances = measure(features, train, heldout, args.seed)
    checks = judge(distances)
    record = {
        "file": args.out.name,
        "sha256": features.sha256,
        "made_by": "scripts/train_mini_features.py",
        "seed": args.seed,
        "steps": step,
        "batch_size": args.batch_size,
        "lr": args.lr,
        "accuracy": accuracy,
        "fd_mini_to_train": distances,
        "checks": checks,
        "seconds": round(time.monotonic() - started, 1),
        "versions": {"torch": torch.__version__, "device": str(device)},
    }
    args.out.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    for name, value in distances.items():
        print(f"fd_mini to train of {name:<24} {value:10.3f}")
    print("checks", checks)
    print(f"wrote {args.out} and {args.out.with_suffix('.json')} in {record['seconds']} s")
    if not all(checks.values()):
        sys.exit(1)


# -- the pictures ------------------------------------------------------------------------------


def read_labels(path: Path) -> dict[str, tuple[int, int]]:
    """File name -> (class id, number of its subgroup in alphabetical order)."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: give the table of pictures with --labels")
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    subgroups = sorted({row["subgroup"] for row in rows})
    return {r["filename"]: (int(r["class_id"]), subgroups.index(r["subgroup"])) for r in rows}


def read_split(folder: Path, rows, device) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 pictures [N, 3, 64, 64] and int64 labels [N, 2], in path order."""
    paths = sorted(folder.glob("*/*.png"))
    if not paths:
        raise FileNotFoundError(
            f"no pictures in {folder}/*/*.png: unpack them with scripts/unpack_mini.py"
        )
    pictures, labels = [], []
    for path in paths:
        if path.name not in rows:
            raise ValueError(f"{path} is not in the table given with --labels")
        with Image.open(path) as image:
            picture = np.asarray(image.convert("RGB"))
        if picture.shape != (SIZE, SIZE, 3):
            raise ValueError(f"{path} is {picture.shape[1]}x{picture.shape[0]}, not {SIZE}x{SIZE}")
        pictures.append(picture)
        labels.append(rows[path.name])
    pictures = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    return pictures.to(device), torch.tensor(labels, device=device)


# -- augmentation, which the network should see through -----------------------------------------


def augment(images: torch.Tensor, dice: torch.Generator) -> torch.Tensor:
    """uint8 [B, 3, H, W] -> float in 0..1: whole-pixel shifts, mirrors and mild colour changes.
    Nothing here resamples, so that sharp stays sharp."""
    count, device = len(images), images.device
    x = F.pad(images.float() / 255, (4, 4, 4, 4), mode="replicate")
    offset = torch.randint(0, 9, (2, count, 1), device=device, generator=dice)
    grid = torch.arange(SIZE, device=device)
    rows, columns = (offset + grid).unbind(0)  # each [B, SIZE]
    mirror = torch.rand(count, 1, device=device, generator=dice) < 0.5
    columns = torch.where(mirror, columns.flip(1), columns)
    batch = torch.arange(count, device=device)[:, None, None]
    x = x[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    gain = 1 + 0.06 * torch.randn(count, 3, 1, 1, device=device, generator=dice)
    # Gains turn about white, so that the background stays what it is.
    return (1 - (1 - x) * gain).clamp(0, 1)


# -- damage, which the network should notice ----------------------------------------------------


def draw_levels(count: int, dice: torch.Generator, device) -> torch.Tensor:
    """Damage levels [B, kinds] in 0..1: about half of the pictures stay clean."""
    levels = torch.rand(count, len(DAMAGES), device=device, generator=dice)
    some = torch.rand(count, len(DAMAGES), device=device, generator=dice) < 0.25
    clean = torch.rand(count, 1, device=device, generator=dice) < 0.4
    return levels * (some & ~clean)


def damage(images: torch.Tensor, levels: torch.Tensor, dice: torch.Generator) -> torch.Tensor:
    """Damages images [B, 3, H, W] in 0..1 by levels [B, kinds]; level 0 leaves a picture exact."""
    x = images
    blur, noise, shuffle, warp, blend, colour, erase = levels.T[..., None, None, None]
    count, device = len(x), x.device

    def uniform(*shape):
        return torch.rand(*shape, device=device, generator=dice)

    def normal(*shape):
        return torch.randn(*shape, device=device, generator=dice)

    other = x[torch.randperm(count, device=device, generator=dice)]
    x = torch.lerp(x, other, 0.5 * blend)

    if (shuffle > 0).any():  # thirds of the batch swap patches of 16, 8 and 4 pixels
        parts = []
        for part, level, side in zip(x.chunk(3), shuffle.chunk(3), (16, 8, 4), strict=False):
            patches = F.unfold(part, side, stride=side)  # [b, 3 * side * side, patches]
            number = patches.shape[2]
            moved = uniform(len(part), number) < level.view(-1, 1)
            place = torch.arange(number, device=device).expand(len(part), -1)
            # The moved patches permute among their own places; the others keep theirs.
            sources = torch.where(moved, uniform(len(part), number), 2.0).argsort(1)
            targets = torch.where(moved, place, number + place).argsort(1)
            order = place.clone().scatter_(1, targets, sources)
            order = torch.where(moved, order, place)
            patches = patches.gather(2, order[:, None].expand_as(patches))
            parts.append(F.fold(patches, (SIZE, SIZE), side, stride=side))
        x = torch.cat(parts)

    if (warp > 0).any():
        field = low_pass(normal(count, 2, SIZE, SIZE), 3 + 5 * uniform(count, 1, 1, 1))
        field = field / field.std((2, 3), keepdim=True) * (0.12 * warp)
        line = (torch.arange(SIZE, device=device) + 0.5) / SIZE * 2 - 1
        grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)
        bent = F.grid_sample(
            x, grid + field.permute(0, 2, 3, 1), padding_mode="border", align_corners=False
        )
        x = torch.where(warp > 0, bent, x)

    grey = x.mean(1, keepdim=True)
    tint = (grey - x) * uniform(count, 1, 1, 1) + 0.4 * (normal(count, 3, 1, 1) * x)
    x = x + colour * tint

    centre, half = uniform(2, count, 1, 1, 1) * SIZE, 6 + 18 * erase
    line = torch.arange(SIZE, device=device)
    inside = (line[:, None] - centre[0]).abs() < half
    inside = inside & ((line - centre[1]).abs() < half)
    x = torch.where(inside & (erase > 0), uniform(count, 3, 1, 1), x)

    x = torch.where(blur > 0, low_pass(x, 0.3 + 2.7 * blur), x)
    # From single pixels to blotches.
    grain = low_pass(normal(count, 3, SIZE, SIZE), 3 * uniform(count, 1, 1, 1) ** 2)
    grain = grain / grain.std((1, 2, 3), keepdim=True)
    return (x + 0.3 * noise * grain).clamp(0, 1)


def low_pass(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Gaussian blur of [B, C, H, W] by sigma [B, 1, 1, 1] pixels (periodic edges)."""
    rows = torch.fft.fftfreq(x.shape[2], device=x.device)
    columns = torch.fft.rfftfreq(x.shape[3], device=x.device)
    square = rows[:, None] ** 2 + columns**2
    response = torch.exp(-2 * math.pi**2 * sigma**2 * square)
    return torch.fft.irfft2(torch.fft.rfft2(x) * response, s=x.shape[2:])


# -- does the distance see what it should? -------------------------------------------------------


def measure(net: MiniFeatures, train, heldout, seed: int) -> dict[str, float]:
    """fd_mini to the train pictures: of clean others, and of copies damaged ever more."""
    device = train.device
    stats = gather_stats(net, train.split(128), device)

    def distance(images):
        other = gather_stats(net, images.split(128), device)
        return round(frechet_distance(stats.mean, stats.sigma, other.mean, other.sigma), 4)

    dice = torch.Generator().manual_seed(seed)
    few = torch.randperm(len(train), generator=dice)[: len(heldout)].to(device)
    out = {"heldout": distance(heldout), "as many of train": distance(train[few])}
    for kind in DAMAGES:
        for level in (0.1, 0.25, 0.5, 1.0):
            dice = torch.Generator(device).manual_seed(seed)
            levels = torch.zeros(len(train), len(DAMAGES), device=device)
            levels[:, DAMAGES.index(kind)] = level
            damaged = torch.cat([
                damage(images.float() / 255, part, dice)
                for images, part in zip(train.split(128), levels.split(128), strict=True)
            ])  # fmt: skip
            out[f"{kind} {level}"] = distance((damaged * 255).round().to(torch.uint8))
    out["one tenth, repeated"] = distance(train[: len(train) // 10].repeat(10, 1, 1, 1))
    return out


def judge(distances: dict[str, float]) -> dict[str, bool]:
    """The promises of this network: damage counts, and new clean pictures are not damage.

    A covariance from few pictures costs some distance by itself, and heldout pictures are few.
    "as many of train" tells how much, so what is new about heldout is what goes beyond it.
    """
    checks = {}
    for kind in DAMAGES:
        values = [value for name, value in distances.items() if name.startswith(kind + " ")]
        checks[f"{kind} grows with its strength"] = values == sorted(values)
    for name in ("blur 1.0", "noise 1.0", "shuffle 1.0", "one tenth, repeated"):
        checks[f"heldout is under half of {name}"] = distances["heldout"] < distances[name] / 2
    beyond = distances["heldout"] - distances["as many of train"]
    for name in ("blur 0.5", "noise 0.5", "shuffle 0.5"):
        checks[f"heldout less its few pictures' cost is under half of {name}"] = (
            beyond < distances[name] / 2
        )
    return checks


if __name__ == "__main__":
    distributed.run(main, parse_args())
