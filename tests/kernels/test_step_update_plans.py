"""Every scheduler under every guidance on every backend: whole short runs of packed plans.

The tables are those that the engine runs, so the kernels meet the weights, slots and uses that
occur. Each row starts from the registers that the row before has left and is held to NumPy in
float64 within the bound of `step_rows`, so errors of earlier rows are not counted again. Slots that
no row has written are NaN: a plan that reads one fails.
"""

from __future__ import annotations

import pytest
import torch
from kernel_cases import BACKENDS, Backend, make_noise, make_output, make_sample, run_and_check

from scheduler_cases import available, build, names
from thg_engine.guidance import (
    CFG,
    THG,
    CFGCache,
    Guidance,
    GuidanceInterval,
    SelectiveGuidance,
)
from thg_engine.lowering import plan_from_table
from thg_engine.packing import step_table
from thg_engine.trace import SolverTable, trace
from thg_kernels.step_update import BranchRows, Column, StepState, StepTable, step_update
from thg_kernels.step_update.table import HEAD, WEIGHTS

NUM_STEPS = 8
"""Past every warm-up, with some steps before the last ones; solvers of two stages have 15 rows."""
HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
# Guidance, dtype of the denoiser, latent.
PLANS: dict[str, tuple[Guidance, torch.dtype, tuple[int, ...]]] = {
    "cfg": (CFG(), HALF, (3, 5, 7)),
    "thg": (THG(grid=3, boost=1.1), BRAIN, (2, 3, 3, 5)),
    "cfg-cache": (CFGCache(interval=3), SINGLE, (5, 7)),
    "interval": (GuidanceInterval(), HALF, (37,)),
    "selective": (SelectiveGuidance(), SINGLE, (3, 5, 1)),
}


pytestmark = pytest.mark.slow


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    request.param.require()
    return request.param


def solver_table(name: str) -> SolverTable:
    """A short run of the scheduler ``name``."""
    case = available(name)
    arguments = {"set_timesteps_kwargs": case.set_kwargs, "step_kwargs": case.step_kwargs}
    return trace(build(name), min(case.steps, NUM_STEPS), **arguments)


def likeness(table: StepTable, row: int) -> tuple[object, ...]:
    """What a row evaluates and stores, and of how many slots it forms what sums."""
    line, stores = table.rows[row, :HEAD], slice(Column.SLOT_SAMPLE, Column.SLOT_STATE + 1)
    terms = [int((table.weights(name)[row] != 0).sum()) for name in WEIGHTS]
    factors = (line[: Column.SLOT_SAMPLE] != 0).tolist()
    both_next = table.flag(row + 1, Column.BOTH)
    return (*factors, *(line[stores] >= 0).tolist(), *terms, both_next)


@pytest.mark.parametrize("method", PLANS)
@pytest.mark.parametrize("name", names("deterministic", "stochastic"))
def test_every_row_of_every_plan(backend: Backend, name: str, method: str) -> None:
    """Triton's interpreter takes 50 ms a row: it runs those whose like this plan has not yet had,
    and the reference, which the same test holds to the bound, runs the others in between."""
    guidance, dtype, latent = PLANS[method]
    if name == "UnCLIPScheduler":
        dtype = SINGLE  # random outputs take its samples beyond float16
    torch.manual_seed(0)
    table = step_table(plan_from_table(solver_table(name), guidance, 5.0))
    x = torch.randn(1, *latent, generator=torch.Generator().manual_seed(0))
    both, met = BranchRows.both(1), set()
    state = StepState(table, x.to(backend.device), model_dtype=dtype, inputs=both)
    for row in range(table.num_rows - 1):
        assert state.positions == [row]
        output = make_output(state, both, dtype)
        noise = make_noise(state, both, SINGLE) if table.has_noise else None
        like = likeness(table, row)
        if backend.truncates and like in met:
            step_update(state, output, both, noise=noise, backend="reference")
        else:
            sample = make_sample(state, dtype)
            run_and_check(backend, state, output, both, noise=noise, sample=sample)
        met.add(like)
    assert state.positions == [table.num_rows - 1]
    assert state.samples().isfinite().all()
