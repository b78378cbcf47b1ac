"""What each stage of scripts/road_mini.sh came to, as a table.

python scripts/road_table.py runs/road
python scripts/road_table.py runs/road --json docs/results/road.json --page docs/distillation.md
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models.files import read_json, write_json
from scripts import testbed
from training import arguments, distributed

MODEL = "DiT-Mini-2"
FIX = "run scripts/road_mini.sh to its end first"
COLUMNS = ["stage", "steps", "measured", "at first", "at last"]


def summary(road: Path) -> dict:
    """What the run folders of a finished road say, as a JSON may hold it.

    Raises:
        ValueError: a stage is missing, or has not come to its end.
    """
    errors = [row for row in _rows(road, "distill") if any(map(_is_error, row))]
    answer = _read(road / f"selection-{MODEL}" / "selection.json")
    score = _read(road / "samples" / "metrics.json")
    return {
        "distill": [{"step": row["step"], **_spread(row)} for row in (errors[0], errors[-1])],
        **{name: _ends(_rows(road, name), "mse") for name in ("stage2", "final")},
        "selection": _ends(_rows(road, "selection"), "loss"),
        "kept": answer["kept"],
        "confidence": statistics.mean(group["confidence"] for group in answer["groups"]),
        "options": sorted({len(group["options"]) for group in answer["groups"]}),
        "metrics": score["metrics"],
        "num_samples": score["num_samples"],
        **{key: answer[key] for key in ("git_revision", "torch", "python", "hardware", "time")},
    }


def _read(path: Path) -> dict:
    if not path.is_file():
        raise ValueError(f"{path}: missing: {FIX}")
    return read_json(path, FIX)


def _rows(road: Path, stage: str) -> list[dict]:
    path = road / f"{stage}-{MODEL}" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    if not rows:
        raise ValueError(f"{path}: missing or empty: {FIX}")
    return rows


def _is_error(key: str) -> bool:
    return key.startswith("val_error/")


def _spread(row: dict) -> dict:
    errors = [value for key, value in row.items() if _is_error(key)]
    return {"median": statistics.median(errors), "min": min(errors), "max": max(errors)}


def _ends(rows: list[dict], key: str) -> list[dict]:
    return [{"step": row["step"], key: row[key]} for row in (rows[0], rows[-1])]


def as_table(found: dict) -> str:
    """The Markdown of a `summary`."""

    def error(row: dict) -> str:
        return f"{row['median']:.2f} ({row['min']:.2f} to {row['max']:.2f})"

    lines = [
        [
            "1 Stage 1, 75 %",
            str(found["distill"][1]["step"]),
            "relative error of an operator's output: median of the blocks (least to greatest)",
            *map(error, found["distill"]),
        ]
    ]
    for number, stage, name, key, what in (
        (2, "Stage 2, 75 %", "stage2", "mse", "training MSE"),
        (3, "selection, 75 % to 50 %", "selection", "loss", "training loss"),
        (4, "finetuning, 50 %", "final", "mse", "training MSE"),
    ):
        first, last = found[name]
        values = (f"{first[key]:.4f}", f"{last[key]:.4f}")
        lines.append([f"{number} {stage}", str(last["step"]), what, *values])
    scores = ", ".join(f"{name} {value:.3f}" for name, value in found["metrics"].items())
    options = " or ".join(map(str, found["options"]))
    return (
        f"{testbed.table(COLUMNS, lines)}\n\n"
        f"Kept: {', '.join(map(str, found['kept']))}; mean confidence {found['confidence']:.2f}, "
        f"with {options} options a group. {found['num_samples']} samples: {scores}. Made at "
        f"revision {found['git_revision'][:8]} with PyTorch {found['torch']} on "
        f"{found['hardware']}."
    )


def main(args: argparse.Namespace) -> None:
    found = summary(args.road)
    if args.json is not None:
        write_json(args.json, found)
    if args.page is not None:
        testbed.write_tables(args.page, Path(__file__).name, as_table(found))
    print(as_table(found))


def parse_args() -> argparse.Namespace:
    parser = arguments.parser(__doc__)
    parser.add_argument("road", type=Path, help="OUT of road_mini.sh")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    parser.add_argument("--page", type=Path, help="write the table here, between its two markers")
    return parser.parse_args()


if __name__ == "__main__":
    distributed.run(main, parse_args())
