"""Calls that run a calibrated plan: which one, on which scheduler, and what is said about it."""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ...doctor import machine_line
from ...errors import CalibrationError, InvalidArgument, UnsupportedPipeline, warn
from ...fitting.choose import Choice, Target, choose, stock_error
from ...fitting.front import PlanEntry, PlanFront
from ...fitting.reference import DATA
from ...fitting.shipped import shipped_front
from ...plan import SamplingPlan
from ...schedule import NoiseSchedule, Point, grid_points, prediction_type
from .adapters import find_record
from .captured import Captured, noise
from .plan_scheduler import PlannedCall, PlanScheduler
from .resolve import fingerprint

USUAL_STEPS, USUAL_SCALE = 50, 7.5
"""Of the call that a target is checked against before there is one."""
TIMED_CALLS = 5


def native_schedule(scheduler: Any) -> tuple[NoiseSchedule, str]:
    """Noise schedule and prediction type of the model behind a scheduler."""
    schedule = NoiseSchedule.from_scheduler(scheduler)
    if schedule.kind == "ve":
        # Karras' schedulers rescale the samples themselves; the model is the same VP model.
        schedule = NoiseSchedule.from_alphas_cumprod(scheduler.alphas_cumprod)
    return schedule, prediction_type(scheduler)


def end_of(scheduler: Any, schedule: NoiseSchedule) -> Point:
    """Where a pipeline's own scheduler ends: noise-free, or at the first training noise level."""
    if schedule.kind != "vp":
        return DATA
    copy = type(scheduler).from_config(scheduler.config)
    copy.set_timesteps(USUAL_STEPS)
    first = schedule.point(0.0)
    noisy = grid_points(copy)[-1].sigma_t > 0.0
    return Point(0.0, first.alpha_t, first.sigma_t) if noisy else DATA


def schedule_digest(schedule: NoiseSchedule) -> str:
    """Sixteen hex digits that identify a noise schedule, to float32 precision."""
    rounded = tuple(float(f"{value:.5g}") for value in schedule.log_snr)
    text = repr((schedule.kind, schedule.num_train_timesteps, rounded))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


DEFAULT_MATCH = "dpm++2m@50"


def target_of(front: PlanFront | None, guidance: Any, **wanted: Any) -> Target | None:
    """The target of `compile`; None where it is a matter of guidance alone.

    Raises:
        InvalidArgument: targets that need fitted plans without any, several, or a method besides.
    """
    given = {name: value for name, value in wanted.items() if value is not None}
    if front is None:
        for name in given.keys() - {"nfe"}:
            remedy = "it takes fitted plans: give calibration=, from `thg-engine calibrate --plans`"
            raise InvalidArgument(name, given[name], f"{remedy} or thg_engine.calibrate_plans.")
        return None
    if guidance != "auto":
        remedy = "fitted plans bring their own; leave guidance out, or calibration."
        raise InvalidArgument("guidance", getattr(guidance, "name", guidance), remedy)
    target = Target(**(given or {"match": DEFAULT_MATCH}))
    if target.match is not None:
        stock_error(front, target.match, _usual_scale(front))
    return target


def shipped_for(pipe: Any) -> PlanFront | None:
    """The front in the package for the architecture of ``pipe``."""
    record = find_record(type(pipe))
    module = None if record is None else getattr(pipe, record.denoiser, None)
    return None if module is None else shipped_front(fingerprint(module))


def check_drift(drift: object) -> None:
    """Refuse what is no number of calls."""
    if drift is None:
        return
    if isinstance(drift, bool) or not isinstance(drift, int) or drift < 1:
        raise InvalidArgument("drift", drift, "give a number of calls, at least 1, or None.")


@dataclass
class Planner:
    """Chooses the plan of each call of one compiled pipeline.

    Attributes:
        front: what was calibrated.
        target: what was asked for.
        seconds: (one branch, both branches) of a denoiser call per sample, here.
        measured: whether these were measured now, or are those of the calibration.
        choice: of the last call; before the first, for a usual one.
    """

    front: PlanFront
    target: Target
    seconds: tuple[float, float]
    measured: bool
    choice: Choice | None = None

    @classmethod
    def of(cls, pipe: Any, front: PlanFront, target: Target) -> Planner:
        """For ``pipe``; warns where the target cannot be met by a usual call.

        Raises:
            CalibrationError: the front is of another model or noise schedule.
            UnsupportedPipeline: guidance of a kind that plans are not fitted for.
        """
        captured = Captured.of(pipe)
        check_front(front, captured.module, pipe.scheduler)
        here = front.machine == machine_line()
        seconds = front.seconds if here else time_denoiser(captured)
        made = cls(front, target, seconds, not here)
        made.choice = made.choose(_usual_scale(front), USUAL_STEPS)
        if made.choice.unmet:
            warn(made.choice.unmet)
        return made

    def choose(self, guidance_scale: float, num_steps: int) -> Choice:
        """The plan of a call."""
        return choose(self.front, self.target, guidance_scale, num_steps, self.seconds)

    @contextmanager
    def driving(
        self, pipe: Any, scale: Callable[[], float], is_custom: Callable[[], bool]
    ) -> Iterator[PlanScheduler]:
        """``pipe`` with the plan's scheduler in place of its own.

        Args:
            pipe: the pipeline.
            scale: w of the call, once the pipeline knows it.
            is_custom: whether the caller has given timesteps or sigmas.
        """
        own = pipe.scheduler
        schedule, predicts = check_front(self.front, None, own)

        def planned(num_steps: int) -> PlannedCall:
            found = self.choose(scale(), num_steps)
            if found.unmet and (self.choice is None or found.unmet != self.choice.unmet):
                warn(found.unmet)
            self._warn_beyond(found)
            self.choice = found
            return PlannedCall(found, schedule, predicts)

        stand_in = PlanScheduler.beside(own, planned, is_custom)
        # Past the pipeline's own __setattr__, which would enter the stand-in into its config.
        vars(pipe)["scheduler"] = stand_in
        try:
            yield stand_in
        finally:
            if vars(pipe).get("scheduler") is stand_in:
                vars(pipe)["scheduler"] = own

    def _warn_beyond(self, found: Choice) -> None:
        """Say it, once in a row, where rows are not fitted to the scale of a guided call."""
        scale, before = found.guidance_scale, self.choice
        if (
            scale <= 1
            or found.entry.covers(scale)
            or (before is not None and before.guidance_scale == scale)
        ):
            return
        low, high = self.front.guidance_scales[0], self.front.guidance_scales[-1]
        message = f"w = {scale:g} lies outside the calibrated {low:g} to {high:g}"
        remedy = "rows that are not fitted run; calibrate with --guidance-scales"
        warn(f"{message}: {remedy} {scale:g} too")

    def preview(
        self, scheduler: Any, num_steps: int = USUAL_STEPS, guidance_scale: float | None = None
    ) -> SamplingPlan:
        """The plan of such a call; of one at the usual scale if none is given."""
        read = check_front(self.front, None, scheduler)
        scale = _usual_scale(self.front) if guidance_scale is None else guidance_scale
        call = PlannedCall(self.choose(scale, num_steps), *read)
        return call.plan

    def lines(self, unfused: str = "") -> list[str]:
        """The choice and its neighbours, for the report; why the fused step did not run, if so."""
        choice = self.choice
        if choice is None:
            return []
        c2 = self.seconds[1] / self.seconds[0]
        size = "x".join(map(str, self.front.shape))
        # Sizes that the calibration was told are known to it alone.
        origin = "measured here" if self.measured else f"of the calibration, one sample of {size}"
        fitted = not unfused
        scales = ", ".join(f"{scale:g}" for scale in self.front.guidance_scales)
        lines = [
            f"  plan for {self.target}: {self._line(choice.entry, choice, fitted)}",
            *(f"  beside it: {self._line(entry, choice, fitted)}" for entry in choice.neighbours),
            f"  calibrated {self.front.date} at w = {scales}",
            f"  both branches cost c2 = {c2:.2f} times one ({origin})",
        ]
        if not choice.entry.covers(choice.guidance_scale):
            nearest = choice.entry.nearest(choice.guidance_scale)
            message = f"  w = {choice.guidance_scale:g} was not calibrated: rows are not fitted"
            lines.append(f"{message}; errors are those of unfitted rows at w = {nearest:g}")
        elif unfused:
            lines.append(f"  fitted rows take the fused step ({unfused}): base rows")
        if self.target.match is not None:
            matched = stock_error(self.front, self.target.match, choice.guidance_scale)
            lines.append(f"  {self.target.match}: error {100 * matched:.2f} %")
        return [*lines, f"  target missed: {choice.unmet}"] if choice.unmet else lines

    def _line(self, entry: PlanEntry, choice: Choice, fitted: bool) -> str:
        c2 = self.seconds[1] / self.seconds[0]
        error = 100 * entry.error_at(choice.guidance_scale, fitted)
        speedup = choice.speedup * choice.entry.cost(c2) / entry.cost(c2)
        seconds = entry.cost(c2) * self.seconds[0]
        found = f"{entry.name}, NFE {entry.nfe}, error {error:.2f} %, {speedup:.2f}x"
        return f"{found}, {seconds:.3g} s a sample"


def _usual_scale(front: PlanFront) -> float:
    """The calibrated scale nearest to the one most calls have."""
    return min(front.guidance_scales, key=lambda scale: abs(scale - USUAL_SCALE))


def check_front(
    front: PlanFront, module: torch.nn.Module | None, scheduler: Any
) -> tuple[NoiseSchedule, str]:
    """Noise schedule and prediction type; refuses a front of others, or of another model."""
    remedy = "calibrate this model with `thg-engine calibrate --plans`"
    if module is not None and front.fingerprint not in ("", fingerprint(module)):
        message = f"the calibration is of {front.model!r}, another architecture"
        raise CalibrationError(f"{message}; {remedy}.")
    try:
        schedule, predicts = native_schedule(scheduler)
    except InvalidArgument as error:
        raise UnsupportedPipeline(f"{type(scheduler).__name__}: {error}") from error
    family = f"{schedule.kind}/{predicts}"
    if family != front.scheduler_family or schedule_digest(schedule) != front.schedule_digest:
        message = f"the calibration is of another noise schedule ({front.scheduler_family})"
        raise CalibrationError(f"{message} than the pipeline's ({family}); {remedy}.")
    return schedule, predicts


@torch.no_grad()
def time_denoiser(captured: Captured, batch: int = 1, **call: Any) -> tuple[float, float]:
    """Median seconds of a denoiser call per sample: (one branch, both branches).

    Args:
        captured: the denoiser.
        batch: samples at a time.
        call: further arguments of the pipeline's call, which may say how large they are.
    """
    shape, cond, uncond = captured.conditioning([""] * batch, "", USUAL_SCALE, **call)
    module, engine = captured.module, captured.engine()
    x = noise(shape, batch, 0, module).to(module.dtype)
    times: dict[str, list[float]] = {"one": [], "both": []}
    for i in range(TIMED_CALLS + 1):
        for name in times:
            begin = _now(x)
            if name == "one":
                engine.evaluate(x, 500.0, cond)
            else:
                engine.evaluate_both(x, 500.0, cond, uncond)
            if i:  # the first round warms up
                times[name].append((_now(x) - begin) / batch)
    return statistics.median(times["one"]), statistics.median(times["both"])


def _now(x: torch.Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter()
