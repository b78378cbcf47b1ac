"""How fast the parts run.

    python scripts/benchmark.py operators                        # every operator on every path
    python scripts/benchmark.py operators --operators mha swa --tokens 1024 4096 --json swa.json

operators: one operator of DiT-XL/2's width with its published configuration, at several lengths
with the same number of tokens in all, on PyTorch and on every other kernel that can be used here.
Prints milliseconds: medians over rounds that visit all paths in turn. mha is the yardstick of
the token mixers, mlp of mlp_hyena_x.
"""

import argparse
import copy
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import yaml
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models.operators import OPERATORS, accelerators, build_operator
from models.operators.accelerators import KERNELS
from training import arguments, distributed, precision

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
MIXERS = ("mha_timm", "swa", "hyena_se", "hyena_x", "hyena_y", "mamba2")
FILES = {name.removesuffix("_timm"): f"sequence_mixers/{name}.yaml" for name in MIXERS}
FILES |= {
    "mlp": "channel_mixers/mlp_ratio_4.yaml",
    "mlp_hyena_x": "channel_mixers/mlp_hyena_x.yaml",
}
MODES = ("eager", "compiled")
PASSES = ("forward", "training")  # training: forward and backward
WARM_ROUNDS = 3
PUBLISHED_WIDTH = 1152


def operators(args: argparse.Namespace) -> None:
    """Times operators on their paths; rows go to stdout and, as JSON, to --json."""
    world = distributed.start(args.device)
    dtype = precision.choose(args.precision, world.device)
    precision.allow_tf32(dtype != torch.float32)
    torch.manual_seed(0)
    rows = []
    print(f"{'operator':11} {'tokens':>6} {'batch':>5}  {'path':27} {'mode':8} {'pass':8}       ms")
    for tokens, name in itertools.product(args.tokens, args.operators):
        batch = max(1, args.batch_tokens // tokens)
        operator = published(name, args.hidden_size, tokens).to(world.device)
        x = torch.randn(batch, tokens, args.hidden_size, device=world.device)
        variants = dict(usable(operator, world.device, dtype, tokens))
        for mode in args.modes:
            torch.compiler.reset()
            steps = {
                (path, kind): step(variant, x, dtype, kind, compiled=mode == "compiled")
                for path, variant in variants.items()
                for kind in args.passes
            }
            for (path, kind), ms in in_turn(steps, args.rounds, world.device).items():
                row = {"operator": name, "tokens": tokens, "batch": batch, "path": path}
                rows.append({**row, "mode": mode, "pass": kind, "ms": ms})
                print(f"{name:11} {tokens:6} {batch:5}  {path:27} {mode:8} {kind:8} {ms:8.3f}")
    if args.json is not None:
        about = {"device": str(world.device), "precision": str(dtype).removeprefix("torch.")}
        if world.device.type == "cuda":
            about["device"] = torch.cuda.get_device_name(world.device)
        about |= {"torch": torch.__version__, "hidden_size": args.hidden_size, "rows": rows}
        Path(args.json).write_text(json.dumps(about, indent=1) + "\n")


def published(name: str, hidden_size: int, tokens: int) -> nn.Module:
    """An operator with its published configuration but for the width and the length."""
    config = yaml.safe_load((CONFIGS / FILES[name]).read_text())
    config[OPERATORS[name].width] = hidden_size
    if name in ("mha", "swa") and hidden_size != PUBLISHED_WIDTH:
        config["num_heads"] = max(1, config["num_heads"] * hidden_size // PUBLISHED_WIDTH)
    if name == "mlp_hyena_x":
        config["l_max"] = tokens
    return build_operator(name, **config)


def usable(
    operator: nn.Module, device: torch.device, dtype: torch.dtype, tokens: int
) -> Iterator[tuple[str, nn.Module]]:
    """The operator on every combination of paths that can run here, by name; says which cannot."""
    sites: dict[type, list[str | None]] = {}
    for path, kernel in KERNELS.items():
        if any(isinstance(m, kernel.site) for m in operator.modules()):
            sites.setdefault(kernel.site, [None])
            if device.type != "cuda":
                continue
            reason = accelerators.refusal(operator, path, device, dtype, tokens)
            if reason:
                print(f"not timed at {tokens} tokens: {kernel.name} {reason}")
            else:
                sites[kernel.site].append(path)
    for paths in itertools.product(*sites.values()):
        variant = copy.deepcopy(operator)
        chosen = [path for path in paths if path is not None]
        for path in chosen:
            accelerators.set_path(variant, path)
        yield " + ".join(chosen) or "torch", variant


def step(
    operator: nn.Module, x: torch.Tensor, dtype: torch.dtype, kind: str, compiled: bool
) -> Callable[[], None]:
    """One pass of `kind` over x, to be timed."""
    run = torch.compile(operator, dynamic=False) if compiled else operator
    given = x.clone().requires_grad_(kind == "training")
    gradient = torch.randn_like(x, dtype=dtype)

    def once() -> None:
        with torch.set_grad_enabled(kind == "training"), precision.autocast(x.device, dtype):
            y = run(given)
        if kind == "training":
            y.backward(gradient)
            operator.zero_grad(set_to_none=True)
            given.grad = None

    return once


def in_turn(
    steps: dict[tuple, Callable[[], None]], rounds: int, device: torch.device
) -> dict[tuple, float]:
    """Median milliseconds of each, over `rounds` that visit all of them."""
    times: dict[tuple, list[float]] = {key: [] for key in steps}
    for i in range(WARM_ROUNDS + rounds):
        for key, once in steps.items():
            ms = timed(once, device)
            if i >= WARM_ROUNDS:
                times[key].append(ms)
    return {key: statistics.median(values) for key, values in times.items()}


def timed(once: Callable[[], None], device: torch.device) -> float:
    """Milliseconds, by CUDA's own events on a GPU."""
    if device.type != "cuda":
        start = time.perf_counter()
        once()
        return 1e3 * (time.perf_counter() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    once()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.parser(__doc__, "COMMAND")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    command = commands.add_parser(
        "operators",
        help="each operator on each path",
        usage="benchmark.py operators [flags]",
        formatter_class=parser.formatter_class,
        allow_abbrev=False,
    )
    command.set_defaults(run=operators)
    add = command.add_argument
    add("--operators", nargs="+", choices=FILES, metavar="NAME", default=list(FILES), help="which")
    add(
        "--tokens",
        type=arguments.positive,
        nargs="+",
        default=[256, 1024, 4096, 16384],
        help="lengths of a sequence",
    )
    add("--batch-tokens", type=arguments.positive, default=32768, help="length x batch")
    add("--hidden-size", type=arguments.positive, default=PUBLISHED_WIDTH, help="width")
    add("--modes", nargs="+", choices=MODES, default=list(MODES), help="with torch.compile or not")
    add("--passes", nargs="+", choices=PASSES, default=list(PASSES), help="what is timed")
    add("--rounds", type=arguments.positive, default=20, help="timed rounds")
    add("--precision", choices=("bf16", "fp32"), help="autocast (unset: bf16 on CUDA, else fp32)")
    add("--device", help="cuda, cuda:1 or cpu (unset: CUDA where there is any)")
    add("--json", metavar="FILE", help="also write the rows there")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    args.run(args)


if __name__ == "__main__":
    distributed.run(main, parse_args())
