"""How fast the parts run.

    python scripts/benchmark.py operators                        # every operator on every path
    python scripts/benchmark.py operators --operators mha swa --tokens 1024 4096 --json swa.json
    python scripts/benchmark.py distill --config configs/75p_hyena_y.yaml --batch 64
    python scripts/benchmark.py finetune --batch 8 32 128         # beside the published style
    python scripts/benchmark.py finetune --batch 4 --config configs/mini/no_graft.yaml  # on a CPU
    python scripts/benchmark.py selection --config configs/75p_swa.yaml --batch 8 32
    python scripts/benchmark.py sampling --batch 32
    python scripts/benchmark.py vae --batch 64

operators: one operator of DiT-XL/2's width with its published configuration, at several lengths
with the same number of tokens in all, on PyTorch and on every other kernel that can be used here.
Prints milliseconds: medians over rounds that visit all paths in turn. mha is the yardstick of
the token mixers, mlp of mlp_hyena_x.

distill: a step of distill_operators.py (teacher, new operators forward and backward, optimisers)
beside the teacher's forward alone, with random weights.

finetune, selection, sampling, vae: a training step, a guided reverse step, and images through the
VAE, as the entries take them and as public code does (scripts/loops.py), both in one run, in turn,
with random weights. Compilation is timed apart. TFLOP/s by the full count of models/costs.py, three
forwards a training step; the peak beside it is that of a large bf16 matrix product, measured here.
"""

import argparse
import copy
import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import yaml
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from latents import group_norm
from models.costs import model_cost
from models.dit import build_dit
from models.files import write_json
from models.inference import has_float8
from models.operators import OPERATORS, accelerators, build_operator
from models.operators.accelerators import KERNELS
from models.plan import load_plan, plan_from_flags
from models.provenance import environment
from scripts import kernel_times, loops
from training import arguments, distributed, precision
from training.compilation import MODEL_OPTIONS, WARM, allow_kinds, compile_models, graphed
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
    allow_kinds()
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
            write_rows(args, world, dtype, rows)  # what is measured so far


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
    for each in (teacher, students):
        lines = accelerators.accelerate(each, world.device, dtype, dit.num_tokens, args.kernels)
        print("\n".join(lines))
    guards = [
        StepGuard(adamw([{"params": [*o.parameters()], "lr": 1e-4}], 0.0), 10.0)
        for o in students.operators
    ]
    compile_models(world, args.compile, teacher, students)
    shape = (args.batch, 4, plan.input_size, plan.input_size)
    x = torch.randn(shape, device=world.device)
    t = torch.randint(1000, (args.batch,), device=world.device)
    y = torch.randint(plan.num_classes, (args.batch,), device=world.device)
    drop = torch.zeros(args.batch, dtype=torch.bool, device=world.device)
    steps = Steps(guards, [])

    inputs = {"x": x, "t": t, "y": y, "drop": drop}

    def forward(**inputs: torch.Tensor) -> torch.Tensor:
        with precision.autocast(world.device, dtype):
            return teacher(**inputs)[1][-1]

    def step(**inputs: torch.Tensor) -> torch.Tensor:
        with precision.autocast(world.device, dtype):
            losses, _ = students(*teacher(**inputs))
        steps.zero_grad()
        losses.sum().backward()
        steps.step()
        return losses.detach()

    def several(once: Callable) -> Callable[[], None]:
        once = graphed(world, args.compile, once)
        warm(partial(once, **inputs), world.device)

        def run() -> None:
            for _ in range(args.steps):
                once(**inputs)

        return run

    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)
    steps.set_rates()
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
        row["peak_memory_gib"] = torch.cuda.max_memory_allocated(world.device) / 2**30
    for key, value in row.items():
        print(f"{key:24} {value:.3f}" if isinstance(value, float) else f"{key:24} {value}")
    write_rows(args, world, dtype, [row])


def compare(args: argparse.Namespace) -> None:
    """Times a step of this repository beside the published style; a table on stdout, --json."""
    world = distributed.start(args.device)
    dtype = precision.choose(args.precision, world.device)
    precision.allow_tf32(dtype != torch.float32)
    model = args.model or (None if args.config else "DiT-XL/2")
    plan = plan_from_flags(args.config, model, None, None)
    forwards = {"finetune": 3, "sampling": 2}.get(args.command)
    peak = matmul_peak(world.device)
    rows = []
    for batch in args.batch:
        torch.compiler.reset()  # a batch size of its own, not one for all
        setting = loops.Setting(
            world,
            dtype,
            plan,
            batch,
            args.compile,
            args.kernels,
            args.grad_checkpoint,
            args.exchange,
        )
        if args.command == "sampling":
            makers = {"published": partial(loops.published_sampling, setting)}
            if has_float8(world.device):
                makers["here, --fp8"] = partial(loops.sampling, setting, fp8=True)
            makers["here"] = partial(loops.sampling, setting)
        else:
            selection = args.command == "selection"
            makers = {"published": partial(loops.published_training, setting, selection)}
            makers["here"] = partial(loops.training, setting, selection)
        found = side_by_side(makers, args.steps, args.rounds, world.device, args.profile)
        for side, row in found.items():
            row |= {"work": args.command, "batch": batch, "side": side}
            row["images_per_sec"] = 1e3 * batch / row["ms"]
            row["ratio"] = found["published"]["ms"] / row["ms"]
            if forwards is not None:
                flops = forwards * batch * model_cost(plan).work.flops
                row["tflops"] = flops / row["ms"] / 1e9
                row["share_of_peak"] = None if peak is None else row["tflops"] / peak
            rows.append(row)
            if world.main:
                print_row(row)
    write_rows(args, world, dtype, rows, config=args.config or model, matmul_peak=peak)
    distributed.stop()


def vae(args: argparse.Namespace) -> None:
    """Times images through the VAE, in batches and one at a time; a table on stdout, --json."""
    world = distributed.start(args.device)
    dtype = precision.choose(args.precision, world.device)
    precision.allow_tf32(dtype != torch.float32)
    torch.manual_seed(0)
    tiny = world.device.type == "cpu"
    codec = loops.random_codec(world.device, dtype, tiny)
    side = args.image_size // codec.downsample
    rows = []
    for batch in args.batch:
        images = torch.rand(batch, 3, args.image_size, args.image_size, device=world.device) * 2 - 1
        latents = torch.randn(batch, 4, side, side, device=world.device)
        public = loops.published_coding(codec, images, latents)
        fast = replace(codec, vae=copy.deepcopy(codec.vae))
        for line in group_norm.accelerate(fast.vae, world.device, dtype, args.kernels):
            print(line)
        fast = fast.compiled(batch, args.image_size)
        here = loops.coding(fast, images, latents)
        for work in ("encode", "decode"):
            both = {"published": partial(public.get, work), "here": partial(here.get, work)}
            found = side_by_side(both, 1, args.rounds, world.device, args.profile)
            for name, row in found.items():
                row |= {"work": work, "batch": batch, "side": name}
                row["images_per_sec"] = 1e3 * batch / row["ms"]
                row["ratio"] = found["published"]["ms"] / row["ms"]
                rows.append(row)
                print_row(row)
    write_rows(args, world, dtype, rows, image_size=args.image_size, tiny=tiny)


def side_by_side(
    makers: dict[str, Callable[[], Callable[[], None]]],
    steps: int,
    rounds: int,
    device: torch.device,
    profile: bool = False,
) -> dict[str, dict]:
    """Builds each side, warms it, and times `steps` of each in turn: ms a step and what it took.

    profile: print where the time of the last side goes, and note it as "kinds".
    """
    found, timed_steps = {}, {}
    for side, make in makers.items():
        torch.manual_seed(0)
        gc.collect()  # what an earlier side has left would be freed, unseen, in this one's peak
        held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        once = make()
        first = timed(once, device) / 1e3
        warm(once, device)
        found[side] = {"first_step_s": first}
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            peak = torch.cuda.max_memory_allocated(device) - held
            found[side]["peak_memory_gib"] = peak / 2**30

        def several(once: Callable[[], None] = once) -> None:
            for _ in range(steps):
                once()

        timed_steps[side] = several
    for side, ms in in_turn(timed_steps, rounds, device).items():
        found[side]["ms"] = ms / steps
    if profile and device.type == "cuda":
        times = kernel_times.kernel_times(once)
        found[side]["kinds"] = kernel_times.by_kind(times)
        print(kernel_times.table(times))
    return found


def warm(once: Callable[[], None], device: torch.device) -> None:
    """Runs a step until nothing is compiled or captured any more."""
    for _ in range(WARM + 1 if device.type == "cuda" else 1):
        once()


def matmul_peak(device: torch.device, side: int = 8192) -> float | None:
    """TFLOP/s of a bf16 product of two square matrices of random numbers; None on the CPU."""
    if device.type != "cuda":
        return None
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    ms = in_turn({"product": lambda: a @ b}, 10, device)["product"]
    return 2 * side**3 / ms / 1e9


def print_row(row: dict) -> None:
    """One line of a table."""
    words = f"{row['work']:10} batch {row['batch']:4}  {row['side']:11} {row['ms']:9.3f} ms"
    words += f"  {row['images_per_sec']:9.1f} images/s  {row['ratio']:6.2f}x"
    if row.get("tflops") is not None:
        words += f"  {row['tflops']:6.1f} TFLOP/s"
    if row.get("share_of_peak") is not None:
        words += f" ({row['share_of_peak']:.0%} of the peak)"
    if "peak_memory_gib" in row:
        words += f"  {row['peak_memory_gib']:.1f} GiB"
    print(f"{words}  first step {row['first_step_s']:.1f} s", flush=True)


def write_rows(
    args: argparse.Namespace,
    world: distributed.World,
    dtype: torch.dtype,
    rows: list[dict],
    **about: object,
) -> None:
    """The rows and what they were measured with, to --json."""
    if args.json is None or not world.main:
        return
    about |= environment(world.device) | {"precision": str(dtype).removeprefix("torch.")}
    flags = {name: value for name, value in vars(args).items() if name not in ("run", "json")}
    about |= {"processes": world.size, "flags": flags}
    write_json(Path(args.json), about | {"rows": rows})


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
    classes = {type(module) for module in operator.modules()}
    for path, kernel in KERNELS.items():
        for site in classes.intersection(kernel.sites):
            sites.setdefault(site, [None])
            if device.type != "cuda":
                continue
            reason = accelerators.refusal(operator, path, device, dtype, tokens)
            if reason:
                print(f"not timed at {tokens} tokens: {kernel.name} {reason}")
            else:
                sites[site].append(path)
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
    run = operator
    if compiled:
        run = torch.compile(operator, dynamic=False, options=MODEL_OPTIONS)
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
    for name, words in (
        ("finetune", "a finetuning step, beside the published style"),
        ("selection", "a layer-selection step, beside the published style"),
        ("sampling", "a guided reverse step, beside the published style"),
        ("vae", "images through the VAE, in batches and one at a time"),
    ):
        command = commands.add_parser(
            name,
            help=words,
            usage=f"benchmark.py {name} [flags]",
            formatter_class=parser.formatter_class,
            allow_abbrev=False,
        )
        command.set_defaults(run=vae if name == "vae" else compare, command=name)
        add = command.add_argument
        add("--batch", type=arguments.positive, nargs="+", default=[32], help="images a step")
        if name == "vae":
            add("--image-size", type=arguments.positive, default=256, help="pixels")
        else:
            default = "configs/75p_swa.yaml" if name == "selection" else None
            add("--config", default=default, help="graft YAML (unset: --model without grafts)")
            add("--model", help="preset, where there is no --config (unset: DiT-XL/2)")
            add("--steps", type=arguments.positive, default=10, help="timed together")
            compiled = argparse.BooleanOptionalAction
            add("--compile", action=compiled, default=True, help="torch.compile")
            command.set_defaults(grad_checkpoint=False, exchange="fp32")
        if name in ("finetune", "selection"):
            arguments.add_grad_checkpoint(add)
            arguments.add_exchange(add)
        add("--kernels", choices=("auto", "torch"), default="auto", help="see the entries")
        add("--profile", action="store_true", help="print which kernels take the time; CUDA")
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
