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

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from models.operators.modulation import Addend, add
from models.selection import PairChoice, mix
from models.streams import beside

Pair = tuple[int, int]
STACKED_ROWS = 1024  # samples x tokens up to which a pair runs as one block, see inference.py
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

    The merges start as the sum, in float32 on PyTorch's default device.

    Raises:
        ValueError: as `check_pairs`, pairs that the model already has among them.
    """
    there = [(int(first), int(first) + 1) for first in model.merges]
    check_pairs([*there, *pairs], len(model.blocks))
    for first, _ in pairs:
        model.merges[str(first)] = new_merge(model.hidden_size)
    return model


def new_merge(width: int) -> nn.Linear:
    """A merge at its start: [I I] and 0."""
    merge = nn.Linear(2 * width, width)
    with torch.no_grad():
        merge.weight.copy_(torch.eye(width).repeat(1, 2))
        merge.bias.zero_()
    return merge


def pair_end(
    addends: Sequence[tuple[Addend, Addend]],
    merge: nn.Linear,
    keep: torch.Tensor | None = None,
    sequence: torch.Tensor | None = None,
) -> torch.Tensor:
    """W [F_a; F_b] + b of what the operators of both blocks add -> [B,T,D]

    sequence: what the blocks add one after the other [B,T,D], which `keep` mixes with it.
    """
    changes = [
        gate_attn.unsqueeze(1) * attn + gate_mlp.unsqueeze(1) * mlp
        for (attn, gate_attn), (mlp, gate_mlp) in addends
    ]
    joined = merge(torch.cat(changes, dim=-1))  # B T 2D -> B T D
    return joined if sequence is None else mix(sequence, joined, keep)


class PairEnd(nn.Module):
    """`pair_end` as a module without tensors of its own, so that it can be compiled in place."""

    def forward(self, *inputs) -> torch.Tensor:
        return pair_end(*inputs)


def run_pair(
    x: torch.Tensor,
    c: torch.Tensor,
    blocks: Sequence[nn.Module],
    merge: nn.Linear | PairChoice,
    shares: Sequence[torch.Tensor | None] = (None, None),
    before: Addend | None = None,
    parts: Sequence[torch.Tensor | None] = (None, None),
    end: Callable[..., torch.Tensor] = pair_end,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What enters a parallel pair, and what the pair adds to it: W [F_a; F_b] + b.

    Args:
        x: tokens [B,T,D].
        c: condition [B,D].
        blocks: two DiTBlocks, or one that stands for both, see `stack` of models/inference.py.
        merge: W and b, or the open choice between W [F_a; F_b] + b and the blocks in sequence.
        shares: the keep of each block, see `DiT.forward`.
        before: what is still to be added to x, see `DiTBlock.forward`.
        parts: what the blocks' `adaLN_modulation` gives, where that is there already.
        end: `pair_end`, or the same compiled.

    Returns:
        [B,T,D] each: x with `before`, and the change.
    """
    rows = x.shape[0] * x.shape[1]
    if len(blocks) == 1:
        x, addends = blocks[0](x, c, None, before, parts=parts[0], apart=True)
        halves = [[t.chunk(2) for t in addend] for addend in addends]  # those of each block
        return x, end([tuple((a[i], g[i]) for a, g in halves) for i in (0, 1)], merge)
    first, second = blocks
    if isinstance(merge, PairChoice):
        x = x if before is None else add(x, before)
        in_sequence = second(first(x, c), c) - x
        a, b = (partial(block, x, c, apart=True) for block in merge.parallel(first, second))
        (_, one), (_, other) = beside(a, b, x.device, rows)
        return x, end((one, other), merge.merge, shares[0], in_sequence)
    a, b = (
        partial(block, x, c, keep, before, parts=part, apart=True)
        for block, keep, part in zip(blocks, shares, parts, strict=True)
    )
    (x, one), (_, other) = beside(a, b, x.device, rows)
    return x, end((one, other), merge)


class ParallelPair(nn.Module):
    """One pair outside its model, for distillation: tokens [B,T,D], condition [B,D] -> [B,T,D].

    Gives what the pair adds to the tokens. Its tensors are named as in the whole model.
    """

    def __init__(self, model: nn.Module, pair: Pair):
        super().__init__()
        self.pair = pair
        self.blocks = nn.ModuleDict({str(i): model.blocks[i] for i in pair})
        self.merges = nn.ModuleDict({str(pair[0]): model.merges[str(pair[0])]})

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return run_pair(x, c, [*self.blocks.values()], self.merges[str(self.pair[0])])[1]
