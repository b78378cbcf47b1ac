r"""Parallel pairs against the whole model and half of its blocks: raw results and table.

    python scripts/restructuring_study.py run --work runs/restructuring --jobs 14
    python scripts/restructuring_study.py report

Four models of the miniature testbed, all from the same pretrained weights:

    sequential   28 blocks, as they are
    sum          14 parallel pairs whose merges add both blocks
    distilled    the same after Stage 1
    dropped      14 blocks: every second one is left out

`run` measures each as it is and after the same finetuning, and samples and scores it, by the
ordinary entries. Each finished case is one small JSON in --results; started again, it makes the
cases that are missing. `report` turns the JSONs into the table of docs/restructuring.md (between
its two markers).
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models import costs
from models.files import write_whole
from models.plan import load_plan, read_yaml
from models.weights import read_state
from scripts import testbed
from scripts.testbed import BASE, METRICS, REPOSITORY
from training import arguments, distributed

RESULTS = REPOSITORY / "docs" / "results" / "restructuring"
STARTS = ("sequential", "sum", "distilled", "dropped")
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


def distill(args: argparse.Namespace) -> None:
    """Stage 1 of the pairs, a run a seed."""
    for seed in args.seeds:
        plan = args.work / "plans" / "sum.yaml"
        testbed.distill(plan, f"pairs-{seed}", seed, args, "--lr", args.distill_lr)


def make(case: tuple[str, str, int], gpu: int, args: argparse.Namespace) -> dict:
    """One case; its result as plain data."""
    start, training, seed = case
    name, weights = "-".join(map(str, case)), []
    plan = args.work / "plans" / f"{start}.yaml"
    if start == "distilled":
        plan = args.work / "runs" / f"distill-pairs-{seed}-DiT-Mini-2" / "distilled.yaml"
    if training == "none":
        losses = testbed.losses(plan, name, seed, args, gpu=gpu)
    else:
        checkpoint, losses = testbed.finetune(plan, name, seed, args, gpu=gpu)
        weights = ["--graft-fusion-ckpt-path", checkpoint]
    model = costs.model_cost(load_plan(plan))
    return {
        "start": start,
        "training": training,
        "seed": seed,
        "layers": len(costs.meta_model(load_plan(plan)).layers),
        "parameters": model.parameters,
        "gmac": model.work.multiply_adds / 1e9,
        **losses,
        **testbed.score(plan, name, seed, args, *weights, gpu=gpu),
    }


def run(args: argparse.Namespace) -> None:
    testbed.encode(args.work)
    write_plans(args.work / "plans")
    wanted = [(s, training, seed) for seed in args.seeds for training in TRAININGS for s in STARTS]
    names = ("steps", "distill_steps", "distill_lr", "batch", "num_samples", "train_flags")
    testbed.run_cases(
        wanted,
        lambda case, gpu: make(case, gpu, args),
        {"distilled": partial(distill, args)},
        args,
        {name: getattr(args, name) for name in names},
    )


def report(args: argparse.Namespace) -> None:
    groups = defaultdict(list)
    records = testbed.results(args.results)
    for record in records:
        groups[record["start"], record["training"]].append(record)
    head = testbed.headline(records)
    rows = []
    for training, words in TRAININGS.items():
        for start in STARTS:
            if found := groups.get((start, training)):
                about = found[0]
                sizes = [f"{about['parameters'] / 1e6:.2f} M", f"{about['gmac']:.2f}"]
                cells = [testbed.cell(found, metric) for metric in METRICS]
                rows.append([start, words, str(about["layers"]), *sizes, str(len(found)), *cells])
    columns = ["model", "trained", "layers", "parameters", "GMAC", "cases", *METRICS.values()]
    text = f"{head}\n\n{testbed.table(columns, rows)}"
    testbed.write_tables(REPOSITORY / "docs" / "restructuring.md", Path(__file__).name, text)


def parse_args() -> argparse.Namespace:
    parser, command = testbed.parser(__doc__, RESULTS, run, report)
    command.add_argument(
        "--distill-lr", type=arguments.rate, default=3e-4, help="learning rate of Stage 1"
    )
    return parser.parse_args()


if __name__ == "__main__":
    args = parse_args()
    distributed.run(args.function, args)
