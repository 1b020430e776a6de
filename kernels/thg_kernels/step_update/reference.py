"""The fused step in plain torch, float64 inside: what every other backend must equal.

Same signature as the other backends, see `thg_kernels.step_update.op`; never imports Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .table import HEAD, WEIGHTS, Column, weight_columns


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
    past = [_Past(registers, index, slot) for slot in range(len(registers))]
    delta = _held_delta(line, past, cond) if uncond is None else cond - uncond
    guided = _plus(cond, line[Column.GUIDANCE], delta)
    state = _total(line, past, "to_state", cond)
    state = _plus(state, line[Column.STATE_FROM_GUIDED], guided)
    state = _plus(state, line[Column.STATE_FROM_DELTA], delta)
    x_next = _total(line, past, "to_sample", cond)
    x_next = _plus(x_next, line[Column.FROM_GUIDED], guided)
    x_next = _plus(x_next, line[Column.FROM_COND], cond)
    x_next = _plus(x_next, line[Column.FROM_DELTA], delta)
    x_next = _plus(x_next, line[Column.FROM_STATE], state)
    if noise is not None:
        x_next = _plus(x_next, line[Column.NOISE], noise)
    # Stored when all has been read: a row may write over what it reads for the last time.
    slots = line[Column.SLOT_SAMPLE : Column.SLOT_STATE + 1]
    for slot, value in zip(slots, (x_next, guided, cond, delta, state), strict=True):
        if slot >= 0.0:
            registers[int(slot)].index_copy_(0, index, value.to(registers.dtype))
    return x_next


@dataclass(frozen=True)
class _Past:
    """One slot of the samples ``index``, read on demand: what nobody weighs may hold anything."""

    registers: Tensor
    index: Tensor
    slot: int

    def value(self) -> Tensor:
        return self.registers[self.slot].index_select(0, self.index).double()


def _weights(line: list[float], name: str) -> list[float]:
    return line[weight_columns(name, (len(line) - HEAD) // len(WEIGHTS))]


def _total(line: list[float], past: Sequence[_Past], name: str, like: Tensor) -> Tensor:
    """sum_s weight_s R_s over the slots of weight other than 0."""
    total = torch.zeros_like(like)
    for slot, weight in zip(past, _weights(line, name), strict=True):
        if weight != 0.0:
            total = total + weight * slot.value()
    return total


def _held_delta(line: list[float], past: Sequence[_Past], cond: Tensor) -> Tensor:
    """The delta of a row without unconditional output."""
    delta = _total(line, past, "to_delta", cond)
    for slot, weight in zip(past, _weights(line, "to_change"), strict=True):
        if weight != 0.0:
            delta = delta + weight * (cond - slot.value())
    return delta


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
