"""Builds the model of a GraftPlan and says of every tensor where it came from.

Sources, in the order of preference: a distilled operator's file (`graft_weights`), the grafted
checkpoint where it holds the same operator, the base DiT for operators that stay original, the
replaced operator where the plan says `graft_init: inherit`, and fresh initialisation. A tensor that
a file holds and the model has no place for is dropped by name with its reason, or is an error;
nothing is loaded by halves.

The file of a parallel pair (`graft_weights`, "pair") holds both of its blocks, operators and all,
and its merge, and comes before every other source; a merge that no file holds starts as the sum.

A self-graft has the tensors of the operator it replaces. Which of the two a file holds is known
from the plan inside it; of a file without one, a slot is read as the graft where the plan
self-grafts it and as the original elsewhere, with a note.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from models.dit import DiT
from models.graft_plan import PAIR
from models.operators import build_operator
from models.plan import Graft, GraftPlan, differences, load_plan, with_base
from models.presets import build_model
from models.restructure import MERGES, parallelize
from models.selection import GraftChoice, GraftPair, PairChoice
from models.tensor_sources import LoadReport, TensorSources
from models.weight_files import (
    check_encoder,
    check_finite,
    check_slots,
    check_whole,
    refuse_selection,
)
from models.weights import SLOTS, read_checkpoint

__all__ = [
    "Graft",
    "GraftPlan",
    "LoadReport",
    "build_choices",
    "build_grafted",
    "build_open",
    "build_open_pairs",
    "gated_in",
    "graft",
    "load_plan",
    "load_trained",
    "new_parts",
    "variants_of",
    "with_base",
]


def graft(model: DiT, plan: GraftPlan, pairs: bool = False) -> DiT:
    """Puts the plan's operators into `model` and makes its pairs parallel, in place.

    Args:
        model: an ungrafted model of the plan's preset.
        pairs: keep the original beside each graft, as a GraftPair (for layer selection).
    """
    for entry in plan.grafts:
        for block in entry.blocks:
            slot = SLOTS[entry.slot]
            operator = build_operator(entry.operator, **entry.config)
            if pairs:
                operator = GraftPair(getattr(model.blocks[block], slot), operator)
            setattr(model.blocks[block], slot, operator)
    return parallelize(model, plan.parallel_pairs) if plan.parallel_pairs else model


def build_grafted(
    plan: GraftPlan, weights: bool = True, pairs: bool = False
) -> tuple[DiT, LoadReport]:
    """The plan's model on the CPU, in float32, and where each tensor came from.

    Args:
        plan: from `load_plan`.
        weights: False leaves every tensor at its initialisation (for callers that load their own).
        pairs: hold original and graft side by side, for layer selection.

    Raises:
        FileNotFoundError: a weight file is missing; says where it was looked for.
        ValueError: a file holds another model, operator, configuration or block list than the plan.
    """
    has_files = plan.base_ckpt_path is not None or plan.grafted_ckpt_path is not None
    # A file replaces every tensor of the DiT itself, so that none needs memory or a start.
    with torch.device("meta") if weights and has_files else nullcontext():
        model = build_model(plan)
    graft(model, plan, pairs)
    own = model.state_dict()
    if not weights:
        return model, LoadReport(dict.fromkeys(own, "fresh"))
    sources = TensorSources(plan, own, pairs)
    for pair in plan.parallel_pairs:
        sources.fill_pair(pair)
    sources.fill_outside_slots()
    for block in range(plan.depth):
        for slot in SLOTS:
            sources.fill_slot(block, slot)
    report = sources.finish()
    tensors = {n: t.to(torch.float32, copy=True) for n, t in sources.tensors.items()}
    model.load_state_dict(tensors, strict=True, assign=True)
    return model, report


def gated_in(plans: Sequence[GraftPlan], choose: str) -> dict:
    """What the gates choose between, as arguments of `LayerGates`.

    Args:
        plans: of --config and of --candidates.
        choose: "grafts", as `variants_of`, or "pairs": which of the plan's parallel pairs stay in
            sequence.

    Raises:
        ValueError: as `variants_of`; pairs of several plans, or of one that has none.
    """
    if choose == "grafts":
        return {"variants": variants_of(plans)}
    if len(plans) > 1:
        raise ValueError(
            "--candidates: grafts of several YAMLs compete for a block, but parallel pairs are "
            "chosen from one: drop --candidates, or choose between grafts with --choose grafts"
        )
    if not plans[0].parallel_pairs:
        raise ValueError(
            f"{plans[0].path}: has no parallel pairs to choose from: name the candidates in its "
            "restructure, as in restructure: parallel_pairs"
        )
    return {"pairs": plans[0].parallel_pairs}


def new_parts(plan: GraftPlan, choose: str) -> tuple[str, ...]:
    """What a model for selection has beyond its pretrained model, by texts in its tensors' names.

    Grafted operators, and the merges of open pairs. Names are read with a dot before them.
    """
    if choose == "grafts":
        return (".graft.", ".grafts.")
    operators = (f".blocks.{b}.{SLOTS[g.slot]}." for g in plan.grafts for b in g.blocks)
    return (".merge.", *operators)


def variants_of(plans: Sequence[GraftPlan]) -> list[list[int]]:
    """For each block the plans that graft it, counted from 1: `LayerGates`' variants.

    Raises:
        ValueError: a plan without grafts, the same plan twice, or plans of different models.
    """
    for number, plan in enumerate(plans):
        if any(plan.path.resolve() == other.path.resolve() for other in plans[:number]):
            raise ValueError(f"{plan.path}: competes with itself; name each YAML once")
    if len(plans) > 1 and plans[0].base_ckpt_path is None and plans[0].grafted_ckpt_path is None:
        raise ValueError(
            f"{plans[0].path}: names neither base_ckpt_path nor grafted_dit_ckpt_path; grafts that "
            "compete need the model that they belong in"
        )
    for plan in plans:
        if not plan.grafts:
            raise ValueError(
                f"{plan.path}: has no grafts; selection chooses between them, or with --choose "
                "pairs between parallel pairs"
            )
        for key in ("model_name", "image_size", "num_classes", "parallel_pairs"):
            first, value = getattr(plans[0], key), getattr(plan, key)
            if value != first:
                raise ValueError(
                    f"{plan.path}: {key} {value} differs from {first} of {plans[0].path}: grafts "
                    "that compete are of one model"
                )
    return [
        [v for v, plan in enumerate(plans, start=1) if block in plan.grafted_blocks()]
        for block in range(plans[0].depth)
    ]


def build_choices(plans: Sequence[GraftPlan], seed: int) -> tuple[DiT, list[LoadReport]]:
    """A model for selection in which the grafts of several plans compete, one variant a plan.

    Every slot that some plan grafts holds a GraftPair (of one plan) or a GraftChoice (of several).
    All that no graft can touch, and the originals, are the first plan's. Fresh grafts of each plan
    start from `seed`, so that another call gives the same model.

    Raises:
        FileNotFoundError, ValueError: as `build_grafted`.
    """
    torch.manual_seed(seed)
    model, report = build_grafted(plans[0], pairs=True)
    if len(plans) == 1:
        return model, [report]
    reports = [report]
    grafts = [_grafts_of(model)]  # a plan: (block, slot) -> its operator
    for variant, plan in enumerate(plans[1:], start=2):
        torch.manual_seed(seed + variant)
        other, report = build_grafted(plan, pairs=True)
        grafts.append(_grafts_of(other))
        reports.append(report)
        del other  # one model besides the first at a time
    for i, slot in sorted({place for own in grafts for place in own}):
        operators = [own[i, slot] for own in grafts if (i, slot) in own]
        numbers = iter(range(len(operators)))
        takes = [next(numbers) if (i, slot) in own else None for own in grafts]
        held = getattr(model.blocks[i], slot)
        original = held.original if isinstance(held, GraftPair) else held
        setattr(model.blocks[i], slot, GraftChoice(original, operators, takes))
    return model, reports


def build_open(plans: Sequence[GraftPlan], choose: str, seed: int) -> tuple[DiT, list[LoadReport]]:
    """The model for selection: `build_choices`, or with choose "pairs" `build_open_pairs`."""
    if choose == "grafts":
        return build_choices(plans, seed)
    model, report = build_open_pairs(plans[0], seed)
    return model, [report]


def build_open_pairs(plan: GraftPlan, seed: int) -> tuple[DiT, LoadReport]:
    """A model for selection among a plan's parallel pairs: a PairChoice stands for every merge.

    In sequence run the blocks of the plan without its pairs. A pair whose file `graft_weights`
    names is made of its own two blocks, from there; any other shares those that run in sequence,
    and its merge starts as the sum. The plan's grafts stand in both. Fresh ones start from `seed`.

    Raises:
        FileNotFoundError, ValueError: as `build_grafted`; a pair that the grafted checkpoint has
            joined already, or whose file alone holds a graft, so that nothing could run in
            sequence.
    """
    torch.manual_seed(seed)
    joined, of_pairs = build_grafted(plan)
    for pair in plan.parallel_pairs:
        if of_pairs.sources[f"{MERGES}{pair[0]}.weight"] == "checkpoint":
            raise ValueError(
                f"{plan.path}: {plan.grafted_ckpt_path} holds the pair {list(pair)} in parallel, "
                "and how its blocks run in sequence nowhere: choose from a model that has no "
                "parallel pairs yet, with distilled ones in graft_weights"
            )
    torch.manual_seed(seed)
    files = {place: file for place, file in plan.graft_weights.items() if place[1] != PAIR}
    model, report = build_grafted(replace(plan, parallel_pairs=(), graft_weights=files))
    sources = dict(report.sources)
    for pair in plan.parallel_pairs:
        merge, own = f"{MERGES}{pair[0]}.", {}
        if (pair[0], PAIR) in plan.graft_weights:
            _check_in_sequence(plan, pair, report)
            own = {i: joined.blocks[i] for i in pair}
        choice = PairChoice(joined.merges[str(pair[0])], own)
        model.merges[str(pair[0])] = choice
        for name in choice.state_dict():
            sources[merge + name] = of_pairs.sources[
                name if name.startswith("blocks.") else merge + name.removeprefix("merge.")
            ]
    resolved = {**of_pairs.resolved, **report.resolved}
    return model, replace(report, sources=sources, resolved=resolved)


def _check_in_sequence(plan: GraftPlan, pair: tuple[int, int], report: LoadReport) -> None:
    """Raises ValueError for a graft that only the file of its parallel pair holds."""
    for graft in plan.grafts:
        for block in {*pair} & {*graft.blocks}:
            place = f"blocks.{block}.{SLOTS[graft.slot]}."
            starts = {source for name, source in report.sources.items() if name.startswith(place)}
            if "fresh" in starts and plan.graft_init != "inherit":
                raise ValueError(
                    f"{plan.path}: graft_weights: {pair[0]}: the pair's file holds "
                    f"{graft.operator} of block {block} for running in parallel alone; in sequence "
                    "it would start anew: name a grafted_dit_ckpt_path that holds it, or say "
                    "graft_init: inherit"
                )


def _grafts_of(model: DiT) -> dict[tuple[int, str], torch.nn.Module]:
    """The grafts of all pairs of a model, by block and attribute."""
    return {
        (i, slot): getattr(block, slot).graft
        for i, block in enumerate(model.blocks)
        for slot in SLOTS.values()
        if isinstance(getattr(block, slot), GraftPair)
    }


def load_trained(model: DiT, plan: GraftPlan, path: str | Path) -> None:
    """Loads a whole trained model, in place: a checkpoint of this plan, or weights of its shape.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the checkpoint is of another architecture or text encoder; names what differs.
    """
    state, stored = read_checkpoint(path)
    refuse_selection(str(path), state)
    check_encoder(str(path), stored, plan)
    differing = "" if stored is None else differences(plan.architecture(), stored)
    if differing:
        raise ValueError(f"{path}: was trained with another plan than {plan.path}: {differing}")
    check_slots(str(path), state, plan)
    check_whole(str(path), state, model.state_dict(), plan)
    for name, tensor in state.items():
        check_finite(str(path), name, tensor)
    model.load_state_dict(state, strict=True)
