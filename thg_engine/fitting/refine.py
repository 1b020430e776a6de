"""Local search of a grid: nodes are moved one by one while fitted rows come closer.

Span errors know single steps from the converged trajectory; here whole runs of fitted rows are
compared, on the samples that rows are fitted to: moves do not see those held out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ..engine import Engine
from ..plan import Row, SamplingPlan
from .reference import Trajectory
from .registers import Registers
from .rows import Gather, at_noise, distances, fit_row
from .spans import Grid

SHIFTS = (-1, 1)
"""Of a node, in the order in which they are tried."""


@dataclass(frozen=True)
class Refiner:
    """What grids are compared by.

    Attributes:
        engine: around the denoiser.
        base: the plan of a grid before any correction.
        trajectories: converged runs that rows are fitted to.
        last: index of the node at which runs end.
        gather: brings rows of other processes.
        on_node: called for each node that has been moved or left.
    """

    engine: Engine
    base: Callable[[Grid], SamplingPlan]
    trajectories: Sequence[Trajectory]
    last: int
    gather: Gather = lambda rows: rows
    on_node: Callable[[], None] = lambda: None

    def refined(self, grid: Grid, rounds: int) -> Grid:
        """``grid`` after so many rounds over its nodes, or as many as change something."""
        best = self._run(grid)
        for _ in range(rounds):
            before = best.grid
            for k in range(1, len(before.nodes)):
                for moved in _moves(best.grid, k, self.last):
                    run = self._run(moved, best)
                    if run.error < best.error:
                        best = run
                        break
                self.on_node()
            if best.grid == before:
                break
        return best.grid

    def _run(self, grid: Grid, other: _Run | None = None) -> _Run:
        """``grid`` with fitted rows; rows that are those of ``other`` are taken from there."""
        steps = tuple(zip(self.base(grid).rows, (*grid.nodes[1:], self.last), strict=True))
        states = [at_noise(self.trajectories)]
        if other is not None:
            pairs = enumerate(zip(steps, other.steps, strict=True))
            states = other.states[: 1 + next(i for i, (a, b) in pairs if a != b)]
        for row, node in steps[len(states) - 1 :]:
            current = [registers.copy() for registers in states[-1]]
            fit_row(self.engine, row, node, current, self.trajectories, self.gather)
            states.append(current)
        error = float(distances(states[-1], self.trajectories, self.gather).mean())
        # A run that overflows is worse than any other, so that a grid can leave it.
        return _Run(grid, steps, states, math.inf if math.isnan(error) else error)


@dataclass(frozen=True)
class _Run:
    """A grid whose rows have been fitted.

    Attributes:
        grid: the grid.
        steps: its base rows, and the nodes that they lead to.
        states: registers before each row, and at the end.
        error: mean relative error.
    """

    grid: Grid
    steps: tuple[tuple[Row, int], ...]
    states: list[list[Registers]]
    error: float


def _moves(grid: Grid, k: int, last: int) -> Iterator[Grid]:
    """``grid`` with its k-th node shifted, where there is room."""
    nodes = (*grid.nodes, last)
    for shift in SHIFTS:
        moved = nodes[k] + shift
        if nodes[k - 1] < moved < nodes[k + 1]:
            new = (*grid.nodes[:k], moved, *grid.nodes[k + 1 :])
            yield Grid(new, tuple(moved if j == nodes[k] else j for j in grid.both))
