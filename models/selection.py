"""Learning which blocks keep their original operator.

A slot whose fate is open holds a GraftPair, or a GraftChoice where several grafts compete;
LayerGates holds one distribution per local group of blocks over the ways to keep N of its M
originals, drawn with a hard Gumbel softmax as in TinyFusion (arXiv 2412.01199). The same gates
choose which pairs of neighbouring blocks run in parallel; an open pair holds a PairChoice.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations, product

import torch
import torch.nn.functional as F
from torch import nn

MAX_OPTIONS = 100_000


class GraftPair(nn.Module):
    """Two operators in one slot: m * original(x) + (1 - m) * graft(x), with m = keep.

    x [B,T,D]; keep 0-d or [B], 1 keeps the original operator, 0 takes the graft, values between
    mix. -> [B,T,D]. Gradients reach keep and both operators. ValueError without a keep.
    """

    def __init__(self, original: nn.Module, graft: nn.Module):
        super().__init__()
        self.original = original
        self.graft = graft

    def forward(self, x: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        return mix(self.original(x), self.graft(x), keep)


def mix(original: torch.Tensor, graft: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    """m * original + (1 - m) * graft, both [B,T,D], with m = keep, 0-d or [B].

    ValueError without a keep.
    """
    if keep is None or keep.ndim > 1:
        raise ValueError(
            "this model holds graft pairs: pass keep, [depth] or [B, depth], to choose "
            "between original (1) and graft (0)"
        )
    m = keep.to(torch.float32).reshape(-1, 1, 1)  # 1 1 1 or B 1 1
    return (m * original + (1 - m) * graft).to(original.dtype)


def check_keep(keep: torch.Tensor | None, batch: int, depth: int) -> None:
    """ValueError for a keep of another shape than a model of `depth` blocks takes."""
    if keep is None:
        return
    # number by number: torch.compile finds no tuple of dynamic sizes among others
    shape = (1, *keep.shape) if keep.ndim < 2 else keep.shape
    if keep.ndim == 0 or shape[1] != depth or (shape[0] != 1 and shape[0] != batch):
        raise ValueError(
            f"keep has shape {list(keep.shape)}; legal is [{depth}] or [{batch}, {depth}], and "
            f"[{batch}, {depth}, 1 + variants] where several grafts compete"
        )


class GraftChoice(nn.Module):
    """Several operators in one slot: the original, and what each of V variants puts in its place.

    takes[v - 1] is the index in `grafts` of variant v's operator, None where that variant leaves
    this slot its original. x [B,T,D]; keep [B or 1, 1 + V], the share of the original block and of
    each variant -> [B,T,D]. ValueError without a keep or with one of another width.
    """

    def __init__(self, original: nn.Module, grafts: list[nn.Module], takes: list[int | None]):
        super().__init__()
        self.original = original
        self.grafts = nn.ModuleList(grafts)
        self.takes = tuple(takes)

    def operator(self, variant: int) -> nn.Module:
        """What the slot holds under a variant; 0 is the original block."""
        taken = None if variant == 0 else self.takes[variant - 1]
        return self.original if taken is None else self.grafts[taken]

    def forward(self, x: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        variants = len(self.takes)
        if keep is None or keep.ndim != 2 or keep.shape[1] != 1 + variants:
            raise ValueError(
                f"this slot holds {1 + variants} variants: pass keep [B, depth, {1 + variants}], "
                "the share of the original block and of each variant"
            )
        shares = keep.to(torch.float32)[..., None, None]  # B 1+V 1 1
        original = self.original(x)
        kept = [0, *(v for v, taken in enumerate(self.takes, start=1) if taken is None)]
        y = shares[:, kept].sum(1) * original
        for number, graft in enumerate(self.grafts):
            held = [v for v, taken in enumerate(self.takes, start=1) if taken == number]
            y = y + shares[:, held].sum(1) * graft(x)
        return y.to(original.dtype)


class PairChoice(nn.Module):
    """What `DiT.merges` holds of a pair of blocks while it is open whether they run in parallel.

    merge: the pair's linear map. blocks: both blocks as the parallel pair has them, by their index,
    where it has its own; without, it shares those that run in sequence. `run_pair` of
    models/restructure.py runs it; keep of the pair's first block is 1 in sequence, 0 in parallel.
    """

    def __init__(self, merge: nn.Linear, blocks: Mapping[int, nn.Module] | None = None):
        super().__init__()
        self.merge = merge
        self.blocks = nn.ModuleDict({str(i): block for i, block in (blocks or {}).items()})

    def parallel(self, *shared: nn.Module) -> tuple[nn.Module, ...]:
        """The two blocks of the parallel pair, given those that run in sequence."""
        return tuple(self.blocks.values()) or shared


def run_slot(slot: nn.Module, h: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    """What a slot gives for its input h [B,T,D]; only an open slot reads keep."""
    return slot(h, keep) if isinstance(slot, (GraftPair, GraftChoice)) else slot(h)


class LayerGates(nn.Module):
    """One gate per group of neighbouring blocks; its options are the ways to keep N of M originals.

    groups: "N:M" repeated over the depth, or a comma list such as "2:4,1:4" that covers it exactly.
    pinned: blocks that always keep their original operator; they count towards their group's N.
    init: value of every logit at the start.
    variants: for each block the numbers (from 1) of the variants that may stand in for the original
    one, for a choice between several grafts; without any, a block is pinned. None: variant 1 alone,
    everywhere.
    pairs: gates these pairs of blocks in place of blocks: a kept pair runs in sequence, variant 1
    in parallel. `groups` then counts pairs, and a pair goes by its first block, in `pinned` as in
    what the methods give.

    .gumbel_gates[g] [1, options] are the only parameters; .options[g] [options, M] the choices in
    lexicographic order of the kept blocks, 1 = keeps the original; .choices[g] [options, M] the
    same by variant, 0 = keeps the original; .spans[g] = (first, one past the last) of what it
    gates, counted in `.blocks`, the names of all that is gated.
    ValueError for groups or pinned blocks that do not fit.
    """

    def __init__(
        self,
        depth: int,
        groups: str = "2:4",
        pinned: Sequence[int] = (),
        init: float = 0.02,
        variants: Sequence[Sequence[int]] | None = None,
        pairs: Sequence[tuple[int, int]] | None = None,
    ):
        super().__init__()
        self.depth = depth
        self.pairs = None if pairs is None else tuple(pairs)
        self.blocks = tuple(range(depth)) if pairs is None else tuple(a for a, _ in pairs)
        self.register_buffer("places", torch.tensor(self.blocks), persistent=False)
        unit = "blocks" if pairs is None else "pairs"
        self.groups = parse_groups(groups, len(self.blocks), unit)
        outside = [block for block in sorted(set(pinned)) if block not in self.blocks]
        if outside and pairs is None:
            raise ValueError(f"pinned blocks {outside} are outside the model: legal 0..{depth - 1}")
        if outside:
            raise ValueError(
                f"pinned pairs {outside}: no pair begins at these blocks; legal: "
                f"{list(self.blocks)}"
            )
        variants = [(1,)] * len(self.blocks) if variants is None else variants
        named = list(zip(self.blocks, variants, strict=True))
        legal = [() if b in pinned else tuple(some) for b, some in named]
        self.pinned = tuple(b for b, some in zip(self.blocks, legal, strict=True) if not some)
        self.variants = max((v for some in variants for v in some), default=1)

        self.spans = []
        self.gumbel_gates = nn.ParameterList()
        first = 0
        for g, (keep, size) in enumerate(self.groups):
            choices = _choices(keep, legal[first : first + size], g, unit)
            self.register_buffer(f"choices_{g}", choices, persistent=False)
            self.register_buffer(f"options_{g}", (choices == 0).float(), persistent=False)
            self.gumbel_gates.append(nn.Parameter(torch.full((1, len(choices)), float(init))))
            self.spans.append((first, first + size))
            first += size

    @property
    def options(self) -> list[torch.Tensor]:
        return [getattr(self, f"options_{g}") for g in range(len(self.groups))]

    @property
    def choices(self) -> list[torch.Tensor]:
        return [getattr(self, f"choices_{g}") for g in range(len(self.groups))]

    def settled(self) -> dict[int, int]:
        """Block -> variant where every option of the group agrees, as for pinned blocks."""
        agreed = {}
        for choices, (first, _) in zip(self.choices, self.spans, strict=True):
            for i, column in enumerate(choices.T):
                if (column == column[0]).all():
                    agreed[self.blocks[first + i]] = int(column[0])
        return agreed

    def draw(
        self,
        tau: float | torch.Tensor,
        scaling: float | torch.Tensor,
        uniform: list[torch.Tensor] | None = None,
        batch_size: int = 1,
    ) -> torch.Tensor:
        """Draws one option per sample and group -> keep [B, depth], exactly 0 or 1.

        Blocks that are not gated have 1. With several variants, keep is [B, depth, 1 + variants],
        one-hot over the last dimension.

        softmax((logits * scaling + gumbel noise) / tau), hard in the forward pass and soft in the
        backward pass. uniform: per group the numbers in (0, 1), [B, options], that make the noise;
        None draws them for `batch_size` samples. tau and scaling: numbers, or 0-d tensors, which a
        captured step reads anew. ValueError for a number tau <= 0, or wrong shapes.
        """
        if not torch.is_tensor(tau) and tau <= 0:
            raise ValueError(f"tau {tau} must be above 0")
        if uniform is None:
            tiny = torch.finfo(torch.float32).tiny
            uniform = [
                torch.rand(batch_size, gate.shape[1], device=gate.device).clamp(min=tiny)
                for gate in self.gumbel_gates
            ]
        given = [tuple(u.shape) for u in uniform]
        batch = given[0][0] if given else 0
        if given != [(batch, gate.shape[1]) for gate in self.gumbel_gates]:
            raise ValueError(
                f"uniform has shapes {given}; legal is one [B, options] per group, with options "
                f"{[gate.shape[1] for gate in self.gumbel_gates]}"
            )
        keep = []
        with torch.autocast(self.gumbel_gates[0].device.type, enabled=False):
            for gate, table, u in zip(self.gumbel_gates, self._tables(), uniform, strict=True):
                noise = -torch.log(-torch.log(u))
                soft = F.softmax((gate * scaling + noise) / tau, dim=-1)  # B options
                hard = F.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft.dtype)
                # this order of terms keeps the forward value exactly one-hot
                weights = hard + (soft - soft.detach())
                keep.append((weights @ table.flatten(1)).unflatten(1, table.shape[1:]))
        return self._spread(torch.cat(keep, dim=1))

    def _spread(self, keep: torch.Tensor) -> torch.Tensor:
        """From [..., gated] to [..., depth], where all that is not gated is kept."""
        if self.pairs is None:
            return keep
        return keep.new_ones(*keep.shape[:-1], self.depth).index_copy(-1, self.places, keep)

    def _tables(self) -> list[torch.Tensor]:
        """What each option means to a model: [options, M], or [options, M, 1 + variants]."""
        if self.variants == 1:
            return self.options
        return [F.one_hot(c, 1 + self.variants).to(torch.float32) for c in self.choices]

    def probabilities(self, scaling: float) -> list[torch.Tensor]:
        """Per group [options]: softmax(logits * scaling). Its maximum is the gate's confidence."""
        return [F.softmax(gate[0] * scaling, dim=-1) for gate in self.gumbel_gates]

    def chosen(self) -> list[int]:
        """Of each of `blocks` the variant of its group's most likely option, 0 the original."""
        best = [c[g[0].argmax()] for g, c in zip(self.gumbel_gates, self.choices, strict=True)]
        return torch.cat(best).tolist()

    def taking(self, variant: int) -> list[int]:
        """Sorted indices of the blocks for which `chosen` says this variant."""
        return [b for b, taken in zip(self.blocks, self.chosen(), strict=True) if taken == variant]

    def decide(self) -> list[int]:
        """Sorted indices of the blocks that keep their original, by `chosen`."""
        return self.taking(0)

    def keep_mask(self) -> torch.Tensor:
        """`chosen()` as a keep: [depth], or [1, depth, 1 + variants]; 1 keeps the original."""
        chosen = torch.tensor(self.chosen(), device=self.gumbel_gates[0].device)
        if self.variants == 1:
            return self._spread((chosen == 0).to(torch.float32))
        return F.one_hot(chosen, 1 + self.variants).to(torch.float32)[None]

    def extra_repr(self) -> str:
        spec = ",".join(f"{keep}:{size}" for keep, size in self.groups)
        return f"depth={self.depth}, groups={spec}, pinned={self.pinned}"


def parse_groups(groups: str, depth: int, unit: str = "blocks") -> list[tuple[int, int]]:
    """Reads "N:M" or "N:M,N:M,..." into one (N, M) per group, covering `depth` units exactly."""
    total = f"the depth {depth}" if unit == "blocks" else f"the {depth} {unit}"
    parsed = []
    for part in groups.split(","):
        keep, colon, size = part.strip().partition(":")
        if not (colon and keep.isdecimal() and size.isdecimal()):
            raise ValueError(
                f"groups {groups!r}: {part!r} is not N:M with two whole numbers, as in 2:4"
            )
        keep, size = int(keep), int(size)
        if size == 0 or keep > size:
            raise ValueError(
                f"groups {groups!r}: cannot keep {keep} of {size} {unit}: N must be at most M and "
                "M at least 1"
            )
        parsed.append((keep, size))
    if len(parsed) == 1:
        keep, size = parsed[0]
        if depth % size:
            divisors = [m for m in range(1, depth + 1) if depth % m == 0]
            raise ValueError(
                f"groups {groups!r}: {size} does not divide {total}: choose M from "
                f"{divisors}, or list every group as in 2:4,1:4 so that the sizes add up to {depth}"
            )
        return parsed * (depth // size)
    covered = sum(size for _, size in parsed)
    if covered != depth:
        raise ValueError(
            f"groups {groups!r} cover {covered} {unit} but the model has {depth}: make the sizes "
            f"add up to {depth}"
        )
    return parsed


def _choices(keep: int, variants: list[tuple[int, ...]], group: int, unit: str) -> torch.Tensor:
    """[options, M] of the variant of each block, 0 its original: every way to keep `keep` of them.

    variants: for each block what may stand in for its original; a block without any is kept.
    """
    size = len(variants)
    pinned = [i for i, legal in enumerate(variants) if not legal]
    if len(pinned) > keep:
        raise ValueError(
            f"group {group} keeps {keep} of {size} {unit} but {len(pinned)} of them are pinned or "
            f"have no graft: at most {keep} may, or raise N"
        )
    ways = [1] + [0] * keep  # ways[k]: with k originals kept among the blocks counted so far
    for legal in variants:
        ways = [len(legal) * n + (ways[k - 1] if k else 0) for k, n in enumerate(ways)]
    if ways[keep] > MAX_OPTIONS:
        raise ValueError(
            f"group {group} has {ways[keep]} ways to keep {keep} of {size} {unit}, more than "
            f"{MAX_OPTIONS}: use smaller groups, such as 2:4"
        )
    # pinned blocks are in every choice, so that they do not change the order of the others
    free = [i for i in range(size) if i not in pinned]
    rows = [
        row
        for kept in combinations(free, keep - len(pinned))
        for row in product(
            *((0,) if i in kept or i in pinned else variants[i] for i in range(size))
        )
    ]
    return torch.tensor(rows)


def settle(dit: nn.Module, chosen: Mapping[int, int]) -> None:
    """Ends the choice, in place: in block b only the operators of variant chosen[b] stay.

    Variant 0 is the original block, 1 the graft of a GraftPair. Where an open pair begins at b, 0
    leaves its blocks in sequence, and 1 puts the parallel pair in their place.
    """
    for i, variant in chosen.items():
        block = dit.blocks[i]
        for slot, operator in list(block.named_children()):
            if isinstance(operator, GraftPair):
                setattr(block, slot, operator.graft if variant else operator.original)
            elif isinstance(operator, GraftChoice):
                setattr(block, slot, operator.operator(variant))
        pair = dict(dit.merges).get(str(i))
        if isinstance(pair, PairChoice):
            del dit.merges[str(i)]
            if variant:
                dit.merges[str(i)] = pair.merge
                for index, own in pair.blocks.items():
                    dit.blocks[int(index)] = own


class GatedDiT(nn.Module):
    """A DiT whose slots or pairs are open, and the gates that choose for them, as one module.

    In training every sample draws its own blocks; that takes `tau`, `scaling` and `uniform` [B, all
    options, group after group], see `LayerGates.draw`. In eval mode the most likely blocks are
    kept, without noise. `drop` goes to the DiT. -> [B,2C,H,W].
    """

    def __init__(self, dit: nn.Module, gates: LayerGates):
        super().__init__()
        self.dit = dit
        self.gates = gates

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        y: torch.Tensor,
        *,
        uniform: torch.Tensor | None = None,
        tau: float | torch.Tensor | None = None,
        scaling: float | torch.Tensor | None = None,
        drop: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if not self.training:
            keep = self.gates.keep_mask()  # depth
        elif uniform is None or tau is None or scaling is None:
            raise ValueError("in training, GatedDiT draws: pass uniform, tau and scaling")
        else:
            sizes = [gate.shape[1] for gate in self.gates.gumbel_gates]
            keep = self.gates.draw(tau, scaling, list(uniform.split(sizes, dim=1)))  # B depth
        return self.dit(x, t, y, keep=keep, drop=drop)


def summary(answer: dict) -> list[str]:
    """What a selection.json decides, in lines for logs and pages."""
    takes = f" as {answer['chosen']} of {answer['variants']}" if "chosen" in answer else ""
    if "pairs" in answer:
        return [
            f"pairs {words}: {' '.join(f'{a}+{b}' for a, b in answer['pairs'][key]) or 'none'}"
            for key, words in (("sequential", "in sequence"), ("parallel", "in parallel"))
        ]
    return [
        f"kept blocks: {' '.join(map(str, answer['kept'])) or 'none'}",
        f"grafted blocks: {' '.join(map(str, answer['grafted'])) or 'none'}{takes}",
    ]
