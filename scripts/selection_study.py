r"""Learned selection against the guesses, on the miniature testbed: raw results, table and plot.

    python scripts/selection_study.py run --work runs/study --jobs 14
    python scripts/selection_study.py report

`run` encodes the testbed's pictures, distills the operator into every block, learns a selection a
seed with prune_by_learning.py (learned: between the grafts of the 75 % plan, as published;
learned-any: every block may be grafted; learned-halves: a choice over each half of the model, whose
budgets are those of low-local; and variations of learned-any), writes the guesses with
scripts/guess_plans.py, and gives every plan the same finetuning, sampling and scoring by the
ordinary entries, and the same to the base model without a graft. Each finished case is one small
JSON in --results; started again, it makes the cases that are missing, or whose flags are others by
now. `report` turns the JSONs into the tables of docs/selection.md (between its two markers),
docs/images/selection_study.png and docs/images/selection_blocks.png.
"""

import argparse
import shlex
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models.plan import load_plan, read_yaml, write_plan
from scripts import selection_page as page
from scripts import testbed
from scripts.selection_page import UNGRAFTED
from scripts.testbed import BASE, REPOSITORY, entry
from training import arguments, distributed

RESULTS = REPOSITORY / "docs" / "results" / "selection"
HALVES = "learned-halves"
LEARNED = {  # from which plan
    "learned": "candidate.yaml", "learned-any": "distilled.yaml", HALVES: "distilled.yaml"
}  # fmt: skip
VARIED = "learned-any"
VARIATIONS = {  # of that, which learns by testbed.LEARNING
    "slow-gates": ["--gate-lr", 3e-4],
    "fast-gates": ["--gate-lr", 3e-2],
    "cool-gates": ["--tau-range", 1, 0.1],
    "long": ["--max-steps", 1800],
    "rank-64": ["--lora-rank", 64],
    "batch-256": ["--global-batch-size", 256],
}
PATTERNS = (*LEARNED, "interleaved", "deep", "shallow", "top-local", "low-local", "random")
PATTERNS += tuple(VARIATIONS)


def candidates(operator: str) -> list[int]:
    """The blocks that the 75 % plan grafts, and that `learned` chooses from."""
    return read_yaml(configured(operator))["sample_config"]["graft_indexes"]


def configured(operator: str) -> Path:
    return REPOSITORY / f"configs/mini/75p_{operator}.yaml"


def prepare(operator: str, args: argparse.Namespace) -> None:
    """Stage 1 for all blocks, the 75 % candidate, and the YAML of every guess, once.

    Every plan of the study takes its operators from the same distillation.
    """
    folder = args.work / "plans" / operator
    made = [folder / "candidate.yaml", *(folder / f"random_{seed}.yaml" for seed in args.seeds)]
    if all(file.is_file() for file in made):
        return
    content = read_yaml(configured(operator))
    content["operator"]["config_filepath"] = f"configs/mini/{operator}.yaml"
    content["sample_config"]["graft_indexes"] = list(range(28))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "100p.yaml").write_text(yaml.safe_dump(content))
    distilled = testbed.distill(folder / "100p.yaml", operator, 0, args)
    entry(
        "scripts/guess_plans.py", "--config", distilled, "--keep", 14, "--out", folder,
        "--locality", args.work / "locality" / "locality.json", "--seeds", *args.seeds,
    )  # fmt: skip
    write_plan(load_plan(distilled), folder / "candidate.yaml", {"mha": candidates(operator)})
    write_plan(load_plan(distilled), folder / "distilled.yaml", {})


def make(case: tuple[str, str, int], args: argparse.Namespace) -> dict:
    """One case from selection to score; its result as plain data."""
    operator, pattern, seed = case
    name, answer, base = "-".join(map(str, case)), None, []
    if (operator, pattern) == UNGRAFTED:
        plan, base = REPOSITORY / "configs/mini/no_graft.yaml", ["--load-weight", BASE]
    elif pattern in LEARNED or pattern in VARIATIONS:
        plan, answer = learn(case, args)
    else:
        file = f"random_{seed}" if pattern == "random" else pattern
        plan = args.work / "plans" / operator / f"{file}.yaml"
    checkpoint, losses = testbed.finetune(plan, name, seed, args, *base)
    weights = ["--graft-fusion-ckpt-path", checkpoint]
    return {
        "operator": operator,
        "pattern": pattern,
        "seed": seed,
        "stage_one": None
        if (operator, pattern) == UNGRAFTED
        else testbed.fingerprint(args.work / "plans" / operator / "distilled.yaml"),
        "grafted": list(load_plan(plan).grafted_blocks("mha")),
        **losses,
        **testbed.score(plan, name, seed, args, *weights),
        "selection": None
        if answer is None
        else {
            **testbed.learned_with(answer),
            "confidence": [group["confidence"] for group in answer["groups"]],
            "agreement": [group["agreement"] for group in answer["groups"]],
        },
    }


def learn(case: tuple[str, str, int], args: argparse.Namespace) -> tuple[Path, dict]:
    """A selection by the gates: its plan, and its selection.json."""
    operator, pattern, seed = case
    choices = args.work / "plans" / operator / LEARNED.get(pattern, LEARNED[VARIED])
    flags = ["--groups", budgets(operator, args) if pattern == HALVES else "2:4"]
    flags += [*args.selection_flags, *VARIATIONS.get(pattern, ())]
    return testbed.select(choices, "-".join(map(str, case)), seed, args, *flags)


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
    # variations last; the seeds of one plan apart, so that later ones find its compiled code
    cases = [(*kind, seed) for seed in args.seeds for kind in (UNGRAFTED, *grafted)]
    cases.sort(key=lambda case: case[1] in VARIATIONS)
    works = {operator: [partial(prepare, operator, args)] for operator in args.operators}
    names = ("steps", "selection_steps", "distill_steps", "batch", "num_samples")
    names += ("train_flags", "selection_flags")
    testbed.run_cases(
        cases,
        lambda case: make(case, args),
        lambda case: works.get(case[0], ()),
        args,
        {name: getattr(args, name) for name in names},
        lambda case: VARIATIONS.get(case[1], []),
    )


def check_of_this_study(record: dict, folder: Path) -> None:
    """ValueError for a result of a selection that the study no longer has, or has otherwise."""
    operator, pattern = record["operator"], record["pattern"]
    flags = VARIATIONS.get(pattern, [])
    if pattern not in PATTERNS and (operator, pattern) != UNGRAFTED:
        what = "is of no selection of this study: delete it"
    elif record.get("flags", flags) != flags:
        what = f"was made with the flags {record['flags']}, not {flags}: make it anew with `run`"
    else:
        return
    raise ValueError(f"{folder}/{operator}-{pattern}-{record['seed']}.json: {what}")


def report(args: argparse.Namespace) -> None:
    groups = defaultdict(list)
    records = testbed.results(args.results, "operator")
    varied = defaultdict(list)
    for record in records:
        check_of_this_study(record, args.results)
        of = varied if record["pattern"] in VARIATIONS else groups
        of[record["operator"], record["pattern"]].append(record)
    operators = sorted({operator for operator, _ in groups} - {UNGRAFTED[0]})
    if UNGRAFTED not in groups or not operators:
        raise ValueError(f"{args.results}: needs cases with a graft and without: go on with `run`")
    pinned = {
        (operator, "learned"): set(range(page.DEPTH)) - set(candidates(operator))
        for operator in operators
    }
    settings = records[0]["settings"]
    text = [f"{settings['selection_steps']} steps of selection, {testbed.headline(records)}"]
    text.append(page.memory(groups))
    text += [page.operator_table(operator, groups) for operator in operators]
    text.append(page.duels_table(operators, groups))
    text.append(page.spread_table(operators, groups))
    text.append(page.learned_table(operators, groups, pinned))
    if varied:
        flags = [*testbed.LEARNING, "--max-steps", settings["selection_steps"]]
        flags += ["--global-batch-size", settings["batch"], *settings.get("selection_flags", ())]
        told = {VARIED: flags, **VARIATIONS}
        text.append(page.variations_table(operators, groups, varied, VARIED, told))
    images = args.page.parent / "images"
    page.plot_metrics(operators, groups, images / "selection_study.png")
    page.plot_blocks(operators, groups, images / "selection_blocks.png")
    testbed.write_tables(args.page, Path(__file__).name, "\n\n".join(text))


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
