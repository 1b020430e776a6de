"""The operators themselves: schema, tracing, and calls that the public function would refuse."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kernel_cases import (
    BACKENDS,
    CPU,
    Backend,
    make_noise,
    make_output,
    make_sample,
    make_state,
    random_table,
)
from step_rows import MUTATED, Call, bits, check, is_active

from thg_kernels.step_update import BranchRows, op
from thg_kernels.step_update.op import FLAT

HERE = Path(__file__).resolve().parent
ROWS = BranchRows((2, 3, 1), (4, -1, 0))
TRACED = [b for b in CPU if b.name in ("reference", "triton")]
OPTIONAL = ("model_input", "timestep", "input_rows", "sample", "noise")
PATTERNS: dict[str, tuple[str, ...]] = {
    "all": OPTIONAL,
    "none": (),
    "input": ("model_input", "timestep", "input_rows"),
    "timestep": ("timestep", "input_rows"),
    "sample": ("sample",),
    "noise": ("noise", "sample"),
}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    request.param.require()
    return request.param


@pytest.fixture(params=TRACED, ids=lambda backend: backend.name)
def traced(request: pytest.FixtureRequest) -> Backend:
    request.param.require()
    return request.param


def arguments(
    backend: Backend, keep: tuple[str, ...] = OPTIONAL
) -> tuple[Call, tuple[object, ...]]:
    """A call of three samples, the last one at its end, and its arguments for an operator."""
    table = random_table(21, num_rows=2, num_slots=5, noise="noise" in keep)
    inputs = BranchRows.both(3) if "input_rows" in keep else None
    state = make_state(table, (3, 7), [0, 1, 2], backend, model_dtype=torch.float16, inputs=inputs)
    output = make_output(state, ROWS, torch.float16)
    noise = make_noise(state, ROWS, torch.float32) if "noise" in keep else None
    sample = make_sample(state) if "sample" in keep else None
    call = Call.of(state, output, ROWS, noise, sample)
    for name in ("output_rows", "input_rows"):
        if getattr(call, name) is not None:
            setattr(call, name, getattr(call, name).to(backend.device))
    if "model_input" not in keep:
        call.model_input = None
    return call, flat(call, int(table.uses))


def flat(call: Call, uses: int) -> tuple[object, ...]:
    """The arguments in the operator's order."""
    return (
        call.registers,
        call.cursor,
        call.table,
        call.model_output,
        call.output_rows,
        call.model_input,
        call.timestep,
        call.input_rows,
        call.sample,
        call.noise,
        uses,
        list(FLAT),
    )


def overload(backend: Backend) -> torch._ops.OpOverload:
    backend.function()
    native = backend.name in ("cpu", "cuda")
    name = "step_update" if native else f"step_update_{backend.name}"
    return getattr(torch.ops.thg_engine, name).default


@pytest.mark.parametrize("pattern", PATTERNS)
def test_optional_arguments(backend: Backend, pattern: str) -> None:
    call, given = arguments(backend, PATTERNS[pattern])
    before = call.copy()
    backend.function()(*given)
    check(before, call, float(backend.truncates))


# What a direct call may hold and `step_update` refuses: (cursor, cond rows, uncond rows).
UNTOUCHED = {
    "terminal": ((2, 2, 2), (2, 3, 1), (4, -1, 0)),
    "behind the table": ((3, 7, 2**31 - 1), (2, 3, 1), (4, 5, 0)),
    "ahead of the table": ((-1, -3, -(2**31)), (2, 3, 1), (4, 5, 0)),
    "no conditional output": ((0, 1, 1), (-1, -1, -1), (4, 5, 0)),
    "no unconditional output": ((0, 2, 0), (2, 3, 1), (-1, -1, -1)),
}


@pytest.mark.parametrize("case", UNTOUCHED)
def test_untouched(backend: Backend, case: str) -> None:
    """Nothing is written for such samples: registers, inputs, sample and cursor keep their bits."""
    call, given = arguments(backend)
    cursor, cond, uncond = UNTOUCHED[case]
    call.cursor[0] = torch.tensor(cursor)
    call.output_rows.copy_(torch.tensor([cond, uncond]))
    before = call.copy()
    assert not any(is_active(call, b) for b in range(3))
    backend.function()(*given)
    for (name, old), (_, new) in zip(before.tensors(), call.tensors(), strict=True):
        assert (bits(old) == bits(new)).all(), name


@pytest.mark.parametrize("both_next", [False, True])
def test_the_unconditional_half_is_written_where_it_is_needed(
    backend: Backend, both_next: bool
) -> None:
    """Row 0 precedes one of a single branch: the other half of the input keeps its NaN."""
    table = random_table(22, num_rows=3, noise=False)
    inputs = BranchRows.both(2)
    state = make_state(table, (5, 7), int(both_next), backend, batch=2, inputs=inputs)
    call = Call.of(state, make_output(state, inputs, torch.float32), inputs)
    for name in ("output_rows", "input_rows"):
        setattr(call, name, getattr(call, name).to(backend.device))
    before = call.copy()
    backend.function()(*flat(call, int(table.uses)))
    check(before, call)
    assert call.model_input[:2].isnan().all() == (not both_next)
    assert call.timestep[:2].isnan().all() == (not both_next)
    assert not call.model_input[2:].isnan().any()


def test_arrivals_return_to_zero(backend: Backend) -> None:
    """The counter that moves cursors on is ready for the next launch, with many programs too."""
    table = random_table(23, num_slots=2, noise=False)
    state = make_state(table, (2100,), [0, 1, 4], backend)
    call = Call.of(state, make_output(state, ROWS, torch.float32), ROWS)
    call.output_rows = call.output_rows.to(backend.device)
    backend.function()(*flat(call, int(table.uses)))
    assert call.cursor.tolist() == [[1, 2, 4], [0, 0, 0]]


def test_mutations_are_declared(backend: Backend) -> None:
    """Exactly what the docstring marks with (x!): neither more (a copy each under torch.compile)
    nor less (wrong results there)."""
    schema = overload(backend)._schema
    written = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
    assert sorted(written) == sorted(MUTATED) == sorted(op.MUTATES)
    assert not schema.returns


@pytest.mark.parametrize("pattern", PATTERNS)
def test_opcheck(traced: Backend, pattern: str) -> None:
    _, given = arguments(traced, PATTERNS[pattern])
    torch.library.opcheck(overload(traced), given)


@pytest.mark.parametrize("pattern", ["all", "none"])
def test_compiled_equals_eager(traced: Backend, pattern: str) -> None:
    """A whole loop body in one graph: what is mutated is seen by the code behind the operator."""
    operator = overload(traced)
    call, given = arguments(traced, PATTERNS[pattern])

    def body(registers: torch.Tensor, cursor: torch.Tensor, *rest: object) -> torch.Tensor:
        doubled = registers * 2.0
        operator(doubled, cursor, *rest)
        return doubled + 1.0

    eager, traced_call = call.copy(), call.copy()
    wanted = body(*_with(given, eager))
    compiled: Callable[..., torch.Tensor] = torch.compile(body, backend="aot_eager", fullgraph=True)
    found = compiled(*_with(given, traced_call))
    assert (bits(found) == bits(wanted)).all()
    for (name, old), (_, new) in zip(eager.tensors(), traced_call.tensors(), strict=True):
        assert (bits(old) == bits(new)).all(), name
    assert traced_call.cursor[0].tolist() == [1, 2, 2]


def _with(given: tuple[object, ...], call: Call) -> tuple[object, ...]:
    return flat(call, given[10])


def test_torch_compile_sees_the_triton_kernel() -> None:
    """With a GPU's tensors, faked, and no interpreter: the graph holds the kernel itself, and
    torch's reading of its code finds exactly the declared mutations."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(HERE / "trace_triton.py")],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    node, *mutated = done.stdout.split()
    assert node == "triton_kernel_wrapper_functional"
    pointers = {"registers_ptr", "cursor_ptr", "input_ptr", "timestep_ptr", "sample_ptr"}
    assert set(mutated) == pointers
