"""Studies on the miniature testbed: many short runs of the entries, each case one small JSON.

Not a command: scripts/*_study.py build on it. A case that has its JSON is not made again, so a
study that was stopped goes on where it was; cases run side by side, dealt out over the GPUs.
"""

import argparse
import gc
import hashlib
import importlib
import json
import multiprocessing
import os
import shlex
import signal
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import (
    FIRST_EXCEPTION,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import torch

from models.files import read_json, write_json, write_whole
from models.plan import find_file, load_plan
from models.provenance import environment, hardware
from training import arguments, distributed
from training.preemption import SIGNALS, Preempted

REPOSITORY = Path(__file__).resolve().parent.parent
BASE = "assets/mini/dit_mini.safetensors"
METRICS = {"train_mse": "training MSE", "heldout_mse": "held-out MSE", "fd_mini": "fd_mini"}
DIGITS = {"train_mse": 5, "heldout_mse": 5, "fd_mini": 3}
# How the gates of every study learn, beside its steps and batch
LEARNING = ["--gate-lr", 3e-3, "--tau-range", 4, 0.1, "--lora-rank", 8]
# What a result records of it, as prune_by_learning.py read it
LEARNED_BY = ("max_steps", "global_batch_size", "lr", "gate_lr", "tau_range", "scaling_range")
LEARNED_BY += ("delta_w", "lora", "lora_rank", "lora_alpha", "ema_decay", "clip_grad")
LEARNED_BY += ("class_dropout",)


# What most of an entry's start is spent on; imported once, by the process that all others fork from
PRELOADED = ["torch", "timm", "diffusers", "torch.utils.tensorboard"]
PRELOADED += ["extract_features", "distill_operators", "prune_by_learning", "finetune_tinyfusion"]
PRELOADED += ["sample_ddp_finetuned", "evaluate_fid", "scripts.validation_loss"]


def entry(*command, threads: int = 1) -> None:
    """Runs an entry of this repository; ValueError with the end of its output where it fails.

    In a process that runs one after the other: what they compile they need not compile again.
    """
    words = [str(word) for word in command]
    with _starting:
        work = _workers().submit(_work, words, threads)
    try:
        failure, seconds, device = work.result()
    except BrokenProcessPool as broken:
        raise ValueError(f"{' '.join(words)}: a process died, this one or another") from broken
    if failure:
        raise ValueError(failure)
    _spent.seconds = getattr(_spent, "seconds", 0.0) + seconds
    _spent.hardware = getattr(_spent, "hardware", set()) | {device}


_starting = threading.Lock()
_spent = threading.local()  # seconds of entries that a thread has waited for, and their hardware


@cache
def _workers() -> ProcessPoolExecutor:
    """Processes that are begun as they are needed, dealt out over the GPUs."""
    # diffusers asks for a GPU when imported; a process that asks CUDA itself cannot fork any more
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # each; read when PyTorch is imported
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    cards = visible.split(",") if visible else range(torch.cuda.device_count())
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    counted = context.Value("i", 0)
    return ProcessPoolExecutor(None, context, _begin, ([str(card) for card in cards], counted))


def _begin(cards: list[str], counted: Synchronized) -> None:
    """A worker's start."""
    with counted.get_lock():
        place = counted.value
        counted.value += 1
    if cards:
        os.environ["CUDA_VISIBLE_DEVICES"] = cards[place % len(cards)]
    os.chdir(REPOSITORY)


def _work(words: list[str], threads: int) -> tuple[str, float, str]:
    """An entry, in a worker -> what it said where it failed, else "", its seconds and hardware."""
    began = time.monotonic()
    torch.set_num_threads(threads)
    before = [os.dup(number) for number in (1, 2)]
    failed = False
    sys.argv = words
    with tempfile.TemporaryFile("w+") as heard:
        for number in (1, 2):
            os.dup2(heard.fileno(), number)
        try:
            module = importlib.import_module(words[0].removesuffix(".py").replace("/", "."))
            module.main(module.parse_args())
        except (Exception, SystemExit, Preempted):
            failed = True
            traceback.print_exc()
        finally:
            distributed.release()
            sys.stdout.flush()
            sys.stderr.flush()
            for number, was in zip((1, 2), before, strict=True):
                os.dup2(was, number)
                os.close(was)
            for number in SIGNALS:  # which a training that failed still listens to
                signal.signal(number, signal.SIG_DFL)
        gc.collect()
        device = torch.device("cpu")
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
            device = torch.device("cuda", torch.cuda.current_device())
        heard.seek(0)
        failure = f"{' '.join(words)}\n{heard.read()[-3000:]}" if failed else ""
    return failure, time.monotonic() - began, hardware(device)


def encode(work: Path) -> None:
    """Pictures, latents of both parts, and statistics of the training pictures; once."""
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
    entry(*score, "--save-stats", work / "reference.npz")


def data_flags(args: argparse.Namespace, seed: int) -> list:
    """Flags that every training run of a study has."""
    flags = ["--data-path", args.work / "train", "--results-dir", args.work / "runs"]
    flags += ["--resume", "auto", "--global-batch-size", args.batch]
    return [*flags, "--global-seed", seed, "--log-every", 20, *args.train_flags]


def distill(plan: Path, name: str, seed: int, args: argparse.Namespace, *more) -> Path:
    """Stage 1 of a plan; the YAML with its operators."""
    entry(
        "distill_operators.py", "--config", plan, *data_flags(args, seed),
        "--prefix", f"distill-{name}", "--num-samples", 1600, "--val-samples", 104,
        "--max-steps", args.distill_steps, "--lr", 1e-3, "--lr-schedule", "cosine", *more,
        threads=4,
    )  # fmt: skip
    return args.work / "runs" / f"distill-{name}-DiT-Mini-2" / "distilled.yaml"


def fingerprint(plan: Path) -> str:
    """The SHA-256, in short, of the files that Stage 1 gave a plan; ValueError without any."""
    found = hashlib.sha256()
    read = load_plan(plan)
    if not read.graft_weights:
        raise ValueError(f"{plan}: names no graft_weights")
    for _, path in sorted(read.graft_weights.items()):
        found.update(find_file(path, read.path, "graft_weights").read_bytes())
    return found.hexdigest()[:16]


def select(plan: Path, name: str, seed: int, args: argparse.Namespace, *more) -> tuple[Path, dict]:
    """Layer selection in a plan, for `args.selection_steps`; its selected.yaml, selection.json."""
    entry(
        "prune_by_learning.py", "--config", plan, *data_flags(args, seed),
        "--prefix", f"select-{name}", "--delta-w", "--lora", "--lr", 3e-4, "--ema-decay", 0.99,
        "--max-steps", args.selection_steps, *LEARNING, *more,
    )  # fmt: skip
    folder = args.work / "runs" / f"select-{name}-{model_of(plan)}"
    return folder / "selected.yaml", read_json(folder / "selection.json", "rerun")


def learned_with(answer: dict) -> dict:
    """How the gates of a selection.json learned, and what they chose from."""
    return {
        "groups": answer["groups_spec"],
        "pinned": answer["pinned"],
        "precision": answer["precision"],
        "settings": {name: answer["settings"][name] for name in LEARNED_BY},
    }


def model_of(plan: Path) -> str:
    """A plan's model as the names of run folders have it."""
    return load_plan(plan).model_name.replace("/", "-")


def finetune(
    plan: Path, name: str, seed: int, args: argparse.Namespace, *more
) -> tuple[Path, dict]:
    """Finetunes a plan for `args.steps`; its last checkpoint, and the last value of each metric."""
    entry(
        "finetune_tinyfusion.py", "--config", plan, *data_flags(args, seed),
        "--prefix", f"tune-{name}", "--val-data-path", args.work / "train", args.work / "heldout",
        "--max-steps", args.steps, "--lr", 3e-4, "--ema-decay", 0.99, *more,
    )  # fmt: skip
    folder = args.work / "runs" / f"tune-{name}-{model_of(plan)}"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = {key: value for line in lines for key, value in line.items()}
    losses = {f"{part}_mse": found[f"val_mse/{part}"] for part in ("train", "heldout")}
    return folder / "checkpoints" / f"{args.steps:07d}.pt", losses


def losses(plan: Path, name: str, seed: int, args: argparse.Namespace) -> dict:
    """The losses that `finetune` gives, of a plan's model as it starts."""
    out = args.work / "losses" / f"{name}.json"
    out.parent.mkdir(exist_ok=True)
    stores = {f"{part}_mse": str(args.work / part) for part in ("train", "heldout")}
    entry(
        "scripts/validation_loss.py", "--config", plan, "--data-path", *stores.values(),
        "--out", out, "--global-seed", seed,
    )  # fmt: skip
    found = read_json(out, "rerun")
    return {metric: found[store]["mse"] for metric, store in stores.items()}


def score(plan: Path, name: str, seed: int, args: argparse.Namespace, *weights) -> dict:
    """Draws `args.num_samples` pictures and measures them against the training pictures."""
    entry(
        "sample_ddp_finetuned.py", "--config", plan, "--sample-dir", args.work / "samples",
        "--folder-name", name, "--num-fid-samples", args.num_samples, "--labels", "balanced",
        "--sampler", "dpm++", "--num-sampling-steps", 20, "--cfg-scale", 1.5,
        "--per-proc-batch-size", min(256, args.num_samples), "--global-seed", seed,
        "--no-compile", *weights,
    )  # fmt: skip
    folder = args.work / "samples" / name
    command = ["evaluate_fid.py", args.work / "reference.npz", folder, "--feature-net", "mini"]
    entry(*command)
    return {"fd_mini": read_json(folder / "metrics.json", "rerun")["metrics"]["fd_mini"]}


def is_made(path: Path, settings: dict, flags: list) -> bool:
    """Whether a case has its result, made with the flags that are its own.

    A result without a record of flags is of a case without any. ValueError where it is of another
    study.
    """
    if not path.is_file():
        return False
    record = read_json(path, "delete it")
    found = record["settings"]
    for name, value in settings.items():
        if found.get(name) != value:
            raise ValueError(
                f"{path}: was made with {name} {found.get(name)}, this study has {value}: give "
                "another --results, or delete it"
            )
    before = record.get("flags", [])
    if before != flags:
        print(f"{path}: was made with the flags {before}, is made anew with {flags}", flush=True)
    return before == flags


def run_cases(
    cases: Iterable[tuple],
    make: Callable[[tuple], dict],
    before: Callable[[tuple], Sequence[Callable[[], None]]],
    args: argparse.Namespace,
    settings: dict,
    flags: Callable[[tuple], list] = lambda case: [],
) -> None:
    """Makes the cases without a result, `args.jobs` at a time, and writes each as it ends.

    Args:
        cases: tuples of words and numbers, the names of their results.
        make: gives a case's result.
        before: what must be done before a case, `args.jobs` of them at a time; once, where several
            cases name the same object.
        settings: what every result of the study shares; written into each.
        flags: gives those of the study that a case has to itself; written into its result.
    """
    args.results.mkdir(parents=True, exist_ok=True)
    names = {"-".join(map(str, case)): case for case in cases}
    missing = [
        name
        for name, case in names.items()
        if not is_made(args.results / f"{name}.json", settings, flags(case))
    ]
    wanted = dict.fromkeys(work for name in missing for work in before(names[name]))

    def finish(name: str, works: dict[Callable, Future]) -> None:
        for work in before(names[name]):
            works[work].result()
        _spent.seconds, _spent.hardware = 0.0, set()
        result = make(names[name]) | {"seconds": round(_spent.seconds, 1)}
        # the hardware as the workers tell it: this process leaves CUDA alone
        about = {**environment(), "hardware": sorted(_spent.hardware)}
        result |= {"settings": settings, "flags": flags(names[name]), **about}
        write_json(args.results / f"{name}.json", result)
        shown = (f"{title} {result[key]:.5f}" for key, title in METRICS.items() if key in result)
        print(f"{name}: {'  '.join(shown)}", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool, ThreadPoolExecutor(args.jobs) as first:
        works = {work: first.submit(work) for work in wanted}
        running = [pool.submit(finish, name, works) for name in missing]
        try:
            done, _ = wait(running, return_when=FIRST_EXCEPTION)
        finally:
            for each in (first, pool):
                each.shutdown(wait=False, cancel_futures=True)
        for future in done:
            future.result()


def results(folder: Path, *keys: str) -> list[dict]:
    """Every result of a study, in the order of their names.

    ValueError where settings differ, or where `stage_one`, the `fingerprint` of what a result
    begins with, does among results that have the values of `keys` in common: they would be compared
    for what differs by chance.
    """
    records = [read_json(path, "delete it") for path in sorted(folder.glob("*.json"))]
    if not records:
        raise ValueError(f"{folder} holds no results: make them with `run`")
    for record in records[1:]:
        if record["settings"] != records[0]["settings"]:
            raise ValueError(f"{folder}: holds results of studies with different settings")
    found: dict[tuple, set] = defaultdict(set)
    for record in records:
        found[tuple(record[key] for key in keys)].add(record.get("stage_one", "not stated"))
    for values, fingerprints in found.items():
        if len(fingerprints - {None}) > 1:
            raise ValueError(
                f"{folder}: results of {' '.join(map(str, values))} hold operators of several "
                "distillations, made with other folders of --work: delete them and make them anew"
            )
    return records


def headline(records: list[dict]) -> str:
    """What all cases of a study had in common, and what made them, for above its tables."""
    shared = records[0]["settings"]
    seconds = [record.get("seconds") for record in records]
    took = ""
    if None not in seconds:
        hours = sum(seconds) / 3600
        took = f"Without Stage 1, {len(records)} cases took {hours:.1f} hours of single processes. "
    revisions = {str(record["git_revision"]) for record in records}
    short = (r[:8] + "-dirty" * r.endswith("-dirty") for r in sorted(revisions))
    versions = sorted({record["torch"] for record in records})
    told = [record["hardware"] for record in records if "hardware" in record]
    where = ""
    if told:
        which = f", {len(told)} of {len(records)} cases" if len(told) < len(records) else ""
        where = f"{which} on {', '.join(sorted({name for names in told for name in names}))}"
    return (
        f"{shared['distill_steps']} distillation steps and {shared['steps']} finetuning steps of "
        f"{shared['batch']} images, {shared['num_samples']} samples; mean ± standard deviation. "
        f"{took}Made at revision {', '.join(short)} with PyTorch {', '.join(versions)}"
        f"{where}."
    )


def cell(records: list[dict], metric: str) -> str:
    """Mean and, from two seeds on, standard deviation of a metric, for a table."""
    values = [record[metric] for record in records if record.get(metric) is not None]
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.{DIGITS[metric]}f}"
    return f"{mean} ± {statistics.stdev(values):.{DIGITS[metric]}f}" if len(values) > 1 else mean


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_tables(page: Path, script: str, text: str) -> None:
    """Puts `text` between the two marker lines of a documentation page."""
    markers = (f"<!-- results: written by scripts/{script} -->", "<!-- end of results -->")
    if not page.is_file():
        raise FileNotFoundError(f"{page}: no such page; it needs the lines {' and '.join(markers)}")
    before, found, rest = page.read_text(encoding="utf-8").partition(markers[0])
    _, closed, after = rest.partition(markers[1])
    if not (found and closed):
        raise ValueError(f"{page}: needs the lines {markers[0]} and {markers[1]}")
    content = f"{before}{markers[0]}\n\n{text}\n\n{markers[1]}{after}"
    write_whole(page, lambda partial: partial.write_text(content, encoding="utf-8"))


def parser(doc: str, default_results: Path, run: Callable, report: Callable):
    """A parser with the commands `run` and `report`, and the parser of `run` for more flags."""
    parser = arguments.parser(doc)
    commands = parser.add_subparsers(dest="command", required=True)
    made = {}
    for name, function in (("run", run), ("report", report)):
        made[name] = command = commands.add_parser(name, allow_abbrev=False)
        command.set_defaults(function=function)
        command.add_argument(
            "--results", type=Path, default=default_results, help="folder of the JSONs, one a case"
        )
    made["report"].add_argument(
        "--page",
        type=Path,
        default=REPOSITORY / "docs" / f"{default_results.name}.md",
        help="documentation page to write the tables into, and pictures to images/ beside it",
    )
    add = made["run"].add_argument
    add("--work", type=lambda p: Path(p).resolve(), required=True, help="run folders go here")
    add("--seeds", type=arguments.seed, nargs="+", default=[0, 1, 2])
    add("--steps", type=arguments.positive, default=600, help="of finetuning")
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
    return parser, made["run"]
