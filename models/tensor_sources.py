"""Where each tensor of a plan's model comes from; `models.grafting` describes the rules."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path

import torch

from models.config_files import find_file, shown
from models.graft_plan import PAIR, Graft, GraftPlan, config_differences
from models.operators import OPERATORS
from models.presets import build_model, check_config
from models.restructure import MERGES
from models.weight_files import (
    Held,
    OpenedFile,
    block_of,
    check_finite,
    check_tensor,
    check_whole,
    other_pairs,
    pairs_in,
    slot_of,
    unknown_operator,
    wanted,
)
from models.weights import PIXART_PARTS, SLOTS, operator_of, read_state, tensors_at

Tensors = dict[str, torch.Tensor]
OF_PAIR = "graft_weights names a file for the parallel pair"


@dataclass(frozen=True)
class LoadReport:
    """Where a model's tensors came from.

    Attributes:
        sources: tensor name -> "base", "checkpoint", "graft_weights", "inherited", "sum" (of a
            merge: it adds what both blocks give) or "fresh".
        resolved: absolute path of each file that was read: "base", "checkpoint", and
            "graft_weights[<block>].<slot>" for each distilled operator or pair.
        dropped: tensors of the files that the model does not take, with the reason.
        notes: what the files leave open, and how it was settled.
    """

    sources: Mapping[str, str]
    resolved: Mapping[str, Path] = field(default_factory=dict)
    dropped: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def files(self) -> dict[str, str]:
        """`resolved` as logs show it: from the working directory where a file lies below that."""
        return {source: shown(path) for source, path in self.resolved.items()}

    def counts(self) -> dict[str, int]:
        """Tensors per source."""
        return dict(Counter(self.sources.values()))

    def lines(self) -> list[str]:
        """For logs."""
        lines = []
        for source, n in sorted(self.counts().items()):
            files = [f for s, f in self.files.items() if s.partition("[")[0] == source]
            more = f" and {len(files) - 1} more" if len(files) > 1 else ""
            lines.append(f"{n} tensors {source}" + (f" ({files[0]}{more})" if files else ""))
        dropped = defaultdict(list)
        for name, reason in self.dropped:
            dropped[reason].append(name)
        for reason, names in dropped.items():
            blocks = sorted({block_of(name) for name in names} - {None})
            where = f" (blocks {' '.join(map(str, blocks))})" if blocks else ""
            lines.append(f"{len(names)} tensors dropped: {reason}{where}")
        return lines + [f"note: {note}" for note in self.notes]


class TensorSources:
    """Gives every tensor of a plan's model (`own`: name -> initialised tensor) its source."""

    def __init__(self, plan: GraftPlan, own: Tensors, pairs: bool) -> None:
        self.plan, self.own, self.pairs = plan, own, pairs
        self.tensors: Tensors = {}
        self.labels: dict[str, str] = {}
        self.resolved: dict[str, Path] = {}
        self.reasons: dict[tuple[int, str], str] = {}  # why the checkpoint's slot is not wanted
        self.unsure: dict[str, list[int]] = defaultdict(list)  # slot -> blocks
        self.paired: set[int] = set()  # blocks filled from the file of their parallel pair
        self.checkpoint: OpenedFile | None = None
        if plan.grafted_ckpt_path is not None:
            key = "grafted_dit_ckpt_path"
            self.checkpoint = self._open("checkpoint", plan.grafted_ckpt_path, key)
            self._check_related(self.checkpoint)
        elif plan.graft_weights and plan.base_ckpt_path is None:
            raise ValueError(
                f"{plan.path}: graft_weights: distilled operators need the model they belong in; "
                "name it in base_ckpt_path or grafted_dit_ckpt_path"
            )

    @cached_property
    def base(self) -> OpenedFile | None:
        """The pretrained DiT, opened only when something is taken from it, and checked whole."""
        if self.plan.base_ckpt_path is None:
            return None
        plan = self.plan
        file = self._open("base", plan.base_ckpt_path, "base_ckpt_path")
        for block, slot in product(range(plan.depth), SLOTS):
            held = file.held(block, slot)
            if held is not None and held.original is False:
                raise ValueError(
                    f"{file}: is a grafted model (block {block} holds {held.operator!r}): put it "
                    "in grafted_dit_ckpt_path"
                )
        if pairs := pairs_in(file.tensors):
            raise ValueError(
                f"{file}: is a restructured model (blocks {list(pairs[0])} are a parallel pair): "
                "put it in grafted_dit_ckpt_path"
            )
        with torch.device("meta"):
            plain = build_model(plan)
        check_whole(str(file), file.tensors, plain.state_dict(), plan)
        if plan.captioned:
            check_config(file.path, plan)
        return file

    def _open(self, label: str, path: Path, key: str) -> OpenedFile:
        try:
            found = find_file(path, self.plan.path, key)
        except FileNotFoundError as error:
            hint = "scripts/download.py fetches published weights"
            raise FileNotFoundError(f"{error}; {hint}") from error
        file = OpenedFile(label, found, self.plan)
        self.resolved[label] = file.path
        return file

    def _check_related(self, file: OpenedFile) -> None:
        """Refuses a checkpoint all of whose grafts lie where the plan keeps the original, or one
        of parallel pairs that the plan does not have."""
        if not set(pairs_in(file.tensors)) <= set(self.plan.parallel_pairs):
            raise other_pairs(str(file), pairs_in(file.tensors), self.plan)
        strays = []
        for block, slot in product(range(self.plan.depth), SLOTS):
            held = file.held(block, slot)
            if held is None or held.original is not False:
                continue
            if self.plan.graft_at(block, slot) is not None:
                return
            strays.append((block, slot, held.operator))
        if strays:
            block, slot, operator = strays[0]
            raise ValueError(
                f"{file}: block {block} holds the graft {operator!r} in its {slot} slot; "
                f"{self.plan.path} wants {wanted(self.plan, block, slot)} there, and none of this "
                "file's grafts: is it the checkpoint of another plan?"
            )

    def _take(self, file: str, name: str, tensor: torch.Tensor, place: str, label: str) -> None:
        check_tensor(file, name, tensor, self.own.get(place), self.plan)
        if label != "fresh":
            check_finite(file, name, tensor)
        self.tensors[place], self.labels[place] = tensor, label

    def _use(self, file: OpenedFile, name: str, place: str, label: str | None = None) -> None:
        """Puts tensor `name` of a file at `place` in the model."""
        self._take(str(file), name, file.tensors[name], place, label or file.label)
        file.left.discard(name)

    def _use_slot(self, file: OpenedFile, block: int, slot: str, place: str) -> None:
        """Fills a place with the whole operator that a file holds in a slot."""
        tensors = tensors_at(file.tensors, block, slot)
        self._check_none_missing(str(file), tensors, place)
        for name in tensors:
            self._use(file, f"blocks.{block}.{SLOTS[slot]}.{name}", place + name)

    def _check_none_missing(self, file: str, tensors: Mapping, place: str) -> None:
        for name, tensor in self.own.items():
            if name.startswith(place) and name.removeprefix(place) not in tensors:
                check_tensor(file, name, None, tensor, self.plan)

    def fill_pair(self, pair: tuple[int, int]) -> None:
        """Fills both blocks of a parallel pair and its merge, where graft_weights names a file."""
        path = self.plan.graft_weights.get((pair[0], PAIR))
        if path is None:
            return
        file = find_file(path, self.plan.path, f"graft_weights: {pair[0]}")
        self.resolved[f"graft_weights[{pair[0]}].{PAIR}"] = file
        where = f"{shown(file)} (graft_weights of the parallel pair {list(pair)})"
        tensors = read_state(file)
        for block, slot in product(pair, SLOTS):
            self._check_operator(where, tensors_at(tensors, block, slot), block, slot)
        for name, tensor in tensors.items():
            self._take(where, name, tensor, self._within_graft(name), "graft_weights")
        self.paired.update(pair)
        for name, tensor in self.own.items():
            at = slot_of(name)
            original = self.pairs and at is not None and ".original." in name
            if block_of(name) in pair and name not in self.tensors and not original:
                check_tensor(where, name, None, tensor, self.plan)

    def _within_graft(self, name: str) -> str:
        """Where a tensor of a file stands in this model, which may hold pairs of operators."""
        at = slot_of(name)
        if not self.pairs or at is None or self.plan.graft_at(*at) is None:
            return name
        prefix = f"blocks.{at[0]}.{SLOTS[at[1]]}."
        return f"{prefix}graft.{name.removeprefix(prefix)}"

    def fill_outside_slots(self) -> None:
        """Fills all that no graft can touch, from the checkpoint when there is one or the base."""
        file = self.checkpoint or self.base
        merged = set() if self.checkpoint is None else set(pairs_in(self.checkpoint.tensors))
        for name, tensor in self.own.items():
            if slot_of(name) is not None or name in self.tensors:
                continue
            if file is None:
                self._take("", name, tensor, name, "fresh")
            elif name.startswith(MERGES) and self.plan.pair_of(block_of(name)) not in merged:
                self._take("", name, tensor, name, "sum")
            else:
                check_tensor(str(file), name, file.tensors.get(name), tensor, self.plan)
                self._use(file, name, name)

    def fill_slot(self, block: int, slot: str) -> None:
        """Fills one slot of one block: the original operator, its graft, or both of a pair."""
        place = f"blocks.{block}.{SLOTS[slot]}."
        into = place + "graft." if self.pairs else place
        entry = self.plan.graft_at(block, slot)
        if block in self.paired and (entry is None or not self.pairs):
            return
        held = None if self.checkpoint is None else self._held(self.checkpoint, block, slot)
        is_graft = held is not None and entry is not None and self._is_graft(held, entry, into)
        is_original = held is not None and held.original is not False and not is_graft
        if entry is None:
            if held is not None and not is_original:
                self._check_known(block, slot, held)
            self._fill_original(block, slot, place, held, is_original)
            if held is not None and not is_original:
                reason = f"the plan keeps the original where the checkpoint has {held.operator}"
                self.reasons[block, slot] = reason
            elif held is not None and held.original is None and self._self_grafts(slot):
                self.unsure[slot].append(block)
            return
        if (block, slot) in self.plan.graft_weights:
            self._fill_from_file(block, entry, into)
            self.reasons[block, slot] = "graft_weights names a file for the block"
        elif block in self.paired:
            pass  # the graft is filled; its original follows
        elif held is None:
            self._initialise(block, entry, into, self.base)
        elif is_graft:
            self._fill_graft(block, entry, into, held)
        else:
            self._replace(block, entry, into, held, is_original)
        if self.pairs:
            self._fill_original(block, slot, place + "original.", held, is_original)

    def _check_known(self, block: int, slot: str, held: Held) -> None:
        """Refuses a graft where the plan keeps the original, unless the plan has that operator in
        other blocks, as after a layer selection, or the file's own plan says that it is there."""
        same = any(g.slot == slot and g.operator == held.operator for g in self.plan.grafts)
        if not same and not self.checkpoint.tells:
            raise ValueError(
                f"{self.checkpoint}: block {block} holds {held.operator!r} in its {slot} slot; "
                f"{self.plan.path} wants {wanted(self.plan, block, slot)} there, and has "
                f"{held.operator!r} in no block"
            )

    def _held(self, file: OpenedFile, block: int, slot: str) -> Held:
        held = file.held(block, slot)
        if held is None:
            tensors = tensors_at(file.tensors, block, slot)
            raise unknown_operator(str(file), tensors, block, slot, self.plan)
        return held

    def _self_grafts(self, slot: str) -> bool:
        """Whether the plan has grafts with the tensors of the original."""
        same = {"mha": ("mha", "qkv_bias", True), "mlp": ("mlp", "expansion_ratio", 4)}
        operator, key, value = same[slot]
        return any(g.operator == operator and g.config[key] == value for g in self.plan.grafts)

    def _is_graft(self, held: Held, entry: Graft, place: str) -> bool:
        """Whether what the checkpoint holds is an operator of the kind that the plan grafts."""
        if held.operator != entry.operator:
            return False
        if held.original is not None:
            return not held.original
        ours = {n: t.shape for n, t in self.own.items() if n.startswith(place)}
        return ours == {place + n: t.shape for n, t in held.tensors.items()}

    def _fill_original(
        self, block: int, slot: str, place: str, held: Held | None, is_original: bool
    ) -> None:
        if is_original:
            self._use_slot(self.checkpoint, block, slot, place)
        elif self._base_for(block, slot, held) is not None:
            self._use_slot(self.base, block, slot, place)
        elif held is not None:
            raise ValueError(
                f"{self.plan.path}: block {block} needs its original {slot}, but "
                f"{self.checkpoint} holds the graft {held.operator!r} there; name the pretrained "
                "DiT in sample_config.base_ckpt_path or with --load-weight"
            )
        else:
            self._leave_fresh(place)

    def _base_for(self, block: int, slot: str, held: Held | None) -> OpenedFile | None:
        """The base; says, where its file is missing, what it is needed for."""
        try:
            return self.base
        except FileNotFoundError as error:
            if held is None:
                raise
            raise FileNotFoundError(
                f"{error}; block {block} needs its original {slot} from there, as "
                f"{self.checkpoint} holds the graft {held.operator!r}"
            ) from error

    def _fill_graft(self, block: int, entry: Graft, place: str, held: Held) -> None:
        """Takes the checkpoint's operator, once it is seen to be configured as the plan's."""
        changed = [] if held.config is None else config_differences(entry.config, held.config)
        if changed:
            raise ValueError(
                f"{self.checkpoint}: block {block}: {entry.operator} is not that of "
                f"{self.plan.path}: {'; '.join(changed)}"
            )
        self._use_slot(self.checkpoint, block, entry.slot, place)

    def _replace(self, block: int, entry: Graft, place: str, held: Held, is_original: bool) -> None:
        """Initialises a graft where the checkpoint has another operator: the original, if asked."""
        if is_original and self.plan.graft_init is not None:
            self._initialise(block, entry, place, self.checkpoint)
            self.reasons[block, entry.slot] = f"replaced by {entry.operator}"
            return
        found, hint = repr(held.operator), ""
        if is_original:
            found = f"the original {held.operator}"
            hint = " (another block list? or say graft_init: fresh or inherit)"
        raise ValueError(
            f"{self.checkpoint}: block {block} holds {found} in its {entry.slot} slot; "
            f"{self.plan.path} wants {wanted(self.plan, block, entry.slot)} there{hint}"
        )

    def _fill_from_file(self, block: int, entry: Graft, place: str) -> None:
        path = self.plan.graft_weights[block, entry.slot]
        file = find_file(path, self.plan.path, f"graft_weights: {block}")
        self.resolved[f"graft_weights[{block}].{entry.slot}"] = file
        tensors = read_state(file)
        where = f"{shown(file)} (graft_weights of block {block}, {entry.slot} slot)"
        self._check_operator(where, tensors, block, entry.slot)
        self._check_none_missing(where, tensors, place)
        for name, tensor in tensors.items():
            self._take(where, name, tensor, place + name, "graft_weights")

    def _check_operator(self, where: str, tensors: Tensors, block: int, slot: str) -> None:
        """Raises ValueError unless these tensors are the operator that the plan has in a slot."""
        entry = self.plan.graft_at(block, slot)
        found = operator_of(tensors, slot)
        if found is None:
            raise unknown_operator(where, tensors, block, slot, self.plan)
        if found != (slot if entry is None else entry.operator):
            raise ValueError(
                f"{where}: holds {found!r} in the {slot} slot of block {block}; {self.plan.path} "
                f"wants {wanted(self.plan, block, slot)}"
            )

    def _initialise(self, block: int, entry: Graft, place: str, file: OpenedFile | None) -> None:
        """No file provides this graft: inherit what fits from `file`'s original, the rest fresh."""
        if self.plan.graft_init == "inherit":
            self._inherit(block, entry, place, file)
        self._leave_fresh(place)

    def _leave_fresh(self, place: str) -> None:
        for name, tensor in self.own.items():
            if name.startswith(place) and name not in self.tensors:
                self._take("", name, tensor, name, "fresh")

    def _inherit(self, block: int, entry: Graft, place: str, file: OpenedFile | None) -> None:
        where = f"{self.plan.path}: graft_init: inherit"
        inherits = OPERATORS[entry.operator].inherits
        if not inherits:
            legal = ", ".join(sorted(n for n, s in OPERATORS.items() if s.inherits))
            raise ValueError(
                f"{where}: {entry.operator!r} shares no tensor with the operator it replaces; "
                f"operators that can inherit: {legal}"
            )
        if file is None:
            raise ValueError(f"{where} needs base_ckpt_path, the model whose operators it takes")
        prefix = f"blocks.{block}.{SLOTS[entry.slot]}."
        for new, old in inherits.items():
            if place + new not in self.own:  # a bias that the configuration leaves out
                continue
            parts = PIXART_PARTS[entry.slot][old] if self.plan.captioned else (old,)
            names = [prefix + part for part in parts]
            found = [file.tensors[name] for name in names if name in file.tensors]
            shape, original = self.own[place + new].shape, None
            if len(found) == len(names):
                original = found[0] if len(found) == 1 else torch.cat(found)
            if original is None or original.shape != shape:
                raise ValueError(
                    f"{where}: block {block}: {entry.operator}'s {new} {list(shape)} does not fit "
                    f"the original {old}; use graft_init: fresh or distilled weights"
                )
            self._take(str(file), names[0], original, place + new, "inherited")
            file.left.difference_update(names)

    def finish(self) -> LoadReport:
        """The report; raises ValueError for a tensor of the checkpoint without place or reason."""
        dropped = []
        for name in sorted(self.checkpoint.left) if self.checkpoint is not None else ():
            reason = self.reasons.get(slot_of(name))
            if block_of(name) in self.paired:
                reason = OF_PAIR
            if reason is None:
                tensor = self.checkpoint.tensors[name]
                check_tensor(str(self.checkpoint), name, tensor, None, self.plan)
            dropped.append((name, reason))
        for name in sorted(self.base.left) if "base" in self.resolved else ():
            at = slot_of(name)
            entry = None if at is None or self.pairs else self.plan.graft_at(*at)
            reason = "the checkpoint holds it" if entry is None else f"replaced by {entry.operator}"
            if block_of(name) in self.paired:
                reason = OF_PAIR
            dropped.append((name, reason))
        notes = [
            f"{self.checkpoint} does not say whether its {slot} in blocks {blocks} is the original "
            "or a self-graft; taken as the original that the plan keeps there"
            for slot, blocks in self.unsure.items()
        ]
        return LoadReport(self.labels, self.resolved, tuple(dropped), tuple(notes))
