"""How fast the parts run.

    python scripts/benchmark.py operators                        # every operator on every path
    python scripts/benchmark.py operators --operators mha swa --tokens 1024 4096 --json swa.json
    python scripts/benchmark.py distill --config configs/75p_hyena_y.yaml --batch 64

operators: one operator of DiT-XL/2's width with its published configuration, at several lengths
with the same number of tokens in all, on PyTorch and on every other kernel that can be used here.
Prints milliseconds: medians over rounds that visit all paths in turn. mha is the yardstick of
the token mixers, mlp of mlp_hyena_x.

distill: a step of distill_operators.py (teacher, new operators forward and backward, optimisers)
beside the teacher's forward alone, with random weights.
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

from models.dit import build_dit
from models.operators import OPERATORS, accelerators, build_operator
from models.operators.accelerators import KERNELS
from models.plan import load_plan
from training import arguments, distributed, precision
from training.compilation import compile_model
from training.distillation import Steps, Students, Teacher
from training.optimizer import StepGuard, adamw

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
        about |= {"torch": str(torch.__version__), "hidden_size": args.hidden_size, "rows": rows}
        Path(args.json).write_text(json.dumps(about, indent=1) + "\n")


def distill(args: argparse.Namespace) -> None:
    """Times a distillation step against the teacher's forward; a table on stdout, --json."""
    world = distributed.start(args.device)
    dtype = precision.choose(args.precision, world.device)
    precision.allow_tf32(dtype != torch.float32)
    torch.manual_seed(0)
    plan = load_plan(args.config)
    slots = [(b, g.slot) for b in plan.grafted_blocks() for g in plan.grafts if b in g.blocks]
    dit = build_dit(plan.model_name, plan.input_size, num_classes=plan.num_classes)
    teacher = Teacher(dit.to(world.device), slots)
    made = {}
    for block, slot in slots:
        graft = plan.graft_at(block, slot)
        made[block, slot] = build_operator(graft.operator, **graft.config)
    students = Students(made, {"mha": "l1", "mlp": "l2"}, 1.0, False).to(world.device)
    lines = accelerators.accelerate(students, world.device, dtype, dit.num_tokens, args.kernels)
    print("\n".join(lines))
    guards = [
        StepGuard(adamw([{"params": [*o.parameters()], "lr": 1e-4}], 0.0), 10.0)
        for o in students.operators
    ]
    if args.compile and world.device.type == "cuda":
        compile_model(teacher)
        compile_model(students)
    shape = (args.batch, 4, plan.input_size, plan.input_size)
    x = torch.randn(shape, device=world.device)
    t = torch.randint(1000, (args.batch,), device=world.device)
    y = torch.randint(plan.num_classes, (args.batch,), device=world.device)
    drop = torch.zeros(args.batch, dtype=torch.bool, device=world.device)
    steps = Steps(guards, [])

    def forward() -> None:
        with precision.autocast(world.device, dtype):
            teacher(x, t, y, drop)

    def step() -> None:
        with precision.autocast(world.device, dtype):
            losses, _ = students(*teacher(x, t, y, drop))
        steps.zero_grad()
        losses.sum().backward()
        steps.step()

    def several(once: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(args.steps):
                once()

        return run

    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)
    both = {"teacher": several(forward), "step": several(step)}
    found = {n: ms / args.steps for n, ms in in_turn(both, args.rounds, world.device).items()}
    rate = {name: args.batch / ms * 1e3 for name, ms in found.items()}
    row = {
        "config": args.config,
        "batch": args.batch,
        "operators": len(slots),
        "teacher_ms": found["teacher"],
        "step_ms": found["step"],
        "teacher_images_per_sec": rate["teacher"],
        "images_per_sec": rate["step"],
        "share_of_teacher": found["teacher"] / found["step"],
        "hours_for_8000_x_200": 8000 * 200 / rate["step"] / 3600,
    }
    if world.device.type == "cuda":
        row["device"] = torch.cuda.get_device_name(world.device)
        row["peak_memory_gib"] = torch.cuda.max_memory_allocated(world.device) / 2**30
    for key, value in row.items():
        print(f"{key:24} {value:.3f}" if isinstance(value, float) else f"{key:24} {value}")
    if args.json is not None:
        Path(args.json).write_text(json.dumps(row, indent=1) + "\n")


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
    machine(command)
    command = commands.add_parser(
        "distill",
        help="a distillation step and the teacher's forward",
        usage="benchmark.py distill [flags]",
        formatter_class=parser.formatter_class,
        allow_abbrev=False,
    )
    command.set_defaults(run=distill)
    add = command.add_argument
    add("--config", default="configs/75p_hyena_y.yaml", help="graft YAML")
    add("--batch", type=arguments.positive, default=64, help="images a step")
    add("--steps", type=arguments.positive, default=5, help="steps that are timed together")
    add("--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile")
    add("--kernels", choices=("auto", "torch"), default="auto", help="see the entries")
    machine(command)
    return parser.parse_args(argv)


def machine(command: argparse.ArgumentParser) -> None:
    """The flags that all commands share."""
    add = command.add_argument
    add("--rounds", type=arguments.positive, default=20, help="timed rounds")
    add("--precision", choices=("bf16", "fp32"), help="autocast (unset: bf16 on CUDA, else fp32)")
    add("--device", help="cuda, cuda:1 or cpu (unset: CUDA where there is any)")
    add("--json", metavar="FILE", help="also write the rows there")


def main(args: argparse.Namespace) -> None:
    args.run(args)


if __name__ == "__main__":
    distributed.run(main, parse_args())
