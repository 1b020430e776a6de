"""Packing: the rows of a plan become the table that the kernels read.

A row names its registers by age; a kernel names them by slot. Every stored value (sample, output,
delta, state) lives from the row that makes it to the last row that reads it, and slots are handed
out as a compiler hands out machine registers: a run takes as many as are ever alive at once, and
what nobody will read is not stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from thg_kernels.step_update import Column, StepTable, blank_rows, weight_columns

from .plan import Row, SamplingPlan

Value = tuple[str, int]
"""A stored value: register letter and the row that made it ("X", 0 is the initial sample)."""
_SLOTS = {
    "X": Column.SLOT_SAMPLE,
    "E": Column.SLOT_GUIDED,
    "C": Column.SLOT_COND,
    "D": Column.SLOT_DELTA,
    "S": Column.SLOT_STATE,
}


@dataclass
class _Line:
    """One row by stored values instead of ages."""

    columns: dict[Column, float]
    weights: dict[str, dict[Value, float]] = field(default_factory=dict)
    makes: list[Value] = field(default_factory=list)

    def reads(self) -> Iterator[Value]:
        """Stored values that the row needs."""
        for weights in self.weights.values():
            yield from weights


@lru_cache(maxsize=64)
def step_table(plan: SamplingPlan) -> StepTable:
    """The plan as a table for `thg_kernels.step_update`; made once per plan."""
    lines = _Reader(plan.rows).lines()
    last_read = {value: len(lines) for value in [("X", len(lines))]}
    for i, line in reversed(list(enumerate(lines))):
        # A sample is kept until the next row has run even if that does not read it: it is the
        # result of the step, for callbacks and for whoever ends the run there.
        for value in [*line.reads(), ("X", i)]:
            last_read.setdefault(value, i)
    slots, writes = _assign(lines, last_read)
    num_slots = max(slots.values()) + 1
    rows = blank_rows(len(lines) + 1, num_slots)
    for i, line in enumerate(lines):
        for column, number in line.columns.items():
            rows[i, column] = number
        for value in writes[i]:
            rows[i, _SLOTS[value[0]]] = slots[value]
        for name, weights in line.weights.items():
            columns = rows[i, weight_columns(name, num_slots)]
            for value, weight in weights.items():
                columns[slots[value]] = weight
    return StepTable(rows, tuple(slots["X", i] for i in range(len(lines) + 1)))


def _assign(
    lines: Sequence[_Line], last_read: dict[Value, int]
) -> tuple[dict[Value, int], list[list[Value]]]:
    """The slot of every value that is stored, and what each row stores."""
    slots: dict[Value, int] = {("X", 0): 0}
    alive: dict[int, Value] = {0: ("X", 0)}
    writes: list[list[Value]] = []
    for i, line in enumerate(lines):
        # A row reads all its slots before it writes any, so what it reads last makes room for it.
        alive = {slot: value for slot, value in alive.items() if last_read[value] > i}
        kept = [value for value in line.makes if last_read.get(value, i) > i]
        for value in kept:
            slot = next(s for s in range(len(alive) + 1) if s not in alive)
            slots[value], alive[slot] = slot, value
        writes.append(kept)
    return slots, writes


class _Reader:
    """Turns ages into stored values, row by row."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.stacks: dict[str, list[Value]] = {letter: [] for letter in "CDES"}
        self.stacks["X"] = [("X", 0)]

    def lines(self) -> list[_Line]:
        """One line per row."""
        return [self._line(i, row) for i, row in enumerate(self.rows)]

    def _line(self, i: int, row: Row) -> _Line:
        line = _Line(
            {
                Column.ACTIVE: 1.0,
                Column.BOTH: float(row.evaluates_both),
                Column.TIMESTEP: row.timestep,
                Column.INPUT_SCALE: row.input_scale,
                Column.GUIDANCE: row.guidance_weight,
                Column.NOISE: row.noise_weight,
            }
        )
        before = list(self.stacks["S"])
        self._shift(line, i, row)
        for value, weight in zip(before, row.state_update, strict=False):
            if weight != 0.0:
                line.weights.setdefault("to_state", {})[value] = weight
        if not row.evaluates_both and row.guidance_weight != 0.0:
            self._add(line, i, "to_delta", "D", row.delta_weights, None)
            self._add(line, i, "to_change", "C", (0.0, *row.cond_change_weights), None)
        self._add(line, i, "to_sample", "X", row.sample_weights, None)
        self._add(line, i, "to_sample", "E", row.guided_weights, Column.FROM_GUIDED)
        self._add(line, i, "to_sample", "C", row.cond_weights, Column.FROM_COND)
        self._add(line, i, "to_sample", "D", row.step_delta_weights, Column.FROM_DELTA)
        self._add(line, i, "to_sample", "S", row.state_weights, Column.FROM_STATE)
        self._add(line, i, "to_state", "X", row.state_sample_update, None)
        self._add(line, i, "to_state", "E", row.state_guided_update, Column.STATE_FROM_GUIDED)
        self._add(line, i, "to_state", "D", row.state_delta_update, Column.STATE_FROM_DELTA)
        self.stacks["X"].insert(0, ("X", i + 1))
        line.makes.append(("X", i + 1))
        return line

    def _shift(self, line: _Line, i: int, row: Row) -> None:
        """Put what row ``i`` makes ahead of what earlier rows have made."""
        for letter in "CEDS":
            if (letter != "D" or row.evaluates_both) and (letter != "S" or row.updates_state):
                self.stacks[letter].insert(0, (letter, i))
                line.makes.append((letter, i))

    def _add(
        self,
        line: _Line,
        i: int,
        name: str,
        letter: str,
        weights: Sequence[float],
        column: Column | None,
    ) -> None:
        """Weights of one register, by age; what this very row makes has a column of its own."""
        for value, weight in zip(self.stacks[letter], weights, strict=False):
            if weight == 0.0:
                continue
            if column is not None and value == (letter, i):
                line.columns[column] = weight
            else:
                line.weights.setdefault(name, {})[value] = weight
