"""``scheduler.step`` as one launch: the traced scheduler's row in place of its own code."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from thg_kernels.step_update import (
    BranchRows,
    Column,
    StepState,
    StepTable,
    choose_backend,
    step_update,
    weight_columns,
)

from ...guidance import GuidanceRow
from ...packing import step_table
from ...plan import SamplingPlan
from ...step_buffers import Shape
from ...table import SolverRow
from .deferred import BranchSum
from .graphed import RowBuffers, RunGraphs


@dataclass(frozen=True)
class Outputs:
    """One denoiser call of the run, as a `BranchSum` refers to it.

    Attributes:
        row: index of the model call.
        guidance: what the plan says about it; ``evaluates_both`` as it was in fact evaluated.
        values: the denoiser's rows.
        branches: which of them are which.
    """

    row: int
    guidance: GuidanceRow
    values: Tensor
    branches: BranchRows


class FusedStep:
    """The solver of one run on the device.

    Args:
        plan: solver and guidance columns of the run.
        solver: where its solver columns come from; says what noise the scheduler would draw.
        x: the sample of the first row, shape ``(B, *latent)``.
        model_dtype: of the denoiser's output.
        guides: whether guidance is formed by the row; if not, rows are given guided outputs.
        dtype: of the samples it returns; that of the denoiser's output if None.
        watches: whether somebody may edit a returned sample so that torch does not notice
            (``.data``, a NumPy view); in inference mode every edit is of that kind.
        graphs: of the run, if its rows may be captured together with the denoiser.
    """

    def __init__(
        self,
        plan: SamplingPlan,
        solver: Sequence[SolverRow],
        x: Tensor,
        model_dtype: torch.dtype,
        guides: bool,
        dtype: torch.dtype | None = None,
        watches: bool = False,
        graphs: RunGraphs | None = None,
    ) -> None:
        self.plan, self.solver, self.guides = plan, solver, guides
        self.dtype, self.watches = dtype or model_dtype, watches
        self._model_dtype = model_dtype
        table = step_table(plan if guides else _unguided(plan))
        wide = torch.float64 in (x.dtype, model_dtype)
        registers = torch.float64 if wide else torch.float32
        self.backend = choose_backend(x.device, wide)
        self._buffers: RowBuffers | None = None
        if graphs is not None and guides and self.backend != "reference":
            shape = Shape.of(table, model_dtype, registers, self.backend, evaluates_both=True)
            shape = shape.roomy(x.numel())
            self._buffers = graphs.start_row(shape, x, self.dtype)
        if self._buffers is None:
            self.state = StepState(table, x, model_dtype=model_dtype, register_dtype=registers)
        else:
            table = table.resized(self._buffers.shape.num_rows, self._buffers.shape.num_slots)
            self.state = self._buffers.state
            self.state.restart(table, x)
        # As planned, before any patch.
        self._delta_slots = [line[Column.SLOT_DELTA] for line in table.lines]
        self._valid: set[int] = set()
        self._generator: Any = None
        self._noise: tuple[int, Tensor | None] = (-1, None)
        self._ahead: float | None = None
        self.rolled_back = 0
        self._remember(x)

    @property
    def row(self) -> int:
        """The next row."""
        return self.state.positions[0] if self.state.positions else 0

    @property
    def done(self) -> bool:
        """Whether the rows are used up."""
        return self.row >= self.plan.num_rows

    def invalidate(self) -> None:
        """Held deltas and outputs are stale from now on."""
        self._valid.clear()

    def is_short(self, row: int) -> bool:
        """Whether the delta of ``row`` would read what has not been written, or is stale."""
        line, num_slots = self.state.table.lines[row], self.state.table.num_slots
        for name in ("to_delta", "to_change"):
            for slot, weight in enumerate(line[weight_columns(name, num_slots)]):
                if weight != 0.0 and slot not in self._valid:
                    return True
        return False

    def held(self, row: int, cond: Tensor) -> Tensor:
        """Delta of ``row`` in torch, for a host that wants the tensor: float32, shape of cond."""
        registers, num_slots = self.state.registers, self.state.table.num_slots
        if self._ahead is not None and self._buffers is not None:
            registers = self._buffers.backup  # the row has run
        line = self.state.table.lines[row]
        delta = torch.zeros_like(cond, dtype=torch.float32)
        for name in ("to_delta", "to_change"):
            for slot, weight in enumerate(line[weight_columns(name, num_slots)]):
                if weight != 0.0:
                    past = self.state.logical(registers[slot])
                    value = past if name == "to_delta" else cond.float() - past
                    delta = delta + weight * value
        return delta

    def scaled(self, sample: Tensor) -> Tensor:
        """What the denoiser is fed in the next row; the sample itself where nothing is scaled."""
        scale = self.state.table.lines[self.row][Column.INPUT_SCALE] if not self.done else 1.0
        return sample if scale == 1.0 else sample * scale

    def step(
        self,
        output: Tensor,
        sample: Tensor,
        generator: Any = None,
        source: Outputs | None = None,
    ) -> Tensor:
        """Run the next row; returns the next sample.

        Args:
            output: what the pipeline made of the denoiser's answer, guided; a `BranchSum` where it
                is a sum of the branches.
            sample: the sample the pipeline steps from.
            generator: of the noise of stochastic solvers.
            source: the denoiser call of this row, None where nothing of it may be held.
        """
        self._generator = generator
        scale = output.guidance_scale if isinstance(output, BranchSum) else None
        if self._ahead is not None:
            following = self._arrived(scale, sample)
            if following is not None:
                return following
        self._take(sample)
        row, kept = self.row, (-1.0, -1.0)
        if self.guides and scale is not None and source is not None:
            values, branches = source.values, source.branches
            self._rescale(scale, source.guidance)
        else:
            values = output.value() if isinstance(output, BranchSum) else output
            branches = BranchRows.cond_only(self.state.batch)
            if self.guides:
                kept = self._hand_over(source)
        following = self._launched(values, branches)
        self._note_writes(row)
        if source is not None:
            self._keep(source, *kept)
        self._remember(following)
        return following

    def _launched(self, values: Tensor, branches: BranchRows) -> Tensor:
        """The sample that the next row makes."""
        following = torch.empty_like(self._last, dtype=self.dtype)
        noise = self._drawn(values.dtype)
        step_update(
            self.state, values, branches, noise=noise, sample=following, backend=self.backend
        )
        return following

    def foresee(self, guidance: GuidanceRow, scale: float) -> None:
        """Bring the next row in line with what the pipeline is about to do, ahead of its replay.

        Args:
            guidance: what the plan says about it; ``evaluates_both`` as it will be evaluated.
            scale: w, as the pipeline has it now.
        """
        self._take(self._last)
        self._rescale(scale, guidance)
        noise = self._drawn(self._model_dtype)
        if noise is not None and self._buffers is not None:
            self._buffers.noise.copy_(noise)
        self._ahead = scale

    def replayed(self) -> None:
        """The row has run on the device, and the host follows."""
        self.state.advance(range(self.state.batch))

    def _arrived(self, scale: float | None, sample: Tensor) -> Tensor | None:
        """The pipeline has come to the step of a row that ran ahead: its sample.

        None where the pipeline has done something else meanwhile; the row is then taken back.
        """
        foreseen, self._ahead = self._ahead, None
        if self._buffers is None or foreseen is None:
            return None
        row = self.row - 1
        same = sample is self._last and (sample.is_inference() or sample._version == self._version)
        if same and scale is not None and math.isclose(scale, foreseen, rel_tol=1e-9):
            following = self._buffers.following.clone()
            self._note_writes(row)
            self._remember(following)
            return following
        self._roll_back(row)
        return None

    def _roll_back(self, row: int) -> None:
        """Undo a row that ran ahead."""
        if self._buffers is not None:
            self.state.registers.copy_(self._buffers.backup)
            self.state.seek(row)
            self.rolled_back += 1

    def take_back(self) -> bool:
        """Undo a row that ran ahead and whose step has not come; whether there was one."""
        found, self._ahead = self._ahead is not None, None
        if found:
            self._roll_back(self.row - 1)
        return found

    def _drawn(self, dtype: torch.dtype) -> Tensor | None:
        """The noise of the next row, drawn as often and as wide as the scheduler itself would."""
        row, like = self.solver[self.row], self._last
        if self._noise[0] != self.row:
            drawn = [
                randn_tensor(
                    like.shape,
                    generator=self._generator,
                    device=like.device,
                    dtype=torch.float32 if wide == "float32" else dtype,
                )
                for wide in row.noise_draws
            ]
            noise = drawn[row.noise_draw] if row.noise_weight != 0.0 else None
            self._noise = (self.row, noise)
        return self._noise[1]

    def _remember(self, sample: Tensor) -> None:
        """Note what the pipeline has been given, to tell an edit."""
        self._last, self._version = sample, 0 if sample.is_inference() else sample._version
        self._copy = sample.clone() if self.watches or sample.is_inference() else None

    def _take(self, sample: Tensor) -> None:
        """Load the sample if it is not the one that the last row returned, as it was returned.

        Registers are wider than samples: where a sample is what it was, its register stays.
        """
        if sample is not self._last:
            self.state.set_samples(sample)
        elif self._copy is not None:
            wide = self.state.samples()
            self.state.set_samples(torch.where(sample == self._copy, wide, sample.to(wide.dtype)))
        elif sample._version != self._version:
            self.state.set_samples(sample)

    def _rescale(self, scale: float, guidance: GuidanceRow) -> None:
        """Bring the row in line with what the pipeline does: the scale, and a refresh."""
        line = self.state.table.lines[self.row]
        weight = (scale - 1.0) * guidance.boost
        held = guidance.delta_weights or guidance.cond_change_weights
        if not (guidance.evaluates_both or held):
            weight = 0.0
        both = guidance.evaluates_both
        if both != bool(line[Column.BOTH]) or abs(weight - line[Column.GUIDANCE]) > 1e-9:
            self._replace(self._formed_by(both, weight))

    def _hand_over(self, source: Outputs | None) -> tuple[float, float]:
        """The next row is given a guided output; slots of the delta and output it was to keep."""
        both = source is not None and source.guidance.evaluates_both
        rows = self._formed_by(both, weight=0.0)
        line = rows[self.row]
        kept = float(line[Column.SLOT_DELTA]), float(line[Column.SLOT_COND])
        line[[Column.SLOT_DELTA, Column.SLOT_COND]] = -1.0
        line[Column.BOTH] = 0.0
        self._replace(rows)
        return kept

    def _keep(self, source: Outputs, delta_slot: float, cond_slot: float) -> None:
        """Store what a row that was given a guided output could not know."""
        if max(delta_slot, cond_slot) < 0.0:
            return
        values = source.values.to(self.state.registers.dtype)
        cond = self.state.ordered(values[list(source.branches.cond)])
        if delta_slot >= 0.0:
            uncond = self.state.ordered(values[list(source.branches.uncond)])
            self.state.registers[int(delta_slot)] = cond - uncond
            self._valid.add(int(delta_slot))
        if cond_slot >= 0.0:
            self.state.registers[int(cond_slot)] = cond
            self._valid.add(int(cond_slot))

    def _formed_by(self, evaluates_both: bool, weight: float) -> Tensor:
        """The rows, the next one forming its guidance in another way; slots stay as they are.

        A row that was to read the newest delta and evaluates both instead puts the fresh one into
        its place.
        """
        rows, slots = self.state.table.rows.clone(), self.state.table.num_slots
        line, at = rows[self.row], self.row
        if evaluates_both and not line[Column.BOTH]:
            kept = [slot for slot in self._delta_slots[:at] if slot >= 0.0]
            # A delta that is read here for the last time has already given its slot away.
            is_free = kept and kept[-1] not in line[Column.SLOT_SAMPLE : Column.SLOT_STATE + 1]
            if is_free and line[weight_columns("to_delta", slots)][int(kept[-1])] != 0:
                line[Column.SLOT_DELTA] = kept[-1]
        elif not evaluates_both and line[Column.BOTH]:
            line[Column.SLOT_DELTA] = -1.0
        if evaluates_both or weight == 0.0:
            line[weight_columns("to_delta", slots)] = 0.0
            line[weight_columns("to_change", slots)] = 0.0
        line[Column.BOTH], line[Column.GUIDANCE] = float(evaluates_both), weight
        return rows

    def _replace(self, rows: Tensor) -> None:
        """Other numbers on host and device."""
        self.state.replace_table(StepTable(rows, self.state.table.sample_slots))

    def _note_writes(self, row: int) -> None:
        """Which slots hold deltas and outputs that a later row may read."""
        line = self.state.table.lines[row]
        for column in (Column.SLOT_SAMPLE, Column.SLOT_GUIDED, Column.SLOT_STATE):
            self._valid.discard(int(line[column]))
        for column in (Column.SLOT_DELTA, Column.SLOT_COND):
            if line[column] >= 0:
                self._valid.add(int(line[column]))


def _unguided(plan: SamplingPlan) -> SamplingPlan:
    """The solver columns alone: each row is given the guided output."""
    columns: dict[str, Any] = {"evaluates_both": False, "guidance_weight": 0.0}
    columns |= {"delta_weights": (), "cond_change_weights": ()}
    return replace(plan, rows=tuple(replace(row, **columns) for row in plan.rows))
