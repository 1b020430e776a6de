"""``scheduler.step`` as one launch: the traced scheduler's row in place of its own code."""

from __future__ import annotations

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
from ...table import SolverRow
from .deferred import BranchSum


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
    ) -> None:
        self.plan, self.solver, self.guides = plan, solver, guides
        self.dtype, self.watches = dtype or model_dtype, watches
        table = step_table(plan if guides else _unguided(plan))
        wide = torch.float64 in (x.dtype, model_dtype)
        registers = torch.float64 if wide else torch.float32
        self.state = StepState(table, x, model_dtype=model_dtype, register_dtype=registers)
        self.backend = choose_backend(x.device, wide)
        self._delta_slots = [
            line[Column.SLOT_DELTA] for line in table.lines
        ]  # as planned, before any patch
        self._valid: set[int] = set()
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
        self._take(sample)
        scale = output.guidance_scale if isinstance(output, BranchSum) else None
        row, kept = self.row, (-1.0, -1.0)
        if self.guides and scale is not None and source is not None:
            values, branches = source.values, source.branches
            self._rescale(scale, source)
        else:
            values = output.value() if isinstance(output, BranchSum) else output
            branches = BranchRows.cond_only(self.state.batch)
            if self.guides:
                kept = self._hand_over(source)
        following = torch.empty_like(sample, dtype=self.dtype)
        noise = self._draw(sample, values.dtype, generator)
        step_update(
            self.state, values, branches, noise=noise, sample=following, backend=self.backend
        )
        self._note_writes(row)
        if source is not None:
            self._keep(source, *kept)
        self._remember(following)
        return following

    def _draw(self, sample: Tensor, dtype: torch.dtype, generator: Any) -> Tensor | None:
        """The noise of the next row, drawn as often and as wide as the scheduler itself would."""
        row = self.solver[self.row]
        drawn = [
            randn_tensor(
                sample.shape,
                generator=generator,
                device=sample.device,
                dtype=torch.float32 if wide == "float32" else dtype,
            )
            for wide in row.noise_draws
        ]
        return drawn[row.noise_draw] if row.noise_weight != 0.0 else None

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

    def _rescale(self, scale: float, source: Outputs) -> None:
        """Bring the row in line with what the pipeline did: the scale, and a refresh."""
        line = self.state.table.lines[self.row]
        weight = (scale - 1.0) * source.guidance.boost
        held = source.guidance.delta_weights or source.guidance.cond_change_weights
        if not (source.guidance.evaluates_both or held):
            weight = 0.0
        both = source.guidance.evaluates_both
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
