"""Tables, branches and the state of a batch: what the host keeps beside the kernels."""

from __future__ import annotations

from math import nan

import numpy as np
import pytest
import torch
from kernel_cases import CPU, make_state, random_row, random_table, table_of
from step_rows import array, bits

from mixture import vp_points
from thg_engine.guidance import THG
from thg_engine.lowering import plan_from_solver
from thg_engine.packing import step_table
from thg_engine.solvers import SOLVERS
from thg_kernels.step_update import (
    BranchRows,
    Column,
    InvalidInput,
    StepState,
    Uses,
    blank_rows,
    launch,
    stack,
    step_update,
)
from thg_kernels.step_update.table import HEAD, WEIGHTS

REFERENCE = CPU[0]


def _line(slots: int = 3, *, both: bool = False) -> torch.Tensor:
    """An active row that copies slot 0 to itself and no more."""
    row = blank_rows(1, slots)[0]
    row[Column.ACTIVE], row[Column.BOTH], row[Column.SLOT_SAMPLE] = 1.0, float(both), 0.0
    row[HEAD] = 1.0
    return row


def _weight(row: torch.Tensor, name: str, slot: int, value: float) -> None:
    row[HEAD + WEIGHTS.index(name) * ((len(row) - HEAD) // 4) + slot] = value


@pytest.mark.parametrize(
    ("column", "value", "use"),
    [
        (Column.SLOT_GUIDED, 1.0, Uses.KEEPS_GUIDED),
        (Column.SLOT_COND, 1.0, Uses.KEEPS_COND),
        (Column.SLOT_DELTA, 1.0, Uses.KEEPS_DELTA),
        (Column.SLOT_STATE, 1.0, Uses.STATE),
        (Column.FROM_STATE, 0.5, Uses.STATE),
        (Column.FROM_DELTA, 0.5, Uses.NOTHING),
        (Column.STATE_FROM_DELTA, 0.5, Uses.NOTHING),
    ],
)
def test_uses_of_a_column(column: Column, value: float, use: Uses) -> None:
    row = _line()
    assert table_of([row]).uses == Uses.NOTHING
    row[column] = value
    assert table_of([_line(), row]).uses == use


@pytest.mark.parametrize(
    ("name", "use"),
    [("to_delta", Uses.DELTA), ("to_change", Uses.CHANGE), ("to_state", Uses.NOTHING)],
)
@pytest.mark.parametrize("both", [False, True])
def test_uses_of_weights(name: str, use: Uses, both: bool) -> None:
    """A row of both branches forms its delta from them, whatever its weights."""
    row = _line(both=both)
    _weight(row, name, 2, -0.5)
    assert table_of([row]).uses == (Uses.NOTHING if both else use)


def test_has_noise() -> None:
    row = _line()
    assert not table_of([row]).has_noise
    row[Column.NOISE] = -0.25
    assert table_of([_line(), row]).has_noise


def test_bytes_of_a_row() -> None:
    """Counted by hand: float32 registers read and written, model values read and written."""
    single, both = _line(), _line(both=True)
    both[Column.SLOT_DELTA], both[Column.NOISE] = 1.0, 1.0
    _weight(both, "to_delta", 2, 1.0)
    _weight(single, "to_delta", 1, 1.0)
    _weight(single, "to_change", 2, 1.0)
    _weight(single, "to_sample", 1, 1.0)
    table = table_of([both, single, both])
    # One register, a sample and a delta out, noise; c and u in, one input out.
    assert table.bytes_per_element(0, 2) == 4 * (1 + 2 + 1) + 2 * (2 + 1)
    # Three registers, a sample out; c in, both inputs out.
    assert table.bytes_per_element(1, 2) == 4 * (3 + 1) + 2 * (1 + 2)
    assert table.bytes_per_element(1, 4, outputs=0) == 4 * (3 + 1) + 4
    assert table.bytes_per_element(3, 2) == 0


def test_stacked_rows_are_the_rows() -> None:
    tables = [random_table(k, num_rows=k + 1, num_slots=s) for k, s in enumerate((3, 1, 5))]
    table, offsets = stack(tables)
    assert offsets == (0, 2, 5)
    assert table.num_slots == 5
    assert table.num_rows == sum(one.num_rows for one in tables) == 9
    for offset, one in zip(offsets, tables, strict=True):
        rows = slice(offset, offset + one.num_rows)
        assert table.sample_slots[rows] == one.sample_slots
        assert torch.equal(table.rows[rows, :HEAD], one.rows[:, :HEAD])
        for name in WEIGHTS:
            assert torch.equal(table.weights(name)[rows, : one.num_slots], one.weights(name))
            assert not table.weights(name)[rows, one.num_slots :].any()


def test_branches() -> None:
    both = BranchRows.both(3)
    assert (both.cond, both.uncond, both.num_rows, both.batch) == ((3, 4, 5), (0, 1, 2), 6, 3)
    one = BranchRows.cond_only(2)
    assert (one.cond, one.uncond, one.num_rows) == ((0, 1), (-1, -1), 2)
    assert BranchRows((-1,), (-1,)).num_rows == BranchRows((), ()).num_rows == 0
    tensor = BranchRows([2, -1], [0, 5]).tensor(torch.device("cpu"))
    assert tensor.dtype == torch.int32
    assert tensor.tolist() == [[2, -1], [0, 5]]
    assert BranchRows([0], [1]) == BranchRows((0,), (1,))
    assert hash(BranchRows([0], [1])) == hash(BranchRows((0,), (1,)))


ORDERS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "expanded": lambda x: x[:, :1].expand_as(x),
}


@pytest.mark.parametrize("order", ORDERS)
def test_samples_come_back(order: str) -> None:
    """In their own order of dimensions, whatever that is in memory."""
    x = ORDERS[order](torch.randn(2, 3, 4, 5))
    state = StepState(random_table(0), x, [0, 3], model_dtype=torch.float16)
    assert torch.equal(state.samples(), x)
    assert state.registers.is_contiguous()
    y = torch.randn(2, 3, 4, 5)
    state.set_samples(y)
    assert torch.equal(state.samples(), y)
    if order != "expanded":
        view = state.logical(state.registers[0])
        assert view.stride()[1:] == x.stride()[1:], "elements lie as in x"


def test_samples_is_a_view_where_all_share_a_row() -> None:
    """Editing it in place edits the run; samples at rows of other slots come as a copy."""
    table = random_table(1)
    state = StepState(table, torch.randn(2, 7), 0)
    state.samples().fill_(3.0)
    assert (state.registers[table.sample_slots[0]] == 3.0).all()
    slots = table.sample_slots
    other = next(row for row in range(len(slots)) if slots[row] != slots[0])
    state = StepState(table, torch.randn(2, 7), [0, other])
    copy = state.samples()
    copy.fill_(3.0)
    assert not (state.samples() == 3.0).any()


def test_the_first_input() -> None:
    """Scaled as the sample's own row says; the unconditional half where that row evaluates it."""
    table = random_table(2)
    inputs = BranchRows((4, 0, 5, -1), (1, 3, 2, -1))
    x = torch.randn(4, 3, 5)
    state = StepState(table, x, [0, 1, 4, 2], model_dtype=torch.float16, inputs=inputs)
    wanted, times = np.zeros((6, 3, 5)), np.zeros(6)
    for row, sample, at in ((0, 0, (4, 1)), (1, 1, (0,)), (4, 2, (5,))):
        for k in at:
            wanted[k] = array(x[sample]) * float(table.rows[row, Column.INPUT_SCALE])
            times[k] = float(table.rows[row, Column.TIMESTEP])
    assert state.model_input.dtype == torch.float16
    assert np.abs(array(state.model_input) - wanted).max() <= 2.0**-10 * np.abs(wanted).max()
    assert array(state.timestep).tolist() == times.tolist()


def test_refresh_after_an_edit() -> None:
    """Also of samples in another order in memory; other slots are left alone."""
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    state = StepState(random_table(3), x, 1, inputs=BranchRows.cond_only(2))
    before = state.registers.clone()
    state.samples().mul_(2.0)
    state.refresh_input()
    scale = float(state.table.rows[1, Column.INPUT_SCALE])
    torch.testing.assert_close(state.model_input, 2.0 * scale * x)
    slot = state.table.sample_slots[1]
    others = [s for s in range(len(before)) if s != slot]
    assert (bits(before[others]) == bits(state.registers[others])).all()
    assert state.registers[others].isnan().all()


def test_seek_moves_cursors_alone() -> None:
    state = make_state(random_table(4), (5,), [0, 1], REFERENCE, inputs=BranchRows.both(2))
    before = state.registers.clone()
    state.seek([3, 2])
    assert state.positions == [3, 2]
    assert state.cursor.tolist() == [[3, 2], [0, 0]]
    state.seek(4)
    assert state.positions == state.cursor[0].tolist() == [4, 4]
    assert (bits(before) == bits(state.registers)).all()


def test_another_table_of_the_same_shape() -> None:
    state = make_state(random_table(5, density=0.3), (5,), [0, 1], REFERENCE)
    other, uses = random_table(6), state.uses
    memory = state.device_table.data_ptr()
    state.replace_table(other)
    assert torch.equal(state.device_table, other.rows.float())
    assert state.device_table.data_ptr() == memory, "captured graphs read it there"
    assert state.uses == uses | other.uses


def test_active_samples() -> None:
    """Those with a row to run and the outputs for it."""
    table = random_table(7)
    state = StepState(table, torch.randn(4, 3), [0, 1, 4, 3])
    assert state.active(BranchRows((0, 1, 2, -1), (3, -1, -1, -1))) == [0, 1]
    assert state.active(BranchRows((-1, -1, 2, 3), (-1, -1, -1, -1))) == [3]
    state.advance([0, 3])
    assert state.positions == [1, 1, 4, 4]


def test_defaults_of_the_process_do_not_matter() -> None:
    """Timesteps stay float32 and host tables on the host."""
    x = torch.randn(2, 5)
    torch.set_default_dtype(torch.float64)
    try:
        state = StepState(random_table(8), x, inputs=BranchRows.both(2))
    finally:
        torch.set_default_dtype(torch.float32)
    assert state.timestep.dtype == state.registers.dtype == torch.float32
    tables = [random_table(8), random_table(9, num_slots=7)]
    with torch.device("meta"):
        table, _ = stack(tables)
        state = StepState(table, x, inputs=BranchRows.both(2))
        state.seek(1)
        assert BranchRows.both(2).tensor(torch.device("cpu")).device.type == "cpu"
    devices = {state.cursor.device, state.registers.device, state.timestep.device}
    assert {device.type for device in devices} == {"cpu"}


def test_inference_mode_leaves_buffers_writable() -> None:
    with torch.inference_mode():
        x = torch.randn(1, 5)
        state = StepState(random_table(10), x, inputs=BranchRows.cond_only(1))
    state.registers.zero_()
    state.model_input.fill_(nan)
    state.set_samples(torch.ones(1, 5))
    assert not state.model_input.isnan().any()


def test_random_rows_use_what_they_may() -> None:
    """Of the tests' own tables: every weight, every result and both kinds of rows occur."""
    rows = [random_row(np.random.default_rng(k), 6, both=k % 2 == 0) for k in range(20)]
    lines = torch.stack(rows)
    assert (lines[:, Column.SLOT_SAMPLE : Column.SLOT_STATE + 1] >= 0).any(0).all()
    assert (lines[:, HEAD:] != 0).any(0).all() and (lines[:, HEAD:] == 0).any(0).all()
    assert table_of(rows).uses == Uses(63)


@pytest.mark.parametrize(("rows", "slots"), [(4, 3), (9, 3), (4, 7), (130, 10)])
def test_a_table_with_room_runs_as_the_table_itself(rows: int, slots: int) -> None:
    table = random_table(3, num_rows=3, num_slots=3)
    wide = table.resized(rows, slots)
    assert (wide.num_rows, wide.num_slots, wide.uses) == (rows, slots, table.uses)
    for name in WEIGHTS:
        assert wide.weights(name)[:4, :3].equal(table.weights(name))
        assert not wide.weights(name)[4:].any() and not wide.weights(name)[:, 3:].any()
    assert not wide.rows[3:, Column.ACTIVE].any()
    both = BranchRows.both(3)
    for row in range(3):
        states = [
            make_state(t, (5, 7), row, REFERENCE, batch=3, inputs=both) for t in (table, wide)
        ]
        states[1].registers[:3].copy_(states[0].registers)
        output = torch.randn(6, 5, 7)
        for state in states:
            step_update(state, output, both, noise=torch.ones(3, 5, 7), backend="reference")
        assert bits(states[1].registers[:3]).tolist() == bits(states[0].registers).tolist()
    with pytest.raises(InvalidInput, match=r"num_slots=2: the table has 3"):
        table.resized(4, 2)
    with pytest.raises(InvalidInput, match=r"num_rows=3: the table has 4"):
        table.resized(3, 3)


def test_a_state_that_restarts_is_a_new_one_on_old_addresses() -> None:
    plans = [
        plan_from_solver(SOLVERS[name], vp_points(steps), THG(grid=2), 4.0)
        for name, steps in (("dpmpp2m", 6), ("lms2", 9))
    ]
    first, second = (step_table(plan).resized(12, 8) for plan in plans)
    both, x = BranchRows.both(2), torch.randn(2, 3, 5)
    state = StepState(first, torch.randn(2, 3, 5), inputs=both)
    state.uses = Uses(sum(Uses))
    kept = (state.registers, state.device_table, state.cursor, state.model_input, state.timestep)
    places = [value.data_ptr() for value in kept if value is not None]
    output = torch.randn(4, 3, 5)
    for _ in range(3):
        step_update(state, output, both, backend="reference")
    state.restart(second, x)
    fresh = StepState(second, x, inputs=both)
    for _ in range(9):
        for each in (state, fresh):
            step_update(each, output, both, backend="reference")
        assert bits(state.registers).tolist() == bits(fresh.registers).tolist()
        assert state.samples().isfinite().all()
        assert state.cursor.equal(fresh.cursor) and state.positions == fresh.positions
        assert state.model_input is not None and fresh.model_input is not None
        assert state.model_input.equal(fresh.model_input)
    assert places == [value.data_ptr() for value in kept if value is not None]


def test_a_launch_leaves_the_host_where_it_was() -> None:
    """Only the device moves on: a capture records it, and the host follows each replay."""
    table, both = random_table(1, num_rows=2, num_slots=4), BranchRows.both(2)
    states = [StepState(table, torch.ones(2, 3, 5), inputs=both) for _ in range(2)]
    output, noise = torch.randn(4, 3, 5), torch.zeros(2, 3, 5)
    launch(states[0], output, both, noise=noise, backend="reference")
    step_update(states[1], output, both, noise=noise, backend="reference")
    assert bits(states[0].registers).tolist() == bits(states[1].registers).tolist()
    assert states[0].positions == [0, 0] and states[0].cursor[0].tolist() == [1, 1]
    states[0].advance([0, 1])
    assert states[0].positions == states[1].positions == [1, 1]
