"""The drift check: how far a reused delta is off, measured now and then.

A skipped row evaluates both branches for once. What the pipeline gets stays what it would have got,
so that images do not depend on whether somebody is looking, but for the rounding of another batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Probe:
    """The check of one run.

    Attributes:
        turn: which of the run's skipped rows it takes, counted round and round.
        row: that row, once the plan is known; -1 where nothing is skipped.
        error: relative error of the reused delta there; None where it was not measured.
    """

    turn: int
    row: int | None = None
    error: float | None = None

    def wants(self, index: int, skipped: tuple[int, ...]) -> bool:
        """Whether row ``index`` is to be measured."""
        if self.row is None:
            self.row = skipped[self.turn % len(skipped)] if skipped else -1
        return self.error is None and index == self.row

    def compare(self, reused: Tensor, fresh: Tensor) -> None:
        """Note |reused - fresh| / |fresh|."""
        fresh = fresh.float()
        self.error = float((reused.float() - fresh).norm() / fresh.norm().clamp_min(1e-12))


@dataclass
class Drift:
    """Checks of one compiled pipeline.

    Attributes:
        every: calls per check; None: never.
        found: row -> relative errors so far.
        calls: so far.
        idle: whether the last check found no row that reuses a delta.
    """

    every: int | None
    found: dict[int, list[float]] = field(default_factory=dict)
    calls: int = 0
    idle: bool = False

    def begin(self) -> Probe | None:
        """The check of the next run, if it is its turn."""
        self.calls += 1
        if self.every is None or (self.calls - 1) % self.every:
            return None
        return Probe((self.calls - 1) // self.every)

    def note(self, probe: Probe | None) -> None:
        """Keep what a run has found."""
        if probe is not None:
            self.idle = probe.row is None or probe.row < 0
        if probe is not None and probe.error is not None and probe.row is not None:
            self.found.setdefault(probe.row, []).append(probe.error)

    def lines(self, measurable: bool = True) -> list[str]:
        """For the report; of calls with all branches, in which a row can be measured."""
        if self.every is None:
            return []
        if not measurable:
            return ["  drift: not measured where each branch has a call of its own"]
        if not self.found:
            return [f"  drift: {'no row reuses a delta' if self.idle else 'not measured yet'}"]
        rows = sorted(self.found)
        means = {row: sum(self.found[row]) / len(self.found[row]) for row in rows}
        worst = max(rows, key=means.__getitem__)
        checks = sum(map(len, self.found.values()))
        mean = sum(map(sum, self.found.values())) / checks
        line = f"  drift: reused deltas off by {100 * mean:.1f} % in {checks} check(s)"
        return [f"{line}, most in row {worst}: {100 * means[worst]:.1f} %"]
