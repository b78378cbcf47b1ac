r"""Writes the tables of docs/performance.md from the JSONs of scripts/benchmark.py.

    python scripts/benchmark.py finetune --batch 8 32 128 --json <results>/finetune.json
    torchrun --nproc_per_node=2 scripts/benchmark.py finetune --batch 8 32 \
        --json <results>/finetune_2.json
    python scripts/performance_page.py

Finetuning, selection, sampling and the VAE beside the published style of loops.py, each with the
ratio that this project set itself; and how finetuning grows with a second GPU.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models.files import read_json
from scripts import testbed
from scripts.testbed import REPOSITORY
from training import arguments, distributed

FILES = ("finetune", "selection", "sampling", "vae")
# (work, images) -> the least ratio to the published style that the project aims at
TARGETS = {
    ("finetune", 8): 4.0,
    ("finetune", 32): 2.5,
    ("selection", 8): 5.0,
    ("selection", 32): 2.7,
    ("sampling", 32): 2.2,
    ("encode", 64): 20.0,
}
SCALING_TARGET = 1.9
COLUMNS = ["work", "images", "published ms", "here ms", "ratio", "target", "images/s"]
COLUMNS += ["TFLOP/s", "of the peak", "GiB published", "GiB here", "first step s"]


def main(args: argparse.Namespace) -> None:
    found = {name: read(args.results, name) for name in (*FILES, "finetune_2")}
    about = found["finetune"]
    text = [
        f"One {about['device']}, PyTorch {about['torch']}, {about['precision']}; medians of "
        f"{about['rounds']} rounds of {about['steps']} steps, both sides in turn. A large bf16 "
        f"product reaches {about['matmul_peak']:.0f} TFLOP/s here.",
        testbed.table(COLUMNS, [row for name in FILES for row in rows_of(found[name])]),
        f"Finetuning on {found['finetune_2']['processes']} GPUs, images a GPU (target: "
        f"{SCALING_TARGET} times the images of one):",
        testbed.table(
            ["images a GPU", "ms on one", "ms on two", "times the images"],
            scaling(found["finetune"], found["finetune_2"]),
        ),
    ]
    page = REPOSITORY / "docs" / "performance.md"
    testbed.write_tables(page, Path(__file__).name, "\n\n".join(text))


def read(folder: Path, name: str) -> dict:
    """One result; FileNotFoundError or ValueError that names it."""
    return read_json(folder / f"{name}.json", "make it with scripts/benchmark.py --json")


def rows_of(result: dict) -> list[list[str]]:
    """The table's lines of a result: one a batch size and each side of ours."""
    sides = {(row["work"], row["batch"], row["side"]): row for row in result["rows"]}
    lines = []
    for (work, batch, side), row in sides.items():
        if side == "published":
            continue
        other = sides[work, batch, "published"]
        target = TARGETS.get((work, batch)) if side == "here" else None
        share = row.get("share_of_peak")
        lines.append([
            work + side.removeprefix("here").replace(",", ""),
            f"{batch}",
            f"{other['ms']:.1f}",
            f"{row['ms']:.1f}",
            f"{row['ratio']:.2f}",
            "" if target is None else f"{target:g}",
            f"{row['images_per_sec']:.0f}",
            "" if row.get("tflops") is None else f"{row['tflops']:.0f}",
            "" if share is None else f"{share:.0%}",
            f"{other['peak_memory_gib']:.1f}",
            f"{row['peak_memory_gib']:.1f}",
            f"{row['first_step_s']:.0f}",
        ])  # fmt: skip
    return lines


def scaling(one: dict, two: dict) -> list[list[str]]:
    """Milliseconds of a step alone and beside another, at equal images a GPU."""
    single = {r["batch"]: r["ms"] for r in one["rows"] if r["side"] == "here"}
    lines = []
    for row in two["rows"]:
        if row["side"] == "here":
            ms = single[row["batch"]]
            times = two["processes"] * ms / row["ms"]
            lines.append([f"{row['batch']}", f"{ms:.1f}", f"{row['ms']:.1f}", f"{times:.2f}"])
    return lines


def parse_args() -> argparse.Namespace:
    parser = arguments.parser(__doc__)
    default = REPOSITORY / "docs" / "results" / "performance"
    parser.add_argument("--results", type=Path, default=default, help="folder of the JSONs")
    return parser.parse_args()


if __name__ == "__main__":
    distributed.run(main, parse_args())
