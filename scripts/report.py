"""A page about what was trained, sampled and scored: tables, sample grids, losses and gates.

Inputs:  RESULT, metrics.json files of evaluate_fid.py, and folders with such files, training runs
         or both, at any depth.
Outputs: <out>/report.html, one file that needs no other; <out>/report.md with images/.

    python scripts/report.py runs/quickstart
    python scripts/report.py outputs/swa_50p samples/swa_50p/metrics.json --out results/night

The page has a table of all scores, below each released model its published ones and below the table
those of the same operators (configs/zoo.yaml); then each set of samples with a grid, its origin and
what to doubt, all runs in one table and plot, and each with its loss and the probabilities of its
gates.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evaluation.page import build_sections, write_page
from models.config_files import REPOSITORY, read_yaml
from training import arguments, distributed


def main(args: argparse.Namespace) -> None:
    zoo = read_yaml(REPOSITORY / "configs" / "zoo.yaml")["models"]
    sections = build_sections(args.results, zoo)
    title = args.title or f"Report of {time.strftime('%Y-%m-%d')}"
    for page in write_page(args.out, title, sections):
        print(f"wrote {page}")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.parser(__doc__, "RESULT [RESULT ...]")
    add = parser.add_argument
    add("results", nargs="+", type=Path, metavar="RESULT", help="metrics.json or a folder")
    add("--out", type=Path, default=Path("report"), help="folder of the page")
    add("--title", help="heading of the page (unset: the date)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    distributed.run(main, parse_args())
