"""What a grafted model is: operators, their blocks, sizes and weight files; how two differ."""

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from models.presets import PRESETS, is_captioned, latent_size

ENCODER_KEYS = ("text_encoder", "text_encoder_sha256")  # as stores and samples.json say it
PAIR = "pair"  # takes the slot's place where `graft_weights` names the file of a parallel pair


@dataclass(frozen=True)
class Graft:
    """One operator and the blocks that take it.

    Attributes:
        slot: "mha" or "mlp".
        operator: name in `models.operators.OPERATORS`.
        config: complete constructor arguments, from `complete_config`.
        blocks: ascending block indices.
    """

    slot: str
    operator: str
    config: Mapping
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class GraftPlan:
    """What is grafted where, and from which files; from `models.plan.load_plan`.

    Attributes:
        path: the YAML file.
        model_name: preset of the pretrained model, for example "DiT-XL/2".
        image_size: pixels.
        num_classes: without the null class; None of a model that is told captions.
        grafts: operators and their blocks; empty for a plain DiT.
        base_ckpt_path: the pretrained DiT; None to train one from scratch.
        grafted_ckpt_path: a grafted model that this plan starts from, or None.
        graft_weights: (block, slot) -> file of a distilled operator; (block, "pair") -> file of the
            distilled parallel pair that begins there, both blocks with all they hold.
        graft_init: "fresh" or "inherit", for grafts that no file provides; None is "fresh" without
            a grafted checkpoint, and with one an error, as the plan may be meant for another.
        vae: "ema", "mse", "sdxl" or a folder, for sampling.
        text_encoder: "t5" or a folder, of a model that is told captions; None of others.
        embedded_by: name and sha256 of the text encoder whose embeddings the model is told, once a
            store or an opened encoder says so; see `with_encoder`.
        parallel_pairs: neighbouring blocks that run side by side, see `models.restructure`.
    """

    path: Path
    model_name: str
    image_size: int
    num_classes: int | None = 1000
    grafts: tuple[Graft, ...] = ()
    base_ckpt_path: Path | None = None
    grafted_ckpt_path: Path | None = None
    graft_weights: Mapping[tuple[int, str], Path] = field(default_factory=dict)
    graft_init: str | None = None
    vae: str = "ema"
    text_encoder: str | None = None
    embedded_by: tuple[str, str] | None = None
    parallel_pairs: tuple[tuple[int, int], ...] = ()

    @property
    def depth(self) -> int:
        """Blocks, those of parallel pairs among them."""
        return PRESETS[self.model_name]["depth"]

    @property
    def captioned(self) -> bool:
        """Whether the model is told captions, not classes."""
        return is_captioned(self.model_name)

    @property
    def is_plain(self) -> bool:
        """Whether the model is the pretrained DiT as it is."""
        return not self.grafts and not self.parallel_pairs

    def plain(self) -> "GraftPlan":
        """The plan of the pretrained DiT alone."""
        return replace(self, grafts=(), grafted_ckpt_path=None, graft_weights={}, parallel_pairs=())

    def pair_of(self, block: int) -> tuple[int, int] | None:
        """The parallel pair that a block stands in."""
        return next((pair for pair in self.parallel_pairs if block in pair), None)

    def with_pairs(self, firsts: Collection[int]) -> "GraftPlan":
        """The plan with those of its parallel pairs that begin at these blocks."""
        weights = {
            (block, slot): file
            for (block, slot), file in self.graft_weights.items()
            if slot != PAIR or block in firsts
        }
        pairs = tuple(pair for pair in self.parallel_pairs if pair[0] in firsts)
        return replace(self, parallel_pairs=pairs, graft_weights=weights)

    def with_encoder(self, name: str, sha256: str) -> "GraftPlan":
        """The plan of a model that is told this text encoder's embeddings."""
        return replace(self, embedded_by=(name, sha256))

    @property
    def input_size(self) -> int:
        """Latent height and width."""
        return latent_size(self.model_name, self.image_size)

    def grafted_blocks(self, slot: str | None = None) -> tuple[int, ...]:
        """Blocks that take another operator, in `slot` or in either."""
        blocks = {b for g in self.grafts if slot in (None, g.slot) for b in g.blocks}
        return tuple(sorted(blocks))

    def graft_at(self, block: int, slot: str) -> Graft | None:
        """The graft of one slot of one block, or None where the original operator stays."""
        for graft in self.grafts:
            if graft.slot == slot and block in graft.blocks:
                return graft
        return None

    def architecture(self) -> dict:
        """What the model is, as plain data; stored in checkpoints and compared by `differences`.

        Plans that say the same in other words (order, defaults, split lists) give equal results.
        """
        grafts: list[dict] = []
        for g in self.grafts:
            kind = {"slot": g.slot, "operator": g.operator, "config": copy.deepcopy(dict(g.config))}
            same = [e for e in grafts if kind == {k: e[k] for k in kind}]
            if same:
                same[0]["blocks"] = sorted([*same[0]["blocks"], *g.blocks])
            else:
                grafts.append({**kind, "blocks": list(g.blocks)})
        grafts.sort(key=lambda g: (g["slot"], g["blocks"][0], g["operator"]))
        found = {
            "model_name": self.model_name,
            "image_size": self.image_size,
            "num_classes": self.num_classes,
            "grafts": grafts,
        }
        if self.parallel_pairs:  # left out elsewhere, so that older checkpoints compare
            found["parallel_pairs"] = [list(pair) for pair in self.parallel_pairs]
        if self.embedded_by is not None:
            found |= dict(zip(ENCODER_KEYS, self.embedded_by, strict=True))
        return found

    def describe(self) -> str:
        """One line for logs."""
        parts = [
            f"{g.operator} in {g.slot} of {len(g.blocks)} block{'s' * (len(g.blocks) > 1)}"
            for g in self.grafts
        ]
        if self.parallel_pairs:
            number = len(self.parallel_pairs)
            parts.append(f"{number} parallel pair{'s' * (number > 1)}")
        return f"{self.model_name} at {self.image_size} px, " + ("; ".join(parts) or "no grafts")


def differences(ours: dict, theirs: dict) -> str:
    """What differs between two `GraftPlan.architecture()`, "" for nothing.

    For example "num_classes 1000 there, 9 here; mha/swa blocks [1, 2] there, [1, 3] here".
    """
    sizes = ("model_name", "image_size", "num_classes")
    said = config_differences({k: ours[k] for k in sizes}, {k: theirs[k] for k in sizes})
    here, there = _configs(ours), _configs(theirs)
    for kind in sorted({*here, *there}):
        mine, other = here.get(kind, {}), there.get(kind, {})
        if mine.keys() != other.keys():
            blocks = [sorted(side) or "none" for side in (other, mine)]
            said.append(f"{kind} blocks {blocks[0]} there, {blocks[1]} here")
        changed: dict[str, list[int]] = {}
        for block in sorted(mine.keys() & other.keys()):
            for text in config_differences(mine[block], other[block]):
                changed.setdefault(text, []).append(block)
        said += [f"{kind} {text} in blocks {blocks}" for text, blocks in changed.items()]
    mine, other = (side.get("parallel_pairs", []) for side in (ours, theirs))
    if mine != other:
        said.append(f"parallel pairs {other or 'none'} there, {mine or 'none'} here")
    return "; ".join([*said, *encoder_differences(ours, theirs)])


def encoder_differences(ours: Mapping, theirs: Mapping) -> list[str]:
    """As `differences`, of the text encoders alone; none where either side does not tell its own.

    For example "text encoder t5 (sha256 0123456789ab) there, /data/t5 (sha256 cdef01234567) here".
    """
    name, sha256 = ENCODER_KEYS
    if ours.get(sha256) is None or theirs.get(sha256) in (None, ours[sha256]):
        return []
    there, here = (f"{side[name]} (sha256 {side[sha256][:12]})" for side in (theirs, ours))
    return [f"text encoder {there} there, {here} here"]


def config_differences(ours: Mapping, theirs: Mapping) -> list[str]:
    """One "key value there, value here" for each key whose values differ."""
    return [
        f"{key} {theirs.get(key)!r} there, {ours.get(key)!r} here"
        for key in sorted({*ours, *theirs})
        if theirs.get(key) != ours.get(key)
    ]


def _configs(architecture: dict) -> dict[str, dict[int, dict]]:
    """ "slot/operator" -> block -> constructor arguments."""
    found: dict[str, dict[int, dict]] = {}
    for g in architecture["grafts"]:
        found.setdefault(f"{g['slot']}/{g['operator']}", {}).update(
            dict.fromkeys(g["blocks"], g["config"])
        )
    return found
