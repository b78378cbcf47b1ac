"""Learning which blocks keep their original operator.

A slot whose fate is open holds a GraftPair; LayerGates holds one distribution per local group of
blocks over the ways to keep N of its M original operators, drawn with a hard Gumbel softmax as in
TinyFusion (arXiv 2412.01199).
"""

import math
from itertools import combinations

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
        if keep is None:
            raise ValueError(
                "this model holds graft pairs: pass keep, [depth] or [B, depth], to choose "
                "between original (1) and graft (0)"
            )
        original, graft = self.original(x), self.graft(x)
        m = keep.to(torch.float32).reshape(-1, 1, 1)  # 1 1 1 or B 1 1
        return (m * original + (1 - m) * graft).to(original.dtype)


class LayerGates(nn.Module):
    """One gate per group of neighbouring blocks; its options are the ways to keep N of M originals.

    groups: "N:M" repeated over the depth, or a comma list such as "2:4,1:4" that covers it exactly.
    pinned: blocks that always keep their original operator; they count towards their group's N.
    init: value of every logit at the start.

    .gumbel_gates[g] [1, options] are the only parameters; .options[g] [options, M] the choices in
    lexicographic order of the kept blocks, 1 = keeps the original; .spans[g] = (first block, one
    past the last). ValueError for groups or pinned blocks that do not fit.
    """

    def __init__(
        self, depth: int, groups: str = "2:4", pinned: tuple[int, ...] = (), init: float = 0.02
    ):
        super().__init__()
        self.depth = depth
        self.groups = parse_groups(groups, depth)
        self.pinned = tuple(sorted(set(pinned)))
        outside = [block for block in self.pinned if not 0 <= block < depth]
        if outside:
            raise ValueError(f"pinned blocks {outside} are outside the model: legal 0..{depth - 1}")

        self.spans = []
        self.gumbel_gates = nn.ParameterList()
        first = 0
        for g, (keep, size) in enumerate(self.groups):
            span = (first, first + size)
            table = _options(
                keep, size, [b - first for b in self.pinned if first <= b < span[1]], g
            )
            self.register_buffer(f"options_{g}", table, persistent=False)
            self.gumbel_gates.append(nn.Parameter(torch.full((1, len(table)), float(init))))
            self.spans.append(span)
            first += size

    @property
    def options(self) -> list[torch.Tensor]:
        return [getattr(self, f"options_{g}") for g in range(len(self.groups))]

    def draw(
        self,
        tau: float,
        scaling: float,
        uniform: list[torch.Tensor] | None = None,
        batch_size: int = 1,
    ) -> torch.Tensor:
        """Draws one option per sample and group -> keep [B, depth], exactly 0 or 1.

        softmax((logits * scaling + gumbel noise) / tau), hard in the forward pass and soft in the
        backward pass. uniform: per group the numbers in (0, 1), [B, options], that make the noise;
        None draws them for `batch_size` samples. ValueError for tau <= 0 or wrong shapes.
        """
        if tau <= 0:
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
            for gate, table, u in zip(self.gumbel_gates, self.options, uniform, strict=True):
                noise = -torch.log(-torch.log(u))
                soft = F.softmax((gate * scaling + noise) / tau, dim=-1)  # B options
                hard = F.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft.dtype)
                # this order of terms keeps the forward value exactly one-hot
                weights = hard + (soft - soft.detach())
                keep.append(weights @ table)  # B M
        return torch.cat(keep, dim=-1)

    def probabilities(self, scaling: float) -> list[torch.Tensor]:
        """Per group [options]: softmax(logits * scaling). Its maximum is the gate's confidence."""
        return [F.softmax(gate[0] * scaling, dim=-1) for gate in self.gumbel_gates]

    def decide(self) -> list[int]:
        """Sorted indices of the blocks kept by each group's most likely option; no noise."""
        kept = []
        for gate, table, (first, _) in zip(
            self.gumbel_gates, self.options, self.spans, strict=True
        ):
            chosen = table[gate[0].argmax()]
            kept += [first + i for i, keeps in enumerate(chosen.tolist()) if keeps]
        return kept

    def keep_mask(self) -> torch.Tensor:
        """[depth] float of `decide()`: 1 keeps the original operator, 0 takes the graft."""
        mask = torch.zeros(self.depth, device=self.gumbel_gates[0].device)
        mask[self.decide()] = 1
        return mask

    def extra_repr(self) -> str:
        spec = ",".join(f"{keep}:{size}" for keep, size in self.groups)
        return f"depth={self.depth}, groups={spec}, pinned={self.pinned}"


def parse_groups(groups: str, depth: int) -> list[tuple[int, int]]:
    """Reads "N:M" or "N:M,N:M,..." into one (N, M) per group, covering `depth` blocks exactly."""
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
                f"groups {groups!r}: cannot keep {keep} of {size} blocks: N must be at most M and "
                "M at least 1"
            )
        parsed.append((keep, size))
    if len(parsed) == 1:
        keep, size = parsed[0]
        if depth % size:
            divisors = [m for m in range(1, depth + 1) if depth % m == 0]
            raise ValueError(
                f"groups {groups!r}: {size} does not divide the depth {depth}: choose M from "
                f"{divisors}, or list every group as in 2:4,1:4 so that the sizes add up to {depth}"
            )
        return parsed * (depth // size)
    covered = sum(size for _, size in parsed)
    if covered != depth:
        raise ValueError(
            f"groups {groups!r} cover {covered} blocks but the model has {depth}: make the sizes "
            f"add up to {depth}"
        )
    return parsed


def _options(keep: int, size: int, pinned: list[int], group: int) -> torch.Tensor:
    """[options, size]: every choice of `keep` out of `size` that holds the pinned ones."""
    if len(pinned) > keep:
        raise ValueError(
            f"group {group} keeps {keep} of {size} blocks but {len(pinned)} of them are pinned: "
            f"pin at most {keep} there or raise N"
        )
    free = [i for i in range(size) if i not in pinned]
    count = math.comb(len(free), keep - len(pinned))
    if count > MAX_OPTIONS:
        raise ValueError(
            f"group {group} has {count} ways to keep {keep} of {size} blocks, more than "
            f"{MAX_OPTIONS}: use smaller groups, such as 2:4"
        )
    # a pinned block is in every choice, so this order is that of the full kept lists
    chosen = [sorted((*pinned, *some)) for some in combinations(free, keep - len(pinned))]
    table = torch.zeros(count, size)
    for row, blocks in enumerate(sorted(chosen)):
        table[row, blocks] = 1
    return table


def settle(dit: nn.Module, kept: list[int]) -> None:
    """Ends the choice, in place: every GraftPair gives way to its original where kept, or graft."""
    for i, block in enumerate(dit.blocks):
        for slot, operator in list(block.named_children()):
            if isinstance(operator, GraftPair):
                setattr(block, slot, operator.original if i in kept else operator.graft)


class GatedDiT(nn.Module):
    """A DiT whose slots hold graft pairs, and the gates that choose between them, as one module.

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
        tau: float | None = None,
        scaling: float | None = None,
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
