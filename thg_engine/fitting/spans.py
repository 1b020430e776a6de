r"""The best grid for a budget: dynamic programming over measured span errors and sensitivities.

How well a fitted row can jump from one node to another is known before anything is run: on the
converged trajectory the jump is a least-squares problem in inner products of its samples, outputs
and deltas. With e(j, a, t) the relative squared error of a jump from node j to node t whose newest
delta is from node a <= j, and s_t the growth of an error from t to the end, the grid minimises

    sum over rows of (s_t^2 e(j, a, t))        subject to        sum over rows of cost <= budget

where a row costs one evaluation, or c2 where it evaluates both branches (then a = j).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from .reference import Nodes, Trajectory

Float64s = NDArray[np.float64]

RIDGE = 1e-8
"""Relative to each feature's size; far below the errors that matter."""
UNITS = range(10, 21)
"""Costs are counted in tenths to twentieths of an evaluation, in whichever c2 is rounded up least:
rounded down, grids would exceed their budget."""


@dataclass(frozen=True)
class Grid:
    """Nodes of a plan's rows, and which of them evaluate both branches.

    Attributes:
        nodes: growing indices, the first 0; the end is not among them.
        both: those of them with both branches.
    """

    nodes: tuple[int, ...]
    both: tuple[int, ...]

    @property
    def nfe(self) -> int:
        """Evaluations per sample."""
        return len(self.nodes) + len(self.both)

    def __str__(self) -> str:
        return "-".join(f"{j}{'b' * (j in self.both)}" for j in self.nodes)

    def cost(self, c2: float) -> float:
        """In evaluations of the conditional branch alone."""
        return len(self.nodes) + (c2 - 1) * len(self.both)

    @property
    def coarse_rows(self) -> tuple[int, ...]:
        """Rows, not nodes, that evaluate both branches."""
        return tuple(self.nodes.index(j) for j in self.both)


class SpanErrors:
    """Errors of jumps between nodes.

    Args:
        nodes: where samples are known.
        gram: inner products of [samples (K + 1), conds (K), deltas (K)], summed over samples.
        sensitivities: growth of an error from each node to the end, K + 1 values.
    """

    def __init__(self, nodes: Nodes, gram: Float64s, sensitivities: Sequence[float]) -> None:
        self.nodes, self.gram = nodes, gram
        self.growth = np.asarray(sensitivities, dtype=np.float64)
        self.size = gram[nodes.last, nodes.last]
        self._times = np.array([p.sigma_t / (p.alpha_t + p.sigma_t) for p in nodes.points])
        self._full = self._table()

    def of_full_rows(self) -> Float64s:
        """Errors of jumps with a fresh delta, ``(K, K + 1)``; infinite where t <= j."""
        return self._full

    def _before(self, j: int, t: int) -> int | None:
        """The node about as far before j as t is behind it: where the row before may have been."""
        if j == 0:
            return None
        wanted = 2 * self._times[j] - self._times[t]
        return int(np.argmin(np.abs(self._times[:j] - wanted)))

    def error(self, j: int, a: int, t: int) -> float:
        """Relative squared error at the end of a jump from j to t with deltas of a and before."""
        last = self.nodes.last
        conds, deltas = last + 1, 2 * last + 1
        features = [j, conds + j, deltas + a]
        before = self._before(j, t)
        if before is not None:
            features.append(conds + before)
        older = before if a == j else self._before(a, t)
        if older is not None and older != a:
            features.append(deltas + older)
        return float(self.growth[t] ** 2 * self._residual(t, features) / self.size)

    def _residual(self, target: int, features: list[int]) -> float:
        gram = self.gram[np.ix_(features, features)]
        scale = np.sqrt(np.diag(gram))
        scale[scale == 0.0] = 1.0  # a delta of two equal branches
        gram, moment = gram / np.outer(scale, scale), self.gram[features, target] / scale
        b = np.linalg.solve(gram + RIDGE * np.eye(len(features)), moment)
        energy = self.gram[target, target]
        return float(max(energy - 2 * b @ moment + b @ gram @ b, 0.0))

    def _table(self) -> Float64s:
        last = self.nodes.last
        table = np.full((last, last + 1), np.inf)
        for j in range(last):
            for t in range(j + 1, last + 1):
                if t < last or j >= 0.7 * last:  # nothing jumps to the end from far away
                    table[j, t] = self.error(j, j, t)
        return table

    def best_full(self, num_rows: int) -> Grid:
        """The best grid of ``num_rows`` rows, or as many as there are, all with both branches."""
        last = self.nodes.last
        num_rows = min(num_rows, last)  # no node is visited twice
        cost = np.full((num_rows + 1, last + 1), np.inf)
        came = np.zeros((num_rows + 1, last + 1), dtype=int)
        cost[0, 0] = 0.0
        for n in range(1, num_rows + 1):
            total = cost[n - 1, :last, None] + self._full
            cost[n], came[n] = total.min(axis=0), total.argmin(axis=0)
        path, at = [], last
        for n in range(num_rows, 0, -1):
            at = int(came[n, at])
            path.append(at)
        return Grid(tuple(path[::-1]), tuple(path[::-1]))

    def best(self, budget: float, c2: float) -> Grid:
        """The best grid of both kinds of rows.

        Args:
            budget: in evaluations of the conditional branch alone.
            c2: what a row with both branches costs.
        """
        unit = min(UNITS, key=lambda each: _ceil(c2 * each) / each)
        return _Search(self, unit, -_ceil(-budget * unit), _ceil(c2 * unit)).grid()


def _ceil(value: float) -> int:
    """The next whole number, with room for rounding in ``value``."""
    return math.ceil(value - 1e-6)


@dataclass
class _Search:
    """Dynamic programming over (cost so far, node, node of the newest delta)."""

    spans: SpanErrors
    unit: int
    budget: int
    both_cost: int

    def grid(self) -> Grid:
        last = self.spans.nodes.last
        table = self._errors()
        value = np.full((self.budget + 1, last + 1, last), np.inf)
        came = np.full((self.budget + 1, last + 1, last, 2), -1, dtype=np.int16)
        value[min(self.both_cost, self.budget), 0, 0] = 0.0
        for spent in range(self.both_cost, self.budget + 1):
            self._leave(spent, table, value, came)
        ends = value[:, last]
        spent, a = (int(v) for v in np.unravel_index(np.argmin(ends), ends.shape))
        return self._path(spent, a, came)

    def _errors(self) -> Float64s:
        """e(j, a, t), infinite where nothing may jump."""
        last, full = self.spans.nodes.last, self.spans.of_full_rows()
        table = np.full((last, last, last + 1), np.inf)
        for j in range(last):
            table[j, j] = full[j]
            for a in range(max(0, j - last // 4), j):
                for t in range(j + 1, min(last, j + last // 4) + 1):
                    if np.isfinite(full[j, t]):
                        table[j, a, t] = self.spans.error(j, a, t)
        return table

    def _leave(self, spent: int, table: Float64s, value: Float64s, came: NDArray[np.int16]) -> None:
        """Jumps from every state that has cost ``spent``."""
        last = self.spans.nodes.last
        total = value[spent, :last, :, None] + table  # (j, a, t)
        if not np.isfinite(total).any():
            return
        ends = total[:, :, last]
        j, a = np.unravel_index(np.argmin(ends), ends.shape)
        if ends[j, a] < value[spent, last, a]:
            value[spent, last, a], came[spent, last, a] = ends[j, a], (j, a)
        inner = total[:, :, :last]
        after = spent + self.unit
        if after <= self.budget:  # the conditional branch alone at t: the delta stays that of a
            best, found = inner.min(axis=0).T, inner.argmin(axis=0).T  # (t, a)
            better = best < value[after, :last]
            value[after, :last][better] = best[better]
            came[after, :last, :, 0][better] = found[better]
            came[after, :last, :, 1][better] = np.broadcast_to(np.arange(last), (last, last))[
                better
            ]
        after = spent + self.both_cost
        if after <= self.budget:
            flat = inner.reshape(-1, last)
            best, found = flat.min(axis=0), flat.argmin(axis=0)
            t = np.arange(last)
            better = best < value[after, t, t]
            value[after, t[better], t[better]] = best[better]
            came[after, t[better], t[better], 0] = found[better] // last
            came[after, t[better], t[better], 1] = found[better] % last

    def _path(self, spent: int, a: int, came: NDArray[np.int16]) -> Grid:
        """The grid that led to the end with this cost and newest delta."""
        at, nodes, both = self.spans.nodes.last, [], []
        while at != 0:
            before, older = (int(v) for v in came[spent, at, a])
            if at != self.spans.nodes.last:
                nodes.append(at)
                is_both = a == at
                both += [at] if is_both else []
                spent -= self.both_cost if is_both else self.unit
            at, a = before, older
        return Grid((0, *nodes[::-1]), (0, *both[::-1]))


def inner_products(trajectory: Trajectory) -> Float64s:
    """Inner products of samples, conditional outputs and deltas of one batch, summed over it."""
    parts = [trajectory.samples, trajectory.conds, trajectory.deltas]
    vectors = torch.cat([part.flatten(1) for part in parts]).double()
    gram: Float64s = (vectors @ vectors.T).numpy()
    return gram
