"""Precision and recall by nearest-neighbour manifolds (Kynkaanniemi et al. 2019).

The manifold of a set of points is the union of balls, one about each point, that reach to its
third nearest neighbour. Precision is the share of samples inside the manifold of the reference,
recall the share of reference images inside that of the samples.

Distances come from float32 matrix products, block by block; where one of these is too close to a
radius to decide, and for the radii themselves, it is computed again in float64 from differences.
So neither the size of the blocks nor the device decides who is inside.
"""

import math
from collections.abc import Iterator

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
    ours, theirs = _Points(samples, centre), _Points(reference, centre)
    reach_ours = squared_radii(ours, neighbours, block)
    reach_theirs = squared_radii(theirs, neighbours, block)
    precise = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    recalled = torch.zeros(len(reference), dtype=torch.bool, device=samples.device)
    for rows in _blocks(len(samples), block):
        for columns in _blocks(len(reference), block):
            squares, doubt = ours.squares(rows, theirs, columns)
            one, two = samples[rows], reference[columns]
            _find(precise[rows], squares, doubt, one, two, reach_theirs[columns])
            _find(recalled[columns], squares.T, doubt, two, one, reach_ours[rows])
    return precise.double().mean().item(), recalled.double().mean().item()


def squared_radii(
    points: "_Points", neighbours: int = NEIGHBOURS, block: int = BLOCK
) -> torch.Tensor:
    """Squared distance [N], float64, of each point to its `neighbours`-th nearest other point.

    Each pair of blocks is looked at once, for the neighbours of both.
    """
    count, device = len(points.exact), points.exact.device
    if count <= neighbours:
        raise ValueError(
            f"{neighbours} neighbours of each of {count} images: precision and recall need at "
            f"least {neighbours + 1}"
        )
    number = min(neighbours + SPARE, count - 1)
    near = torch.full((count, number), math.inf, device=device)
    which = torch.zeros(count, number, dtype=torch.int64, device=device)

    def offer(rows: slice, squares: torch.Tensor, first: int) -> None:
        """The points `rows` may have neighbours among those from `first` on."""
        values, columns = squares.topk(min(number, squares.shape[1]), largest=False, sorted=False)
        values = torch.cat([near[rows], values], 1)
        columns = torch.cat([which[rows], columns + first], 1)
        near[rows], best = values.topk(number, largest=False, sorted=False)
        which[rows] = columns.gather(1, best)

    for rows in _blocks(count, block):
        for columns in _blocks(count, block, rows.start):
            squares, _ = points.squares(rows, points, columns)
            if columns == rows:
                squares.fill_diagonal_(math.inf)
            else:
                offer(columns, squares.T, rows.start)
            offer(rows, squares, columns.start)

    radii = []
    for rows, columns in zip(points.exact.split(EXACT), which.split(EXACT), strict=True):
        exact = (points.exact[columns].double() - rows[:, None].double()).square().sum(2)
        radii.append(exact.kthvalue(neighbours, dim=1).values)
    return torch.cat(radii)


class _Points:
    """Points [N, D] as they are, and centred in float32 with their squared lengths [N]."""

    def __init__(self, exact: torch.Tensor, centre: torch.Tensor):
        self.exact = exact
        self.rows = torch.empty_like(exact, dtype=torch.float32)
        self.lengths = torch.empty(len(exact), device=exact.device)
        for rows in _blocks(len(exact), BLOCK):
            centred = exact[rows].double() - centre
            self.rows[rows] = centred.float()
            self.lengths[rows] = centred.square().sum(1).float()

    def squares(self, rows: slice, other: "_Points", columns: slice) -> tuple[torch.Tensor, float]:
        """Squared distances [B, C] of some points to some others, and more than their error.

        The rounding errors of D terms add up like random steps; the second value is 16 times what
        such a walk comes to.
        """
        one, two = self.lengths[rows], other.lengths[columns]
        both = one[:, None] + two
        both.addmm_(self.rows[rows], other.rows[columns].T, alpha=-2)
        size = (one.max() + two.max()).item()
        steps = math.sqrt(self.rows.shape[1])
        return both, 16 * steps * torch.finfo(torch.float32).eps * size


def _find(
    found: torch.Tensor,
    squares: torch.Tensor,
    doubt: float,
    queries: torch.Tensor,
    points: torch.Tensor,
    reach: torch.Tensor,
) -> None:
    """Sets `found` [Q] where a query [Q, D] is in the ball about one of the points [N, D].

    squares: distances [Q, N] within `doubt`; reach: squared radii [N], float64. A query on the rim
    of a ball is inside.
    """
    margin = reach.float() - squares
    best, column = margin.max(1)
    unclear = ((best.abs() <= doubt) & ~found).nonzero().squeeze(1)
    found |= best > doubt
    for some in unclear.split(EXACT):
        gaps = (queries[some].double() - points[column[some]].double()).square().sum(1)
        held = gaps <= reach[column[some]]
        found[some[held]] = True
        for row in some[~held].tolist():
            close = (margin[row] >= -doubt).nonzero().squeeze(1)
            gaps = (queries[row].double() - points[close].double()).square().sum(1)
            found[row] = (gaps <= reach[close]).any()


def _blocks(count: int, size: int, start: int = 0) -> Iterator[slice]:
    for first in range(start, count, size):
        yield slice(first, min(first + size, count))
