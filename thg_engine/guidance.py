r"""Guidance methods as rows: which steps evaluate both branches, and what stands in elsewhere.

With delta = out_cond - out_uncond and g = w - 1, classifier-free guidance forms
``out_cond + g * delta`` at every step. Each method here only changes delta:

    delta_hat = c - u                                       where both branches are evaluated
              = sum_k w_k D_k + sum_k v_k (c - C_k)         otherwise, from held deltas D_k

References:
    Tortoise and Hare Guidance, arXiv 2511.04117 (`THG`); Lv et al. 2024, arXiv 2410.19355
    (FasterCache, whose CFG half is `CFGCache`); Kynkaanniemi et al. 2024, arXiv 2404.07724
    (`GuidanceInterval`); Golnari et al. 2023, arXiv 2305.09847 (`SelectiveGuidance`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol, runtime_checkable

from .curves import Calibration
from .errors import InvalidArgument
from .grid import (
    CoarseGrid,
    MappedGrid,
    check_grid,
    default_grid,
    even_grid_for_nfe,
    grid_for_nfe,
    grid_for_rho,
    uniform_grid,
)
from .reuse import (
    DEGREES,
    FALLBACK,
    FittedWeights,
    RowWeights,
    check_reuse,
    coordinates,
    weights,
)


@dataclass(frozen=True)
class GuidanceRow:
    """Guidance of one model call.

    Attributes:
        evaluates_both: whether the unconditional branch runs, so that delta is fresh.
        boost: factor on delta_hat in this row.
        delta_weights: w_k of the held deltas D_0 (newest), D_1, ...; empty means no guidance.
        cond_change_weights: v_k of c - C_1, c - C_2, ...: the change of the conditional output.
        coarse: whether the hare takes a step here; also true where delta is set to zero.
    """

    evaluates_both: bool
    boost: float = 1.0
    delta_weights: tuple[float, ...] = (1.0,)
    cond_change_weights: tuple[float, ...] = ()
    coarse: bool = False


FRESH = GuidanceRow(evaluates_both=True, coarse=True)
HELD = GuidanceRow(evaluates_both=False)
UNGUIDED = GuidanceRow(evaluates_both=False, delta_weights=(), coarse=True)


@runtime_checkable
class Guidance(Protocol):
    """What a guidance method answers."""

    @property
    def name(self) -> str:
        """Short label for reports."""

    def rows(self, lambdas: Sequence[float], guidance_scale: float) -> tuple[GuidanceRow, ...]:
        """One `GuidanceRow` per model call of a run at half log-SNR ``lambdas``."""


def resolve_nfe(nfe: int | float, num_rows: int) -> int:
    """A budget in evaluations: a whole number as it stands, a float as a share of full guidance."""
    if isinstance(nfe, bool) or not isinstance(nfe, (int, float)) or not math.isfinite(nfe):
        raise InvalidArgument("nfe", nfe, "give evaluations (int) or a share of 2 N (float).")
    if isinstance(nfe, int):
        budget = nfe
    elif 0.5 < nfe <= 1:
        budget = max(num_rows + 1, round(nfe * 2 * num_rows))
    else:
        raise InvalidArgument(
            "nfe", nfe, "a share lies in (0.5, 1]: the conditional branch alone is half."
        )
    return min(budget, 2 * num_rows)


def resolve_row(argument: str, value: int | float, num_rows: int) -> int:
    """A row index: a whole number as it stands, a float as a share of the rows."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise InvalidArgument(
            argument, value, "give a row (int >= 0) or a share (float in [0, 1])."
        )
    if isinstance(value, int):
        return min(value, num_rows)
    if value > 1:
        raise InvalidArgument(argument, value, "a share lies in [0, 1]; give an int for a row.")
    return math.floor(value * num_rows + 1e-9)


def _check_positive(argument: str, value: object, remedy: str) -> None:
    """Refuse what is not a positive, finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidArgument(argument, value, remedy)
    if not (math.isfinite(value) and value > 0):
        raise InvalidArgument(argument, value, remedy)


@dataclass(frozen=True)
class CFG:
    """Plain classifier-free guidance: both branches at every step."""

    name: str = "cfg"

    def rows(self, lambdas: Sequence[float], guidance_scale: float) -> tuple[GuidanceRow, ...]:
        """Every row fresh."""
        return (FRESH,) * len(lambdas)


@dataclass(frozen=True)
class THG:
    """Tortoise and Hare Guidance: delta is evaluated at coarse points and held in between.

    With ``reuse`` it is extrapolated in between, which is of higher order at the same cost, and not
    Algorithm 1 any more; ``after`` likewise.

    The coarse grid is, in this order: ``grid``; that of fitted weights where there is no ``nfe``
    and no ``rho``; from ``calibration`` for the budget ``nfe`` or the error ratio ``rho`` (1 if
    neither is given); spread evenly for ``nfe``; the default grid.

    Attributes:
        rho: bound on the ratio of hare to tortoise error; needs a calibration.
        boost: factor b on delta where it serves more than one fine step.
        cutoff: i_hi, the row (int) or share of the rows (float) from which delta is 0; None: never.
        calibration: measured error curves of the model.
        grid: coarse rows, an interval, or a grid to be mapped by half log-SNR.
        nfe: budget per sample, evaluations (int) or a share of full guidance (float).
        reuse: "hold" (the paper), "linear" or "quadratic" extrapolation of the newest deltas, or
            weights fitted to the model (`thg_engine.fit_reuse`); "linear" in runs other than those
            they were fitted to, which the plan's notes say.
        along: coordinate of the extrapolation: "time", "lambda" or "row"; see `reuse.coordinates`.
        damping: share of the extrapolated change that is taken over, in [0, 1].
        after: from the cut-off on, "drop" delta (the paper) or "hold" the last one.

    Source: arXiv 2511.04117, algorithms 1 and 2, section 3.4 for boost and cut-off.
    """

    rho: float | None = None
    boost: float = 1.0
    cutoff: int | float | None = None
    calibration: Calibration | None = None
    grid: Sequence[int] | int | MappedGrid | None = None
    nfe: int | float | None = None
    reuse: str | FittedWeights = "hold"
    along: str = "time"
    damping: float = 1.0
    after: str = "drop"
    name: str = "thg"

    def __post_init__(self) -> None:
        check_reuse(self.reuse, self.along, self.damping)
        if self.after not in ("drop", "hold"):
            raise InvalidArgument("after", self.after, 'use "drop" or "hold".')
        _check_positive("boost", self.boost, "give a positive factor, e.g. 1.1.")
        if self.boost != 1.0 and not isinstance(self.reuse, str):
            raise InvalidArgument("boost", self.boost, "fitted weights leave no room for a factor.")
        if self.rho is not None:
            _check_positive("rho", self.rho, "give a positive error ratio, e.g. 1.1.")
        if self.rho is not None and self.nfe is not None:
            raise InvalidArgument(
                "nfe", self.nfe, "give rho or nfe, not both: each fixes the grid."
            )
        if self.grid is not None and (self.rho is not None or self.nfe is not None):
            raise InvalidArgument("grid", self.grid, "a given grid leaves no room for rho or nfe.")
        calibration: object = self.calibration
        if not (calibration is None or isinstance(calibration, Calibration)):
            remedy = "give a Calibration; Calibration.load reads one from a file."
            raise InvalidArgument("calibration", calibration, remedy)
        if self.cutoff is not None:
            resolve_row("cutoff", self.cutoff, 1)
        if self.nfe is not None:
            resolve_nfe(self.nfe, 1)
        if isinstance(self.grid, int):
            if isinstance(self.grid, bool) or self.grid < 1:
                raise InvalidArgument("grid", self.grid, "an interval is at least 1 row.")
        elif self.grid is not None and not isinstance(self.grid, MappedGrid):
            object.__setattr__(self, "grid", check_grid(self.grid))

    def with_calibration(self, calibration: Calibration) -> THG:
        """The same method with error curves to choose its grid from."""
        return replace(self, calibration=calibration)

    def _limit(self, lambdas: Sequence[float]) -> int:
        """The row from which delta is 0; the number of rows where it never is."""
        if self.cutoff is not None:
            return resolve_row("cutoff", self.cutoff, len(lambdas))
        return self.grid.cutoff_on(lambdas) if isinstance(self.grid, MappedGrid) else len(lambdas)

    def coarse_grid(self, lambdas: Sequence[float], guidance_scale: float) -> CoarseGrid:
        """Row indices at which the hare steps, cut-off not yet applied."""
        num_rows = len(lambdas)
        cutoff = self._limit(lambdas)
        if isinstance(self.grid, MappedGrid):
            return self.grid.on(lambdas)
        if isinstance(self.grid, int):
            return uniform_grid(num_rows, self.grid)
        if self.grid is not None:
            return check_grid(self.grid, num_rows)
        budget = None if self.nfe is None else resolve_nfe(self.nfe, num_rows)
        if not isinstance(self.reuse, str) and budget is None and self.rho is None:
            fitted = self.reuse.grid_for(lambdas)
            if fitted is not None:
                return fitted
        if self.calibration is not None and guidance_scale > 1:
            if budget is not None:
                return grid_for_nfe(self.calibration, lambdas, guidance_scale, budget, cutoff)
            return grid_for_rho(self.calibration, lambdas, guidance_scale, self.rho or 1.0)
        if self.rho is not None and self.calibration is None:
            remedy = "an error ratio needs a calibration; give one, or a grid or nfe instead."
            raise InvalidArgument("rho", self.rho, remedy)
        if budget is not None:
            return even_grid_for_nfe(num_rows, budget, cutoff)
        return default_grid(num_rows)

    def rows(self, lambdas: Sequence[float], guidance_scale: float) -> tuple[GuidanceRow, ...]:
        """Rows of Algorithm 1; from the cut-off on, every row is a coarse point with delta = 0."""
        rows = self._extrapolated(lambdas, guidance_scale)
        fitted = self._fitted(rows, lambdas, guidance_scale)
        if isinstance(fitted, str):
            return rows
        return tuple(
            row
            if row.evaluates_both or not row.delta_weights
            else replace(row, delta_weights=deltas, cond_change_weights=changes)
            for row, (deltas, changes) in zip(rows, fitted, strict=True)
        )

    def notes(self, lambdas: Sequence[float], guidance_scale: float) -> tuple[str, ...]:
        """What a user should know of such a run: that fitted weights do not apply to it."""
        if isinstance(self.reuse, str) or guidance_scale == 1.0:
            return ()
        rows = self._extrapolated(lambdas, guidance_scale)
        why = self._fitted(rows, lambdas, guidance_scale)
        return (f"{why}: {FALLBACK} extrapolation instead",) if isinstance(why, str) else ()

    def _fitted(
        self, rows: Sequence[GuidanceRow], lambdas: Sequence[float], guidance_scale: float
    ) -> tuple[RowWeights, ...] | str:
        if isinstance(self.reuse, str):
            return "nothing is fitted"
        coarse = [i for i, row in enumerate(rows) if row.evaluates_both]
        return self.reuse.weights_for(lambdas, coarse, guidance_scale)

    def _extrapolated(
        self, lambdas: Sequence[float], guidance_scale: float
    ) -> tuple[GuidanceRow, ...]:
        num_rows = len(lambdas)
        limit = self._limit(lambdas)
        points = {*self.coarse_grid(lambdas, guidance_scale), limit, num_rows}
        places = coordinates(lambdas, self.along)
        rows: list[GuidanceRow] = []
        held: list[float] = []
        for start, stop in pairwise(sorted(points)):
            boost = self.boost if stop - start > 1 else 1.0
            if start < limit:
                held.insert(0, places[start])
                rows.append(replace(FRESH, boost=boost))
                between = (self._held(held, places[i]) for i in range(start + 1, stop))
                rows += [replace(HELD, boost=boost, delta_weights=each) for each in between]
            elif self.after == "hold" and held:
                rows += [HELD] * (stop - start)
            else:
                # Delta := 0 at each of these rows: the hare steps along, nothing is extrapolated.
                rows += [UNGUIDED] * (stop - start)
        return tuple(rows)

    def _held(self, held: Sequence[float], at: float) -> tuple[float, ...]:
        degree = DEGREES[self.reuse if isinstance(self.reuse, str) else FALLBACK]
        return weights(held, at, degree, self.damping)


@dataclass(frozen=True)
class CFGCache:
    """FasterCache's guidance reuse without its frequency weights: a fixed interval, delta held.

    Attributes:
        interval: rows between two evaluations of both branches.
        start: share of the rows that run full guidance first (0.25: 70 of 100 evaluations at N =
            50).
    """

    interval: int = 5
    start: float = 0.25
    name: str = "cfg-cache"

    def __post_init__(self) -> None:
        uniform_grid(1, self.interval)
        resolve_row("start", self.start, 1)

    def rows(self, lambdas: Sequence[float], guidance_scale: float) -> tuple[GuidanceRow, ...]:
        """Fresh in the first rows, then in every ``interval``-th."""
        first = resolve_row("start", self.start, len(lambdas))
        return tuple(
            FRESH if i < first or (i - first) % self.interval == 0 else HELD
            for i in range(len(lambdas))
        )


@dataclass(frozen=True)
class GuidanceInterval:
    """Guidance only between two shares of the rows, the conditional output alone outside.

    Attributes:
        start: share (float in [0, 1]) or row (int) at which guidance begins.
        stop: share or row at which it ends, exclusive.
    """

    start: int | float = 0.1
    stop: int | float = 0.5
    name: str = "guidance-interval"

    def __post_init__(self) -> None:
        resolve_row("start", self.start, 1)
        resolve_row("stop", self.stop, 1)
        if isinstance(self.start, type(self.stop)) and not self.start < self.stop:
            raise InvalidArgument("stop", self.stop, f"must lie behind start={self.start!r}.")

    def rows(self, lambdas: Sequence[float], guidance_scale: float) -> tuple[GuidanceRow, ...]:
        """Fresh inside the interval, unguided outside."""
        num_rows = len(lambdas)
        start = resolve_row("start", self.start, num_rows)
        stop = resolve_row("stop", self.stop, num_rows)
        return tuple(FRESH if start <= i < stop else UNGUIDED for i in range(num_rows))


@dataclass(frozen=True)
class SelectiveGuidance:
    """Guidance dropped in the last part of the run.

    Attributes:
        skip: share of the rows, counted from the end, that run the conditional branch alone.
    """

    skip: float = 0.6
    name: str = "selective-guidance"

    def __post_init__(self) -> None:
        number = isinstance(self.skip, (int, float)) and not isinstance(self.skip, bool)
        if not (number and 0 <= self.skip <= 1):
            raise InvalidArgument("skip", self.skip, "give a share of the rows in [0, 1].")

    def rows(self, lambdas: Sequence[float], guidance_scale: float) -> tuple[GuidanceRow, ...]:
        """Fresh first, unguided in the last ``skip`` share."""
        keep = len(lambdas) - math.floor(self.skip * len(lambdas) + 1e-9)
        return (FRESH,) * keep + (UNGUIDED,) * (len(lambdas) - keep)


GUIDANCE_NAMES: dict[str, type[Guidance]] = {
    "cfg": CFG,
    "thg": THG,
    "cfg-cache": CFGCache,
    "guidance-interval": GuidanceInterval,
    "selective-guidance": SelectiveGuidance,
}
