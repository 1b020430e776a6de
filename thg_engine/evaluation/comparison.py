"""Ours against the best baseline: error at equal cost, and cost at equal error.

A curve is a method under one solver, over its numbers of steps. Between two of its points, PSNR is
interpolated linearly in the logarithm of the cost; a point that costs more than another and is
worse is no point of its curve, since nobody would choose it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Row = dict[str, Any]
COSTS = ("nfe", "seconds")


def groups(rows: Sequence[Row]) -> dict[tuple[str, float], list[Row]]:
    """Rows by pipeline and guidance scale, in the order in which they come."""
    found: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        found.setdefault((row["pipeline"], row["guidance_scale"]), []).append(row)
    return found


def curves_of(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by curve, baselines first; plans of several budgets are one curve."""
    curves: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row["ours"], row["method"], row["nfe"])):
        curves.setdefault(f"{row['method']}, {row['solver']}", []).append(row)
    for points in curves.values():
        points.sort(key=lambda row: row["nfe"])
    return curves


@dataclass(frozen=True)
class Curve:
    """PSNR to the converged solution over a cost, as a curve that rises.

    Attributes:
        name: method and solver.
        costs: of its points, ascending.
        levels: PSNR in dB, ascending.
    """

    name: str
    costs: tuple[float, ...]
    levels: tuple[float, ...]

    @classmethod
    def of(cls, name: str, rows: Sequence[Row], cost: str) -> Curve:
        """The points of ``rows`` that no cheaper one beats."""
        points: list[tuple[float, float]] = []
        for row in sorted(rows, key=lambda row: (row[cost], -row["psnr_to_converged"])):
            if not points or row["psnr_to_converged"] > points[-1][1]:
                points.append((row[cost], row["psnr_to_converged"]))
        costs, levels = zip(*points, strict=True)
        return cls(name, costs, levels)

    def level_at(self, cost: float) -> float:
        """PSNR that ``cost`` buys; -inf below the cheapest point, the last beyond the dearest."""
        return float(np.interp(math.log(cost), np.log(self.costs), self.levels, left=-math.inf))

    def cost_of(self, level: float) -> float:
        """What ``level`` costs: at most its cheapest point; inf above the levels of its points."""
        return float(np.exp(np.interp(level, self.levels, np.log(self.costs), right=math.inf)))


def comparison(rows: Sequence[Row]) -> list[Row]:
    """Each point of ours against the best baseline, at its NFE and at its seconds.

    Returns:
        Rows with ``pipeline``, ``guidance_scale``, ``method``, ``solver``, ``num_steps``,
        ``budget``, ``cost`` ("nfe" or "seconds"), ``value`` (of that cost), ``psnr``, ``ci95``,
        ``baseline`` and ``baseline_psnr`` at equal cost, ``lead`` in dB; ``equal`` and
        ``equal_cost``, the baseline that reaches this PSNR first and what it costs there,
        ``share``, our cost over it. Null where no baseline is as cheap, or none measured reaches
        this PSNR.
    """
    found = []
    for some in groups(rows).values():
        baselines = curves_of(row for row in some if not row["ours"])
        if not baselines:
            continue
        for cost in COSTS:
            curves = [Curve.of(name, points, cost) for name, points in baselines.items()]
            ours = sorted((row for row in some if row["ours"]), key=lambda row: row[cost])
            found += [_compared(row, curves, cost) for row in ours]
    return found


def _compared(row: Row, curves: Sequence[Curve], cost: str) -> Row:
    value, psnr = row[cost], row["psnr_to_converged"]
    rival = max(curves, key=lambda curve: curve.level_at(value))
    level = rival.level_at(value)
    equal = min(curves, key=lambda curve: curve.cost_of(psnr))
    price = equal.cost_of(psnr)
    names = ("pipeline", "guidance_scale", "method", "solver", "num_steps", "budget")
    return {
        **{name: row[name] for name in names},
        "cost": cost,
        "value": value,
        "psnr": psnr,
        "ci95": row["ci95"],
        "baseline": rival.name if math.isfinite(level) else None,
        "baseline_psnr": level if math.isfinite(level) else None,
        "lead": psnr - level if math.isfinite(level) else None,
        "equal": equal.name if math.isfinite(price) else None,
        "equal_cost": price if math.isfinite(price) else None,
        "share": value / price if math.isfinite(price) else None,
    }
