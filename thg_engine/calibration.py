r"""Algorithm 3: the local error constants of tortoise and hare, by Richardson's comparison.

At every fine step of the fully guided trajectory, one solver step t_i -> t_{i+1} is compared with
two half steps through t_m = (t_i + t_{i+1}) / 2, for the conditional state x^T and the guidance
state x^H apart. The norms of the differences, averaged over prompts, are the curves c_T and c_H.

Source: Tortoise and Hare Guidance, arXiv 2511.04117, section 3.3 and algorithm 3.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from .checks import check_inputs
from .curves import Calibration
from .engine import Engine
from .errors import InvalidArgument
from .grid import LAMBDA_BOUND
from .schedule import NoiseSchedule, Point
from .solvers import Solver, get_solver
from .step_buffers import Conditioning

FLOOR = 1e-12
"""Smallest error norm kept: a curve must stay positive to have a ratio."""

Batch = tuple[Tensor, Conditioning, Conditioning]
"""(x_T, cond, uncond) of some prompts, batch first."""


@dataclass
class _State:
    """One of the two ODEs: its state and the history its solver reads, newest first."""

    state: Tensor
    outputs: list[Tensor]
    states: list[Tensor]

    @classmethod
    def start(cls, state: Tensor) -> _State:
        return cls(state, [], [])

    def stepped(
        self, solver: Solver, history: Sequence[Point], target: Point, kind: str, output: Tensor
    ) -> _State:
        """The state at ``target`` when ``output`` is the model output at ``history[0]``."""
        outputs = [output, *self.outputs][: solver.order]
        states = [self.state, *self.states][: solver.order]
        step = solver.weights(history, target, kind)
        total = torch.zeros_like(self.state)
        for weight, value in zip(step.sample, states, strict=False):
            total = total + weight * value
        for weight, value in zip(step.output, outputs, strict=False):
            total = total + weight * value
        return _State(total, outputs, states)


_States = tuple[_State, _State]
"""Tortoise and hare."""


def fine_points(schedule: NoiseSchedule, timesteps: Sequence[float]) -> tuple[Point, ...]:
    """Points of a fine grid: distinct ``timesteps`` from noise to data, then the schedule's end.

    That end is t = 0, or T where time runs backwards; kind ``edm`` has none and stops at the last.
    """
    ends = {float(schedule.num_train_timesteps)} if schedule.reverse else {0.0}
    distinct = {float(t) for t in timesteps} | (set() if schedule.kind == "edm" else ends)
    return tuple(sorted(map(schedule.point, distinct), key=lambda point: point.lambda_t))


def local_errors(
    engine: Engine,
    schedule: NoiseSchedule,
    points: Sequence[Point],
    batch: Batch,
    guidance_scale: float,
    solver: Solver,
    prediction_type: str,
    on_step: Callable[[], None] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """Error norms of one batch: two tensors of shape ``(N, B)``, float64, tortoise and hare.

    Costs 4 evaluations per step and sample. ``on_step`` is called after each of the N steps.
    """
    check_inputs(*batch)
    x_T = batch[0].detach().to(engine.register_dtype)
    states = (_State.start(x_T), _State.start(torch.zeros_like(x_T)))
    norms: list[Tensor] = []
    for i, (cur, nxt) in enumerate(pairwise(points)):
        past = [points[i - k] for k in range(min(solver.order, i + 1))]
        middle = schedule.point(0.5 * (cur.timestep + nxt.timestep))
        outputs = _outputs(engine, states, cur, batch, guidance_scale)
        whole = _step_both(solver, states, past, nxt, prediction_type, outputs)
        half = _step_both(solver, states, past, middle, prediction_type, outputs)
        outputs = _outputs(engine, half, middle, batch, guidance_scale)
        halves = [middle, cur][: solver.order]
        fine = _step_both(solver, half, halves, nxt, prediction_type, outputs)
        gaps = [one.state - two.state for one, two in zip(whole, fine, strict=True)]
        norms.append(torch.stack([gap.flatten(1).norm(dim=1).double().cpu() for gap in gaps]))
        states = whole
        on_step()
    tortoise, hare = torch.stack(norms, dim=1)
    return tortoise, hare


def _outputs(
    engine: Engine, states: _States, point: Point, batch: Batch, guidance_scale: float
) -> tuple[Tensor, Tensor]:
    """What drives tortoise and hare at ``point``: the conditional output and (w - 1) delta."""
    x_T, cond, uncond = batch
    x = (states[0].state + states[1].state).to(engine.model_dtype or x_T.dtype)
    out_cond, out_uncond = engine.evaluate_both(x, point.timestep, cond, uncond)
    wide = out_cond.to(engine.register_dtype)
    return wide, (guidance_scale - 1) * (wide - out_uncond.to(engine.register_dtype))


def _step_both(
    solver: Solver,
    states: _States,
    history: Sequence[Point],
    target: Point,
    kind: str,
    outputs: tuple[Tensor, Tensor],
) -> _States:
    """Tortoise and hare at ``target``."""
    tortoise, hare = states
    return (
        tortoise.stepped(solver, history, target, kind, outputs[0]),
        hare.stepped(solver, history, target, kind, outputs[1]),
    )


def calibrate_denoiser(
    engine: Engine,
    schedule: NoiseSchedule,
    timesteps: Sequence[float],
    batches: Iterable[Batch],
    *,
    guidance_scale: float,
    prediction_type: str = "epsilon",
    solver: str = "ddim",
    model: str = "",
    fingerprint: str = "",
    prompts: Sequence[str] = (),
    on_step: Callable[[], None] = lambda: None,
) -> Calibration:
    """Error curves of any denoiser.

    Args:
        engine: an `Engine` around the denoiser.
        schedule: noise schedule in which the samples live; gives the midpoints.
        timesteps: the fine grid, from noise to data, without its end.
        batches: initial noise and conditioning, a few prompts each.
        guidance_scale: w > 1 of the trajectories; divided out of the hare's curve.
        prediction_type: diffusers' string.
        solver: name in `SOLVERS`; its order is the p of Algorithm 2.
        model, fingerprint, prompts: recorded in the result.
        on_step: called after each of the N steps of each batch, for a progress bar.
    Raises:
        InvalidArgument: w <= 1, no timesteps, no batch, unknown solver, a batch that does not fit.
    """
    method = get_solver(solver)
    points = _checked_points(schedule, timesteps, guidance_scale)
    arguments = (guidance_scale, method, prediction_type, on_step)
    parts = [local_errors(engine, schedule, points, batch, *arguments) for batch in batches]
    if not parts:
        raise InvalidArgument("batches", batches, "give at least one batch of prompts.")
    about = {"model": model, "fingerprint": fingerprint, "prompts_sha256": _digest(prompts)}
    about["scheduler_family"] = f"{schedule.kind}/{prediction_type}"
    return _calibration(parts, points, method, guidance_scale, about)


def check_scale(guidance_scale: float) -> None:
    """Refuse a scale at which there is no hare."""
    if not 1 < guidance_scale < math.inf:
        remedy = "there is no hare to measure at w <= 1; use the scale you sample with."
        raise InvalidArgument("guidance_scale", guidance_scale, remedy)


def _checked_points(
    schedule: NoiseSchedule, timesteps: Sequence[float], guidance_scale: float
) -> tuple[Point, ...]:
    check_scale(guidance_scale)
    points = fine_points(schedule, timesteps)
    if len(points) < 2:
        raise InvalidArgument("timesteps", timesteps, "give the fine grid, from noise to data.")
    return points


def _calibration(
    parts: Sequence[tuple[Tensor, Tensor]],
    points: Sequence[Point],
    solver: Solver,
    guidance_scale: float,
    about: Mapping[str, str],
) -> Calibration:
    """Norms of all batches, averaged over their samples, as curves."""
    tortoise, hare = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    lambdas = [max(-LAMBDA_BOUND, min(LAMBDA_BOUND, p.lambda_t)) for p in points[:-1]]
    return Calibration(
        **about,
        solver=solver.name,
        order=solver.order,
        guidance_scale=float(guidance_scale),
        num_steps=len(points) - 1,
        num_prompts=tortoise.shape[1],
        date=datetime.date.today().isoformat(),
        lambdas=tuple(lambdas),
        tortoise=_curve(tortoise),
        hare=_curve(hare / (guidance_scale - 1)),
    )


def _curve(norms: Tensor) -> tuple[float, ...]:
    return tuple(max(FLOOR, value) for value in norms.mean(dim=1).tolist())


def merge(parts: Sequence[Calibration], prompts: Sequence[str]) -> Calibration:
    """One calibration from several of disjoint ``prompts``: norms averaged, weighted by prompts.

    Raises:
        InvalidArgument: nothing to merge, or curves that were not measured alike.
    """
    if not parts:
        raise InvalidArgument("parts", parts, "give at least one calibration.")
    first = parts[0]
    alike = ("fingerprint", "scheduler_family", "solver", "order", "guidance_scale", "lambdas")
    for part in parts[1:]:
        for name in alike:
            if getattr(part, name) != getattr(first, name):
                remedy = f"all must have the same {name}, {getattr(first, name)!r}."
                raise InvalidArgument("parts", getattr(part, name), remedy)
    total = sum(part.num_prompts for part in parts)

    def mean(name: str) -> tuple[float, ...]:
        curves = zip(*(getattr(part, name) for part in parts), strict=True)
        weights = [part.num_prompts / total for part in parts]
        return tuple(
            sum(w * value for w, value in zip(weights, values, strict=True)) for values in curves
        )

    return replace(
        first,
        num_prompts=total,
        prompts_sha256=_digest(prompts),
        tortoise=mean("tortoise"),
        hare=mean("hare"),
    )


def _digest(prompts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()
