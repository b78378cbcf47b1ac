r"""Learned selection against the guesses, on the miniature testbed: raw results, table and plot.

    python scripts/selection_study.py run --work runs/study --jobs 12
    python scripts/selection_study.py report

`run` encodes the testbed's pictures, distills the operator into every block, learns a selection a
seed with prune_by_learning.py, writes the guesses with scripts/guess_plans.py, and gives every plan
the same finetuning, sampling and scoring by the ordinary entries, and the same to the base model
without a graft. Each finished case is one small JSON in --results; started again, it makes the
cases that are missing. `report` turns the JSONs into the tables of docs/selection.md (between its
two markers) and docs/images/selection_study.png.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models.files import read_json, write_json, write_whole
from models.plan import load_plan, read_yaml, write_plan
from models.provenance import environment
from training import arguments, distributed

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "docs" / "results" / "selection"
PATTERNS = ("learned", "interleaved", "deep", "shallow", "top-local", "low-local", "random")
BASE = "assets/mini/dit_mini.safetensors"
UNGRAFTED = ("none", "base")  # the operator and pattern of the base model's cases
MARKERS = ("<!-- results: written by scripts/selection_study.py -->", "<!-- end of results -->")
METRICS = {"train_mse": "training MSE", "heldout_mse": "held-out MSE", "fd_mini": "fd_mini"}


def entry(*command, threads: int = 1) -> None:
    """Runs an entry of this repository; ValueError with the end of its output where it fails."""
    words = [sys.executable, *map(str, command)]
    limits = {"OMP_NUM_THREADS": str(threads), "TORCHINDUCTOR_COMPILE_THREADS": str(threads)}
    result = subprocess.run(
        words, cwd=REPOSITORY, env={**os.environ, **limits}, capture_output=True, text=True
    )
    if result.returncode:
        raise ValueError(f"{' '.join(words[1:])}\n{(result.stdout + result.stderr)[-3000:]}")


def encode(work: Path) -> None:
    """Pictures, latents of both parts, statistics of the training pictures, locality; once."""
    if (work / "reference.npz").is_file():
        return
    entry("scripts/unpack_mini.py", "--out", work / "images")
    for part in ("train", "heldout"):
        entry(
            "extract_features.py", "--vae", "assets/mini/vae", "--image-size", 64,
            "--num-classes", 9, "--no-mirror", "--data-path", work / "images" / part,
            "--features-path", work / part,
        )  # fmt: skip
    score = ["evaluate_fid.py", work / "images/train", "--feature-net", "mini"]
    config = "configs/mini/no_graft.yaml"
    entry(
        "scripts/attention_locality.py", "--config", config, "--load-weight", BASE,
        "--data-path", work / "train", "--out", work / "locality", threads=4,
    )  # fmt: skip
    entry(*score, "--save-stats", work / "reference.npz")


def prepare(operator: str, args: argparse.Namespace) -> None:
    """Stage 1 for all blocks, the 75 % candidate, and the YAML of every guess, once.

    Every plan of the study takes its operators from the same distillation.
    """
    folder = args.work / "plans" / operator
    made = [folder / "candidate.yaml", *(folder / f"random_{seed}.yaml" for seed in args.seeds)]
    if all(file.is_file() for file in made):
        return
    source = REPOSITORY / f"configs/mini/75p_{operator}.yaml"
    content = read_yaml(source)
    candidates = content["sample_config"]["graft_indexes"]
    content["operator"]["config_filepath"] = f"configs/mini/{operator}.yaml"
    content["sample_config"]["graft_indexes"] = list(range(28))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "100p.yaml").write_text(yaml.safe_dump(content))
    entry(
        "distill_operators.py", "--config", folder / "100p.yaml",
        "--data-path", args.work / "train", "--results-dir", args.work / "distilled",
        "--prefix", operator, "--num-samples", 1600,
        "--val-samples", 104, "--global-batch-size", args.batch, "--max-steps", args.distill_steps,
        "--lr", 1e-3, "--lr-schedule", "cosine", "--resume", "auto", *args.train_flags, threads=4,
    )  # fmt: skip
    distilled = args.work / "distilled" / f"{operator}-DiT-Mini-2" / "distilled.yaml"
    entry(
        "scripts/guess_plans.py", "--config", distilled, "--keep", 14, "--out", folder,
        "--locality", args.work / "locality" / "locality.json", "--seeds", *args.seeds,
    )  # fmt: skip
    write_plan(load_plan(distilled), folder / "candidate.yaml", {"mha": candidates})


def make(operator: str, pattern: str, seed: int, args: argparse.Namespace) -> dict:
    """One case from selection to score; its result as plain data."""
    work, name = args.work, f"{operator}-{pattern}-{seed}"
    data = ["--data-path", work / "train", "--results-dir", work / "runs", "--resume", "auto"]
    data += ["--global-seed", seed, "--log-every", 20, *args.train_flags]
    answer, base = None, []
    if (operator, pattern) == UNGRAFTED:
        plan, base = REPOSITORY / "configs/mini/no_graft.yaml", ["--load-weight", BASE]
    elif pattern == "learned":
        entry(
            "prune_by_learning.py", "--config", work / "plans" / operator / "candidate.yaml", *data,
            "--prefix", f"select-{name}", "--delta-w", "--lora",
            "--global-batch-size", args.batch, "--max-steps", args.selection_steps,
            "--lr", 3e-4, "--gate-lr", 3e-3, "--ema-decay", 0.99, *args.selection_flags,
        )  # fmt: skip
        chosen = work / "runs" / f"select-{name}-DiT-Mini-2"
        plan, answer = chosen / "selected.yaml", read_json(chosen / "selection.json", "rerun")
    else:
        file = f"random_{seed}" if pattern == "random" else pattern
        plan = work / "plans" / operator / f"{file}.yaml"
    entry(
        "finetune_tinyfusion.py", "--config", plan, *data, "--prefix", f"tune-{name}",
        "--val-data-path", work / "train", work / "heldout", "--global-batch-size", args.batch,
        "--max-steps", args.steps, "--lr", 3e-4, "--ema-decay", 0.99, *base,
    )  # fmt: skip
    tuned = work / "runs" / f"tune-{name}-DiT-Mini-2"
    entry(
        "sample_ddp_finetuned.py", "--config", plan, "--sample-dir", work / "samples",
        "--folder-name", name, "--num-fid-samples", args.num_samples, "--labels", "balanced",
        "--graft-fusion-ckpt-path", tuned / "checkpoints" / f"{args.steps:07d}.pt",
        "--sampler", "dpm++", "--num-sampling-steps", 20, "--cfg-scale", 1.5,
        "--global-seed", seed, "--no-compile",
    )  # fmt: skip
    folder = work / "samples" / name
    entry("evaluate_fid.py", work / "reference.npz", folder, "--feature-net", "mini")
    lines = [json.loads(line) for line in (tuned / "metrics.jsonl").read_text().splitlines()]
    found = {key: value for line in lines for key, value in line.items()}
    return {
        "operator": operator,
        "pattern": pattern,
        "seed": seed,
        "grafted": list(load_plan(plan).grafted_blocks("mha")),
        "fd_mini": read_json(folder / "metrics.json", "rerun")["metrics"]["fd_mini"],
        "train_mse": found["val_mse/train"],
        "heldout_mse": found["val_mse/heldout"],
        "settings": settings(args),
        "selection": None
        if answer is None
        else {
            "confidence": [group["confidence"] for group in answer["groups"]],
            "agreement": [group["agreement"] for group in answer["groups"]],
        },
        **environment(),
    }


def settings(args: argparse.Namespace) -> dict:
    """What every case of a study must share."""
    names = ("steps", "selection_steps", "distill_steps", "batch", "num_samples")
    names += ("train_flags", "selection_flags")
    return {name: getattr(args, name) for name in names}


def is_made(path: Path, wanted: dict) -> bool:
    """Whether a case has its result; ValueError where that is of another study."""
    if not path.is_file():
        return False
    found = read_json(path, "delete it")["settings"]
    for name, value in wanted.items():
        if found.get(name) != value:
            raise ValueError(
                f"{path}: was made with {name} {found.get(name)}, this study has {value}: give "
                "another --results, or delete it"
            )
    return True


def run(args: argparse.Namespace) -> None:
    args.work = args.work.resolve()
    args.results.mkdir(parents=True, exist_ok=True)
    encode(args.work)
    grafted = [(operator, pattern) for pattern in args.patterns for operator in args.operators]
    cases = [  # the seeds of one plan apart, so that later ones find its compiled code
        (*kind, seed)
        for seed in args.seeds
        for kind in (UNGRAFTED, *grafted)
        if not is_made(args.results / f"{'-'.join(kind)}-{seed}.json", settings(args))
    ]

    def finish(case: tuple[str, str, int]) -> str:
        if case[:2] != UNGRAFTED:
            prepared[case[0]].result()
        result = make(*case, args)
        write_json(args.results / f"{'-'.join(map(str, case))}.json", result)
        line = "  ".join(f"{title} {result[key]:.5f}" for key, title in METRICS.items())
        print(f"{'-'.join(map(str, case))}: {line}", flush=True)
        return line

    with ThreadPoolExecutor(args.jobs) as pool, ThreadPoolExecutor(len(args.operators)) as first:
        prepared = {operator: first.submit(prepare, operator, args) for operator in args.operators}
        for future in [pool.submit(finish, case) for case in cases]:
            future.result()


def report(args: argparse.Namespace) -> None:
    records = [read_json(path, "delete it") for path in sorted(args.results.glob("*.json"))]
    if not records:
        raise ValueError(f"{args.results} holds no results: make them with `run`")
    groups = defaultdict(list)
    for record in records:
        groups[record["operator"], record["pattern"]].append(record)
    operators = sorted({operator for operator, _ in groups} - {UNGRAFTED[0]})
    text = "\n\n".join(operator_table(operator, groups) for operator in operators)
    for record in records[1:]:
        if record["settings"] != records[0]["settings"]:
            raise ValueError(f"{args.results}: holds results of studies with different settings")
    page = REPOSITORY / "docs" / "selection.md"
    if not page.is_file():
        raise FileNotFoundError(f"{page}: no such page; it needs the lines {' and '.join(MARKERS)}")
    before, found, rest = page.read_text(encoding="utf-8").partition(MARKERS[0])
    _, closed, after = rest.partition(MARKERS[1])
    if not (found and closed):
        raise ValueError(f"{page}: needs the lines {MARKERS[0]} and {MARKERS[1]}")
    content = f"{before}{MARKERS[0]}\n\n{text}\n\n{MARKERS[1]}{after}"
    write_whole(page, lambda partial: partial.write_text(content, encoding="utf-8"))
    plot(groups, operators, REPOSITORY / "docs" / "images" / "selection_study.png")


def operator_table(operator: str, groups: dict) -> str:
    """Mean and standard deviation over the seeds of every pattern, the best first."""
    rows = []
    for key in [(operator, pattern) for pattern in PATTERNS] + [UNGRAFTED]:
        found, pattern = groups.get(key, []), key[1]
        if found:
            cells = []
            for metric, digits in zip(METRICS, (5, 5, 3), strict=True):
                values = [record[metric] for record in found]
                spread = statistics.stdev(values) if len(values) > 1 else float("nan")
                cells += [f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}"]
            rows.append(
                (statistics.mean(r["train_mse"] for r in found), pattern, len(found), cells)
            )
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
                color = "tab:orange" if pattern == "learned" else "tab:blue"
                axis.plot(values, [place] * len(values), "o", color=color, alpha=0.6)
                axis.plot(statistics.mean(values), place, "|", color=color, markersize=16)
            axis.set_yticks(range(len(shown)), shown)
            axis.invert_yaxis()
            axis.set_title(f"{operator}: {title} (lower is better)", fontsize=10)
            axis.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def parse_args() -> argparse.Namespace:
    parser = arguments.parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function in (("run", run), ("report", report)):
        command = commands.add_parser(name, allow_abbrev=False)
        command.set_defaults(function=function)
        add = command.add_argument
        add("--results", type=Path, default=RESULTS, help="folder of the JSONs, one a case")
        if name == "run":
            add("--work", type=Path, required=True, help="run folders are made here")
            add("--operators", nargs="+", default=["swa", "hyena_y"])
            add("--patterns", nargs="+", choices=PATTERNS, default=list(PATTERNS))
            add("--seeds", type=arguments.seed, nargs="+", default=[0, 1, 2])
            add("--steps", type=arguments.positive, default=600, help="of finetuning")
            add("--selection-steps", type=arguments.positive, default=600)
            add("--distill-steps", type=arguments.positive, default=1500, help="of Stage 1")
            add("--batch", type=arguments.positive, default=64, help="images a step")
            add("--num-samples", type=arguments.positive, default=1024, help="images to score")
            add("--jobs", type=arguments.positive, default=1, help="cases at the same time")
            add(
                "--train-flags",
                type=shlex.split,
                default=[],
                help="one string: --train-flags=--no-compile",
            )
            add("--selection-flags", type=shlex.split, default=[], help="one string, for selection")
    return parser.parse_args()


if __name__ == "__main__":
    args = parse_args()
    distributed.run(args.function, args)
