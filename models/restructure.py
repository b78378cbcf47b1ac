"""Parallel pairs: two neighbouring blocks read the same tokens, and a linear map joins them.

    y = x + W [F_a(x, c); F_b(x, c)] + b        F_k(x, c) = block_k(x, c) - x

The grafting paper (arXiv 2506.05340) turns DiT-XL/2 of depth 28 into 14 such pairs. It does not say
how W starts; here as [I I], and b as 0: the sum of both changes, which is the sequential pair but
for what block b would have seen of block a's change.

Blocks keep their indices and the names of their tensors. The pair of blocks a and a + 1 adds
`merges.<a>.weight` [D, 2D], the columns of block a first, and `merges.<a>.bias` [D].

While the gates learn which pairs become parallel (models/selection.py), a PairChoice stands for the
merge, and both ways to run the two blocks are computed and mixed.
"""

import logging
from collections import defaultdict
from collections.abc import Sequence
from functools import cache

import torch
from torch import nn

from models.operators.modulation import norm
from models.operators.stacked import linear_both, obstacle, run_both
from models.selection import PairChoice, mix, run_slot

logger = logging.getLogger(__name__)

Pair = tuple[int, int]
MERGES = "merges."  # how the names of the merges' tensors begin


def all_pairs(depth: int) -> tuple[Pair, ...]:
    """(0, 1), (2, 3), ...; ValueError for an odd number of blocks."""
    if depth % 2:
        raise ValueError(
            f"{depth} blocks do not divide into pairs: list pairs that leave one block alone, such "
            "as [[0, 1]]"
        )
    return tuple((a, a + 1) for a in range(0, depth, 2))


def check_pairs(pairs: Sequence, depth: int) -> tuple[Pair, ...]:
    """The pairs in ascending order; ValueError for what is no [a, a + 1] inside the model, and for
    a block in two of them."""
    taken: dict[int, Sequence] = {}
    for pair in pairs:
        whole = isinstance(pair, (list, tuple)) and all(type(block) is int for block in pair)
        if not whole or len(pair) != 2 or pair[1] != pair[0] + 1:
            raise ValueError(f"{pair!r} is no pair of neighbouring blocks, such as [4, 5]")
        if not 0 <= pair[0] < depth - 1:
            raise ValueError(
                f"pair {list(pair)} lies outside the model: legal blocks are 0 to {depth - 1}"
            )
        for block in pair:
            if block in taken:
                raise ValueError(
                    f"block {block} stands in the pairs {list(taken[block])} and {list(pair)}: "
                    "pairs must not overlap"
                )
            taken[block] = pair
    return tuple(sorted((a, b) for a, b in pairs))


def parallelize(model: nn.Module, pairs: Sequence[Pair]) -> nn.Module:
    """Makes these pairs of a DiT's blocks parallel, in place, after their operators are grafted.

    The merges start as the sum, in float32 on PyTorch's default device. Says once, by a warning,
    which slots take two passes because their operators cannot run as one.

    Raises:
        ValueError: as `check_pairs`, pairs that the model already has among them.
    """
    there = [(int(first), int(first) + 1) for first in model.merges]
    check_pairs([*there, *pairs], len(model.blocks))
    for first, _ in pairs:
        model.merges[str(first)] = new_merge(model.hidden_size)
    for line in two_passes(model):
        _warn_once(line)
    return model


def new_merge(width: int) -> nn.Linear:
    """A merge at its start: [I I] and 0."""
    merge = nn.Linear(2 * width, width)
    with torch.no_grad():
        merge.weight.copy_(torch.eye(width).repeat(1, 2))
        merge.bias.zero_()
    return merge


def pair_change(
    x: torch.Tensor,
    c: torch.Tensor,
    first: nn.Module,
    second: nn.Module,
    merge: nn.Linear | PairChoice,
    shares: Sequence[torch.Tensor | None] = (None, None),
) -> torch.Tensor:
    """What a parallel pair adds to its input: W [F_a; F_b] + b, both branches at once.

    Args:
        x: tokens [B,T,D].
        c: condition [B,D].
        first, second: DiTBlocks; operators that cannot run as one run one after the other.
        merge: W and b, or the open choice between W [F_a; F_b] + b and the blocks in sequence.
        shares: the keep of each block, see `DiT.forward`.

    Returns:
        [B,T,D].
    """
    if isinstance(merge, PairChoice):
        at_once = pair_change(x, c, *merge.parallel(first, second), merge.merge)
        return mix(second(first(x, c), c) - x, at_once, shares[0])
    silu, linear = first.adaLN_modulation
    condition = silu(c).expand(2, -1, -1)  # 2 B D
    parts = linear_both(linear, second.adaLN_modulation[1], condition).unsqueeze(2)
    shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = parts.chunk(6, dim=-1)
    h = norm(x) * (1 + scale_attn) + shift_attn  # 2 B T D
    change = gate_attn * _slots(first.attn, second.attn, h, shares)
    h = norm(x + change) * (1 + scale_mlp) + shift_mlp
    change = change + gate_mlp * _slots(first.mlp, second.mlp, h, shares)
    return merge(change.permute(1, 2, 0, 3).flatten(2))  # B T 2D -> B T D


class PairRunner(nn.Module):
    """`pair_change` as a module without tensors of its own, so that it can be compiled in place."""

    def forward(
        self,
        x: torch.Tensor,
        c: torch.Tensor,
        first: nn.Module,
        second: nn.Module,
        merge: nn.Module,
        shares: Sequence[torch.Tensor | None] = (None, None),
    ) -> torch.Tensor:
        return pair_change(x, c, first, second, merge, shares)


class ParallelPair(nn.Module):
    """One pair outside its model, for distillation: tokens [B,T,D], condition [B,D] -> [B,T,D].

    Gives `pair_change`. Its tensors are named as in the whole model.
    """

    def __init__(self, model: nn.Module, pair: Pair):
        super().__init__()
        self.pair = pair
        self.blocks = nn.ModuleDict({str(i): model.blocks[i] for i in pair})
        self.merges = nn.ModuleDict({str(pair[0]): model.merges[str(pair[0])]})

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return pair_change(x, c, *self.blocks.values(), self.merges[str(self.pair[0])])


def _slots(
    first: nn.Module, second: nn.Module, h: torch.Tensor, shares: Sequence[torch.Tensor | None]
) -> torch.Tensor:
    """The two operators of a slot, each on its own input: [2,B,T,D] -> [2,B,T,D]"""
    if not obstacle(first, second):
        return run_both(first, second, h)
    return torch.stack([run_slot(first, h[0], shares[0]), run_slot(second, h[1], shares[1])])


def two_passes(model: nn.Module) -> list[str]:
    """Which slots of a model's pairs run one operator after the other, and why; for logs."""
    found: dict[str, list[str]] = defaultdict(list)
    for first in map(int, model.merges):
        for slot in ("attn", "mlp"):
            operators = (getattr(model.blocks[block], slot) for block in (first, first + 1))
            if reason := obstacle(*operators):
                found[f"in their {slot}, one after the other: {reason}"].append(
                    f"{first}+{first + 1}"
                )
    return [f"parallel pairs {', '.join(pairs)} run {how}" for how, pairs in found.items()]


@cache
def _warn_once(line: str) -> None:
    """Once a process; a warning, as only these show where nobody has set up logging."""
    logger.warning("%s", line)
