r"""Parallel pairs against the whole model and half of its blocks: raw results and table.

    python scripts/restructuring_study.py run --work runs/restructuring --jobs 14
    python scripts/restructuring_study.py report

Models of the miniature testbed, all from the same pretrained weights:

    sequential         28 blocks, as they are
    sum                14 parallel pairs whose merges add both blocks
    distilled          the same after Stage 1
    dropped            14 blocks: every second one is left out
    half-learned       7 of the distilled pairs in parallel, the other blocks as they are; which
                       ones, prune_by_learning.py learns
    half-interleaved   every second pair
    half-random        seven drawn by the seed

`run` measures the first four as they are, gives all the same finetuning, and samples and scores
them, by the ordinary entries. Each finished case is one small JSON in --results; started again, it
makes the cases that are missing. `report` turns the JSONs into the table of docs/restructuring.md
(between its two markers).
"""

import argparse
import shlex
import sys
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from latents.loader import epoch_order
from models import costs
from models.files import write_whole
from models.plan import load_plan, read_yaml, write_plan
from models.weights import read_state
from scripts import testbed
from scripts.guess_plans import interleave
from scripts.testbed import BASE, METRICS, REPOSITORY
from training import arguments, distributed

RESULTS = REPOSITORY / "docs" / "results" / "restructuring"
STARTS = ("sequential", "sum", "distilled", "dropped")
HALVES = ("half-learned", "half-interleaved", "half-random")
TAUGHT = ("distilled", *HALVES)  # those that begin with the operators of Stage 1
TRAININGS = {"none": "as it starts", "finetune": "finetuned"}
HALF = "DiT-Mini-D14/2"


def every_second(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A DiT's state dict with its odd blocks left out, the others numbered anew."""
    kept = {}
    for name, tensor in state.items():
        start, _, rest = name.partition(".")
        if start == "blocks":
            block, _, rest = rest.partition(".")
            if int(block) % 2:
                continue
            name = f"blocks.{int(block) // 2}.{rest}"
        kept[name] = tensor
    return kept


def write_plans(folder: Path) -> None:
    """<start>.yaml of every model that needs no training, and the weights of the dropped one."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = read_yaml(REPOSITORY / "configs/mini/parallel_pairs.yaml")
    sequential = {key: value for key, value in pairs.items() if key != "restructure"}
    weights = folder / "dropped.pt"
    state = every_second(read_state(REPOSITORY / BASE))
    write_whole(weights, lambda partial: torch.save(state, partial))
    sample = {**pairs["sample_config"], "dit_model_name": HALF, "base_ckpt_path": str(weights)}
    contents = {
        "sum": pairs,
        "sequential": sequential,
        "dropped": {**sequential, "sample_config": sample},
    }
    for start, content in contents.items():
        (folder / f"{start}.yaml").write_text(yaml.safe_dump(content))


def distill(seed: int, args: argparse.Namespace) -> None:
    """Stage 1 of the pairs."""
    plan = args.work / "plans" / "sum.yaml"
    testbed.distill(plan, f"pairs-{seed}", seed, args, "--lr", args.distill_lr)


def choose(
    half: str, distilled: Path, seed: int, args: argparse.Namespace
) -> tuple[Path, dict | None]:
    """The YAML of a plan with half of the distilled pairs, and the gates' answer where they chose
    them."""
    plan = load_plan(distilled)
    firsts = [pair[0] for pair in plan.parallel_pairs]
    if half == "half-learned":
        return testbed.select(distilled, f"{half}-{seed}", seed, args, *args.selection_flags)
    if half == "half-random":
        chosen = epoch_order(len(firsts), seed, epoch=0).tolist()[: len(firsts) // 2]
    else:
        chosen = interleave(range(len(firsts)), len(firsts) // 2, len(firsts))
    path = args.work / "plans" / f"{half}-{seed}.yaml"
    write_plan(plan.with_pairs([firsts[i] for i in chosen]), path, {})
    return path, None


def make(case: tuple[str, str, int], args: argparse.Namespace) -> dict:
    """One case; its result as plain data."""
    start, training, seed = case
    name, weights, answer = "-".join(map(str, case)), [], None
    plan = args.work / "plans" / f"{start}.yaml"
    distilled = args.work / "runs" / f"distill-pairs-{seed}-DiT-Mini-2" / "distilled.yaml"
    if start == "distilled":
        plan = distilled
    elif start in HALVES:
        plan, answer = choose(start, distilled, seed, args)
    if training == "none":
        losses = testbed.losses(plan, name, seed, args)
    else:
        checkpoint, losses = testbed.finetune(plan, name, seed, args)
        weights = ["--graft-fusion-ckpt-path", checkpoint]
    model = costs.model_cost(load_plan(plan))
    return {
        "start": start,
        "training": training,
        "seed": seed,
        "stage_one": testbed.fingerprint(distilled) if start in TAUGHT else None,
        "layers": len(costs.meta_model(load_plan(plan)).layers),
        "pairs": [list(pair) for pair in load_plan(plan).parallel_pairs],
        "confidence": answer and [group["confidence"] for group in answer["groups"]],
        "learned_with": answer and testbed.learned_with(answer),
        "parameters": model.parameters,
        "gmac": model.work.multiply_adds / 1e9,
        **losses,
        **testbed.score(plan, name, seed, args, *weights),
    }


def run(args: argparse.Namespace) -> None:
    testbed.encode(args.work)
    write_plans(args.work / "plans")
    wanted = [(s, training, seed) for seed in args.seeds for training in TRAININGS for s in STARTS]
    wanted += [(half, "finetune", seed) for seed in args.seeds for half in HALVES]
    stage_one = {seed: [partial(distill, seed, args)] for seed in args.seeds}
    names = ("steps", "distill_steps", "distill_lr", "selection_steps", "selection_flags")
    names += ("batch", "num_samples", "train_flags")
    testbed.run_cases(
        wanted,
        lambda case: make(case, args),
        lambda case: stage_one[case[2]] if case[0] in TAUGHT else (),
        args,
        {name: getattr(args, name) for name in names},
    )


def report(args: argparse.Namespace) -> None:
    groups = defaultdict(list)
    records = testbed.results(args.results, "seed")
    for record in records:
        groups[record["start"], record["training"]].append(record)
    head = testbed.headline(records)
    rows = []
    for training, words in TRAININGS.items():
        for start in (*STARTS, *HALVES):
            if found := groups.get((start, training)):
                about = found[0]
                sizes = [f"{about['parameters'] / 1e6:.2f} M", f"{about['gmac']:.2f}"]
                cells = [testbed.cell(found, metric) for metric in METRICS]
                rows.append([start, words, str(about["layers"]), *sizes, str(len(found)), *cells])
    columns = ["model", "trained", "layers", "parameters", "GMAC", "cases", *METRICS.values()]
    text = f"{head}\n\n{testbed.table(columns, rows)}"
    for record in groups["half-learned", "finetune"]:
        pairs = " ".join(f"{a}+{b}" for a, b in record["pairs"])
        low, high = min(record["confidence"]), max(record["confidence"])
        steps = record["settings"]["selection_steps"]
        text += (
            f"\n\nSeed {record['seed']}: after {steps} steps of selection the gates made {pairs} "
        )
        text += f"parallel, with a confidence of {low:.2f} to {high:.2f}."
    testbed.write_tables(args.page, Path(__file__).name, text)


def parse_args() -> argparse.Namespace:
    parser, command = testbed.parser(__doc__, RESULTS, run, report)
    command.add_argument(
        "--distill-lr", type=arguments.rate, default=3e-4, help="learning rate of Stage 1"
    )
    command.add_argument("--selection-steps", type=arguments.positive, default=600)
    command.add_argument(
        "--selection-flags", type=shlex.split, default=[], help="one string, for selection"
    )
    return parser.parse_args()


if __name__ == "__main__":
    args = parse_args()
    distributed.run(args.function, args)
