"""The fused step in plain torch, float64 inside: what every other backend must equal.

Same signature as the other backends, see `thg_kernels.step_update.op`; never imports Triton.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .table import HEAD, WEIGHTS, Column


def step_update_reference(
    registers: Tensor,
    cursor: Tensor,
    table: Tensor,
    model_output: Tensor,
    output_rows: Tensor,
    model_input: Tensor | None,
    timestep: Tensor | None,
    input_rows: Tensor | None,
    sample: Tensor | None,
    noise: Tensor | None,
    uses: int,
    layout: Sequence[int],
) -> None:
    """Run one row of every active sample, in place.

    ``uses`` and ``layout`` tell the other backends what to leave out and how to find an element;
    torch needs neither.
    """
    lines = table.to(torch.float64).cpu()
    cond_rows, uncond_rows = output_rows.tolist()
    at = cursor[0].tolist()
    groups: dict[int, list[int]] = {}
    for b, row in enumerate(at):
        if _active(lines, row, cond_rows[b], uncond_rows[b]):
            groups.setdefault(row, []).append(b)
    for row, members in groups.items():
        line = lines[row].tolist()
        index = torch.tensor(members, device=registers.device)
        cond = _take(model_output, [cond_rows[b] for b in members])
        both = line[Column.BOTH] != 0.0
        uncond = _take(model_output, [uncond_rows[b] for b in members]) if both else None
        z = noise.index_select(0, index).double() if noise is not None else None
        x_next = _row(registers, line, index, cond, uncond, z)
        _write_outputs(x_next, lines[row + 1].tolist(), members, model_input, timestep, input_rows)
        if sample is not None:
            sample.index_copy_(0, index, x_next.to(sample.dtype))
        cursor[0].index_fill_(0, index, row + 1)


def _active(lines: Tensor, row: int, cond_row: int, uncond_row: int) -> bool:
    """Whether a sample has a row to run and the outputs that the row needs."""
    if not 0 <= row < len(lines) - 1 or lines[row, Column.ACTIVE] == 0 or cond_row < 0:
        return False
    return bool(lines[row, Column.BOTH] == 0) or uncond_row >= 0


def _take(model_output: Tensor, rows: list[int]) -> Tensor:
    return model_output[torch.tensor(rows, device=model_output.device)].double()


def _row(
    registers: Tensor,
    line: list[float],
    index: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    noise: Tensor | None,
) -> Tensor:
    """The arithmetic of one row for the samples ``index``; returns x_next in float64."""
    num_slots = len(registers)
    weights = {
        name: line[HEAD + k * num_slots : HEAD + (k + 1) * num_slots]
        for k, name in enumerate(WEIGHTS)
    }

    def total(name: str) -> Tensor:
        value = torch.zeros_like(cond)
        for slot, weight in enumerate(weights[name]):
            if weight != 0.0:
                value = value + weight * registers[slot].index_select(0, index).double()
        return value

    if uncond is None:
        delta = total("to_delta")
        for slot, weight in enumerate(weights["to_change"]):
            if weight != 0.0:
                past = registers[slot].index_select(0, index).double()
                delta = delta + weight * (cond - past)
    else:
        delta = cond - uncond
    guided = _plus(cond, line[Column.GUIDANCE], delta)
    state = _plus(total("to_state"), line[Column.STATE_FROM_GUIDED], guided)
    state = _plus(state, line[Column.STATE_FROM_DELTA], delta)
    x_next = total("to_sample")
    for column, value in (
        (Column.FROM_GUIDED, guided),
        (Column.FROM_COND, cond),
        (Column.FROM_DELTA, delta),
        (Column.FROM_STATE, state),
    ):
        x_next = _plus(x_next, line[column], value)
    if noise is not None:
        x_next = _plus(x_next, line[Column.NOISE], noise)
    for column, value in (
        (Column.SLOT_SAMPLE, x_next),
        (Column.SLOT_GUIDED, guided),
        (Column.SLOT_COND, cond),
        (Column.SLOT_DELTA, delta),
        (Column.SLOT_STATE, state),
    ):
        if line[column] >= 0.0:
            registers[int(line[column])].index_copy_(0, index, value.to(registers.dtype))
    return x_next


def _plus(value: Tensor, weight: float, term: Tensor) -> Tensor:
    """``value + weight * term``; a term of weight 0 is not read."""
    return value if weight == 0.0 else value + weight * term


def _write_outputs(
    x_next: Tensor,
    following: list[float],
    members: list[int],
    model_input: Tensor | None,
    timestep: Tensor | None,
    input_rows: Tensor | None,
) -> None:
    """The next model input, scaled, and the next timestep, for the branches the next row runs."""
    if input_rows is None:
        return
    cond_rows, uncond_rows = input_rows.tolist()
    scaled = following[Column.INPUT_SCALE] * x_next
    rows = [(cond_rows[b], k) for k, b in enumerate(members) if cond_rows[b] >= 0]
    if following[Column.BOTH] != 0.0:
        rows += [(uncond_rows[b], k) for k, b in enumerate(members) if uncond_rows[b] >= 0]
    for row, k in rows:
        if model_input is not None:
            model_input[row].copy_(scaled[k])
        if timestep is not None:
            timestep[row].fill_(following[Column.TIMESTEP])
