"""Cuts the miniature testbed's contact sheets into an image folder.

Input: assets/mini/images (labels.csv and one lossless sheet a class; 1892 pictures of 64x64 RGB).
Output: <out>/{train,heldout}/<class_id>_<class name>/<code point>.png. Sorted folder names give
the class ids of labels.csv, so torchvision's ImageFolder and extract_features.py read it as it is.
Every picture is checked against labels.csv; a picture that is already there and right is kept.

    python scripts/unpack_mini.py --out data/mini
"""

import argparse
import csv
import hashlib
import os
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from training import arguments, distributed

SHEETS = Path(__file__).resolve().parent.parent / "assets" / "mini" / "images"
COLUMNS = 24  # pictures in a row of a sheet; a class fills its sheet in the order of labels.csv


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("data/mini"), help="folder to write")
    parser.add_argument("--sheets", type=Path, default=SHEETS, help="the sheets and labels.csv")
    return parser.parse_args(argv)


def pixel_digest(pixels: np.ndarray) -> str:
    """First 12 hex digits of the sha256 of a picture's raw bytes; pixels uint8 [H, W, 3]."""
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()[:12]


def folder_name(class_id: int, class_name: str) -> str:
    return f"{class_id}_" + re.sub(r"[^a-z0-9]+", "_", class_name.lower()).strip("_")


def read_rows(sheets: Path) -> list[dict[str, str]]:
    path = sheets / "labels.csv"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: point --sheets at the folder that holds it")
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def cut_sheet(path: Path) -> np.ndarray:
    """A sheet's cells in reading order, uint8 [cells, S, S, 3]; the last row may hold blanks."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: labels.csv lists pictures of its class")
    with Image.open(path) as image:
        sheet = np.asarray(image.convert("RGB"))
    size = sheet.shape[1] // COLUMNS
    rows = np.split(sheet, sheet.shape[0] // size, axis=0)
    return np.stack([cell for row in rows for cell in np.split(row, COLUMNS, axis=1)])


def is_whole(path: Path, digest: str) -> bool:
    if not path.is_file():
        return False
    try:
        with Image.open(path) as image:
            return pixel_digest(np.asarray(image.convert("RGB"))) == digest
    except OSError:  # cut short by an earlier interruption: it is written again
        return False


def unpack(sheets: Path, out: Path) -> Counter:
    """Writes the image folder; returns how many pictures each (split, folder) holds."""
    rows = read_rows(sheets)
    names = {int(row["class_id"]): row["class_name"] for row in rows}
    counts: Counter = Counter()
    for class_id in sorted(names):
        folder = folder_name(class_id, names[class_id])
        sheet = sheets / f"{folder}.webp"
        members = [row for row in rows if int(row["class_id"]) == class_id]
        # zip stops at the shorter: a sheet's last row is padded with blank cells.
        for row, pixels in zip(members, cut_sheet(sheet), strict=False):
            if pixel_digest(pixels) != row["sha256_12"]:
                raise ValueError(
                    f"{sheet}: picture {row['filename']} differs from sha256_12 "
                    f"{row['sha256_12']} in labels.csv: restore both files from the repository"
                )
            path = out / row["split"] / folder / row["filename"]
            counts[row["split"], folder] += 1
            if is_whole(path, row["sha256_12"]):
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            Image.fromarray(pixels).save(partial, format="PNG")
            os.replace(partial, path)
    if sum(counts.values()) != len(rows):
        raise ValueError(
            f"{sheets}: the sheets hold {sum(counts.values())} of the {len(rows)} pictures in "
            "labels.csv: restore the folder from the repository"
        )
    return counts


def main(args: argparse.Namespace) -> None:
    counts = unpack(args.sheets, args.out)
    for split, folder in sorted(counts, reverse=True):
        print(f"{split:<8} {folder:<20} {counts[split, folder]:>5}")
    print(f"{sum(counts.values())} pictures in {args.out}")


if __name__ == "__main__":
    distributed.run(main, parse_args())
