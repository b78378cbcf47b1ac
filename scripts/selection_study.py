r"""Learned selection against the guesses, on the miniature testbed: raw results, table and plot.

    python scripts/selection_study.py run --work runs/study --jobs 14
    python scripts/selection_study.py report

`run` encodes the testbed's pictures, distills the operator into every block, learns a selection a
seed with prune_by_learning.py (learned: between the grafts of the 75 % plan, as published;
learned-any: every block may be grafted; learned-halves: a choice over each half of the model, whose
budgets are those of low-local), writes the guesses with scripts/guess_plans.py, and gives
every plan the same finetuning, sampling and scoring by the ordinary entries, and the same to the
base model without a graft. Each finished case is one small JSON in --results; started again, it
makes the cases that are missing. `report` turns the JSONs into the tables of docs/selection.md
(between its two markers) and docs/images/selection_study.png.
"""

import argparse
import shlex
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models.files import read_json
from models.plan import load_plan, read_yaml, write_plan
from scripts import testbed
from scripts.testbed import BASE, METRICS, REPOSITORY, entry
from training import arguments, distributed

RESULTS = REPOSITORY / "docs" / "results" / "selection"
HALVES = "learned-halves"
LEARNED = {  # from which plan
    "learned": "candidate.yaml", "learned-any": "distilled.yaml", HALVES: "distilled.yaml"
}  # fmt: skip
PATTERNS = (*LEARNED, "interleaved", "deep", "shallow", "top-local", "low-local", "random")
UNGRAFTED = ("none", "base")  # the operator and pattern of the base model's cases


def prepare(operator: str, args: argparse.Namespace) -> None:
    """Stage 1 for all blocks, the 75 % candidate, and the YAML of every guess, once.

    Every plan of the study takes its operators from the same distillation.
    """
    folder = args.work / "plans" / operator
    made = [folder / "candidate.yaml", *(folder / f"random_{seed}.yaml" for seed in args.seeds)]
    if all(file.is_file() for file in made):
        return
    content = read_yaml(REPOSITORY / f"configs/mini/75p_{operator}.yaml")
    candidates = content["sample_config"]["graft_indexes"]
    content["operator"]["config_filepath"] = f"configs/mini/{operator}.yaml"
    content["sample_config"]["graft_indexes"] = list(range(28))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "100p.yaml").write_text(yaml.safe_dump(content))
    distilled = testbed.distill(folder / "100p.yaml", operator, 0, args)
    entry(
        "scripts/guess_plans.py", "--config", distilled, "--keep", 14, "--out", folder,
        "--locality", args.work / "locality" / "locality.json", "--seeds", *args.seeds,
    )  # fmt: skip
    write_plan(load_plan(distilled), folder / "candidate.yaml", {"mha": candidates})
    write_plan(load_plan(distilled), folder / "distilled.yaml", {})


def make(case: tuple[str, str, int], gpu: int, args: argparse.Namespace) -> dict:
    """One case from selection to score; its result as plain data."""
    operator, pattern, seed = case
    name, answer, base = "-".join(map(str, case)), None, []
    if (operator, pattern) == UNGRAFTED:
        plan, base = REPOSITORY / "configs/mini/no_graft.yaml", ["--load-weight", BASE]
    elif pattern in LEARNED:
        groups = budgets(operator, args) if pattern == HALVES else "2:4"
        entry(
            "prune_by_learning.py", "--config", args.work / "plans" / operator / LEARNED[pattern],
            *testbed.data_flags(args, seed), "--prefix", f"select-{name}", "--delta-w", "--lora",
            "--max-steps", args.selection_steps, "--lr", 3e-4, "--gate-lr", 3e-3,
            "--ema-decay", 0.99, "--groups", groups, *args.selection_flags, gpu=gpu,
        )  # fmt: skip
        chosen = args.work / "runs" / f"select-{name}-DiT-Mini-2"
        plan, answer = chosen / "selected.yaml", read_json(chosen / "selection.json", "rerun")
    else:
        file = f"random_{seed}" if pattern == "random" else pattern
        plan = args.work / "plans" / operator / f"{file}.yaml"
    checkpoint, losses = testbed.finetune(plan, name, seed, args, *base, gpu=gpu)
    weights = ["--graft-fusion-ckpt-path", checkpoint]
    return {
        "operator": operator,
        "pattern": pattern,
        "seed": seed,
        "grafted": list(load_plan(plan).grafted_blocks("mha")),
        **losses,
        **testbed.score(plan, name, seed, args, *weights, gpu=gpu),
        "selection": None
        if answer is None
        else {
            "confidence": [group["confidence"] for group in answer["groups"]],
            "agreement": [group["agreement"] for group in answer["groups"]],
        },
    }


def budgets(operator: str, args: argparse.Namespace) -> str:
    """--groups of two halves, each with as many originals as low-local keeps there."""
    grafted = load_plan(args.work / "plans" / operator / "low-local.yaml").grafted_blocks()
    kept = [14 - sum(first <= block < first + 14 for block in grafted) for first in (0, 14)]
    return f"{kept[0]}:14,{kept[1]}:14"


def run(args: argparse.Namespace) -> None:
    testbed.encode(args.work)
    locality = args.work / "locality"
    if not (locality / "locality.json").is_file():
        entry(
            "scripts/attention_locality.py", "--config", "configs/mini/no_graft.yaml",
            "--load-weight", BASE, "--data-path", args.work / "train", "--out", locality, threads=4,
        )  # fmt: skip
    grafted = [(operator, pattern) for pattern in args.patterns for operator in args.operators]
    # the seeds of one plan apart, so that later ones find its compiled code
    cases = [(*kind, seed) for seed in args.seeds for kind in (UNGRAFTED, *grafted)]
    names = ("steps", "selection_steps", "distill_steps", "batch", "num_samples")
    names += ("train_flags", "selection_flags")
    testbed.run_cases(
        cases,
        lambda case, gpu: make(case, gpu, args),
        {
            operator: lambda operator=operator: prepare(operator, args)
            for operator in args.operators
        },
        args,
        {name: getattr(args, name) for name in names},
    )


def report(args: argparse.Namespace) -> None:
    groups = defaultdict(list)
    for record in testbed.results(args.results):
        groups[record["operator"], record["pattern"]].append(record)
    operators = sorted({operator for operator, _ in groups} - {UNGRAFTED[0]})
    text = "\n\n".join(operator_table(operator, groups) for operator in operators)
    testbed.write_tables(REPOSITORY / "docs" / "selection.md", Path(__file__).name, text)
    plot(groups, operators, REPOSITORY / "docs" / "images" / "selection_study.png")


def operator_table(operator: str, groups: dict) -> str:
    """Mean and standard deviation over the seeds of every pattern, the best first."""
    rows = []
    for key in [(operator, pattern) for pattern in PATTERNS] + [UNGRAFTED]:
        if found := groups.get(key, []):
            order = statistics.mean(record["train_mse"] for record in found)
            cells = [testbed.cell(found, metric) for metric in METRICS]
            rows.append((order, key[1], len(found), cells))
    shared = next(iter(groups.values()))[0]["settings"]
    lines = [
        f"**{operator}**, 14 of 28 blocks grafted; {shared['steps']} finetuning steps of "
        f"{shared['batch']}, {shared['num_samples']} samples; mean ± standard deviation.",
        "",
        f"| selection | cases | {' | '.join(METRICS.values())} |",
        "|---|---|" + "---|" * len(METRICS),
    ]
    lines += [f"| {p} | {n} | {' | '.join(c)} |" for _, p, n, c in sorted(rows)]
    return "\n".join(lines)


def plot(groups: dict, operators: list[str], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(METRICS), 3.2 * len(operators)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(operators), len(METRICS), squeeze=False)
    for row, operator in zip(axes, operators, strict=True):
        for axis, (metric, title) in zip(row, METRICS.items(), strict=True):
            shown = [p for p in PATTERNS if (operator, p) in groups]
            for place, pattern in enumerate(shown):
                values = [record[metric] for record in groups[operator, pattern]]
                color = "tab:orange" if pattern in LEARNED else "tab:blue"
                axis.plot(values, [place] * len(values), "o", color=color, alpha=0.6)
                axis.plot(statistics.mean(values), place, "|", color=color, markersize=16)
            axis.set_yticks(range(len(shown)), shown)
            axis.invert_yaxis()
            axis.set_title(f"{operator}: {title} (lower is better)", fontsize=10)
            axis.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def parse_args() -> argparse.Namespace:
    parser, command = testbed.parser(__doc__, RESULTS, run, report)
    add = command.add_argument
    add("--operators", nargs="+", default=["swa", "hyena_y"])
    add("--patterns", nargs="+", choices=PATTERNS, default=list(PATTERNS))
    add("--selection-steps", type=arguments.positive, default=600)
    add("--selection-flags", type=shlex.split, default=[], help="one string, for selection")
    return parser.parse_args()


if __name__ == "__main__":
    args = parse_args()
    distributed.run(args.function, args)
