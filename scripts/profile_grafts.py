"""What grafts and parallel pairs cost: parameters, FLOPs and latency, against the plain model.

    python scripts/profile_grafts.py configs/50p_swa.yaml configs/75p_mamba2.yaml
    python scripts/profile_grafts.py --latency --batch 32 configs/50p_graftfusion75_swa.yaml
    python scripts/profile_grafts.py --latency --batch 1 configs/pixart_hyena_x*.yaml
    python scripts/profile_grafts.py configs/parallel_pairs.yaml --latency --batch 1 2 32
    python scripts/profile_grafts.py --table      # the grafting paper's table of costs, and ours
    python scripts/profile_grafts.py --json ...   # any of these, for machines

Prints Markdown; models/costs.py says what is counted. No weight files are read. Latency is that of
the GPU, or without one of the CPU: of a forward among several in a row, as sampling runs them, the
plain model's and the other's in turn.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models import costs
from models.graft_plan import GraftPlan
from models.inference import quicken
from models.operators.accelerators import accelerate
from models.plan import load_plan
from models.presets import blank_condition
from models.provenance import environment
from scripts.benchmark import in_turn
from training import arguments, distributed, precision
from training.compilation import compile_models, graphed

FORWARDS = {"cuda": (10, 15, 5), "cpu": (2, 10, 1)}  # to warm up; rounds, of so many in a row
WEIGHT_STD = 0.02  # latency does not depend on the weights; these keep all values finite

FOOTNOTES = """\
op: attention or gating core; ft: projections and featurizers; each in % of all original operators
of the slot. published: arXiv 2506.05340, Table 4; rule: ours by the paper's way of counting; full:
ours with nothing left out.

(1) The paper prints the share of attention's projections that Mamba-2's take, where every other
entry is a difference. The difference by the same count is {differences} %.
(2) The paper counts the two gates of MLP Hyena-X and not its convolution, which the full count has.
(3) Beyond rounding: 77.89 is half of the rounded 155.77; 50.00 leaves the biases out."""


def main(args: argparse.Namespace) -> None:
    if args.table == bool(args.configs):
        raise ValueError("give either --table or graft YAMLs")
    if args.table and args.latency:
        raise ValueError("--latency times the models of graft YAMLs: name some instead of --table")
    if args.table:
        rows, show = costs.paper_table(), table_text
    else:
        rows, show = profile([load_plan(path) for path in args.configs], args), profile_text
    if not args.json:
        print(show(rows))
        return
    device = distributed.start(args.device).device if args.latency else None
    print(json.dumps({**environment(device), "flags": vars(args), "rows": rows}, indent=2))


# -- graft YAMLs ---------------------------------------------------------------


def profile(plans: list[GraftPlan], args: argparse.Namespace) -> list[dict]:
    """One row a plan: "parameters", "gmac", "gflop" of one image's forward, "latency_ms" by batch
    size or None, these of the plain "model" under "plain", and "changes" of the slots in %."""
    rows = []
    for plan in plans:
        pair = costs.plain(plan), plan
        times = {n: latencies(pair, n, args) for n in args.batch} if args.latency else None
        plain, own = (
            {"model": model.describe(), **counts(model)}
            | {"latency_ms": times and {n: both[i] for n, both in times.items()}}
            for i, model in enumerate(pair)
        )
        changes = {
            count: {slot: asdict(c) for slot, c in costs.slot_changes(plan, count).items()}
            for count in costs.COUNTS
        }
        rows.append({"config": str(plan.path), **own, "plain": plain, "changes": changes})
    return rows


def counts(plan: GraftPlan) -> dict:
    cost = costs.model_cost(plan)
    return {
        "parameters": cost.parameters,
        "gmac": cost.work.multiply_adds / 1e9,
        "gflop": cost.work.flops / 1e9,
    }


def latencies(
    plans: tuple[GraftPlan, GraftPlan], batch: int, args: argparse.Namespace
) -> list[float]:
    """Median milliseconds of a forward of `batch` samples, of both models in turn, warm."""
    torch.compiler.reset()
    world = distributed.start(args.device)
    warm, rounds, row = FORWARDS[world.device.type]
    steps = {}
    for i, plan in enumerate(plans):
        once = forward(plan, batch, world, args)
        for _ in range(warm):
            once()
        steps[i] = lambda once=once: [once() for _ in range(row)]
    return [ms / row for ms in in_turn(steps, rounds, world.device).values()]


def forward(
    plan: GraftPlan, batch: int, world: distributed.World, args: argparse.Namespace
) -> Callable[[], None]:
    """A forward of `batch` samples through a model of random weights, as sampling runs it."""
    device = world.device
    model = costs.meta_model(plan).to_empty(device=device).eval()
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data, std=WEIGHT_STD, generator=generator)
    for buffer in model.buffers():
        buffer.zero_()  # PixArt's position table
    dtype = precision.choose(args.precision, device)
    lines = accelerate(model, device, dtype, model.num_tokens, args.kernels)
    for line in [*lines, *quicken(model, dtype)]:
        print(line, file=sys.stderr)
    compile_models(world, args.compile, model)
    run = graphed(world, args.compile, model, reduces=False)
    side = plan.input_size
    x = torch.randn(batch, model.in_channels, side, side, device=device, generator=generator)
    t = torch.full((batch,), 500, device=device)
    y = blank_condition(plan, batch, device)

    def once() -> None:
        with torch.inference_mode(), precision.autocast(device, dtype):
            run(x=x, t=t, y=y)

    return once


def profile_text(rows: list[dict]) -> str:
    keys = {"parameters": ("parameters", ","), "GMAC": ("gmac", ".2f"), "GFLOP": ("gflop", ".2f")}
    batches = list(rows[0]["latency_ms"] or ())
    lines = [["config"]]
    for title in [*keys, *(f"ms at batch {n}" for n in batches)]:
        lines[0] += [title, "x plain"]
    shown, models = [], {row["plain"]["model"] for row in rows}
    for row in rows:
        label = "plain" if row["latency_ms"] is None else f"plain, beside {row['config']}"
        if len(models) > 1:
            label += " " + row["plain"]["model"].removesuffix(", no grafts")
        for name, cost in ((label, row["plain"]), (row["config"], row)):
            if name == label and cost in shown:
                continue
            shown.append(cost)
            cells = [name]
            for key, form in keys.values():
                cells += [format(cost[key], form), f"{cost[key] / row['plain'][key]:.4f}"]
            for n in batches:
                ms, plain = (side["latency_ms"][n] for side in (cost, row["plain"]))
                cells += [f"{ms:.2f}", f"{ms / plain:.4f}"]
            lines.append(cells)
    parts = ["GMAC and GFLOP: one image's forward, full count.", markdown(lines)]
    head = ["config", "slot", "op: rule", "full", "ft: rule", "full", "params"]
    lines = [head]
    for row in rows:
        for slot, rule in row["changes"]["paper"].items():
            full = row["changes"]["full"][slot]
            both = [figure(c[k]) for k in ("op", "ft_difference") for c in (rule, full)]
            lines.append([row["config"], slot, *both, figure(rule["params"])])
    if len(lines) > 1:
        parts += [
            "Change in % of all original operators of the slot, by the paper's rule and in full."
        ]
        parts += [markdown(lines)]
    return "\n\n".join(parts)


# -- the paper's table ---------------------------------------------------------


def table_text(rows: list[dict]) -> str:
    lines = [["operator", "blocks"]]
    for name in ("op", "ft", "params"):
        lines[0] += [f"{name}: published", "rule"] + ["full"] * (name != "params")
    for row in rows:
        cells = [row["label"], f"{row['share']} %"]
        for i, name in enumerate(("op", "ft", "params")):
            published, rule, full = (row[k][i] for k in ("published", "paper", "full"))
            cells += [figure(published) + mark(row["operator"], name, published - rule)]
            cells += [figure(rule)] + [figure(full)] * (name != "params")
        lines.append(cells)
    differences = [figure(r["ft_difference"]) for r in rows if r["operator"] == "mamba2"]
    return markdown(lines) + "\n\n" + FOOTNOTES.format(differences=" / ".join(differences))


def mark(operator: str, name: str, gap: float) -> str:
    """The footnotes of one published entry; `gap`: how far it is from ours, in %."""
    marks = {("mamba2", "ft"): " (1)", ("mlp_hyena_x", "op"): " (2)"}.get((operator, name), "")
    return marks + " (3)" * (abs(gap) > 0.005)


def figure(value: float) -> str:
    text = f"{value:+.2f}"
    return "0" if text in ("+0.00", "-0.00") else text


def markdown(lines: list[list[str]]) -> str:
    """A Markdown table whose first line is the head."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = []
    for line in lines:
        others = [c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)]
        rows.append([line[0].ljust(widths[0]), *others])
    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (rows[0], rule, *rows[1:]))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.parser(__doc__, "[CONFIG ...]")
    add = parser.add_argument
    add("configs", nargs="*", metavar="config", help="graft YAMLs")
    add("--table", action="store_true", help="the cost table of arXiv 2506.05340 for DiT-XL/2")
    add("--json", action="store_true", help="print JSON")
    add("--latency", action="store_true", help="time forwards, too")
    add(
        "--batch",
        type=arguments.positive,
        nargs="+",
        default=[32],
        metavar="N",
        help="samples a timed forward; each size has its column",
    )
    add("--device", help="of timed forwards: cuda, cuda:1 or cpu (unset: cuda where there is any)")
    add(
        "--precision",
        choices=("bf16", "fp32"),
        help="of timed forwards (unset: bf16, on the CPU fp32)",
    )
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="torch.compile, as sampling does",
    )
    add("--kernels", choices=("auto", "torch"), default="auto", help="as sampling's --kernels")
    return parser.parse_args(argv)


if __name__ == "__main__":
    distributed.run(main, parse_args())
