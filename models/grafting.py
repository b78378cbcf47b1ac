"""Builds the model of a GraftPlan and says of every tensor where it came from.

Sources, in the order of preference: a distilled operator's file (`graft_weights`), the grafted
checkpoint where it holds the same operator, the base DiT for operators that stay original, the
base DiT's replaced operator where the plan says `graft_init: inherit`, and fresh initialisation.
A tensor that a file holds and the model has no place for is dropped by name with its reason, or is
an error; nothing is loaded by halves.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from models.dit import PRESETS, DiT, build_dit
from models.operators import OPERATORS, build_operator
from models.plan import Graft, GraftPlan, find_file, load_plan, with_base
from models.selection import GraftPair
from models.weights import (
    SLOTS,
    depth_of,
    operator_of,
    read_checkpoint,
    read_state,
    tensors_at,
)

__all__ = [
    "Graft",
    "GraftPlan",
    "LoadReport",
    "build_grafted",
    "find_file",
    "graft",
    "load_plan",
    "load_trained",
    "with_base",
]

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class LoadReport:
    """Where a model's tensors came from.

    Attributes:
        sources: tensor name -> "base", "checkpoint", "graft_weights", "inherited" or "fresh".
        files: source -> file.
        dropped: tensors of the files that the model has no place for, with the reason.
    """

    sources: Mapping[str, str]
    files: Mapping[str, str]
    dropped: tuple[tuple[str, str], ...] = ()

    def counts(self) -> dict[str, int]:
        """Tensors per source."""
        return dict(Counter(self.sources.values()))

    def lines(self) -> list[str]:
        """For logs."""
        lines = [
            f"{n} tensors {source}" + (f" ({self.files[source]})" if source in self.files else "")
            for source, n in sorted(self.counts().items())
        ]
        reasons = Counter(reason for _, reason in self.dropped)
        return lines + [f"{n} tensors dropped: {reason}" for reason, n in reasons.items()]


def graft(model: DiT, plan: GraftPlan, pairs: bool = False) -> DiT:
    """Puts the plan's operators into `model`, in place.

    Args:
        model: an ungrafted DiT of the plan's preset.
        pairs: keep the original beside each graft, as a GraftPair (for layer selection).
    """
    for entry in plan.grafts:
        for block in entry.blocks:
            slot = SLOTS[entry.slot]
            operator = build_operator(entry.operator, **entry.config)
            if pairs:
                operator = GraftPair(getattr(model.blocks[block], slot), operator)
            setattr(model.blocks[block], slot, operator)
    return model


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
        ValueError: a file holds another operator, width or block list than the plan.
    """
    has_files = plan.base_ckpt_path is not None or plan.grafted_ckpt_path is not None
    # A file replaces every tensor of the DiT itself, so that none needs memory or a start.
    with torch.device("meta" if weights and has_files else "cpu"):
        model = build_dit(plan.model_name, plan.input_size, num_classes=plan.num_classes)
    graft(model, plan, pairs)
    own = model.state_dict()
    if not weights:
        return model, LoadReport(dict.fromkeys(own, "fresh"), {})
    sources = _Sources(plan, own)
    for block in range(plan.depth):
        for slot in SLOTS:
            sources.fill_slot(block, slot, pairs)
    sources.fill_outside_slots()
    report = sources.finish()
    tensors = {n: t.to(torch.float32, copy=True) for n, t in sources.tensors.items()}
    model.load_state_dict(tensors, strict=True, assign=True)
    return model, report


def load_trained(model: DiT, plan: GraftPlan, path: str | Path) -> None:
    """Loads a whole trained model, in place: a checkpoint of this plan, or weights of its shape.

    Raises:
        ValueError: the checkpoint is of another architecture; names the first difference.
    """
    state, stored = read_checkpoint(path)
    wanted = plan.architecture()
    if stored is not None and stored != wanted:
        keys = [k for k in wanted if stored.get(k) != wanted[k]]
        raise ValueError(
            f"{path}: was trained with another plan than {plan.path}: "
            + "; ".join(f"{k}: {stored.get(k)!r} there, {wanted[k]!r} here" for k in keys)
        )
    own = model.state_dict()
    for name in [*own, *state]:
        there = list(state[name].shape) if name in state else "missing"
        here = list(own[name].shape) if name in own else "no place"
        if there != here:
            raise ValueError(
                f"{path}: tensor {name}: {there} in the file, {here} in the model of {plan.path} "
                f"({plan.describe()})"
            )
    model.load_state_dict(state, strict=True)


class _Sources:
    """Gives every tensor of a plan's model (`own`: name -> initialised tensor) its source."""

    def __init__(self, plan: GraftPlan, own: Tensors) -> None:
        self.plan = plan
        self.own = own
        self.files: dict[str, str] = {}
        self.tensors: Tensors = {}
        self.labels: dict[str, str] = {}
        self.dropped: list[tuple[str, str]] = []
        self.checkpoint: Tensors | None = None
        self.left: set[str] = set()  # the checkpoint's tensors that have found no place yet
        if plan.grafted_ckpt_path is not None:
            self.checkpoint = self._open(
                "checkpoint", plan.grafted_ckpt_path, "grafted_dit_ckpt_path"
            )
            self.left = set(self.checkpoint)

    @cached_property
    def base(self) -> Tensors | None:
        """The pretrained DiT, opened only when something is taken from it."""
        if self.plan.base_ckpt_path is None:
            return None
        return self._open("base", self.plan.base_ckpt_path, "base_ckpt_path")

    def _open(self, label: str, path: Path, key: str) -> Tensors:
        file = find_file(str(path), self.plan.path, key)
        state = read_state(file)
        if depth_of(state) != self.plan.depth:
            raise ValueError(
                f"{file}: holds {depth_of(state)} blocks; {self.plan.model_name} of "
                f"{self.plan.path} has {self.plan.depth}"
            )
        self.files[label] = str(path)
        return state

    def _take(self, name: str, tensor: torch.Tensor, label: str) -> None:
        file = self.files.get(label, self.files.get("base", label))
        if name not in self.own:
            raise ValueError(f"{file}: tensor {name} has no place in the model of {self.plan.path}")
        if tensor.shape != self.own[name].shape:
            raise ValueError(
                f"{file}: tensor {name} has shape {list(tensor.shape)}; the model of "
                f"{self.plan.path} ({self.plan.model_name} at {self.plan.image_size} px, "
                f"{self.plan.num_classes} classes) needs {list(self.own[name].shape)}"
            )
        self.tensors[name], self.labels[name] = tensor, label

    def _held(self, block: int, slot: str) -> tuple[str | None, Tensors]:
        """What the grafted checkpoint holds in a slot: operator (None: no file) and tensors."""
        if self.checkpoint is None:
            return None, {}
        tensors = tensors_at(self.checkpoint, block, slot)
        operator = operator_of(tensors, slot)
        if operator is None:
            raise ValueError(
                f"{self.files['checkpoint']}: block {block}: the {slot} slot holds no known "
                f"operator (tensors {sorted(tensors)})"
            )
        return operator, tensors

    def _is_original(self, operator: str | None, tensors: Tensors) -> bool:
        """Whether tensors of one slot have the pretrained DiT's operator and expansion ratio."""
        hidden = PRESETS[self.plan.model_name]["hidden_size"]
        return operator == "mha" or (
            operator == "mlp" and tensors["fc1.weight"].shape[0] == 4 * hidden
        )

    def _use(self, prefix: str, tensors: Tensors, place: str) -> None:
        """Takes one slot's tensors from the checkpoint (`prefix`) into the model (`place`)."""
        for name, tensor in tensors.items():
            self._take(place + name, tensor, "checkpoint")
            self.left.discard(prefix + name)

    def fill_slot(self, block: int, slot: str, pairs: bool) -> None:
        """Fills one slot of one block: the original operator, its graft, or both of a pair."""
        prefix = f"blocks.{block}.{SLOTS[slot]}."
        entry = self.plan.graft_at(block, slot)
        if entry is None:
            self._fill_original(block, slot, prefix, prefix, reason="the plan keeps the original")
        elif pairs:
            self._fill_graft(block, entry, prefix, prefix + "graft.")
            self._fill_original(block, slot, prefix, prefix + "original.", reason=None)
        else:
            self._fill_graft(block, entry, prefix, prefix)

    def _fill_original(
        self, block: int, slot: str, prefix: str, place: str, reason: str | None
    ) -> None:
        held, tensors = self._held(block, slot)
        if self._is_original(held, tensors):
            self._use(prefix, tensors, place)
            return
        if held is not None and self.base is None:
            raise ValueError(
                f"{self.plan.path}: block {block} needs its original {slot}, but "
                f"{self.files['checkpoint']} holds {held!r} there; name the pretrained DiT in "
                "sample_config.base_ckpt_path or with --load-weight"
            )
        for name, tensor in tensors_at(self.base or {}, block, slot).items():
            self._take(place + name, tensor, "base")
        if reason is not None:
            for name in tensors:
                self.dropped.append((prefix + name, f"{reason} where the checkpoint has {held}"))
                self.left.discard(prefix + name)

    def _fill_graft(self, block: int, entry: Graft, prefix: str, place: str) -> None:
        held, tensors = self._held(block, entry.slot)
        if block in self.plan.graft_weights:
            self._fill_from_file(block, entry, place)
            for name in tensors:
                self.dropped.append((prefix + name, "graft_weights names a file for the block"))
                self.left.discard(prefix + name)
        elif held is None:
            self._initialise(block, entry, place)
        elif held == entry.operator:
            self._use(prefix, tensors, place)
        else:
            found = f"the original {entry.slot}" if self._is_original(held, tensors) else repr(held)
            raise ValueError(
                f"{self.files['checkpoint']}: block {block} holds {found} in its {entry.slot} "
                f"slot; {self.plan.path} wants {entry.operator!r} there"
            )

    def _fill_from_file(self, block: int, entry: Graft, place: str) -> None:
        path = self.plan.graft_weights[block]
        file = find_file(str(path), self.plan.path, f"graft_weights: {block}")
        tensors = read_state(file)
        found = operator_of(tensors, entry.slot)
        if found != entry.operator:
            raise ValueError(
                f"{file}: holds {found!r}; {self.plan.path} wants {entry.operator!r} in block "
                f"{block}"
            )
        self.files["graft_weights"] = str(path)
        for name, tensor in tensors.items():
            self._take(place + name, tensor, "graft_weights")

    def _initialise(self, block: int, entry: Graft, place: str) -> None:
        """No file provides this graft: inherit what fits from the original, or leave it fresh."""
        if self.plan.graft_init != "inherit":
            return
        inherits = OPERATORS[entry.operator].inherits
        if not inherits:
            legal = ", ".join(sorted(n for n, s in OPERATORS.items() if s.inherits))
            raise ValueError(
                f"{self.plan.path}: graft_init: inherit: {entry.operator!r} shares no tensor with "
                f"the operator it replaces; operators that can inherit: {legal}"
            )
        if self.base is None:
            raise ValueError(
                f"{self.plan.path}: graft_init: inherit needs base_ckpt_path, the model whose "
                "operators are inherited"
            )
        original = tensors_at(self.base, block, entry.slot)
        for new, old in inherits.items():
            shape = self.own[place + new].shape
            if old not in original or original[old].shape != shape:
                raise ValueError(
                    f"{self.plan.path}: graft_init: inherit: block {block}: {entry.operator}'s "
                    f"{new} {list(shape)} does not fit the original {old}; use graft_init: fresh "
                    "or distilled weights"
                )
            self._take(place + new, original[old], "inherited")

    def fill_outside_slots(self) -> None:
        """Fills all that no graft can touch, from the checkpoint when there is one or the base."""
        label = "base" if self.checkpoint is None else "checkpoint"
        state = self.base if self.checkpoint is None else self.checkpoint
        for name, tensor in (state or {}).items():
            if not _in_slot(name):
                self._take(name, tensor, label)
                self.left.discard(name)

    def finish(self) -> LoadReport:
        """Leaves what has no source fresh where that is meant; raises on anything unexplained."""
        if self.left:
            raise ValueError(
                f"{self.files['checkpoint']}: tensors {sorted(self.left)[:4]} have no place in the "
                f"model of {self.plan.path}"
            )
        for name, tensor in self.own.items():
            if name not in self.tensors:
                if self.files and not self._may_be_fresh(name):
                    files = " and ".join(self.files.values())
                    raise ValueError(f"{files}: tensor {name} is missing")
                self._take(name, tensor, "fresh")
        return LoadReport(self.labels, self.files, tuple(self.dropped))

    def _may_be_fresh(self, name: str) -> bool:
        """A graft without a file, and what it does not inherit; never a part of the base DiT."""
        if not _in_slot(name):
            return False
        _, block, attribute, child = name.split(".")[:4]
        slot = next(s for s, a in SLOTS.items() if a == attribute)
        entry = self.plan.graft_at(int(block), slot)
        if entry is None or child == "original":
            return False
        return self.checkpoint is None and int(block) not in self.plan.graft_weights


def _in_slot(name: str) -> bool:
    parts = name.split(".")
    return len(parts) > 3 and parts[0] == "blocks" and parts[2] in SLOTS.values()
