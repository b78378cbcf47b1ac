"""How far several runs of prune_by_learning.py agree, for example under different seeds.

    for seed in 0 1 2; do python prune_by_learning.py ... --global-seed $seed --prefix s$seed; done
    python scripts/compare_selections.py outputs/s?-DiT-XL-2

Prints a column a block and a line a run (K keeps the original, g takes the graft, 2, 3, ... a graft
of --candidates), the share of runs that keep each block, and per group how many runs chose its most
frequent option. For runs over the same model and groups. Pairs of blocks go by their first block: K
runs in sequence, g in parallel.
"""

import argparse
import json
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models.files import read_json
from training import arguments, distributed

SAME = ("groups_spec", "slots", "pinned", "variants")
OPTIONAL = ("variants", "chosen")


def read_answer(path: Path) -> dict:
    """The selection.json of a run folder, or the file itself."""
    file = path / "selection.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; has prune_by_learning.py finished there?")
    answer = read_json(file, "run prune_by_learning.py again")
    for key in ("kept", "grafted", "groups", *SAME):
        if key not in answer and key not in OPTIONAL:
            raise ValueError(f"{file}: has no {key!r}: run prune_by_learning.py again")
    return answer


def compare(answers: list[dict]) -> dict:
    """What the runs share, as plain data.

    Returns:
        "blocks": those that were in question, "kept_share": per block of these the share of runs
        that keep it; "groups": per group its blocks, its
        most frequent choice and in how many runs; "unanimous": share of the blocks that all runs
        treat alike; "pairwise": mean share of two runs' kept blocks that they have in common;
        "by_chance": that share for two independent uniform choices.
    """
    choices = [choice(answer) for answer in answers]
    blocks = list(choices[0])
    groups = []
    for g, group in enumerate(answers[0]["groups"]):
        span = group["blocks"]
        taken = Counter(tuple(c[b] for b in span) for c in choices)
        row, times = taken.most_common(1)[0]
        kept = [b for b, variant in zip(span, row, strict=True) if variant == 0]
        confidence = [answer["groups"][g]["confidence"] for answer in answers]
        groups.append({"blocks": span, "kept": kept, "runs": times, "confidence": confidence})
    kept = [set(answer["kept"]) for answer in answers]
    pairs = [len(a & b) / max(1, len(a)) for a, b in combinations(kept, 2)]
    return {
        "runs": len(answers),
        "blocks": blocks,
        "kept_share": [sum(c[b] == 0 for c in choices) / len(choices) for b in blocks],
        "groups": groups,
        "unanimous": sum(len({c[b] for c in choices}) == 1 for b in blocks) / len(blocks),
        "pairwise": sum(pairs) / len(pairs),
        "by_chance": chance(answers[0]),
    }


def choice(answer: dict) -> dict[int, int]:
    """Block -> 0 where the original is kept, else the variant."""
    variants = {int(b): v for b, v in answer.get("chosen", {}).items()}
    blocks = sorted(answer["kept"] + answer["grafted"])
    return {b: 0 if b in answer["kept"] else variants.get(b, 1) for b in blocks}


def chance(answer: dict) -> float:
    """Expected share of common kept blocks of two uniform draws of options."""
    common = 0.0
    for group in answer["groups"]:
        options = group["options"]
        for block in group["blocks"]:
            common += (sum(block in o["keeps"] for o in options) / len(options)) ** 2
    return common / max(1, len(answer["kept"]))


def main(args: argparse.Namespace) -> None:
    answers = [read_answer(path) for path in args.runs]
    if len(answers) < 2:
        raise ValueError("one run agrees with itself: give at least two")
    for path, answer in zip(args.runs, answers, strict=True):
        for key in SAME:
            mine, first = answer.get(key), answers[0].get(key)
            if mine != first:
                raise ValueError(f"{path}: {key} {mine} differs from {first} of {args.runs[0]}")
    found = compare(answers)
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    marks = {0: "K", 1: "g"}
    width = max(len(str(path)) for path in args.runs)
    print(" " * width, " ".join(f"{b:3d}" for b in found["blocks"]))
    for path, answer in zip(args.runs, answers, strict=True):
        taken = choice(answer).values()
        print(f"{path!s:{width}}", " ".join(f"{marks.get(v, str(v)):>3}" for v in taken))
    print(f"{'% kept':{width}}", " ".join(f"{round(100 * s):3d}" for s in found["kept_share"]))
    for group in found["groups"]:
        low, high = min(group["confidence"]), max(group["confidence"])
        print(
            f"blocks {group['blocks'][0]} to {group['blocks'][-1]}: {group['runs']} of "
            f"{found['runs']} runs keep {group['kept']}; confidence {low:.2f} to {high:.2f}"
        )
    print(
        f"two runs share {found['pairwise']:.0%} of their kept blocks (two random choices "
        f"{found['by_chance']:.0%}); {found['unanimous']:.0%} of the blocks are the same in all"
    )


def parse_args() -> argparse.Namespace:
    parser = arguments.parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, or selection.json files")
    parser.add_argument("--json", type=Path, help="write the comparison here too")
    return parser.parse_args()


if __name__ == "__main__":
    distributed.run(main, parse_args())
