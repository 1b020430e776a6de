r"""Coarse grids: the fine steps at which the hare steps, i.e. both branches are evaluated.

A coarse grid is a tuple of growing row indices that starts with 0. Algorithm 2 builds one from
calibrated error constants: a span of m fine steps costs the tortoise m c_T h^(p+1) and the hare
c_H (m h)^(p+1); their ratio stays below rho for

    m_max(i) = max(1, floor((rho c_T(i) / c_H(i))^(1/p)))

Source: Tortoise and Hare Guidance, arXiv 2511.04117, algorithm 2.
"""

from __future__ import annotations

import math
import operator
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from .curves import Calibration
from .errors import InvalidArgument

CoarseGrid = tuple[int, ...]

LAMBDA_BOUND = 20.0
"""Half log-SNR at which the infinite ends of a schedule are entered into curves and grids."""


def max_spans(ratios: Sequence[float], rho: float, order: int) -> tuple[int, ...]:
    """m_max of every fine step, >= 1. ``ratios`` are c_T / c_H, ``rho`` > 0, ``order`` p >= 1."""
    if not (math.isfinite(rho) and rho > 0):
        raise InvalidArgument("rho", rho, "give a positive, finite error ratio, e.g. 1.1.")
    # A hair above the root, so that exact p-th powers are not floored to the span below.
    roots = ((rho * ratio) ** (1 / order) * (1 + 1e-12) for ratio in ratios)
    return tuple(max(1, math.floor(min(root, len(ratios)))) for root in roots)


def look_before_you_leap(spans: Sequence[int]) -> CoarseGrid:
    """Algorithm 2: from step 0, leap ``spans[i]`` fine steps at a time until the end."""
    grid, i = [], 0
    while i < len(spans):
        grid.append(i)
        i += spans[i]
    return tuple(grid)


def grid_for_rho(
    calibration: Calibration, lambdas: Sequence[float], guidance_scale: float, rho: float
) -> CoarseGrid:
    """The coarse grid of Algorithm 2 for a run whose rows lie at half log-SNR ``lambdas``."""
    ratios = calibration.ratio(lambdas, guidance_scale)
    return look_before_you_leap(max_spans(ratios, rho, calibration.order))


def grid_for_nfe(
    calibration: Calibration,
    lambdas: Sequence[float],
    guidance_scale: float,
    nfe: int,
    cutoff: int | None = None,
) -> CoarseGrid:
    """The grid of Algorithm 2 with the smallest rho that costs at most ``nfe`` evaluations.

    Args:
        calibration: measured error curves.
        lambdas: half log-SNR of the N rows.
        guidance_scale: w > 1.
        nfe: budget, N + 1 <= nfe; more than 2 N is the same as 2 N.
        cutoff: coarse points from this row on cost nothing (delta is dropped there).
    """
    num_rows = len(lambdas)
    check_budget(nfe, num_rows)
    ratios = calibration.ratio(lambdas, guidance_scale)
    order = calibration.order
    rho = min(1 / ratio for ratio in ratios)
    while True:
        spans = max_spans(ratios, rho, order)
        grid = look_before_you_leap(spans)
        if grid_nfe(grid, num_rows, cutoff) <= nfe or len(grid) == 1:
            return grid
        # It changes only where one of its spans grows (the last one may end beyond the run).
        rho = min((spans[i] + 1) ** order / ratios[i] for i in grid[:-1])


def uniform_grid(num_rows: int, interval: int) -> CoarseGrid:
    """Every ``interval``-th row."""
    if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
        raise InvalidArgument("interval", interval, "give a whole number of rows, at least 1.")
    return tuple(range(0, num_rows, interval))


def even_grid_for_nfe(num_rows: int, nfe: int, cutoff: int | None = None) -> CoarseGrid:
    """The points an uncalibrated budget buys, spread evenly over the rows before the cut-off."""
    check_budget(nfe, num_rows)
    limit = num_rows if cutoff is None else min(cutoff, num_rows)
    count = min(nfe - num_rows, limit)
    return tuple(sorted({j * limit // count for j in range(count)})) if count else (0,)


def default_grid(num_rows: int) -> CoarseGrid:
    """Conservative grid for a model nobody calibrated: the first fifth, then every second row.

    The guidance delta turns fastest at high noise on every model that the paper reports, and two
    rows is the shortest span that saves anything: 80 of 100 evaluations at 50 steps.
    """
    start = math.ceil(num_rows / 5)
    return (*range(start), *range(start, num_rows, 2))


def map_grid(coarse_lambdas: Iterable[float], lambdas: Sequence[float]) -> CoarseGrid:
    """Carry coarse points over to another fine grid: the first row at or past each half log-SNR.

    Row 0 is always a coarse point, so a truncated run (img2img) starts with a fresh delta.
    """
    rows = _bounded(lambdas)
    # Rounding of schedules computed in float32 must not push a point to the next row.
    found = {bisect_left(rows, value - 1e-3) for value in _bounded(coarse_lambdas)}
    return tuple(sorted({0} | {i for i in found if i < len(lambdas)}))


def _bounded(lambdas: Iterable[float]) -> list[float]:
    """Half log-SNRs with infinite ones (zero SNR, flow matching's pure noise) at the bound."""
    return [max(-LAMBDA_BOUND, min(LAMBDA_BOUND, value)) for value in lambdas]


@dataclass(frozen=True)
class MappedGrid:
    """A coarse grid known on one fine grid, carried to others by half log-SNR.

    Attributes:
        indices: coarse points on the fine grid it was made for.
        lambdas: half log-SNR of that fine grid, one per row.
        cutoff: row of that fine grid from which delta is 0; None: never.
    """

    indices: CoarseGrid
    lambdas: tuple[float, ...]
    cutoff: int | None = None

    def cutoff_on(self, lambdas: Sequence[float]) -> int:
        """The first row at or past the cut-off's half log-SNR; the number of rows without one."""
        if self.cutoff is None:
            return len(lambdas)
        return bisect_left(_bounded(lambdas), _bounded(self.lambdas)[self.cutoff] - 1e-3)

    def on(self, lambdas: Sequence[float]) -> CoarseGrid:
        """Coarse points of a run at ``lambdas``; the identical indices on the same fine grid."""
        same = len(lambdas) == len(self.lambdas) and all(
            abs(a - b) < 1e-3
            for a, b in zip(_bounded(lambdas), _bounded(self.lambdas), strict=True)
        )
        return self.indices if same else map_grid([self.lambdas[i] for i in self.indices], lambdas)


def check_grid(grid: Sequence[int], num_rows: int | None = None) -> CoarseGrid:
    """``grid`` as a tuple if it is one for ``num_rows`` rows, otherwise `InvalidArgument`."""
    try:
        points = tuple(operator.index(i) for i in grid)
    except TypeError:
        raise InvalidArgument("grid", grid, "coarse points are row numbers (int).") from None
    if not points or points[0] != 0:
        raise InvalidArgument("grid", points, "a coarse grid starts with row 0.")
    if any(b <= a for a, b in pairwise(points)):
        raise InvalidArgument("grid", points, "coarse points must grow strictly.")
    if num_rows is not None and points[-1] >= num_rows:
        remedy = f"the run has {num_rows} rows; give indices below that, or map it by log-SNR."
        raise InvalidArgument("grid", points, remedy)
    return points


def check_budget(nfe: int, num_rows: int) -> None:
    """Refuse a budget below one evaluation per row plus the first delta."""
    if nfe < num_rows + 1:
        remedy = (
            f"{num_rows} steps need at least {num_rows + 1} evaluations; raise nfe or use "
            "fewer steps."
        )
        raise InvalidArgument("nfe", nfe, remedy)


def grid_nfe(grid: CoarseGrid, num_rows: int, cutoff: int | None = None) -> int:
    """Evaluations per sample: one a row, one more at each coarse point before the cut-off."""
    limit = num_rows if cutoff is None else cutoff
    return num_rows + sum(i < limit for i in grid)


def grid_iou(first: Iterable[int], second: Iterable[int]) -> float:
    """Intersection over union of two grids, 1 for equal ones."""
    a, b = set(first), set(second)
    return len(a & b) / len(a | b)
