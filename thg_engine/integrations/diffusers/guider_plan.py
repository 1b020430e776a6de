"""The plan of a guider's run: it sees a step number and a timestep, and a scheduler where told."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ...guidance import THG, UNGUIDED, Guidance, GuidanceRow
from ...lowering import guidance_rows, plan_from_timesteps
from ...plan import SamplingPlan
from ...schedule import model_timesteps
from .planning import ChosenRows, noise_levels

BY_NUMBER = "grid placed by step number"
NOT_FOLLOWED = f"the guider follows no scheduler, see TortoiseHareGuidance.follow: {BY_NUMBER}"


@dataclass(frozen=True)
class Window:
    """Steps in which a guider guides: ``first <= step < end``."""

    first: int
    end: int


@dataclass(frozen=True)
class Levels:
    """Where the steps of a run lie.

    Attributes:
        timesteps: of every step; step numbers where nobody knows them.
        lambdas: half log-SNR of every step.
        solver: name of the scheduler.
        notes: what is worth telling the user.
    """

    timesteps: tuple[float, ...]
    lambdas: tuple[float, ...]
    solver: str
    notes: tuple[str, ...]


def plan_run(
    guidance: Guidance, levels: Levels, window: Window, guidance_scale: float
) -> tuple[tuple[GuidanceRow, ...], SamplingPlan]:
    """Rows and plan of a run; the method has the steps inside the window to itself.

    A whole-number budget is that of the run: the steps outside cost one evaluation each.

    Args:
        guidance: the method.
        levels: of N steps.
        window: outside it the conditional branch runs alone.
        guidance_scale: w, the factor of c - u with which c + (w - 1) (c - u) is the output.
    Returns:
        N rows, and the plan that says so.
    Raises:
        InvalidArgument: the method has no rows for this number of steps.
    """
    first, end = window.first, window.end
    outside = len(levels.lambdas) - (end - first)
    if isinstance(guidance, THG) and isinstance(guidance.nfe, int) and outside:
        guidance = replace(guidance, nfe=guidance.nfe - outside)
    inside: tuple[GuidanceRow, ...] = ()
    if end > first:
        inside = tuple(guidance_rows(guidance, levels.lambdas[first:end], guidance_scale))
    rows = (*[UNGUIDED] * first, *inside, *[UNGUIDED] * (len(levels.lambdas) - end))
    chosen = ChosenRows(guidance.name, rows)
    plan = plan_from_timesteps(
        levels.timesteps, levels.lambdas, chosen, guidance_scale, levels.solver, levels.notes
    )
    return rows, plan


def find_levels(scheduler: Any, num_steps: int, step: int, timestep: Any) -> Levels:
    """Noise levels of the run that is at ``step`` and ``timestep``; reads one number of a device.

    Args:
        scheduler: its timesteps set; None where it is unknown.
        num_steps: N, as the loop says.
        step: number of the step at hand; 0 but for a guider that takes over during a run.
        timestep: of the step at hand, a tensor of one element or a number.
    Returns:
        The part of the scheduler's run that the loop visits: image-to-image takes the last steps,
        and where a step makes two model calls, loops count N steps and stop guiding after them.
    """
    if scheduler is None:
        return _by_number(num_steps, "unknown scheduler", NOT_FOLLOWED)
    name = type(scheduler).__name__
    try:
        timesteps = model_timesteps(scheduler).tolist()
    except (AttributeError, TypeError, ValueError):  # no timesteps yet, or another kind of object
        return _by_number(num_steps, name, f"{name} has no timesteps: {BY_NUMBER}")
    start = _offset(timesteps, num_steps, step, timestep)
    if start is None:
        return _by_number(num_steps, name, f"the loop does not run along {name}: {BY_NUMBER}")
    lambdas, notes = noise_levels(scheduler, len(timesteps))
    visited = slice(start, start + num_steps)
    return Levels(tuple(timesteps[visited]), tuple(lambdas[visited]), name, notes)


def _by_number(num_steps: int, solver: str, note: str) -> Levels:
    lambdas = tuple(-3.0 + 6.0 * i / num_steps for i in range(num_steps))
    return Levels(tuple(map(float, range(num_steps))), lambdas, solver, (note,))


def _offset(timesteps: Sequence[float], num_steps: int, step: int, timestep: Any) -> int | None:
    """The scheduler's index of the loop's step 0; None where the loop is not along it."""
    if isinstance(timestep, Tensor) and timestep.numel() != 1:
        return None
    here = float(timestep)
    for start in range(len(timesteps) - num_steps + 1):
        if step < num_steps and math.isclose(timesteps[start + step], here, rel_tol=1e-5):
            return start
    return None
