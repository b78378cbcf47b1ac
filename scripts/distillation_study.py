r"""What Stage 1 is worth, on the miniature testbed: raw results and tables.

    python scripts/distillation_study.py run --work runs/distillation --jobs 14
    python scripts/distillation_study.py report

`run` distills each operator into all blocks by the ordinary entry, once a loss and seed, takes the
50 % and 75 % grafts from that, and measures every start (fresh, inherited, distilled) as it is and
after the same finetuning, with and without knowledge distillation; beside them the pretrained model
without a graft. Each finished case is one small JSON in --results; started again, it makes the
cases that are missing. `report` turns the JSONs into the tables of docs/distillation.md (between
its two markers).
"""

import argparse
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models.plan import load_plan, read_yaml, write_plan
from scripts import testbed
from scripts.testbed import BASE, METRICS, REPOSITORY
from training import distributed

RESULTS = REPOSITORY / "docs" / "results" / "distillation"
# name -> slot, operator, its arguments at DiT-Mini/2's width and 64 tokens, the loss of its slot
OPERATORS = {
    "mha": ("mha", "mha", {}, "l1"),
    "swa": ("mha", "swa", {"window_size": [4, 4]}, "l1"),
    "hyena_se": ("mha", "hyena_se", {"short_filter_order": 4}, "l1"),
    "hyena_x": ("mha", "hyena_x", {"short_filter_order": 4}, "l1"),
    "hyena_y": ("mha", "hyena_y", {"inner_filter_len": 4}, "l1"),
    "mamba2": ("mha", "mamba2", {"d_state": 64, "d_conv": 4, "expand": 2, "headdim": 16}, "l1"),
    "mlp_ratio_3": ("mlp", "mlp", {"expansion_ratio": 3}, "l2"),
    "mlp_ratio_4": ("mlp", "mlp", {"expansion_ratio": 4}, "l2"),
    "mlp_ratio_6": ("mlp", "mlp", {"expansion_ratio": 6}, "l2"),
    "mlp_hyena_x": ("mlp", "mlp_hyena_x", {"l_max": 64, "expansion_ratio": 2}, "l2"),
}
SELF_GRAFTS = ("mha", "mlp_ratio_4")
SWAPS = tuple(name for name in OPERATORS if name not in SELF_GRAFTS)
INHERITING = ("swa", "hyena_se", "hyena_x", "hyena_y")
LOSSES = ("l1", "l2", "huber")
UNGRAFTED = ("none", 0, "base")  # distillation, percent and start of the cases without a graft
STARTS = {"fresh": "fresh", "inherit": "inherited", "distilled": "distilled"}
TRAININGS = {"none": "", "finetune": ", finetuned", "kd": ", finetuned with KD"}
SHARES = (50, 75)
BLOCKS = {50: [b for b in range(28) if b % 2], 75: [b for b in range(28) if b % 4]}


def cases(args: argparse.Namespace) -> list[tuple]:
    """(distillation, percent, start, training, seed) of every case; the main rows have all seeds.

    A distillation is <operator>-<loss>; starts are fresh, inherit and distilled; trainings are
    none, finetune and kd. The model without a graft is UNGRAFTED.
    """
    found = []
    for seed in args.seeds:
        found += [(*UNGRAFTED, training, seed) for training in ("none", "finetune")]
        for name in SELF_GRAFTS if args.self_grafts else ():
            found += [(f"{name}-{loss}", 75, "distilled", "none", seed) for loss in LOSSES]
            found.append((f"{name}-{LOSSES[0]}", 75, "fresh", "none", seed))
        for name in args.operators:
            if seed != args.seeds[0] and name not in args.main:
                continue
            key = f"{name}-{OPERATORS[name][3]}"
            starts = ["distilled", "fresh"] + (["inherit"] if name in INHERITING else [])
            for percent in SHARES:
                for training in ("finetune", "none"):
                    found += [(key, percent, start, training, seed) for start in starts]
                found.append((key, percent, "distilled", "kd", seed))
    return found


def prepare_ungrafted(args: argparse.Namespace) -> None:
    """The YAML of the pretrained model, without a graft."""
    folder = args.work / "plans" / UNGRAFTED[0]
    folder.mkdir(parents=True, exist_ok=True)
    content = read_yaml(REPOSITORY / "configs/mini/no_graft.yaml")
    content["sample_config"]["base_ckpt_path"] = BASE
    (folder / "base-0.yaml").write_text(yaml.safe_dump(content))


def write_plans(key: str, args: argparse.Namespace) -> None:
    """The YAML of each case's plan that needs no Stage 1, and all.yaml, which Stage 1 takes."""
    slot, operator, config, _ = OPERATORS[key.rsplit("-", 1)[0]]
    folder = args.work / "plans" / key
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "operator.yaml").write_text(yaml.safe_dump(config))
    content = read_yaml(REPOSITORY / "configs/mini/75p_hyena_y.yaml")
    content["operator"] = {
        "type": slot, "name": operator, "config_filepath": str(folder / "operator.yaml")
    }  # fmt: skip
    content["sample_config"] |= {"graft_indexes": list(range(28)), "graft_init": "fresh"}
    (folder / "all.yaml").write_text(yaml.safe_dump(content))
    for percent, blocks in BLOCKS.items():
        for start in ("fresh", "inherit"):
            content["sample_config"] |= {"graft_indexes": blocks, "graft_init": start}
            (folder / f"{start}-{percent}.yaml").write_text(yaml.safe_dump(content))


def distill(key: str, seed: int, args: argparse.Namespace) -> None:
    """Stage 1 of one operator into all blocks; and the YAML of each plan that starts from it."""
    name, loss = key.rsplit("-", 1)
    slot = OPERATORS[name][0]
    folder = args.work / "plans" / key
    flags = ["--loss-mha" if slot == "mha" else "--loss-mlp", loss]
    path = testbed.distill(folder / "all.yaml", f"{key}-{seed}", seed, args, *flags)
    for percent, blocks in BLOCKS.items():
        write_plan(load_plan(path), folder / f"distilled-{percent}-{seed}.yaml", {slot: blocks})


def stage_one_of(key: str, seed: int, args: argparse.Namespace) -> Path:
    """The YAML that `distill` makes."""
    return args.work / "runs" / f"distill-{key}-{seed}-DiT-Mini-2" / "distilled.yaml"


def make(case: tuple, args: argparse.Namespace) -> dict:
    """One case; its result as plain data."""
    key, percent, start, training, seed = case
    name = "-".join(map(str, case))
    suffix, stage_one = "", None
    if start == "distilled":
        suffix, stage_one = f"-{seed}", testbed.fingerprint(stage_one_of(key, seed, args))
    plan = args.work / "plans" / key / f"{start}-{percent}{suffix}.yaml"
    weights = ["--allow-untrained"]
    if training == "none":
        losses = testbed.losses(plan, name, seed, args)
    else:
        flags = ["--distill"] if training == "kd" else []
        checkpoint, losses = testbed.finetune(plan, name, seed, args, *flags)
        weights = ["--graft-fusion-ckpt-path", checkpoint]
    return {
        "distillation": key,
        "percent": percent,
        "start": start,
        "training": training,
        "seed": seed,
        "stage_one": stage_one,
        **losses,
        **testbed.score(plan, name, seed, args, *weights),
    }


def run(args: argparse.Namespace) -> None:
    testbed.encode(args.work)
    prepare_ungrafted(args)
    wanted = cases(args)
    stage_one = {
        (key, seed): [partial(distill, key, seed, args)]
        for key, _, start, _, seed in wanted
        if start == "distilled"
    }
    for key in {key for key, _ in stage_one}:
        write_plans(key, args)
    names = ("steps", "distill_steps", "batch", "num_samples", "train_flags")
    testbed.run_cases(
        wanted,
        lambda case: make(case, args),
        lambda case: stage_one[case[0], case[4]] if case[2] == "distilled" else (),
        args,
        {name: getattr(args, name) for name in names},
    )


def report(args: argparse.Namespace) -> None:
    groups = defaultdict(list)
    records = testbed.results(args.results, "distillation", "seed")
    for record in records:
        keys = ("distillation", "percent", "start", "training")
        groups[tuple(record[key] for key in keys)].append(record)
    text = [testbed.headline(records), self_graft_table(groups)]
    text += [start_table(metric, groups) for metric in METRICS]
    testbed.write_tables(args.page, Path(__file__).name, "\n\n".join(text))


def self_graft_table(groups: dict) -> str:
    """The loss of Stage 1 against none, at 75 %, before any finetuning."""
    rows = [("no graft", "", groups.get((*UNGRAFTED, "none")))]
    for name in SELF_GRAFTS:
        for loss in LOSSES:
            rows.append((name, loss, groups.get((f"{name}-{loss}", 75, "distilled", "none"))))
        rows.append((name, "no Stage 1", groups.get((f"{name}-{LOSSES[0]}", 75, "fresh", "none"))))
    lines = [
        [name, loss, str(len(found)), *(testbed.cell(found, metric) for metric in METRICS)]
        for name, loss, found in rows
        if found
    ]
    title = f"**Self-graft** of {len(BLOCKS[75])} blocks, no finetuning:"
    return f"{title}\n\n{testbed.table(['operator', 'loss', 'cases', *METRICS.values()], lines)}"


def start_table(metric: str, groups: dict) -> str:
    """A metric of every operator and share: a column a start, before and after finetuning."""
    columns = [(start, training) for training in ("none", "finetune") for start in STARTS]
    columns.append(("distilled", "kd"))
    lines = []
    for name in SWAPS:
        for percent in SHARES:
            key = (f"{name}-{OPERATORS[name][3]}", percent)
            found = [groups.get((*key, *column), []) for column in columns]
            if counts := sorted({len(records) for records in found if records}):
                cells = [testbed.cell(records, metric) for records in found]
                cases = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
                lines.append([name, f"{percent} %", cases, *cells])
    base = [testbed.cell(groups.get((*UNGRAFTED, t), []), metric) for t in ("none", "finetune")]
    title = f"**{METRICS[metric]}** (no graft: {base[0]}, finetuned {base[1]}):"
    names = [f"{STARTS[start]}{TRAININGS[training]}" for start, training in columns]
    return f"{title}\n\n{testbed.table(['operator', 'grafted', 'cases', *names], lines)}"


def parse_args() -> argparse.Namespace:
    parser, command = testbed.parser(__doc__, RESULTS, run, report)
    add = command.add_argument
    add("--operators", nargs="*", choices=SWAPS, default=list(SWAPS), metavar="NAME")
    add(
        "--main",
        nargs="*",
        choices=SWAPS,
        default=["swa", "hyena_y"],
        metavar="NAME",
        help="operators with every seed; others have the first",
    )
    add("--no-self-grafts", dest="self_grafts", action="store_false", help="leave them out")
    return parser.parse_args()


if __name__ == "__main__":
    args = parse_args()
    distributed.run(args.function, args)
