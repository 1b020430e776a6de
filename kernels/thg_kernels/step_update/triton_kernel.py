"""The fused step in Triton: one program per block of one sample, one launch per step.

The row comes from the device table by the device cursor, so a captured graph replays any schedule.
A weight of zero is uniform over a program: its load is predicated off and moves no bytes. Column
numbers are those of `table.Column`, use bits those of `table.Uses`.
"""

from __future__ import annotations

import triton
import triton.language as tl

HEAD = tl.constexpr(20)
UNROLLED = tl.constexpr(8)
"""Slots whose loads may be in flight together; more would not fit into a thread's registers."""


@triton.jit
def _term(weight, value):
    """weight * value; 0 where the weight is, whatever the value."""
    return tl.where(weight != 0.0, weight * value, 0.0)


@triton.jit
def _below(offsets, numel, wanted):
    """Mask of the elements that exist; of none unless ``wanted``, a scalar."""
    return offsets < tl.where(wanted, numel, 0)


@triton.jit
def _load_output(ptr, row, offsets, numel, stride, n1, n2, s0, s1, s2, STRIDED: tl.constexpr):
    """One row of the model output in float32, found by the element numbers of the registers."""
    where = offsets
    if STRIDED:
        where = offsets // n2 // n1 * s0 + offsets // n2 % n1 * s1 + offsets % n2 * s2
    base = ptr + tl.maximum(row, 0).to(tl.int64) * stride
    return tl.load(base + where, _below(offsets, numel, row >= 0), other=0.0).to(tl.float32)


@triton.jit
def _slot_weights(row, slot, both, SLOTS: tl.constexpr):
    """Weights of one slot (to sample, state, delta, change), and whether any of them counts."""
    first = row + HEAD + slot
    to_sample, to_state = tl.load(first), tl.load(first + SLOTS)
    to_delta, to_change = tl.load(first + 2 * SLOTS), tl.load(first + 3 * SLOTS)
    used = ((to_delta != 0.0) | (to_change != 0.0)) & (both == 0)
    return to_sample, to_state, to_delta, to_change, used | (to_sample != 0.0) | (to_state != 0.0)


@triton.jit
def _add_slot(
    row, slot, both, ptr, offsets, numel, cond, x_next, delta, state,
    SLOTS: tl.constexpr, USES: tl.constexpr,
):  # fmt: skip
    """The sums with the terms of one slot, whose registers are at ``ptr``."""
    to_sample, to_state, to_delta, to_change, used = _slot_weights(row, slot, both, SLOTS)
    value = tl.load(ptr + offsets, _below(offsets, numel, used), other=0.0)
    x_next += _term(to_sample, value)
    if USES & 1:
        delta += _term(to_delta, value)
    if USES & 2:
        delta += _term(to_change, cond - value)
    if USES & 4:
        state += _term(to_state, value)
    return x_next, delta, state


@triton.jit
def _noise(weight, ptr, offsets, numel):
    """weight * z; nothing is read where the weight is 0."""
    z = tl.load(ptr + offsets, _below(offsets, numel, weight != 0.0), other=0.0)
    return weight * z.to(tl.float32)


@triton.jit
def _store_slot(slots, slot, slot_stride, offsets, numel, value):
    """``value`` into a slot, or nowhere where that is -1."""
    where = slots + tl.maximum(slot, 0.0).to(tl.int64) * slot_stride + offsets
    tl.store(where, value, _below(offsets, numel, slot >= 0.0))


@triton.jit
def _store(ptr, row, numel, offsets, wanted, value):
    """``value`` into a dense row of the model's dtype, rounded once."""
    where = ptr + row * numel + offsets
    tl.store(where, value.to(ptr.dtype.element_ty), _below(offsets, numel, wanted))


@triton.jit
def _store_input(ptr, timestep_ptr, row, numel, offsets, first, value, timestep):
    """The next model input and timestep of one branch, or nothing where its row is -1."""
    at = tl.maximum(row, 0).to(tl.int64)
    if ptr is not None:
        _store(ptr, at, numel, offsets, row >= 0, value)
    if timestep_ptr is not None:
        tl.store(timestep_ptr + at, timestep, mask=first & (row >= 0))


@triton.jit
def _advance(cursor_ptr, batch, blocks, b, at):
    """Move the cursor of sample ``b`` on, in whichever of its programs comes last.

    Every program of the sample reads the cursor first, so it may only change when all have: the
    barrier keeps this program's own threads from reading it late.
    """
    tl.debug_barrier()
    arrived = tl.atomic_add(cursor_ptr + batch + b, 1, sem="acq_rel")
    last = arrived == blocks - 1
    tl.store(cursor_ptr + batch + b, 0, mask=last)
    tl.store(cursor_ptr + b, at + 1, mask=last)


@triton.jit
def step_update_kernel(
    registers_ptr, cursor_ptr, table_ptr, output_ptr, output_rows_ptr, input_ptr, timestep_ptr,
    input_rows_ptr, sample_ptr, noise_ptr, num_rows, batch, numel, slot_stride, blocks,
    output_stride, n1, n2, s0, s1, s2,
    SLOTS: tl.constexpr, USES: tl.constexpr, STRIDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of the sample in grid dimension 1, for the block in dimension 0."""
    block, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at = tl.load(cursor_ptr + b)
    inside = (at >= 0) & (at < num_rows - 1)
    row = table_ptr + tl.where(inside, at, 0).to(tl.int64) * (HEAD + 4 * SLOTS)
    cond_row, uncond_row = tl.load(output_rows_ptr + b), tl.load(output_rows_ptr + batch + b)
    both = tl.load(row + 1) != 0.0
    if inside & (tl.load(row) != 0.0) & (cond_row >= 0) & ((uncond_row >= 0) | (both == 0)):
        offsets = block * BLOCK + tl.arange(0, BLOCK)
        uncond_row = tl.where(both, uncond_row, -1)
        cond = _load_output(output_ptr, cond_row, offsets, numel, output_stride, n1, n2, s0, s1, s2, STRIDED)  # fmt: skip  # noqa: E501
        uncond = _load_output(output_ptr, uncond_row, offsets, numel, output_stride, n1, n2, s0, s1, s2, STRIDED)  # fmt: skip  # noqa: E501
        delta, state, x_next = tl.zeros_like(cond), tl.zeros_like(cond), tl.zeros_like(cond)
        slots = registers_ptr + b * numel
        slot = slots
        for s in tl.static_range(UNROLLED if SLOTS > UNROLLED else SLOTS):
            x_next, delta, state = _add_slot(row, s, both, slot, offsets, numel, cond, x_next, delta, state, SLOTS, USES)  # fmt: skip  # noqa: E501
            slot += slot_stride
        for s in tl.range(UNROLLED, SLOTS):
            x_next, delta, state = _add_slot(row, s, both, slot, offsets, numel, cond, x_next, delta, state, SLOTS, USES)  # fmt: skip  # noqa: E501
            slot += slot_stride
        delta = tl.where(both, cond - uncond, delta)
        guided = cond + _term(tl.load(row + 4), delta)
        x_next += _term(tl.load(row + 5), guided) + _term(tl.load(row + 6), cond)
        x_next += _term(tl.load(row + 7), delta)
        if USES & 4:
            state += _term(tl.load(row + 10), guided) + _term(tl.load(row + 11), delta)
            x_next += _term(tl.load(row + 8), state)
            _store_slot(slots, tl.load(row + 16), slot_stride, offsets, numel, state)
        if noise_ptr is not None:
            x_next += _noise(tl.load(row + 9), noise_ptr + b * numel, offsets, numel)
        if USES & 8:
            _store_slot(slots, tl.load(row + 13), slot_stride, offsets, numel, guided)
        if USES & 16:
            _store_slot(slots, tl.load(row + 14), slot_stride, offsets, numel, cond)
        if USES & 32:
            _store_slot(slots, tl.load(row + 15), slot_stride, offsets, numel, delta)
        _store_slot(slots, tl.load(row + 12), slot_stride, offsets, numel, x_next)
        if sample_ptr is not None:
            _store(sample_ptr, b, numel, offsets, True, x_next)
        if input_rows_ptr is not None:
            following, first = row + HEAD + 4 * SLOTS, block == 0
            uncond_in = tl.load(input_rows_ptr + batch + b)
            uncond_in = tl.where(tl.load(following + 1) != 0.0, uncond_in, -1)
            scaled, timestep = tl.load(following + 3) * x_next, tl.load(following + 2)
            _store_input(input_ptr, timestep_ptr, tl.load(input_rows_ptr + b), numel, offsets, first, scaled, timestep)  # fmt: skip  # noqa: E501
            _store_input(input_ptr, timestep_ptr, uncond_in, numel, offsets, first, scaled, timestep)  # fmt: skip  # noqa: E501
        _advance(cursor_ptr, batch, blocks, b, at)
