"""One sampling step of a batch in one launch: guidance, extrapolation, solver update, next input.

    state = StepState(table, x_T, inputs=BranchRows.both(B))
    step_update(state, denoiser(state.model_input, state.timestep), BranchRows.both(B))

`table` says what a row computes, `op` what a backend is given, `reference` what it must equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..errors import BackendUnavailable, InvalidInput
from . import native_op, op
from .branches import BranchRows
from .state import MODEL_DTYPES, StepState
from .table import Column, StepTable, Uses, blank_rows, stack, weight_columns

__all__ = [
    "BACKENDS",
    "BackendUnavailable",
    "BranchRows",
    "Column",
    "InvalidInput",
    "StepState",
    "StepTable",
    "Uses",
    "blank_rows",
    "choose_backend",
    "launch",
    "resolve_backend",
    "stack",
    "step_update",
    "weight_columns",
    "why_unavailable",
]

BACKENDS = ("reference", "triton", "cuda", "cpu")
SERVING = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}
"""Per type of device the backends that are taken by default, the fastest first."""


def step_update(
    state: StepState,
    model_output: Tensor,
    outputs: BranchRows,
    *,
    noise: Tensor | None = None,
    sample: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Run the next row of every sample that has its outputs, in place, in one launch.

    Args:
        state: registers, cursors, buffers; advanced.
        model_output: denoiser rows, shape ``(M, *latent)``, float16, bfloat16 or float32, any
            strides, on the state's device.
        outputs: where the branches of each sample stand in ``model_output``.
        noise: unit Gaussian noise, shape ``(B, *latent)``; needed where an active row adds noise.
        sample: receives x_next, shape ``(B, *latent)``, any float dtype; untouched where a sample
            is not active.
        backend: one of `BACKENDS`; by default the fastest that is there.
    Raises:
        InvalidInput: names argument, value and remedy; nothing has been launched or changed.
        BackendUnavailable: ``backend`` was named and cannot run here.
    """
    active = _check_call(state, model_output, outputs, noise, sample)
    wide = torch.float64 in (state.registers.dtype, state.model_dtype, model_output.dtype)
    run = _backend(backend, state.device, wide)
    if sample is None:
        _launch(run, state, model_output, outputs, noise, None)
    else:
        target = state.ordered(sample)
        dense = target.contiguous()
        _launch(run, state, model_output, outputs, noise, dense)
        if dense.data_ptr() != target.data_ptr():
            target.copy_(dense)
    state.advance(active)


def launch(
    state: StepState,
    model_output: Tensor,
    outputs: BranchRows,
    *,
    noise: Tensor | None = None,
    sample: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """What a capture records of `step_update`: the launch alone, from where the cursors are.

    Arguments as there, unchecked. A replay runs the next row of every sample on the device; the
    host follows with ``state.advance``.

    Args:
        noise: contiguous in the memory order of the state.
        sample: likewise.
    """
    wide = torch.float64 in (state.registers.dtype, state.model_dtype, model_output.dtype)
    run = _backend(backend, state.device, wide)
    ordered = None if sample is None else state.ordered(sample)
    _launch(run, state, model_output, outputs, noise, ordered)


def _launch(
    run: op.Backend,
    state: StepState,
    model_output: Tensor,
    outputs: BranchRows,
    noise: Tensor | None,
    sample: Tensor | None,
) -> None:
    """Hand a backend what `op` says it is given; ``sample`` is contiguous in memory order."""
    values, layout = _readable(state.ordered(model_output))
    run(
        state.registers,
        state.cursor,
        state.device_table,
        values,
        outputs.tensor(state.device),
        None if state.model_input is None else state.ordered(state.model_input),
        state.timestep,
        None if state.inputs is None else state.inputs.tensor(state.device),
        sample,
        None if noise is None else state.ordered(noise).contiguous(),
        int(state.uses),
        layout,
    )


def choose_backend(device: torch.device, wide: bool = False) -> str:
    """Name of the backend that `step_update` takes by default.

    "reference" is what remains on devices that no kernel serves (mps, xpu), where none was built,
    and for float64. It is exact rather than fast, and not every device has its float64: a host
    that can do the step by itself does so there.

    Args:
        device: of the state.
        wide: float64 is involved, in registers, model input or output.
    """
    if not wide:
        for name in SERVING.get(device.type, ()):
            if not why_unavailable(name):
                return name
    return "reference"


def why_unavailable(backend: str) -> str:
    """Why a backend cannot run on this machine; "" where it can."""
    if backend not in BACKENDS:
        raise InvalidInput("backend", backend, f"use one of {', '.join(BACKENDS)}.")
    if backend in ("cuda", "cpu"):
        return native_op.why_unavailable(backend)
    if backend == "triton":
        return op.why_no_triton()
    return ""


def resolve_backend(name: str | None, device: torch.device, wide: bool = False) -> str:
    """The backend that `step_update` runs on when ``name`` is asked for; None: the default.

    Args:
        name: one of `BACKENDS`.
        device: of the state.
        wide: float64 is involved, in registers, model input or output.
    Raises:
        InvalidInput: it does not serve this device or float64; BackendUnavailable: not here.
    """
    chosen = name or choose_backend(device, wide)
    reason = why_unavailable(chosen)
    if reason:
        raise BackendUnavailable(f"backend {chosen!r} cannot run: {reason}")
    if chosen == "reference":
        return chosen
    if wide:
        remedy = "float64 runs on the reference backend."
        raise InvalidInput("backend", chosen, remedy)
    wanted = "cpu" if chosen == "cpu" or (chosen == "triton" and op.interpreted()) else "cuda"
    if device.type != wanted:
        raise InvalidInput("backend", chosen, f"it runs on {wanted}, the state is on {device}.")
    return chosen


def _backend(name: str | None, device: torch.device, wide: bool) -> op.Backend:
    """The function that launches."""
    chosen = resolve_backend(name, device, wide)
    if chosen == "reference":
        return op.reference
    return op.triton_backend() if chosen == "triton" else native_op.native_backend(chosen)


def _readable(values: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """A model output that the kernels can address, and its layout; copied only if it must be."""
    layout = _layout(values.shape[1:], values.stride()[1:])
    if layout is None:
        return values.contiguous(), op.FLAT
    return values, layout


@lru_cache(maxsize=256)
def _layout(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...] | None:
    """(n1, n2, s0, s1, s2) of `op`: the dimensions, merged where neighbours lie in one stride.

    None where more than three are left; no pipeline produces that.
    """
    if 0 in shape:
        return op.FLAT  # nothing to find, and no division by a size of 0
    merged: list[tuple[int, int]] = []
    for size, stride in zip(shape, strides, strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    if len(merged) > 3:
        return None
    if not merged or (len(merged) == 1 and merged[0][1] == 1):
        return op.FLAT
    (_, s0), (n1, s1), (n2, s2) = [(1, 0)] * (3 - len(merged)) + merged
    return n1, n2, s0, s1, s2


def _check_call(
    state: StepState,
    model_output: Tensor,
    outputs: BranchRows,
    noise: Tensor | None,
    sample: Tensor | None,
) -> list[int]:
    """Refuse what no backend may be launched with; returns the samples that will move on."""
    if not isinstance(outputs, BranchRows):
        raise InvalidInput("outputs", type(outputs).__name__, "give BranchRows.")
    _check_tensor("model_output", model_output, state, rows=None)
    if model_output.dtype not in MODEL_DTYPES:
        raise InvalidInput("model_output", model_output.dtype, "use float16, bfloat16 or float32.")
    if outputs.batch != state.batch:
        raise InvalidInput("outputs", outputs, f"give the rows of all {state.batch} samples.")
    if outputs.num_rows > model_output.shape[0]:
        remedy = f"model_output has only {model_output.shape[0]} rows."
        raise InvalidInput("outputs", outputs, remedy)
    active = state.active(outputs)
    for name, value in (("noise", noise), ("sample", sample)):
        if value is not None:
            _check_tensor(name, value, state, rows=state.batch)
    if noise is None and state.table.has_noise:
        for b in active:
            if state.table.flag(state.positions[b], Column.NOISE):
                raise InvalidInput("noise", None, f"row {state.positions[b]} adds noise: give it.")
    _check_overlap(state, {"model_output": model_output, "noise": noise, "sample": sample})
    return active


def _check_tensor(name: str, value: Tensor, state: StepState, rows: int | None) -> None:
    if not isinstance(value, Tensor):
        raise InvalidInput(name, type(value).__name__, "give a tensor.")
    if value.layout is not torch.strided or value.is_nested:
        raise InvalidInput(name, str(value.layout), "give a dense tensor.")
    if value.device != state.device:
        raise InvalidInput(name, str(value.device), f"the state is on {state.device}.")
    if tuple(value.shape[1:]) != state.latent or (rows is not None and value.shape[0] != rows):
        count = "rows" if rows is None else rows
        raise InvalidInput(name, tuple(value.shape), f"give shape ({count}, *{state.latent}).")
    if not value.is_floating_point():
        raise InvalidInput(name, value.dtype, "give a floating-point tensor.")


def _check_overlap(state: StepState, given: dict[str, Tensor | None]) -> None:
    """Refuse tensors that share memory with the state, or with the sample that the step writes."""
    buffers = [state.registers, state.cursor, state.device_table, state.model_input, state.timestep]
    for name, value in given.items():
        if value is None or not value.numel():
            continue
        if name == "sample" and _folded(value):
            remedy = "its elements may share memory (an expanded tensor): give a dense one."
            raise InvalidInput(name, value.stride(), remedy)
        for target in buffers if name == "sample" else [*buffers, given["sample"]]:
            if target is not None and target.numel() and _share(value, target):
                remedy = "it shares memory with what the step writes: give a copy."
                raise InvalidInput(name, f"<at {value.data_ptr():#x}>", remedy)


def _folded(value: Tensor) -> bool:
    """Whether two elements may be one: a stride within the reach of the smaller ones."""
    reach = 0
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _share(a: Tensor, b: Tensor) -> bool:
    """By address, not by storage: two of these may lie in one buffer of NumPy's."""
    (low_a, high_a), (low_b, high_b) = _extent(a), _extent(b)
    return low_a < high_b and low_b < high_a


def _extent(value: Tensor) -> tuple[int, int]:
    """Addresses of the first byte and past the last one."""
    last = sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
    return value.data_ptr(), value.data_ptr() + (last + 1) * value.element_size()
