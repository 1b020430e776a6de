"""What a batch of sampling runs keeps on the device between two steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import InvalidInput
from .branches import BranchRows
from .table import Column, StepTable

MODEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
REGISTER_DTYPES = (torch.float32, torch.float64)


class StepState:
    """Registers, cursors and static buffers of B samples; the table on their device.

    Args:
        table: the rows; samples may run different plans of a `table.stack`.
        x: initial samples, already at their plan's noise level, shape ``(B, *latent)``, floating.
            Its order of dimensions in memory (channels_last, say) becomes that of all buffers.
        rows: the first row of each sample in ``table``; an int for all of them.
        model_dtype: dtype of the denoiser's input and output; that of ``x`` if None.
        register_dtype: float32 or float64. float64, here or there, runs on the reference backend.
        inputs: where the branches stand in ``model_input``; None: no model input is kept, for
            hosts that form it by themselves.

    Attributes:
        registers: shape ``(S, B, *ordered latent)``; slots that no row has written hold NaN.
        cursor: int32, shape ``(2, B)``: next row, arrivals.
        positions: the same rows as the host knows them.
        model_input: next input of the denoiser, shape ``(M, *latent)``, and ``timestep``, ``(M,)``.
    Raises:
        InvalidInput: before anything is allocated.
    """

    def __init__(
        self,
        table: StepTable,
        x: Tensor,
        rows: int | Sequence[int] = 0,
        *,
        model_dtype: torch.dtype | None = None,
        register_dtype: torch.dtype = torch.float32,
        inputs: BranchRows | None = None,
    ) -> None:
        model_dtype = model_dtype or getattr(x, "dtype", None)
        _check_state(table, x, model_dtype, register_dtype, inputs)
        self.positions = _check_rows(rows, x.shape[0], table)
        self.table, self.inputs, self.model_dtype = table, inputs, model_dtype
        self.uses = table.uses
        self.batch, self.latent = x.shape[0], tuple(x.shape[1:])
        self.order = _memory_order(x)
        self.model_input: Tensor | None = None
        self.timestep: Tensor | None = None
        # Tensors of inference mode could not be written to outside of it, by callbacks say.
        with torch.inference_mode(False), torch.no_grad():
            self._allocate(x.device, register_dtype)
            self.set_samples(x)

    def _allocate(self, device: torch.device, register_dtype: torch.dtype) -> None:
        ordered = [self.latent[k] for k in self.order]
        shape = (self.table.num_slots, self.batch, *ordered)
        self.registers = torch.full(shape, torch.nan, dtype=register_dtype, device=device)
        self.device_table = self.table.rows.to(device, register_dtype)
        counters = [self.positions, [0] * self.batch]
        self.cursor = torch.tensor(counters, dtype=torch.int32, device=device)
        if self.inputs is None:
            return
        shape = (self.inputs.num_rows, *ordered)
        buffer = torch.zeros(shape, dtype=self.model_dtype, device=device)
        self.model_input = self.logical(buffer)
        self.timestep = torch.zeros(self.inputs.num_rows, dtype=torch.float32, device=device)

    @property
    def device(self) -> torch.device:
        """Where everything is."""
        return self.registers.device

    def ordered(self, value: Tensor) -> Tensor:
        """A view of ``(n, *latent)`` with the latent's dimensions in memory order."""
        return value.permute(0, *(k + 1 for k in self.order))

    def logical(self, value: Tensor) -> Tensor:
        """The inverse of `ordered`."""
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return value.permute(0, *(k + 1 for k in inverse))

    def samples(self) -> Tensor:
        """The current samples, shape ``(B, *latent)``, in the register dtype.

        A view of the registers where all samples share a row, else a copy.
        """
        slots = [self.table.sample_slots[row] for row in self.positions]
        if len(set(slots)) <= 1:
            return self.logical(self.registers[slots[0] if slots else 0])
        return self.logical(torch.stack([self.registers[s, b] for b, s in enumerate(slots)]))

    def set_samples(self, x: Tensor) -> None:
        """Replace the current samples by ``x``, shape ``(B, *latent)``, and their model input."""
        if tuple(x.shape) != (self.batch, *self.latent):
            remedy = f"give shape {(self.batch, *self.latent)}."
            raise InvalidInput("x", tuple(x.shape), remedy)
        x = self.ordered(x.detach())
        for b, row in enumerate(self.positions):
            self.registers[self.table.sample_slots[row], b].copy_(x[b])
        self.refresh_input()

    def refresh_input(self) -> None:
        """Form model input and timestep anew from the registers, after an edit by hand."""
        if self.inputs is None or self.model_input is None or self.timestep is None:
            return
        buffer = self.ordered(self.model_input)
        for b, row in enumerate(self.positions):
            line = self.table.lines[row]
            branches = [self.inputs.cond[b]]
            if line[Column.BOTH]:
                branches.append(self.inputs.uncond[b])
            x = self.registers[self.table.sample_slots[row], b]
            for at in branches:
                if at >= 0:
                    buffer[at].copy_(line[Column.INPUT_SCALE] * x)
                    self.timestep[at].fill_(line[Column.TIMESTEP])

    def seek(self, rows: int | Sequence[int]) -> None:
        """Put the cursors at ``rows``; registers stay as they are."""
        self.positions = _check_rows(rows, self.batch, self.table)
        self.cursor[0].copy_(torch.tensor(self.positions, dtype=torch.int32, device="cpu"))

    def replace_table(self, table: StepTable) -> None:
        """Other numbers for the rows to come, on host and device; slots and rows must be as many.

        Raises:
            InvalidInput: the table has another shape or uses what the kernels were not made for.
        """
        if table.rows.shape != self.table.rows.shape:
            remedy = f"give a table of shape {tuple(self.table.rows.shape)}."
            raise InvalidInput("table", tuple(table.rows.shape), remedy)
        self.table, self.uses = table, self.uses | table.uses
        self.device_table.copy_(table.rows)

    def restart(self, table: StepTable, x: Tensor, rows: int | Sequence[int] = 0) -> None:
        """Another run on the same addresses, so that what was captured on them serves it.

        Args:
            table: of the same shape; `StepTable.resized` gives it room.
            x: initial samples, shape ``(B, *latent)``.
            rows: the first row of each sample.
        """
        positions = _check_rows(rows, self.batch, table)
        self.replace_table(table)
        with torch.inference_mode(False), torch.no_grad():
            self.registers.fill_(torch.nan)
            self.cursor[1].zero_()
            self.seek(positions)
            self.set_samples(x)

    def active(self, outputs: BranchRows) -> list[int]:
        """Samples that a step with these outputs moves on.

        Raises:
            InvalidInput: a row that evaluates both branches has no unconditional output.
        """
        found = []
        for b, (row, cond) in enumerate(zip(self.positions, outputs.cond, strict=True)):
            if cond < 0 or not self.table.flag(row, Column.ACTIVE):
                continue
            if self.table.flag(row, Column.BOTH) and outputs.uncond[b] < 0:
                remedy = f"row {row} of sample {b} evaluates both branches: give the row of uncond."
                raise InvalidInput("outputs.uncond", outputs.uncond, remedy)
            found.append(b)
        return found

    def advance(self, active: Sequence[int]) -> None:
        """Follow a launch, or the replay of a captured one, on the host."""
        for b in active:
            self.positions[b] += 1


def _memory_order(x: Tensor) -> tuple[int, ...]:
    """The latent's dimensions from the slowest to the fastest in memory."""
    strides = x.stride()[1:]
    return tuple(sorted(range(x.ndim - 1), key=lambda k: -strides[k]))


def _check_rows(rows: int | Sequence[int], batch: int, table: StepTable) -> list[int]:
    if not isinstance(rows, int | Sequence):
        raise InvalidInput("rows", rows, "give one row number or a sequence of them.")
    positions = [rows] * batch if isinstance(rows, int) else list(rows)
    if len(positions) != batch:
        raise InvalidInput("rows", rows, f"give one row for each of the {batch} samples.")
    for row in positions:
        if isinstance(row, bool) or not isinstance(row, int) or not 0 <= row < table.num_rows:
            remedy = f"a cursor must be a row of the table, 0 to {table.num_rows - 1}."
            raise InvalidInput("rows", row, remedy)
    return positions


def _check_state(
    table: StepTable,
    x: Tensor,
    model_dtype: torch.dtype | None,
    register_dtype: torch.dtype,
    inputs: BranchRows | None,
) -> None:
    if not isinstance(table, StepTable):
        raise InvalidInput("table", type(table).__name__, "give a StepTable.")
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2:
        kind = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise InvalidInput("x", kind, "give floating-point samples of shape (B, *latent).")
    if register_dtype not in REGISTER_DTYPES:
        raise InvalidInput("register_dtype", register_dtype, "use float32 (or float64).")
    if model_dtype not in MODEL_DTYPES:
        raise InvalidInput("model_dtype", model_dtype, "use float16, bfloat16 or float32.")
    if inputs is not None and not isinstance(inputs, BranchRows):
        raise InvalidInput("inputs", type(inputs).__name__, "give BranchRows.")
    if inputs is not None and inputs.batch != x.shape[0]:
        remedy = f"give the rows of all {x.shape[0]} samples."
        raise InvalidInput("inputs", inputs, remedy)
