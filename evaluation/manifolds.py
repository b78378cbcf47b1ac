"""Precision and recall by nearest-neighbour manifolds (Kynkaanniemi et al. 2019).

The manifold of a set of points is the union of balls, one about each point, that reach to its
third nearest neighbour. Precision is the share of samples inside the manifold of the reference,
recall the share of reference images inside that of the samples.

Distances come from float32 matrix products, block by block; where one of these is too close to a
radius to decide, and for the radii themselves, it is computed again in float64 from differences.
So neither the size of the blocks nor the device decides who is inside.
"""

import math

import torch

NEIGHBOURS = 3
SPARE = 5  # candidates for a neighbour beyond those needed, of which float64 chooses
BLOCK = 4096
EXACT = 256  # rows whose candidates are looked at in float64 at a time


def precision_recall(
    reference: torch.Tensor,
    samples: torch.Tensor,
    neighbours: int = NEIGHBOURS,
    block: int = BLOCK,
) -> tuple[float, float]:
    """Precision and recall of features [N, D] against reference features [M, D], float32.

    Raises: ValueError when a set has no more points than `neighbours`.
    """
    centre = reference.double().mean(0)  # smaller numbers, and so smaller rounding errors
    radii = [squared_radii(points, centre, neighbours, block) for points in (reference, samples)]
    precision = inside(samples, reference, radii[0], centre, block).double().mean().item()
    recall = inside(reference, samples, radii[1], centre, block).double().mean().item()
    return precision, recall


def squared_radii(
    points: torch.Tensor, centre: torch.Tensor, neighbours: int = NEIGHBOURS, block: int = BLOCK
) -> torch.Tensor:
    """Squared distance [N], float64, of each point to its `neighbours`-th nearest other point.

    Each pair of blocks is looked at once, for the neighbours of both.
    """
    count = len(points)
    if count <= neighbours:
        raise ValueError(
            f"{neighbours} neighbours of each of {count} images: precision and recall need at "
            f"least {neighbours + 1}"
        )
    number = min(neighbours + SPARE, count - 1)
    near = torch.full((count, number), math.inf, device=points.device)
    which = torch.zeros(count, number, dtype=torch.int64, device=points.device)

    def offer(start: int, squares: torch.Tensor, first: int) -> None:
        """Points from `start` on may have neighbours among those from `first` on."""
        rows = slice(start, start + len(squares))
        values, columns = squares.topk(min(number, squares.shape[1]), largest=False, sorted=False)
        values = torch.cat([near[rows], values], 1)
        columns = torch.cat([which[rows], columns + first], 1)
        near[rows], best = values.topk(number, largest=False, sorted=False)
        which[rows] = columns.gather(1, best)

    for start in range(0, count, block):
        mine = _Rows(points[start : start + block], centre)
        for first in range(start, count, block):
            squares = mine.squares(_Rows(points[first : first + block], centre))
            if first == start:
                squares.fill_diagonal_(math.inf)
            else:
                offer(first, squares.T, start)
            offer(start, squares, first)

    radii = []
    for rows, columns in zip(points.split(EXACT), which.split(EXACT), strict=True):
        exact = (points[columns].double() - rows[:, None].double()).square().sum(2)
        radii.append(exact.kthvalue(neighbours, dim=1).values)
    return torch.cat(radii)


def inside(
    queries: torch.Tensor,
    points: torch.Tensor,
    radii: torch.Tensor,
    centre: torch.Tensor,
    block: int = BLOCK,
) -> torch.Tensor:
    """Whether each query [Q, D] is in the ball about any of the points [N, D], bool [Q].

    radii: squared, float64 [N]. A query on the rim of a ball is inside.
    """
    found = torch.zeros(len(queries), dtype=torch.bool, device=queries.device)
    for first in range(0, len(points), block):
        near, reach = points[first : first + block], radii[first : first + block]
        theirs = _Rows(near, centre)
        for index in (~found).nonzero().squeeze(1).split(block):
            mine = _Rows(queries[index], centre)
            margin = reach.float() - mine.squares(theirs)
            doubt = _doubt(mine, theirs)
            best, column = margin.max(1)
            found[index] = best > doubt
            unclear = (best.abs() <= doubt).nonzero().squeeze(1)
            gaps = (queries[index[unclear]].double() - near[column[unclear]].double()).square()
            held = gaps.sum(1) <= reach[column[unclear]]
            found[index[unclear[held]]] = True
            for row in unclear[~held].tolist():
                close = (margin[row] >= -doubt).nonzero().squeeze(1)
                gaps = (queries[index[row]].double() - near[close].double()).square().sum(1)
                found[index[row]] = (gaps <= reach[close]).any()
    return found


class _Rows:
    """Centred float32 rows [N, D] and their squared lengths [N]."""

    def __init__(self, rows: torch.Tensor, centre: torch.Tensor):
        exact = rows.double() - centre
        self.rows = exact.float()
        self.lengths = exact.square().sum(1).float()

    def squares(self, other: "_Rows") -> torch.Tensor:
        """Squared distances [N, M], within `_doubt`; may be a little below 0."""
        both = self.lengths[:, None] + other.lengths
        return both.addmm_(self.rows, other.rows.T, alpha=-2)


def _doubt(one: _Rows, two: _Rows) -> float:
    """More than the rounding error of a squared distance: those of D terms add up like random
    steps, and this is 16 times what such a walk comes to."""
    size = (one.lengths.max() + two.lengths.max()).item()
    return 16 * math.sqrt(one.rows.shape[1]) * torch.finfo(torch.float32).eps * size
