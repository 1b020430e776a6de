"""The scheduler of a calibrated plan, in the pipeline's place for the length of a call.

Its timesteps are those of the plan, whatever number of steps the call asks for. Where the fused
step runs, its rows are the fitted ones; where a pipeline does something else with the denoiser's
output in between, ``step`` takes the base rows, which need the guided output alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from ...errors import InvalidArgument
from ...fitting.choose import Choice
from ...fitting.front import base_plan
from ...guidance import CFG, GuidanceRow
from ...lowering import plan_from_table
from ...plan import SamplingPlan
from ...schedule import NoiseSchedule, Point
from ...solvers import get_solver, solver_table
from ...table import SolverTable
from .planning import FusedPlan
from .resolve import PlannedRows


@dataclass(frozen=True)
class PlannedCall:
    """The plan of one call.

    Attributes:
        choice: the plan of the front.
        schedule: of the pipeline's scheduler.
        prediction_type: diffusers' string.
    """

    choice: Choice
    schedule: NoiseSchedule
    prediction_type: str

    @property
    def guidance_scale(self) -> float:
        """w that it was chosen for."""
        return self.choice.guidance_scale

    @cached_property
    def plan(self) -> SamplingPlan:
        """The fitted rows."""
        return self.choice.entry.plan(self.schedule, self.prediction_type, self.guidance_scale)

    @cached_property
    def base(self) -> SamplingPlan:
        """The rows before any correction."""
        arguments = (self.schedule, self.prediction_type, self.guidance_scale)
        return base_plan(self.choice.entry, *arguments)

    @cached_property
    def guidance(self) -> tuple[GuidanceRow, ...]:
        """What each row says about guidance."""
        base = self.base
        return PlannedRows(base).rows([row.lambda_t for row in base.rows], self.guidance_scale)

    @cached_property
    def points(self) -> tuple[Point, ...]:
        """Of the rows, and the end."""
        return self.choice.entry.points(self.schedule)

    @cached_property
    def table(self) -> SolverTable:
        """The base solver's rows."""
        solver = get_solver(self.choice.entry.solver)
        return solver_table(solver, self.points, self.prediction_type)


class PlanScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """A scheduler that runs a calibrated plan.

    Args:
        choose: gives the plan for a number of steps, once a call has set its timesteps.
        config: of the pipeline's scheduler, which pipelines read.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, num_train_timesteps: int = 1000) -> None:
        self._choose: Callable[[int], PlannedCall] | None = None
        self.call: PlannedCall | None = None
        self.timesteps = torch.empty(0)
        self._step_index: int | None = None
        self._samples: list[Tensor] = []
        self._outputs: list[Tensor] = []
        self._is_custom: Callable[[], bool] = lambda: True

    @classmethod
    def beside(
        cls,
        scheduler: Any,
        choose: Callable[[int], PlannedCall],
        is_custom: Callable[[], bool] = lambda: True,
    ) -> PlanScheduler:
        """In place of ``scheduler``, whose configuration pipelines go on to read.

        Args:
            scheduler: the pipeline's own.
            choose: see the class.
            is_custom: whether timesteps and sigmas are the caller's and not the pipeline's habit.
        """
        made: PlanScheduler = cls()
        made._internal_dict = scheduler.config
        made._choose, made._is_custom = choose, is_custom
        return made

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: Any = None,
        sigmas: Any = None,
        **_: Any,
    ) -> None:
        """The plan's timesteps.

        Pipelines ask for ``timesteps`` and ``sigmas`` by name, and some give their own in every
        call: these say how many steps are meant, and no more.

        Raises:
            InvalidArgument: timesteps or sigmas of the caller's own; the plan brings its grid.
        """
        for name, given in (("timesteps", timesteps), ("sigmas", sigmas)):
            if given is None:
                continue
            if self._is_custom():
                remedy = "a calibrated plan brings its own grid; leave it out, or uncompile."
                raise InvalidArgument(name, given, remedy)
            num_inference_steps = num_inference_steps or len(given)
        if self._choose is None or num_inference_steps is None:
            raise InvalidArgument("num_inference_steps", num_inference_steps, "give a number.")
        self.call = self._choose(num_inference_steps)
        self.num_inference_steps = self.call.choice.entry.num_steps
        times = self.call.choice.entry.timesteps
        whole = all(t == int(t) for t in times)
        dtype = torch.int64 if whole and self.call.schedule.kind == "vp" else torch.float32
        self.timesteps = torch.tensor(times, dtype=dtype, device=device)
        # Half log-SNR is read off these by whoever asks what the samples are.
        self.points = self.call.points
        self._step_index = None
        self._samples, self._outputs = [], []

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Nothing: plans begin at their first row."""

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample itself."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        return_dict: bool = True,
        **_: Any,
    ) -> Any:
        """One base row from a guided output; its history begins where fitted rows have ended."""
        if self.call is None:
            raise InvalidArgument("scheduler", "PlanScheduler", "set its timesteps first.")
        index = self._step_index or 0
        self._step_index = index + 1
        solver = get_solver(self.call.choice.entry.solver)
        wide = torch.promote_types(sample.dtype, torch.float32)
        self._samples = [sample.to(wide), *self._samples][: solver.order]
        self._outputs = [model_output.to(wide), *self._outputs][: solver.order]
        history = [self.points[index - k] for k in range(len(self._samples))]
        row = solver.weights(history, self.points[index + 1], self.call.prediction_type)
        total = torch.zeros_like(self._samples[0])
        for weight, value in zip(row.sample, self._samples, strict=False):
            total = total + weight * value
        for weight, value in zip(row.output, self._outputs, strict=False):
            total = total + weight * value
        following = total.to(model_output.dtype)
        return SchedulerOutput(prev_sample=following) if return_dict else (following,)

    def _init_step_index(self, timestep: Any) -> None:
        self._step_index = 0

    def rows_and_plan(
        self, guidance_scale: float, num_rows: int, full: bool
    ) -> tuple[tuple[GuidanceRow, ...], SamplingPlan]:
        """Guidance rows of the call in progress, and its base plan; of full guidance if asked.

        Raises:
            InvalidArgument: the call leaves the plan's first rows out.
        """
        call = self._at(guidance_scale)
        plan = call.base
        if num_rows != plan.num_rows:
            remedy = f"a calibrated plan of {plan.num_rows} rows cannot be cut short; uncompile."
            raise InvalidArgument("strength", f"<{num_rows} rows>", remedy)
        if full:
            lambdas = [row.lambda_t for row in plan.rows]
            plan = plan_from_table(call.table, CFG(), guidance_scale)
            return CFG().rows(lambdas, guidance_scale), plan
        return call.guidance, plan

    def fused(self, guidance_scale: float) -> FusedPlan:
        """The fitted rows of the call in progress."""
        call = self._at(guidance_scale)
        plan = call.plan
        fitted = plan is not call.base
        return FusedPlan(plan, call.table.rows, self, 0, {}, needs_branches=fitted)

    def _at(self, guidance_scale: float) -> PlannedCall:
        """The plan of the call, at the scale that the pipeline has now."""
        if self.call is None:
            raise InvalidArgument("scheduler", "PlanScheduler", "set its timesteps first.")
        if guidance_scale == self.call.guidance_scale:
            return self.call
        return replace(self.call, choice=replace(self.call.choice, guidance_scale=guidance_scale))
