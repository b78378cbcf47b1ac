"""Opened weight files: what they hold block by block, and whether it is the plan's model."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from models.config_files import shown
from models.graft_plan import GraftPlan, encoder_differences
from models.operators import OPERATORS
from models.weights import (
    PIXART_PARTS,
    SLOTS,
    depth_of,
    is_of_pixart,
    operator_of,
    read_checkpoint,
    tensors_at,
)

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Held:
    """What a file holds in one slot. `original`: True, False, or None where it cannot be told."""

    operator: str
    tensors: Mapping[str, torch.Tensor]
    config: Mapping | None  # of a graft, where the file says it
    original: bool | None


class OpenedFile:
    """A weight file of the plan's depth, read.

    Attributes:
        label: "base" or "checkpoint".
        left: names of the tensors that have found no place yet.
        tells: the file holds a plan, which says what is grafted.

    Raises:
        ValueError: another depth, another text encoder than the plan says, or a checkpoint of layer
            selection.
    """

    def __init__(self, label: str, path: Path, plan: GraftPlan) -> None:
        self.label, self.path, self.captioned = label, path, plan.captioned
        self.tensors, stored = read_checkpoint(path)
        refuse_selection(str(self), self.tensors)
        check_depth(str(self), self.tensors, plan)
        check_encoder(str(self), stored, plan)
        self.left = set(self.tensors)
        self.tells = stored is not None
        grafts = stored["grafts"] if stored is not None else []
        self.grafts = {(b, g["slot"]): g for g in grafts for b in g["blocks"]}

    def __str__(self) -> str:
        return shown(self.path)

    def held(self, block: int, slot: str) -> Held | None:
        """None when the tensors are those of no known operator."""
        tensors = tensors_at(self.tensors, block, slot)
        operator = operator_of(tensors, slot)
        if operator is None:
            return None
        told = self.grafts.get((block, slot))
        if told is not None:
            return Held(told["operator"], tensors, told["config"], original=False)
        if self.captioned:  # whose originals have names of their own
            return Held(operator, tensors, None, original=is_of_pixart(tensors, slot))
        if not _like_original(operator, tensors):
            return Held(operator, tensors, None, original=False)
        return Held(operator, tensors, None, original=True if self.tells else None)


def _like_original(operator: str, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether an operator has the names and proportions of the pretrained DiT's."""
    if operator == "mlp":
        hidden, width = tensors["fc1.weight"].shape
        return hidden == 4 * width
    return operator == "mha"


def refuse_selection(file: str, state: Mapping) -> None:
    """Raises ValueError for a training state of layer selection, which holds gates and pairs."""
    if any(name.startswith("gates.") for name in state):
        raise ValueError(
            f"{file}: is a checkpoint of prune_by_learning.py: finetune its selected.yaml, or use "
            "--save-model"
        )


def check_encoder(file: str, stored: Mapping | None, plan: GraftPlan) -> None:
    """Raises ValueError where a checkpoint's plan and this one tell of different text encoders."""
    for different in encoder_differences(plan.architecture(), stored or {}):
        raise ValueError(
            f"{file}: was trained on embeddings of another encoder than the prompts': {different}; "
            "name that of the checkpoint with --text-encoder or in the YAML's sample_config"
        )


def pairs_in(state: Mapping) -> list[tuple[int, int]]:
    """The parallel pairs whose merges a state dict holds."""
    firsts = {int(m[1]) for m in (re.match(r"merges\.(\d+)\.", name) for name in state) if m}
    return [(first, first + 1) for first in sorted(firsts)]


def other_pairs(file: str, pairs: list[tuple[int, int]], plan: GraftPlan) -> ValueError:
    """The error of a file whose parallel pairs are not the plan's."""

    def listed(pairs) -> str:
        return f"{[list(pair) for pair in pairs]}" if pairs else "none"

    return ValueError(
        f"{file}: holds the parallel pairs {listed(pairs)}; {plan.path} has "
        f"{listed(plan.parallel_pairs)}: name them in its restructure, or another file"
    )


def check_depth(file: str, state: Mapping, plan: GraftPlan) -> None:
    """Raises ValueError unless the file has as many blocks as the plan's model."""
    depth = depth_of(state)
    if depth != plan.depth:
        raise ValueError(
            f"{file}: holds {depth or 'no'} blocks; {plan.model_name} of {plan.path} has "
            f"{plan.depth}"
        )


def check_whole(file: str, state: Mapping, wanted: Mapping, plan: GraftPlan) -> None:
    """Raises ValueError at the first tensor of `state` that is not as `wanted`."""
    for name in [*wanted, *state]:
        check_tensor(file, name, state.get(name), wanted.get(name), plan)


def check_slots(file: str, state: Mapping, plan: GraftPlan) -> None:
    """Raises ValueError for other parallel pairs than the plan's, or at the first block that does
    not hold the operators of the plan."""
    check_depth(file, state, plan)
    if pairs_in(state) != list(plan.parallel_pairs):
        raise other_pairs(file, pairs_in(state), plan)
    for block in range(plan.depth):
        for slot in SLOTS:
            tensors, entry = tensors_at(state, block, slot), plan.graft_at(block, slot)
            found = operator_of(tensors, slot)
            if found is None:
                raise unknown_operator(file, tensors, block, slot, plan)
            if found != (slot if entry is None else entry.operator):
                raise ValueError(
                    f"{file}: block {block} holds {found!r} in its {slot} slot; {plan.path} wants "
                    f"{wanted(plan, block, slot)} there"
                )


def unknown_operator(
    file: str, tensors: Mapping, block: int, slot: str, plan: GraftPlan
) -> ValueError:
    """The error of a slot whose tensors are those of no operator; names those of the plan's."""
    entry = plan.graft_at(block, slot)
    spec = OPERATORS[slot if entry is None else entry.operator]
    names, optional = spec.tensors, spec.optional_tensors
    if plan.captioned and entry is None:
        names = {name for parts in PIXART_PARTS[slot].values() for name in parts}
        optional = set()
    tells = {
        "missing": sorted(names - tensors.keys()),
        "left over": sorted(tensors.keys() - names - optional),
    }
    said = "; ".join(f"{word}: {_few(names)}" for word, names in tells.items() if names)
    return ValueError(
        f"{file}: block {block}: the {slot} slot holds no known operator; {plan.path} wants "
        f"{wanted(plan, block, slot)} there ({said})"
    )


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def wanted(plan: GraftPlan, block: int, slot: str) -> str:
    """What the plan has in a slot, for messages."""
    entry = plan.graft_at(block, slot)
    if entry is None:
        return f"the original {slot}"
    ratio = entry.config.get("expansion_ratio")
    return repr(entry.operator) + (f" of expansion_ratio {ratio}" if ratio is not None else "")


def check_tensor(
    file: str,
    name: str,
    there: torch.Tensor | None,
    here: torch.Tensor | None,
    plan: GraftPlan,
) -> None:
    """Raises ValueError unless the tensor is in the file (`there`) as in the model (`here`)."""
    told = "captions" if plan.captioned else f"{plan.num_classes} classes"
    model = f"{plan.path} ({plan.describe()}, {told})"
    if there is None:
        raise ValueError(f"{file}: tensor {name} is missing; the model of {model} has it")
    if here is None:
        raise ValueError(f"{file}: tensor {name} has no place in the model of {model}")
    if there.shape != here.shape:
        raise ValueError(
            f"{file}: tensor {name} has shape {list(there.shape)}; the model of {model} needs "
            f"{list(here.shape)}{_meaning(name, there.shape, here.shape)}"
        )
    if there.dtype not in FLOATS or there.layout is not torch.strided:
        kind = f"{there.layout}, {there.dtype}".replace("torch.", "").removeprefix("strided, ")
        legal = " or ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
        raise ValueError(f"{file}: tensor {name} is {kind}; weights are {legal}")


def check_finite(file: str, name: str, tensor: torch.Tensor) -> None:
    """Raises ValueError when a tensor holds NaN or infinity."""
    if tensor.is_meta or tensor.sum(dtype=torch.float64).isfinite():  # faster than all of them
        return
    bad = int((~tensor.isfinite()).sum())
    if bad:
        raise ValueError(
            f"{file}: tensor {name}: {bad} of {tensor.numel()} values are not finite: the training "
            "that wrote it had failed"
        )


def _meaning(name: str, there: torch.Size, here: torch.Size) -> str:
    """What a differing shape says of the whole model, for the two tensors that tell."""
    if name == "pos_embed":
        what = "hidden size" if there[-1] != here[-1] else "resolution"
        return f": the file is of another {what}"
    if name == "y_embedder.embedding_table.weight":
        return f": the file has {there[0] - 1} classes, the plan {here[0] - 1}"
    return ""


def block_of(name: str) -> int | None:
    """The block that a tensor's name lies in, a merge in its first block; None outside of all."""
    found = re.match(r"(?:blocks|merges)\.(\d+)\.", name)
    return int(found[1]) if found else None


def slot_of(name: str) -> tuple[int, str] | None:
    """Block and slot that a tensor's name lies in, or None outside the slots."""
    found = re.match(r"blocks\.(\d+)\.(\w+)\.", name)
    for slot, attribute in SLOTS.items():
        if found and found[2] == attribute:
            return int(found[1]), slot
    return None
