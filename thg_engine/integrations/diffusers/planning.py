"""From a pipeline's scheduler to noise levels and solver columns of the call in progress."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from ...errors import InvalidArgument, UntraceableScheduler
from ...guidance import THG, Guidance, GuidanceRow, resolve_nfe
from ...lowering import plan_from_table
from ...plan import SamplingPlan
from ...schedule import grid_points, model_timesteps
from ...scheduler_run import NotLinear, SchedulerRun, clone
from ...table import SolverRow, SolverTable
from ...trace import trace


@dataclass(frozen=True)
class FusedPlan:
    """A plan whose rows step, and whose rows draw noise as the scheduler does.

    Attributes:
        plan: guidance and solver.
        solver: the scheduler's own rows.
        scheduler: the scheduler itself, before its first step.
        start: its first model call.
        step_kwargs: further arguments of its ``step``.
        needs_branches: whether its rows read conditional outputs and deltas besides the guided
            output, and so cannot be given the latter alone.
    """

    plan: SamplingPlan
    solver: tuple[SolverRow, ...]
    scheduler: Any
    start: int
    step_kwargs: dict[str, Any]
    needs_branches: bool = False

    def result_dtype(self, sample: torch.dtype, output: torch.dtype) -> torch.dtype:
        """Dtype of the sample that the scheduler's own step makes of these."""
        if sample is output:
            return sample
        run = SchedulerRun(clone(self.scheduler), self.start, self.step_kwargs)
        zeros = torch.zeros(1, 1, 1, 2)
        try:
            return run.step(0, zeros.to(output), zeros.to(sample)).dtype
        except NotLinear:  # it cannot step a CPU copy of these dtypes: as most schedulers do
            return output


@dataclass(frozen=True)
class ChosenRows:
    """Guidance whose rows have been decided."""

    name: str
    chosen: tuple[GuidanceRow, ...]

    def rows(self, lambdas: Sequence[float], guidance_scale: float) -> tuple[GuidanceRow, ...]:
        """The rows as they were chosen."""
        return self.chosen


def fused_plan(
    scheduler: Any,
    num_rows: int,
    guidance: ChosenRows,
    guidance_scale: float,
    step_kwargs: dict[str, Any],
) -> FusedPlan | str:
    """The plan with the scheduler's own step as columns, or why there is none.

    Args:
        scheduler: timesteps set, no step taken.
        num_rows: model calls of this run; image-to-image takes the last ones only.
        guidance: its rows.
        guidance_scale: w.
        step_kwargs: what the pipeline passes to ``step`` besides output, timestep and sample.
    """
    start = len(model_timesteps(scheduler)) - num_rows
    kwargs = {k: v for k, v in step_kwargs.items() if k != "generator"}
    try:
        table = trace(scheduler, start=start, step_kwargs=kwargs)
    except (UntraceableScheduler, InvalidArgument) as reason:
        return str(reason)
    if any(row.noise_weight != 0.0 and not row.noise_draws for row in table.rows):
        return f"{table.name} draws its noise from a source of its own"
    if not table.edits:
        return f"{table.name} keeps more between its steps than samples and outputs"
    if len(table.rows) != len(guidance.chosen):
        return f"{table.name} takes {len(table.rows)} steps in {len(guidance.chosen)} model calls"
    plan = _lowered(table, guidance, guidance_scale)
    return FusedPlan(plan, table.rows, scheduler, start, kwargs)


@lru_cache(maxsize=64)
def _lowered(table: SolverTable, guidance: ChosenRows, guidance_scale: float) -> SamplingPlan:
    """Tables and rows repeat from call to call, and so does the plan."""
    return plan_from_table(table, guidance, guidance_scale)


def in_branches(
    guidance: Guidance, num_rows: int, branches: int
) -> tuple[Guidance, tuple[str, ...]]:
    """``guidance`` with its budget told in the rows of two branches that plans are made of.

    A row with all of ``branches`` costs that many evaluations, where a plan's row costs two.
    """
    budget = guidance.nfe if isinstance(guidance, THG) else None
    if branches == 2:
        return guidance, ()
    note = f"{branches} branches: the plan's rows are counted as of two, the call as it is"
    if budget is None or not isinstance(guidance, THG):
        return guidance, (note,)
    resolve_nfe(budget, num_rows)  # refuses what is no budget
    whole = branches * num_rows
    total = budget if isinstance(budget, int) else round(budget * whole)
    coarse = max((min(total, whole) - num_rows) // (branches - 1), 1)
    return replace(guidance, nfe=num_rows + coarse), (note,)


def noise_levels(scheduler: Any, num_rows: int) -> tuple[Sequence[float], tuple[str, ...]]:
    """Half log-SNR of the last ``num_rows`` rows, by step number where nobody knows it."""
    try:
        points = grid_points(scheduler)[:-1]
    except (AttributeError, IndexError, TypeError, ValueError):  # a scheduler of another kind
        name = type(scheduler).__name__
        note = f"the noise level of {name} is unknown: grid placed by step number"
        return [-3.0 + 6.0 * i / num_rows for i in range(num_rows)], (note,)
    return [point.lambda_t for point in points][-num_rows:], ()
