r"""The guesses that a learned selection has to beat, as finished graft YAMLs.

    python scripts/guess_plans.py --config configs/75p_swa.yaml --keep 14 --out outputs/guesses \
        --locality outputs/locality/locality.json --seeds 0 1 2

Takes operator, weight files and sizes from a graft YAML, the candidate, and grafts n of the depth
blocks in all, in a pattern that needs no training (the grafting paper, arXiv 2506.05340,
compares four for Hyena-X in 14 of 28 blocks: FID 2.74 interleaved, 3.02 top-local, 3.18 low-local
and 4.00 deep):

    interleaved   every depth/n-th block, rounded up: 1, 3, 5, ... of 28 at half, and at three
                  quarters 1, 2, 3, 5, 6, 7, ..., the paper's patterns at these ratios
    deep          the last n blocks
    shallow       the first n blocks
    top-local     the n blocks with the largest L_k, whose attention is most local
    low-local     the n blocks with the smallest L_k
    random        the first n of the permutation latents.loader.epoch_order(blocks, seed, epoch 0),
                  which is Philox's and the same everywhere; one plan a seed

Among equal L_k the block that comes first goes first. With --within a pattern picks among the
candidate's grafted blocks alone, as a learned selection from this candidate must; an interleaved
block that is none of them is replaced by the nearest one that is free.

Output: <out>/<pattern>.yaml, and random_<seed>.yaml, which every entry takes as --config.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from latents.loader import epoch_order
from models.files import file_sha256, read_json
from models.graft_plan import Graft, GraftPlan
from models.locality import default_band
from models.operators import OPERATORS
from models.plan import INITS, load_plan, write_plan
from training import arguments, distributed

LOCAL = ("top-local", "low-local")
PATTERNS = ("interleaved", "deep", "shallow", *LOCAL, "random")


def main(args: argparse.Namespace) -> None:
    plan = load_plan(args.config_filepath)
    graft = the_graft(plan, args.slot)
    if args.graft_init == "inherit" and not OPERATORS[graft.operator].inherits:
        raise ValueError(
            f"--graft-init inherit: {graft.operator} shares no tensor with the operator it "
            "replaces; use fresh"
        )
    number = how_many(plan.depth, args.keep, args.ratio)
    eligible = list(graft.blocks) if args.within else list(range(plan.depth))
    if number > len(eligible):
        raise ValueError(
            f"--within: {number} grafts, but {plan.path} grafts {len(eligible)} blocks"
        )
    mass, origin = None, ""
    if set(args.patterns) & set(LOCAL):
        if graft.slot != "mha":
            raise ValueError("top-local and low-local order attention: name other --patterns")
        mass, origin = read_mass(args.locality, plan, args.band, eligible)
    chosen, headers = {}, {}
    for pattern in args.patterns:
        for seed in args.seeds if pattern == "random" else [None]:
            name = pattern if seed is None else f"{pattern}_{seed}"
            chosen[name] = pick(pattern, eligible, number, plan.depth, mass, seed)
            headers[name] = f"The guess {name}, by scripts/guess_plans.py from {plan.path.name}"
            headers[name] += f" and {origin}." if pattern in LOCAL else "."

    init = args.graft_init or plan.graft_init
    lacking = {name: untrained(plan, graft, blocks) for name, blocks in chosen.items()}
    if init is None and any(lacking.values()):
        which = "; ".join(f"{name} {blocks}" for name, blocks in lacking.items() if blocks)
        raise ValueError(
            f"{plan.path} has no weights of {graft.operator} for all blocks of these patterns: "
            f"{which}. Confine the patterns with --within, or say how such grafts start with "
            f"--graft-init {' or '.join(INITS)}"
        )
    for name, blocks in chosen.items():
        file = args.out / f"{name}.yaml"
        write(plan, graft, blocks, file, headers[name], args.graft_init)
        start = f"; {init} start: {' '.join(map(str, lacking[name]))}" if lacking[name] else ""
        print(f"{file}: {graft.operator} in {' '.join(map(str, blocks))}{start}")


def the_graft(plan: GraftPlan, slot: str | None) -> Graft:
    """The candidate's only graft, of `slot` or of all; ValueError when there is not just one."""
    found = [g for g in plan.grafts if slot in (None, g.slot)]
    if len(found) != 1:
        kinds = ", ".join(f"{g.operator} in {g.slot}" for g in plan.grafts) or "nothing"
        raise ValueError(
            f"{plan.path} grafts {kinds}: a guess places one operator; give a YAML with one"
            + (", or --slot" if slot is None and len(plan.grafts) > 1 else "")
        )
    return found[0]


def how_many(depth: int, keep: int | None, ratio: float | None) -> int:
    """Blocks to graft; ValueError when that is none or more than there are."""
    number = depth - keep if ratio is None else int(ratio * depth + 0.5)
    if not 1 <= number <= depth:
        given = f"--keep {keep}" if ratio is None else f"--ratio {ratio}"
        raise ValueError(f"{given}: grafts {number} of {depth} blocks; it must be 1 to {depth}")
    return number


def pick(
    pattern: str,
    eligible: Sequence[int],
    number: int,
    depth: int,
    mass: Sequence[float | None] | None = None,
    seed: int | None = None,
) -> list[int]:
    """Which `number` of the `eligible` blocks a pattern grafts, ascending.

    Args:
        mass: L_k of every block, for top-local and low-local.
        seed: for random.
    """
    if pattern == "interleaved":
        return interleave(eligible, number, depth)
    if pattern == "random":
        eligible = [eligible[i] for i in epoch_order(len(eligible), seed, epoch=0).tolist()]
    elif pattern == "deep":
        eligible = eligible[::-1]
    elif pattern in LOCAL:
        sign = -1 if pattern == "top-local" else 1
        eligible = sorted(eligible, key=lambda block: (sign * mass[block], block))
    return sorted(eligible[:number])


def interleave(eligible: Sequence[int], number: int, depth: int) -> list[int]:
    even = [-(-(i + 1) * depth // number) - 1 for i in range(number)]
    taken = {block for block in even if block in eligible}
    for block in even:
        if block not in eligible:
            free = [b for b in eligible if b not in taken]
            taken.add(min(free, key=lambda b, block=block: (abs(b - block), b)))
    return sorted(taken)


# -- files ---------------------------------------------------------------------


def read_mass(
    path: Path | None, plan: GraftPlan, band: int | None, blocks: Sequence[int]
) -> tuple[list[float | None], str]:
    """L_k of every block, from scripts/attention_locality.py, and words on where it is from.

    Raises:
        FileNotFoundError, ValueError: no file, or of another model or k, or `blocks` were grafted;
            the message holds the command that makes the right one.
    """
    command = "python scripts/attention_locality.py --data-path <latents> --config "
    command += f"{plan.path} --out {'<folder>' if path is None else path.parent}"
    command += "" if band is None else f" --band {band}"
    if path is None:
        rest = " ".join(p for p in PATTERNS if p not in LOCAL)
        raise ValueError(
            f"top-local and low-local need --locality; make it with: {command} (or leave them out: "
            f"--patterns {rest})"
        )
    if not path.is_file():
        raise FileNotFoundError(f"--locality {path}: no such file; make it with: {command}")
    content = read_json(path, f"make it again with: {command}")
    try:
        measured = {key: content["plan"][key] for key in ("model_name", "image_size")}
        found = [entry["mass"] for entry in content["blocks"]]
        band = default_band(content["num_tokens"]) if band is None else band
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is no locality.json; make it with: {command}") from error
    for key, value in measured.items():
        if value != getattr(plan, key):
            raise ValueError(
                f"{path} is of {key} {value}; make that of {plan.path} with: {command}"
            )
    null = [block for block in blocks if found[block] is None]
    if null:
        raise ValueError(f"{path}: blocks {null} held no attention; measure again with: {command}")
    if str(band) not in found[blocks[0]]:
        measured = " ".join(found[blocks[0]])
        raise ValueError(
            f"{path}: no L_{band}; --band takes {measured}, or measure with: {command}"
        )
    mass = [None if of_block is None else of_block[str(band)] for of_block in found]
    return mass, f"L_{band} of {path.name} (sha256 {file_sha256(path)[:12]})"


def untrained(plan: GraftPlan, graft: Graft, blocks: Sequence[int]) -> list[int]:
    """Those of `blocks` whose graft the candidate's files lack while they hold that of others."""
    held = {block for block, slot in plan.graft_weights if slot == graft.slot}
    if plan.grafted_ckpt_path is not None:
        held |= set(graft.blocks)
    return [b for b in blocks if b not in held] if held else []


def write(
    plan: GraftPlan, graft: Graft, blocks: list[int], path: Path, header: str, init: str | None
) -> None:
    """Writes the candidate's YAML with `graft` in `blocks`, and with `graft_init` when given."""
    moved = tuple(replace(g, blocks=tuple(blocks)) if g is graft else g for g in plan.grafts)
    plan = replace(plan, grafts=moved, graft_init=init or plan.graft_init)
    write_plan(plan, path, {graft.slot: blocks}, header)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.parser(__doc__)
    add = parser.add_argument
    add("--config-filepath", "--config", required=True, help="the candidate's graft YAML")
    amount = parser.add_mutually_exclusive_group(required=True).add_argument
    amount("--keep", type=arguments.nonnegative, help="blocks that keep the original operator")
    amount("--ratio", type=arguments.share, help="share of the blocks that is grafted")
    add("--out", type=Path, required=True, help="folder to write the YAMLs to")
    add(
        "--patterns",
        nargs="+",
        choices=PATTERNS,
        default=list(PATTERNS),
        metavar="P",
        help="of these",
    )
    add("--seeds", type=arguments.seed, nargs="+", default=[0], help="of random, a plan each")
    add("--locality", type=Path, help="locality.json of scripts/attention_locality.py")
    add("--band", type=arguments.positive, help="k of L_k (unset: tokens / 8, the paper's 32)")
    add("--within", action="store_true", help="graft only blocks that the candidate grafts")
    add("--slot", choices=("mha", "mlp"), help="for a candidate that grafts both")
    add(
        "--graft-init",
        choices=INITS,
        help="goes into the YAMLs: how a graft starts that no file of the candidate holds",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    distributed.run(main, parse_args())
