r"""Step tables: sampling rows in the form the kernels read, one line of floats per row.

All registers of a run (past samples, outputs, deltas, solver states) share one pool of
``num_slots`` slots; which slot holds what in which row was decided when the table was made, so a
row needs no shifts and no ages. With R_s the slots, c and u the outputs of this call, a row does

    delta   = c - u                                                       if BOTH
            = sum_s to_delta[s] R_s + sum_s to_change[s] (c - R_s)        otherwise
    e       = c + GUIDANCE delta
    state   = sum_s to_state[s] R_s + STATE_FROM_GUIDED e + STATE_FROM_DELTA delta
    x_next  = sum_s to_sample[s] R_s + FROM_GUIDED e + FROM_COND c + FROM_DELTA delta
              + FROM_STATE state + NOISE z

and then stores x_next, e, c, delta and state into the slots that SLOT_* name (-1: nowhere). What
has weight 0 is not read. Columns, in float32: `Column`, then ``to_sample``, ``to_state``,
``to_delta`` and ``to_change`` with ``num_slots`` entries each. Every table ends in a row with
ACTIVE = 0, where a finished sample rests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from functools import cached_property

import torch
from torch import Tensor

from ..errors import InvalidInput


class Column(IntEnum):
    """Columns ahead of the weights of the slots."""

    ACTIVE = 0
    BOTH = 1
    TIMESTEP = 2
    INPUT_SCALE = 3
    GUIDANCE = 4
    FROM_GUIDED = 5
    FROM_COND = 6
    FROM_DELTA = 7
    FROM_STATE = 8
    NOISE = 9
    STATE_FROM_GUIDED = 10
    STATE_FROM_DELTA = 11
    SLOT_SAMPLE = 12
    SLOT_GUIDED = 13
    SLOT_COND = 14
    SLOT_DELTA = 15
    SLOT_STATE = 16


HEAD = 20
"""Columns ahead of the weights, with room left so that these start on 16 bytes."""
WEIGHTS = ("to_sample", "to_state", "to_delta", "to_change")
MAX_SLOTS = 64


class Uses(IntFlag):
    """What any row of a table does; kernels are specialised on it and leave out the rest."""

    NOTHING = 0
    DELTA = 1
    """Some row forms its delta from slots."""
    CHANGE = 2
    """... or from changes of the conditional output."""
    STATE = 4
    """Some row stores a state of its own solver."""
    KEEPS_GUIDED = 8
    KEEPS_COND = 16
    KEEPS_DELTA = 32


@dataclass(frozen=True)
class StepTable:
    """Rows of one or more plans on the host.

    Attributes:
        rows: float64 on the CPU, shape ``(num_rows, HEAD + 4 num_slots)``.
        sample_slots: per row the slot of the current sample *before* that row; that of the terminal
            row holds the result.
    Raises:
        InvalidInput: a number that is not finite, a slot that does not exist, a flag that is
            neither 0 nor 1, no terminal row, a sample slot other than the row before has written.
    """

    rows: Tensor
    sample_slots: tuple[int, ...]

    def __post_init__(self) -> None:
        rows = self.rows
        if not isinstance(rows, Tensor):
            raise InvalidInput("rows", type(rows).__name__, "give a float64 matrix on the CPU.")
        if rows.ndim != 2 or rows.dtype != torch.float64 or rows.device.type != "cpu":
            found = f"{rows.dtype} {tuple(rows.shape)} on {rows.device}"
            raise InvalidInput("rows", found, "give a float64 matrix on the CPU.")
        width = rows.shape[1] - HEAD
        if width < 4 or width % 4 or width > 4 * MAX_SLOTS:
            remedy = f"a row has {HEAD} columns and four for each of 1 to {MAX_SLOTS} slots."
            raise InvalidInput("rows", tuple(rows.shape), remedy)
        _check_values(rows, self.num_slots)
        _check_sample_slots(rows, self.num_slots, self.sample_slots)

    @cached_property
    def lines(self) -> list[list[float]]:
        """``rows`` as plain floats, for hosts that look at every step."""
        lines: list[list[float]] = self.rows.tolist()
        return lines

    @property
    def num_rows(self) -> int:
        """Rows, the terminal ones included."""
        return len(self.rows)

    @property
    def num_slots(self) -> int:
        """Registers that a sample needs."""
        return (self.rows.shape[1] - HEAD) // 4

    @cached_property
    def uses(self) -> Uses:
        """What the kernels have to be able to do for these rows."""
        both = self.rows[:, Column.BOTH] != 0
        found = {
            Uses.DELTA: self.weights("to_delta")[~both].any(),
            Uses.CHANGE: self.weights("to_change")[~both].any(),
            Uses.STATE: (self.rows[:, Column.SLOT_STATE] >= 0).any()
            | (self.rows[:, Column.FROM_STATE] != 0).any(),
            Uses.KEEPS_GUIDED: (self.rows[:, Column.SLOT_GUIDED] >= 0).any(),
            Uses.KEEPS_COND: (self.rows[:, Column.SLOT_COND] >= 0).any(),
            Uses.KEEPS_DELTA: (self.rows[:, Column.SLOT_DELTA] >= 0).any(),
        }
        return Uses(sum(use for use, is_found in found.items() if is_found))

    @cached_property
    def has_noise(self) -> bool:
        """Whether any row adds noise."""
        return bool((self.rows[:, Column.NOISE] != 0).any())

    def weights(self, name: str) -> Tensor:
        """One of `WEIGHTS`, shape ``(num_rows, num_slots)``; a view."""
        return self.rows[:, weight_columns(name, self.num_slots)]

    def flag(self, row: int, column: Column) -> bool:
        """A 0/1 column of one row."""
        return self.lines[row][column] != 0.0

    def resized(self, num_rows: int, num_slots: int) -> StepTable:
        """The same rows with terminal ones behind them and slots that nothing uses.

        Raises:
            InvalidInput: there are more rows or slots than that.
        """
        for name, found, wanted in (
            ("num_rows", self.num_rows, num_rows),
            ("num_slots", self.num_slots, num_slots),
        ):
            if wanted < found:
                raise InvalidInput(name, wanted, f"the table has {found}.")
        rows = blank_rows(num_rows, num_slots)
        rows[: self.num_rows, :HEAD] = self.rows[:, :HEAD]
        for k, name in enumerate(WEIGHTS):
            begin = HEAD + k * num_slots
            rows[: self.num_rows, begin : begin + self.num_slots] = self.weights(name)
        last = self.sample_slots[-1:] * (num_rows - self.num_rows)
        return StepTable(rows, self.sample_slots + last)

    def bytes_per_element(self, row: int, itemsize: int, outputs: int | None = None) -> int:
        """Bytes that ``row`` has to move per latent element of one sample.

        Args:
            row: index of the row.
            itemsize: bytes of the model's dtype.
            outputs: model-dtype values written (halves of the model input, a sample); by default
                as many halves as the next row evaluates.
        """
        if not self.flag(row, Column.ACTIVE):
            return 0
        both = self.flag(row, Column.BOTH)
        reads = (self.weights("to_sample")[row] != 0) | (self.weights("to_state")[row] != 0)
        if not both:
            reads |= self.weights("to_delta")[row] != 0
            reads |= self.weights("to_change")[row] != 0
        slots = self.rows[row, Column.SLOT_SAMPLE : Column.SLOT_STATE + 1]
        if outputs is None:
            following = min(row + 1, self.num_rows - 1)
            outputs = 2 if self.flag(following, Column.BOTH) else 1
        registers = int(reads.sum()) + int((slots >= 0).sum()) + (self.rows[row, Column.NOISE] != 0)
        return 4 * int(registers) + itemsize * ((2 if both else 1) + outputs)


def blank_rows(num_rows: int, num_slots: int) -> Tensor:
    """Rows that do nothing: inactive, every weight 0, every SLOT_* -1; float64 on the CPU."""
    rows = torch.zeros(num_rows, HEAD + 4 * num_slots, dtype=torch.float64, device="cpu")
    rows[:, Column.SLOT_SAMPLE : Column.SLOT_STATE + 1] = -1
    return rows


def weight_columns(name: str, num_slots: int) -> slice:
    """Where one of `WEIGHTS` stands in a row."""
    begin = HEAD + WEIGHTS.index(name) * num_slots
    return slice(begin, begin + num_slots)


def stack(tables: Sequence[StepTable]) -> tuple[StepTable, tuple[int, ...]]:
    """One table for samples of different plans, and the first row of each in it."""
    if not tables:
        raise InvalidInput("tables", tables, "give at least one table.")
    num_slots = max(table.num_slots for table in tables)
    parts: list[Tensor] = []
    offsets: list[int] = []
    slots: list[int] = []
    for table in tables:
        offsets.append(sum(map(len, parts)))
        parts.append(table.resized(table.num_rows, num_slots).rows)
        slots += table.sample_slots
    return StepTable(torch.cat(parts), tuple(slots)), tuple(offsets)


def _check_values(rows: Tensor, num_slots: int) -> None:
    """Refuse what would make a kernel compute nonsense or write elsewhere."""
    # Checked as the kernels will read it: 1e39 is finite here and infinite there.
    bad = (~torch.isfinite(rows.float())).nonzero()
    if len(bad):
        row, column = bad[0].tolist()
        remedy = "every coefficient must be finite in float32."
        raise InvalidInput(f"rows[{row}, {column}]", float(rows[row, column]), remedy)
    for column in (Column.ACTIVE, Column.BOTH):
        for row, value in enumerate(rows[:, column].tolist()):
            if value not in (0.0, 1.0):
                raise InvalidInput(f"rows[{row}].{column.name}", value, "give 0 or 1.")
    for row, slots in enumerate(rows[:, Column.SLOT_SAMPLE : Column.SLOT_STATE + 1].tolist()):
        used = [slot for slot in slots if slot != -1.0]
        if len(set(used)) < len(used):
            raise InvalidInput(f"rows[{row}].SLOT_*", slots, "two results in one slot.")
        for slot in used:
            if slot not in range(num_slots):
                remedy = f"give -1 or one of the {num_slots} slots."
                raise InvalidInput(f"rows[{row}].SLOT_*", slot, remedy)
    active = rows[:, Column.ACTIVE] != 0
    for row in (active & (rows[:, Column.SLOT_SAMPLE] < 0)).nonzero().flatten().tolist():
        raise InvalidInput(f"rows[{row}].SLOT_SAMPLE", -1, "an active row stores its sample.")
    if not len(rows) or bool(active[-1]):
        remedy = "the last row must be a terminal one, with ACTIVE = 0."
        raise InvalidInput("rows", f"<{len(rows)} rows>", remedy)


def _check_sample_slots(rows: Tensor, num_slots: int, slots: tuple[int, ...]) -> None:
    """Refuse slots that are not where the rows have put their samples."""
    if len(slots) != len(rows):
        remedy = f"give one slot for each of the {len(rows)} rows."
        raise InvalidInput("sample_slots", slots, remedy)
    for slot in slots:
        if not isinstance(slot, int) or not 0 <= slot < num_slots:
            raise InvalidInput("sample_slots", slot, f"there are {num_slots} slots.")
    written = rows[:-1, [Column.ACTIVE, Column.SLOT_SAMPLE]].tolist()
    for row, (active, stored) in enumerate(written):
        # Behind a terminal row begins another plan.
        if active and stored != slots[row + 1]:
            remedy = f"row {row} stores its sample in slot {int(stored)}: name that one."
            raise InvalidInput(f"sample_slots[{row + 1}]", slots[row + 1], remedy)
