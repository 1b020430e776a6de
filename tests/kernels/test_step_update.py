"""Every backend of the fused step against NumPy in float64; the bound stands in `step_rows`."""

from __future__ import annotations

from math import nan

import numpy as np
import pytest
import torch
from kernel_cases import (
    BACKENDS,
    CPU,
    LAYOUTS,
    Backend,
    make_noise,
    make_output,
    make_state,
    prepare,
    random_row,
    random_table,
    run_and_check,
    step,
    table_of,
)
from step_rows import Call, bits, check, expected, ulp

from thg_kernels.step_update import (
    BranchRows,
    Column,
    StepState,
    op,
    stack,
    step_update,
    weight_columns,
)
from thg_kernels.step_update.table import WEIGHTS

HALF, BRAIN, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
# (model output, model input, sample, noise)
DTYPES = [
    *((dtype, dtype, dtype, dtype) for dtype in (HALF, BRAIN, SINGLE)),
    (HALF, SINGLE, BRAIN, SINGLE),
    (SINGLE, HALF, DOUBLE, BRAIN),
    (BRAIN, HALF, SINGLE, HALF),
    (SINGLE, BRAIN, HALF, DOUBLE),
]
LATENTS = [
    (0,),
    (1,),
    (1025,),
    (257, 5),
    (3, 7, 11),
    (1, 1, 129, 1),
    (4, 0, 3),
    (3, 5, 7),
    (2, 3, 5, 7),
    (5, 3, 9, 1, 3),
]
IN_MEMORY = [
    pytest.param(shape, layout, like, id=f"{layout}-like-{like}-{len(shape)}d")
    for shape in [(4, 7, 5), (4, 3, 7, 5), (2, 3, 2, 3, 5)]
    for layout in LAYOUTS
    for like in ["contiguous", "channels_last"]
    if len(shape) < 5 or "channels_last" not in (layout, like)
]
"""(latent, layout of the denoiser's output, layout of the samples); four dimensions that do not
merge go through a copy."""
MIXED = BranchRows((4, 1, 0), (2, 5, 3))
"""Three samples whose branches lie in no order."""


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    request.param.require()
    return request.param


@pytest.mark.parametrize(
    "dtypes", DTYPES, ids=lambda dtypes: "-".join(str(d).removeprefix("torch.") for d in dtypes)
)
def test_dtypes(backend: Backend, dtypes: tuple[torch.dtype, ...]) -> None:
    output, model, sample, noise = dtypes
    table = random_table(1, density=1.0)
    state = make_state(table, (3, 7, 13), [0, 1, 2], backend, model_dtype=model, inputs=MIXED)
    step(backend, state, MIXED, dtype=output, noise=noise, sample=sample)


@pytest.mark.parametrize("latent", LATENTS, ids=str)
@pytest.mark.parametrize("row", [0, 1])
def test_sizes(backend: Backend, latent: tuple[int, ...], row: int) -> None:
    table = random_table(2, num_slots=5)
    both = BranchRows.both(2)
    state = make_state(table, latent, row, backend, batch=2, model_dtype=HALF, inputs=both)
    step(backend, state, both, dtype=HALF, sample=HALF)


@pytest.mark.parametrize("num_slots", [1, 2, 3, 7, 8, 12])
def test_numbers_of_slots(backend: Backend, num_slots: int) -> None:
    table = random_table(num_slots, num_slots=num_slots)
    state = make_state(table, (33,), [0, 1], backend, inputs=BranchRows.both(2))
    step(backend, state, BranchRows.both(2))


@pytest.mark.parametrize(("shape", "layout", "like"), IN_MEMORY)
def test_layouts(backend: Backend, shape: tuple[int, ...], layout: str, like: str) -> None:
    outputs = MIXED
    x = LAYOUTS[like]((3, *shape), dtype=SINGLE)[0].normal_()
    table = random_table(3, num_slots=4)
    state = make_state(table, shape, [0, 1, 2], backend, x=x, model_dtype=HALF, inputs=MIXED)
    assert state.model_input.stride()[1:] == x.to(HALF).stride()[1:]
    step(backend, state, outputs, dtype=HALF, layout=layout, sample=None)


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "every_second", "narrowed"])
def test_layouts_of_sample_and_noise(backend: Backend, layout: str) -> None:
    shape = (3, 4, 6, 5)
    state = make_state(random_table(4), shape[1:], [0, 1, 4], backend, inputs=MIXED)
    noise = LAYOUTS[layout](shape, dtype=SINGLE, device=backend.device)[0]
    noise.copy_(make_noise(state, MIXED, SINGLE))
    sample = LAYOUTS[layout](shape, dtype=HALF, device=backend.device)[0]
    output = make_output(state, MIXED, SINGLE)
    run_and_check(backend, state, output, MIXED, noise=noise, sample=sample)


def test_samples_at_rows_of_their_own(backend: Backend) -> None:
    """One launch: other plans, other rows, one sample without a branch, one at its end."""
    tables = [random_table(k, num_rows=2 + k, num_slots=1 + k, density=0.5) for k in range(4)]
    table, offsets = stack(tables)
    rows = [offsets[0], offsets[1] + 1, offsets[2] + 3, offsets[3] + 5]
    rows += [offsets[3] + 2, offsets[1] + tables[1].num_rows - 1]
    outputs = BranchRows((3, 2, 8, 1, -1, 7), (5, -1, -1, -1, 0, 6))
    inputs = BranchRows((0, -1, 9, 1, 2, 3), (4, 5, 6, -1, 7, 8))
    state = make_state(table, (3, 43), rows, backend, model_dtype=BRAIN, inputs=inputs)
    step(backend, state, outputs, dtype=BRAIN, sample=HALF)


def test_without_optional_arguments(backend: Backend) -> None:
    table = random_table(5, noise=False)
    state = make_state(table, (37,), [0, 1, 2], backend)
    step(backend, state, MIXED, noise=None, sample=None)


def test_to_the_end_and_not_beyond(backend: Backend) -> None:
    """Consecutive steps read what the ones before have stored; a finished sample rests."""
    table = random_table(6, num_rows=5, num_slots=4, density=0.5)
    both = BranchRows.both(3)
    state = make_state(table, (4, 17), [0, 2, 5], backend, model_dtype=HALF, inputs=both)
    for _ in range(6):
        prepare(state, keep=True)
        step(backend, state, both, dtype=HALF)
    assert state.positions == [5, 5, 5]
    result = state.registers[table.sample_slots[-1]]
    assert (bits(state.samples()) == bits(result)).all()
    assert not result[:2].isnan().any()


def test_what_has_no_weight_is_not_read(backend: Backend) -> None:
    """A row of both branches reads no slot for its delta; nor one for the sample, weight 0."""
    rng = np.random.default_rng(7)
    rows = [
        random_row(rng, 4, both=both, density=1.0, noise=False, writes=[1, -1, -1, 2, 3])
        for both in (True, False, True)
    ]
    for k, name in ((0, "to_sample"), (0, "to_state"), (2, "to_sample")):
        rows[k][weight_columns(name, 4)][3] = 0.0
    rows[2][Column.FROM_STATE], rows[2][Column.SLOT_STATE] = 0.0, -1.0
    state = make_state(table_of(rows), (65,), [0, 1, 2], backend)
    # Row 2 reads slot 3 for a state that it neither stores nor uses.
    state.registers[3, 2] = nan
    assert state.registers[3, 0].isnan().all()
    assert not state.registers[3, 1].isnan().any()
    step(backend, state, BranchRows.both(3), noise=None)


@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply")
@pytest.mark.parametrize("name", WEIGHTS)
def test_infinite_registers_stay_where_they_are(backend: Backend, name: str) -> None:
    """0 times infinity is NaN: a register may be read for one result and not for another."""
    writes = [0, -1, -1, 1, 2]
    row = random_row(np.random.default_rng(8), 4, both=False, density=1.0, writes=writes)
    for column in (Column.GUIDANCE, Column.FROM_DELTA, Column.FROM_STATE, Column.STATE_FROM_DELTA):
        row[column] = 0.0
    for other in WEIGHTS:
        row[weight_columns(other, 4)][3] = 0.5 if other == name else 0.0
    state = make_state(table_of([row]), (65,), 0, backend, batch=1)
    state.registers[3] = torch.inf
    cond = BranchRows.cond_only(1)
    output, noise = make_output(state, cond, SINGLE), make_noise(state, cond, SINGLE)
    step_update(state, output, cond, noise=noise, backend=backend.name)
    kept = dict(zip(("to_sample", "to_delta", "to_state"), state.registers, strict=False))
    hit = "to_delta" if name == "to_change" else name
    for result, values in kept.items():
        assert values.isinf().all() if result == hit else values.isfinite().all(), result


def test_no_samples(backend: Backend) -> None:
    state = make_state(random_table(9), (3, 5), [], backend, inputs=BranchRows.both(0))
    step(backend, state, BranchRows.both(0))
    assert state.samples().shape == (0, 3, 5)


LAUNCHES = sorted({launch for sizes in op.LAUNCHES.values() for launch in sizes[1:]})


@pytest.mark.parametrize("launch", LAUNCHES, ids=lambda launch: f"{launch.elements}-{launch.warps}")
def test_blocks(backend: Backend, monkeypatch: pytest.MonkeyPatch, launch: op.Launch) -> None:
    """Those of every architecture's Triton launch, and a ragged last one."""
    if backend.name != "triton":
        pytest.skip("it has no blocks to choose")
    monkeypatch.setattr(op, "launch_of", lambda device, elements: launch)
    table, latent = random_table(10, num_slots=3), (1024 + 37,)
    state = make_state(table, latent, [0, 1], backend, model_dtype=HALF, inputs=BranchRows.both(2))
    step(backend, state, BranchRows.both(2), dtype=HALF, sample=None)


def test_gradients_and_inference_mode(backend: Backend) -> None:
    """A denoiser may run outside of no_grad, or inside inference mode."""
    state = make_state(random_table(11, noise=False), (19,), 0, backend, batch=2)
    both = BranchRows.both(2)
    output = make_output(state, both, SINGLE).requires_grad_()
    run_and_check(backend, state, output, both)
    assert not state.registers.requires_grad
    prepare(state, keep=True)
    with torch.inference_mode():
        run_and_check(backend, state, make_output(state, both, SINGLE), both)
    state.set_samples(torch.zeros(2, 19, device=backend.device))


def test_float64_registers_are_exact_to_float64() -> None:
    """The reference keeps float64 throughout: the bound is that of float64."""
    reference = Backend("reference", "cpu")
    options = {"register_dtype": DOUBLE, "model_dtype": DOUBLE, "inputs": MIXED}
    state = make_state(random_table(12), (3, 43), [0, 1, 2], reference, **options)
    assert state.registers.dtype == state.device_table.dtype == state.model_input.dtype == DOUBLE
    step(reference, state, MIXED, dtype=DOUBLE, noise=DOUBLE, sample=DOUBLE)


@pytest.mark.parametrize(("output", "model"), [(DOUBLE, HALF), (HALF, DOUBLE), (DOUBLE, DOUBLE)])
def test_float64_denoisers_run_on_the_reference(output: torch.dtype, model: torch.dtype) -> None:
    """Registers stay float32; the backend that is taken by default can do it."""
    state = make_state(
        random_table(12), (3, 43), [0, 1, 2], CPU[0], model_dtype=model, inputs=MIXED
    )
    call_output, noise = make_output(state, MIXED, output), make_noise(state, MIXED, SINGLE)
    call = Call.of(state, call_output, MIXED, noise)
    before = call.copy()
    step_update(state, call_output, MIXED, noise=noise)
    check(before, call)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_more_than_two_to_the_31_elements(name: str) -> None:
    """Offsets have 64 bits; torch in float32 is held against, piece by piece."""
    backend = Backend(name, "cuda")
    backend.require()
    if torch.cuda.mem_get_info()[0] < 36 << 30:
        pytest.skip("needs 36 GB of free GPU memory")
    numel = 2**31 + 1025
    row = random_row(np.random.default_rng(13), 2, both=False, noise=False, density=0.0)
    row[Column.SLOT_SAMPLE : Column.SLOT_STATE + 1] = torch.tensor([1.0, -1, -1, -1, -1])
    row[Column.FROM_COND] = 0.25
    row[weight_columns("to_sample", 2)][0] = 0.5
    table = table_of([row])
    x = torch.arange(numel, dtype=torch.int32, device="cuda").remainder_(1021).half().unsqueeze(0)
    state = StepState(table, x, inputs=BranchRows.cond_only(1))
    state.registers[1].fill_(nan)
    step_update(state, x, BranchRows.cond_only(1), backend=name)
    for begin in range(0, numel, 1 << 28):
        part = x[0, begin : begin + (1 << 28)].float() * 0.75
        assert torch.equal(state.registers[1, 0, begin : begin + (1 << 28)], part)
        wanted = (table.rows[1, Column.INPUT_SCALE].item() * part).half()
        assert torch.equal(state.model_input[0, begin : begin + (1 << 28)], wanted)


def test_the_bound_has_teeth() -> None:
    """Two units in the last place more than torch is off by, and the check fails."""
    backend = Backend("reference", "cpu")
    state = make_state(random_table(14, noise=False), (600,), 0, backend, batch=1)
    output = make_output(state, BranchRows.both(1), SINGLE)
    call = Call.of(state, output, BranchRows.both(1))
    before = call.copy()
    step_update(state, output, BranchRows.both(1), backend="reference")
    slot = state.table.sample_slots[1]
    check(before, call)
    wanted = expected(before)["registers"]
    call.registers[slot, 0, 7] += 1.5 * wanted.bound[slot, 0, 7]
    with pytest.raises(AssertionError, match="registers: 1 wrong"):
        check(before, call)
    unit = ulp(np.abs(wanted.value[slot, 0]), torch.float32)
    assert np.median(wanted.bound[slot, 0] / unit) < 32, "the bound is a few ulps"
