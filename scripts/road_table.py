"""What each stage of scripts/road_mini.sh came to, as a table.

python scripts/road_table.py runs/road
python scripts/road_table.py runs/road --json docs/results/road.json --page docs/distillation.md
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evaluation.page import read_lines
from models.files import read_json, write_json
from scripts import testbed
from training import arguments, distributed

MODEL = "DiT-Mini-2"
FIX = "run scripts/road_mini.sh to its end first"
MADE = ("git_revision", "torch", "python", "hardware", "time")
COLUMNS = ["stage", "steps", "measured", "at first", "at last"]


def summary(road: Path) -> dict:
    """What the run folders of a finished road say, as a JSON may hold it.

    Raises:
        ValueError: a stage is missing, has not come to its end, or left a file that is not whole.
    """
    ends = {
        "distill": _ends(road, "distill", _spread),
        **{name: _ends(road, name, partial(_value, "mse")) for name in ("stage2", "final")},
        "selection": _ends(road, "selection", partial(_value, "loss")),
    }
    answer = _read(road / f"selection-{MODEL}" / "selection.json")
    score = _read(road / "samples" / "metrics.json")
    return {
        **ends,
        "kept": answer["kept"],
        "confidence": statistics.mean(group["confidence"] for group in answer["groups"]),
        "options": sorted({len(group["options"]) for group in answer["groups"]}),
        "metrics": score["metrics"],
        "num_samples": score["num_samples"],
        "selected": {key: answer[key] for key in MADE},
        "scored": {key: score[key] for key in MADE},
    }


def _read(path: Path) -> dict:
    if not path.is_file():
        raise ValueError(f"{path}: missing: {FIX}")
    return read_json(path, FIX)


def _ends(road: Path, stage: str, measured: Callable[[dict], dict]) -> list[dict]:
    """What a stage measured first and last."""
    path = road / f"{stage}-{MODEL}" / "metrics.jsonl"
    try:
        rows = read_lines(path) if path.is_file() else []
    except ValueError as error:
        raise ValueError(f"{path} is not whole ({error}): {FIX}") from error
    found = [{"step": row["step"], **values} for row in rows if (values := measured(row))]
    if not found:
        raise ValueError(f"{path}: missing, or without what the stage measures: {FIX}")
    return [found[0], found[-1]]


def _spread(row: dict) -> dict:
    """Of the operators' relative errors, where a row has them and all are finite."""
    errors = [value for key, value in row.items() if key.startswith("val_error/")]
    if not errors or None in errors:
        return {}
    return {"median": statistics.median(errors), "min": min(errors), "max": max(errors)}


def _value(key: str, row: dict) -> dict:
    return {} if row.get(key) is None else {key: row[key]}


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
    made = [
        f"at revision {each['git_revision'][:8]} with PyTorch {each['torch']} on {each['hardware']}"
        for each in (found["selected"], found["scored"])
    ]
    options = " or ".join(map(str, found["options"]))
    return (
        f"{testbed.table(COLUMNS, lines)}\n\n"
        f"Kept: {', '.join(map(str, found['kept']))}; mean confidence {found['confidence']:.2f}, "
        f"with {options} options a group. {found['num_samples']} samples: {scores}. Made "
        f"{'; '.join(dict.fromkeys(made))}."
    )


def main(args: argparse.Namespace) -> None:
    found = summary(args.road)
    if args.page is not None:
        testbed.write_tables(args.page, Path(__file__).name, as_table(found))
    if args.json is not None:
        write_json(args.json, found)
    print(as_table(found))


def parse_args() -> argparse.Namespace:
    parser = arguments.parser(__doc__)
    parser.add_argument("road", type=Path, help="OUT of road_mini.sh")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    parser.add_argument("--page", type=Path, help="write the table here, between its two markers")
    return parser.parse_args()


if __name__ == "__main__":
    distributed.run(main, parse_args())
