"""``pipe.thg``: what a compiled pipeline runs, what it did, and why."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from thg_kernels.step_update import choose_backend

from ...errors import InvalidArgument, ThgError
from ...graph_cache import GraphCache
from ...guidance import CFG, FRESH, Guidance, GuidanceRow
from ...lowering import guidance_rows, plan_from_timesteps
from ...plan import SamplingPlan
from ...schedule import model_timesteps
from . import hook
from .adapter_types import AdapterRecord
from .adapters import find_layout
from .asking import call_arguments, has_own_grid, num_rows_of, scale_of
from .batch_run import BatchRun
from .callbacks import watch_callback
from .calls_run import CallsRun
from .drift import Drift
from .fingerprint import processors
from .graphed import CallGraphs, RunGraphs
from .networks import Networks
from .plan_scheduler import PlanScheduler
from .planned import Planner
from .planning import ChosenRows, FusedPlan, fused_plan, in_branches, noise_levels
from .report import (
    call_lines,
    graph_line,
    guidance_line,
    plan_lines,
    step_line,
    switch_lines,
    tuning_lines,
    why_unfused,
)
from .resolve import resolve_guidance
from .run import PipelineRun
from .settings import Settings
from .stepping import stepping
from .tuning import Undo, tune
from .twins import Twins

Arguments = tuple[Any, ...]
WRAPPED = 'torch.compile is around the denoiser; compile(pipe, denoiser="compile") goes with graphs'


class Controller:
    """Report, plan and counters of one compiled pipeline.

    Args:
        settings: what was asked for.
        record: how the pipeline does guidance; None where it is left alone.
        networks: its denoisers, and what goes with them.
        inactive: why the pipeline is left alone, "" where it is not.
        pipe: the pipeline, referred to weakly.

    Attributes:
        guidance: the method that was resolved.
        notes: how it was chosen.
    """

    def __init__(
        self,
        settings: Settings,
        record: AdapterRecord | None,
        networks: Networks,
        inactive: str = "",
        pipe: Any = None,
    ) -> None:
        self.settings, self.record, self.inactive = settings, record, inactive
        self.networks = networks
        self.guidance: Guidance | None = None
        self._pipe = None if pipe is None else weakref.ref(pipe)
        self.notes: tuple[str, ...] = ()
        self._last: PipelineRun | None = None
        self._counts: Counter[str] = Counter()
        self._graphs = GraphCache(choose=settings.graph is None)
        self._undo_tuning: list[Undo] = []
        self._twins = Twins()
        self._planner: Planner | None = None
        self._drift = Drift(settings.drift)
        self._lock = threading.Lock()
        if networks.denoisers:
            self._resolve()

    def _resolve(self) -> None:
        settings = self.settings
        self.guidance, self.notes = resolve_guidance(
            settings.guidance, settings.calibration, settings.nfe, self.networks.module
        )
        pipe = None if self._pipe is None else self._pipe()
        if settings.front is not None and settings.target is not None and pipe is not None:
            self._planner = Planner.of(pipe, settings.front, settings.target)

    def __reduce__(self) -> Any:
        """Of a pipeline that is left alone; compiled ones make their copies' controllers anew."""
        return Controller, (self.settings, None, Networks(), self.inactive)

    @property
    def plan(self) -> SamplingPlan | None:
        """Plan of the last call (None if guidance was off).

        Before the first call the finished plan that was given, that of a usual call where plans
        were calibrated, or one for 50 steps if 50 can be run within the budget, else None.
        """
        if self._last is not None:
            return self._last.plan
        if isinstance(self.settings.guidance, SamplingPlan):
            return self.settings.guidance
        pipe = None if self._pipe is None else self._pipe()
        if pipe is None or self.guidance is None:
            return None
        if self._planner is not None:
            return self._planner.preview(pipe.scheduler)
        try:
            return self.preview(pipe.scheduler)
        except InvalidArgument:
            return None  # a budget for runs of other lengths: only their call can tell

    def preview(
        self, scheduler: Any, num_inference_steps: int = 50, guidance_scale: float = 7.5
    ) -> SamplingPlan:
        """The plan that a full-length call would run; evaluates nothing, changes no scheduler.

        Args:
            scheduler: the pipeline's scheduler; a copy of it is asked for its timesteps.
            num_inference_steps: as in the call.
            guidance_scale: as in the call.
        Raises:
            InvalidArgument: a value that no run can have; `ThgError`: the pipeline is left alone.
        """
        if self.guidance is None:
            raise ThgError(f"there is no plan: {self.inactive}.")
        if not hasattr(scheduler, "set_timesteps"):
            remedy = "give a scheduler, e.g. pipe.scheduler."
            raise InvalidArgument("scheduler", type(scheduler).__name__, remedy)
        if not isinstance(num_inference_steps, int) or num_inference_steps < 1:
            remedy = "give a whole number of steps, at least one."
            raise InvalidArgument("num_inference_steps", num_inference_steps, remedy)
        if self._planner is not None:
            return self._planner.preview(scheduler, num_inference_steps, guidance_scale)
        fresh = type(scheduler).from_config(scheduler.config)
        fresh.set_timesteps(num_inference_steps)
        return self._plan(fresh, len(model_timesteps(fresh)), guidance_scale, self.guidance)[1]

    def stats(self) -> dict[str, Any]:
        """Counters since `compile`, and of the last call.

        Keys: ``runs``, ``failed_runs``, ``evaluations`` (all runs, per sample), ``refreshes``,
        ``fused_steps``, ``last_nfe``, ``last_rows``, ``last_extras`` (calls for guidance of another
        kind, in ``last_nfe``), ``fallbacks`` (reason -> runs), ``drift`` (row -> relative errors of
        the reused delta), ``graphs`` (see `Engine.stats`).
        """
        reasons = {
            key.removeprefix("fallback: "): count
            for key, count in self._counts.items()
            if key.startswith("fallback: ")
        }
        names = ("runs", "failed_runs", "evaluations", "refreshes", "fused_steps")
        last = self._last
        return {
            **{name: self._counts[name] for name in names},
            "last_nfe": 0 if last is None else last.nfe,
            "last_rows": 0 if last is None else last.calls,
            "last_extras": 0 if last is None else last.extras,
            "fallbacks": reasons,
            "drift": {row: list(found) for row, found in self._drift.found.items()},
            "graphs": self._graphs.report(),
        }

    def report(self) -> str:
        """What runs, how, and what does not with its reason; readable text."""
        if self.inactive:
            return f"thg_engine: not active, {self.inactive}."
        lines = [guidance_line(self.guidance), *(f"  {note}" for note in self.notes)]
        planned = self._planner is not None
        if planned:
            lines = ["thg_engine: calibrated plans, one for each call"]
        run, record = self._last, self.record
        if run is None or record is None:
            lines += plan_lines(self.plan)
        else:
            lines += call_lines(run, record, planned)
        if self._planner is not None:
            lines += self._planner.lines(why_unfused(run, self.settings))
        lines += ["  guidance hook: on", step_line(run, self.settings)]
        lines += [graph_line(self._graphs.report(), self.settings)]
        lines += self._drift.lines(record is not None and not record.calls)
        lines += [*tuning_lines(self.settings), *switch_lines()]
        fallbacks = self.stats()["fallbacks"]
        lines += [f"  full guidance in {n} call(s): {why}" for why, n in fallbacks.items()]
        return "\n".join(lines)

    def call(
        self, original: Callable[..., Any], pipe: Any, args: Arguments, kwargs: dict[str, Any]
    ) -> Any:
        """A call of the pipeline under the plan."""
        with self.running(pipe) as run:
            run.arguments = call_arguments(original, pipe, args, kwargs)
            args, kwargs = watch_callback(original, pipe, args, kwargs, run)
            return original(pipe, *args, **kwargs)

    @contextmanager
    def running(self, pipe: Any) -> Iterator[PipelineRun]:
        """Everything one call needs, undone however the call ends."""
        if self.record is None:
            raise ThgError(f"{type(pipe).__name__} is left alone; compile it again.")
        self._follow(pipe, self.record)
        run = self._begin(pipe, self.record)
        token = hook.activate(run)
        with self._lock:
            self._counts["runs"] += 1
        # Rows of one call per branch end with the step, whoever takes it.
        steps = self.settings.fused is not False or self.record.calls
        try:
            with ExitStack() as stack:
                if self._planner is not None:
                    asked = (lambda: self._scale(run)), (lambda: has_own_grid(run.arguments))
                    stack.enter_context(self._planner.driving(pipe, *asked))
                if steps:
                    stack.enter_context(stepping(pipe.scheduler))
                yield run
        except BaseException as error:
            run.error = type(error).__name__
            with self._lock:
                self._counts["failed_runs"] += 1
            raise
        finally:
            hook.deactivate(token)
            run.finish()
            self._count(run)

    def _begin(self, pipe: Any, record: AdapterRecord) -> PipelineRun:
        """The run of a call of ``pipe``."""
        run: PipelineRun
        networks = self.networks
        layout = None if record.calls else find_layout(networks.module)

        def graphs(index: int = 0) -> RunGraphs:
            state = processors(networks.denoisers)
            return RunGraphs(self._graphs, state, networks.denoisers, record, layout, index)

        wanted = self.settings.graph is not False
        if wanted and networks.is_wrapped:
            self._graphs.refuse(WRAPPED)
            wanted = False
        common: Any = (
            *(pipe, record, networks.denoisers, lambda full: self._plan_of_call(run, full)),
            None if self.settings.fused is False else lambda *args: self._fuse(run, *args),
        )
        if layout is None:
            run = CallsRun(*common, CallGraphs(self._graphs, graphs) if wanted else None)
        else:
            companions = networks.companions
            kept = graphs() if wanted else None
            run = BatchRun(*common, kept, layout=layout, companions=companions)
            run.drift = self._drift.begin()
        return run

    def _scale(self, run: PipelineRun) -> float:
        """w of a call in progress."""
        return scale_of(run.pipe, run.record, run.arguments)

    def _count(self, run: PipelineRun) -> None:
        with self._lock:
            self._last = run
            self._counts["fused_steps"] += run.fused_steps
            self._counts["evaluations"] += run.nfe
            self._counts["refreshes"] += run.refreshes
            self._drift.note(run.drift)
            self._counts.update(f"fallback: {reason}" for reason in run.fallbacks)

    def apart(self, pipe: Any) -> AbstractContextManager[Any]:
        """``pipe`` for one call, or a twin of it while another call is in progress."""
        return self._twins.one(pipe)

    def tune(self) -> None:
        """Make the changes of the denoisers that were asked for."""
        settings = self.settings
        try:
            for module in self.networks.denoisers:
                self._undo_tuning.append(tune(module, settings.denoiser, settings.attention))
        except BaseException:
            self.undo_tuning()
            raise

    def undo_tuning(self) -> None:
        """Take them back, and drop what was captured."""
        self._graphs.flush()
        while self._undo_tuning:
            self._undo_tuning.pop()()

    def release(self, pipe: Any) -> None:
        """Undo all that has been changed of the networks of ``pipe``."""
        for module in self.networks.hooked:
            hook.detach(module, self)
        self.undo_tuning()

    @contextmanager
    def aside(self, pipe: Any) -> Iterator[None]:
        """The networks of ``pipe`` without hooks, for copies."""
        removed = [(module, hook.remove(module)) for module in self.networks.hooked]
        try:
            yield
        finally:
            for module, owners in removed:
                hook.restore(module, owners)

    def attach(self) -> None:
        """Put the guidance hook on every network."""
        for module in self.networks.hooked:
            hook.attach(module, self)

    def _follow(self, pipe: Any, record: AdapterRecord) -> None:
        """Move the hook when the user has given the pipeline other networks."""
        networks = Networks.of(pipe, record)
        reason = networks.why_not(pipe, record)
        if reason:
            raise ThgError(f"{reason}; compile the pipeline again, or uncompile it.")
        before, self.networks = self.networks, networks
        if any(a is not b for a, b in zip_longest(before.denoisers, networks.denoisers)):
            self._resolve()
            self.undo_tuning()
            self.tune()
        for module in before.hooked:
            if not any(module is kept for kept in networks.hooked):
                hook.detach(module, self)
        self.attach()

    def _plan_of_call(
        self, run: PipelineRun, full: bool
    ) -> tuple[tuple[GuidanceRow, ...], SamplingPlan]:
        """Rows and plan of the call in progress: the timesteps are set, truncation is known."""
        scale = scale_of(run.pipe, run.record, run.arguments)
        rows = num_rows_of(run.pipe, run.arguments)
        scheduler: Any = run.pipe.scheduler
        if isinstance(scheduler, PlanScheduler):
            planned: tuple[tuple[GuidanceRow, ...], SamplingPlan]
            planned = scheduler.rows_and_plan(scale, rows, full)
            return planned
        return self._plan(run.pipe.scheduler, rows, scale, CFG() if full else self.guidance)

    def _fuse(
        self,
        run: PipelineRun,
        rows: tuple[GuidanceRow, ...],
        step_kwargs: dict[str, Any],
        sample: Tensor,
    ) -> FusedPlan | str:
        """The call's plan with solver columns, or why it has none; runs from ``sample``."""
        scale = self._scale(run)
        scheduler: Any = run.pipe.scheduler
        if isinstance(scheduler, PlanScheduler):
            fitted: FusedPlan = scheduler.fused(scale)
            return fitted
        full = all(row.evaluates_both and row.boost == 1.0 for row in rows)
        if full and self.settings.fused is None:
            return "full guidance leaves the scheduler alone, so that images are bit-identical"
        wide = sample.dtype is torch.float64
        is_slow = choose_backend(sample.device, wide) == "reference" and not wide
        if is_slow and self.settings.fused is None:
            return f"no backend for {sample.device.type} is ready (thg-engine doctor says why)"
        name = "none" if self.guidance is None else self.guidance.name
        return fused_plan(
            run.pipe.scheduler,
            num_rows_of(run.pipe, run.arguments),
            ChosenRows(name, rows),
            scale,
            step_kwargs,
        )

    def _plan(
        self, scheduler: Any, num_rows: int, guidance_scale: float, guidance: Guidance | None
    ) -> tuple[tuple[GuidanceRow, ...], SamplingPlan]:
        if guidance is None:
            raise ThgError(f"there is no plan: {self.inactive}.")
        # img2img and inpainting run the last rows only.
        timesteps = [float(t) for t in model_timesteps(scheduler)][-num_rows:]
        lambdas, notes = noise_levels(scheduler, num_rows)
        branches = 2 if self.record is None else self.record.branches
        guidance, more = in_branches(guidance, num_rows, branches)
        notes = (*notes, *more)
        rows = guidance_rows(guidance, lambdas, guidance_scale)
        if isinstance(guidance, CFG):  # whatever the scale: its images are the plain pipeline's
            rows = (FRESH,) * num_rows
        name = type(scheduler).__name__
        plan = plan_from_timesteps(timesteps, lambdas, guidance, guidance_scale, name, notes)
        return rows, plan
