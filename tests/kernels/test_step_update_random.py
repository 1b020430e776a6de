"""Random requests in one ragged batch, several steps on end, on every backend."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import BACKENDS, LAYOUTS, Backend, make_state, prepare, random_row, step, table_of

from thg_kernels.step_update import BranchRows, Column, StepState, StepTable, stack

DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32])
LATENTS = st.sampled_from([(1,), (300,), (2, 3), (3, 2, 5), (2, 3, 2, 2), (2, 1, 2, 3, 2), (0, 4)])
SETTINGS = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    # The fixture only names the backend, which no example changes.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    request.param.require()
    return request.param


@st.composite
def tables(draw: st.DrawFn) -> StepTable:
    """One to four rows of one to five slots: what they evaluate, read and write is drawn."""
    num_slots = draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        order = draw(st.permutations(range(num_slots))) + [-1] * 4
        writes = [order[0], *draw(st.permutations(order[1:5]))]
        density = draw(st.sampled_from([0.0, 0.3, 1.0]))
        both = draw(st.booleans())
        rows.append(random_row(rng, num_slots, both=both, density=density, writes=writes))
    return table_of(rows, draw(st.integers(0, num_slots - 1)))


def branches(draw: st.DrawFn, present: list[tuple[bool, bool]]) -> BranchRows:
    """Rows for the branches that are there, in any order and with gaps."""
    count = 2 * len(present)
    order = draw(st.permutations(range(count + 1)))
    cond = [order[b] if there[0] else -1 for b, there in enumerate(present)]
    uncond = [order[-1 - b] if there[1] else -1 for b, there in enumerate(present)]
    return BranchRows(tuple(cond), tuple(uncond))


def outputs_of(draw: st.DrawFn, state: StepState) -> BranchRows:
    """Some samples sit a step out; an unconditional output may be there without need."""
    present = []
    for row in state.positions:
        runs = draw(st.booleans()) or draw(st.booleans())
        needed = bool(state.table.rows[row, Column.BOTH]) and runs
        present.append((runs, needed or draw(st.booleans())))
    return branches(draw, present)


@st.composite
def batches(draw: st.DrawFn) -> tuple[StepTable, list[int]]:
    table, offsets = stack(draw(st.lists(tables(), min_size=1, max_size=3)))
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        k = draw(st.integers(0, len(offsets) - 1))
        end = offsets[k + 1] if k + 1 < len(offsets) else table.num_rows
        rows.append(draw(st.integers(offsets[k], end - 1)))
    return table, rows


@SETTINGS
@given(batch=batches(), latent=LATENTS, data=st.data())
def test_random_batches(
    backend: Backend,
    batch: tuple[StepTable, list[int]],
    latent: tuple[int, ...],
    data: st.DataObject,
) -> None:
    """Each step is held to NumPy, and reads what the ones before have left in the registers."""
    table, rows = batch
    draw = data.draw
    inputs = None
    if draw(st.booleans()):
        inputs = branches(draw, [(draw(st.booleans()), draw(st.booleans())) for _ in rows])
    options = {"model_dtype": draw(DTYPES), "inputs": inputs}
    state = make_state(table, latent, rows, backend, **options)
    for _ in range(draw(st.integers(1, 3))):
        outputs = outputs_of(draw, state)
        layouts = [name for name in LAYOUTS if not name.startswith("channels_last")]
        layout = draw(st.sampled_from(layouts if len(latent) > 1 else ["contiguous", "one_row"]))
        sample = draw(st.none() | DTYPES)
        step(
            backend,
            state,
            outputs,
            dtype=draw(DTYPES),
            layout=layout,
            noise=draw(DTYPES),
            sample=sample,
        )
        prepare(state, keep=True)
