"""From what a user wants to a plan of the front: the cheapest that does it, and its neighbours."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import InvalidArgument
from ..guidance import resolve_nfe
from .front import PlanEntry, PlanFront

ALIASES = {"dpmpp2m": "dpm++2m", "dpm-solver++": "dpm++2m", "dpm++": "dpm++2m"}
SLACK = 1e-6
"""Share by which a plan may exceed a budget: rounding."""


@dataclass(frozen=True)
class Target:
    """What `compile` was asked for; exactly one of four.

    Attributes:
        speedup: over full guidance with the pipeline's own number of steps, in time.
        nfe: evaluations per sample: a count, or a share of full guidance.
        seconds: of all denoiser calls of one image.
        match: "solver@steps", an ordinary solver under full guidance whose error is to be met.
    """

    speedup: float | None = None
    nfe: int | float | None = None
    seconds: float | None = None
    match: str | None = None

    def __post_init__(self) -> None:
        names = ("speedup", "nfe", "seconds", "match")
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            value = ", ".join(given) or None
            raise InvalidArgument("target", value, f"give exactly one of {', '.join(names)}.")
        for name in ("speedup", "seconds"):
            value = getattr(self, name)
            if value is None:
                continue
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (number and 0 < value < math.inf):
                raise InvalidArgument(name, value, "give a positive number.")
        if self.nfe is not None:
            resolve_nfe(self.nfe, 2**30)
        if self.match is not None:
            parse_match(self.match)

    def __str__(self) -> str:
        names = ("speedup", "nfe", "seconds", "match")
        return next(f"{n}={getattr(self, n)!r}" for n in names if getattr(self, n) is not None)


def parse_match(text: object) -> tuple[str, int]:
    """(solver, N) of "solver@N"."""
    remedy = 'name a solver and its steps, e.g. "dpm++2m@50".'
    if not isinstance(text, str):
        raise InvalidArgument("match", text, remedy)
    solver, _, steps = text.partition("@")
    if not solver or not steps.isdecimal() or int(steps) < 1:
        raise InvalidArgument("match", text, remedy)
    return ALIASES.get(solver.lower(), solver.lower()), int(steps)


@dataclass(frozen=True)
class Choice:
    """A plan of the front, and why.

    Attributes:
        entry: the plan.
        guidance_scale: w it was chosen for.
        error: expected relative error to the converged solution.
        speedup: expected, over full guidance with the pipeline's own number of steps.
        unmet: in which respect the target is missed; "" where it is not.
        neighbours: plans of the front next to it, cheaper and dearer.
    """

    entry: PlanEntry
    guidance_scale: float
    error: float
    speedup: float
    unmet: str
    neighbours: tuple[PlanEntry, ...]


def choose(
    front: PlanFront,
    target: Target,
    guidance_scale: float,
    num_steps: int,
    seconds: tuple[float, float],
) -> Choice:
    """The plan of ``front`` for ``target``.

    Args:
        front: what there is.
        target: what is wanted.
        guidance_scale: w of the call.
        num_steps: N that the call asks for; speed-ups and shares refer to its full guidance.
        seconds: (one branch, both branches) of a denoiser call, as measured here.
    """
    c2 = seconds[1] / seconds[0]
    # Where evaluations are counted, a plan that time rules out may be the best.
    plans = front.pareto(guidance_scale, c2 if target.nfe is None else 2.0)
    if target.match is not None:
        entry, unmet = _matching(front, plans, target.match, guidance_scale)
    else:
        entry, unmet = _affordable(plans, target, num_steps, seconds)
    at = plans.index(entry)
    neighbours = (*plans[max(at - 1, 0) : at], *plans[at + 1 : at + 2])
    full = num_steps * c2
    error = entry.error_at(guidance_scale)
    return Choice(entry, guidance_scale, error, full / entry.cost(c2), unmet, neighbours)


def _affordable(
    plans: tuple[PlanEntry, ...], target: Target, num_steps: int, seconds: tuple[float, float]
) -> tuple[PlanEntry, str]:
    """The most accurate plan within the budget; the cheapest of all where none is."""
    c2 = seconds[1] / seconds[0]
    if target.nfe is not None:
        budget = float(resolve_nfe(target.nfe, 2**30 if isinstance(target.nfe, int) else num_steps))
        costs = {entry: float(entry.nfe) for entry in plans}
    else:
        costs = {entry: entry.cost(c2) for entry in plans}
        budget = num_steps * c2 / target.speedup if target.speedup else 0.0
        if target.seconds is not None:
            budget = target.seconds / seconds[0]
    within = [entry for entry in plans if costs[entry] <= budget * (1 + SLACK)]
    if within:
        return within[-1], ""
    cheapest = min(plans, key=costs.__getitem__)
    if target.nfe is not None:
        least = f"the cheapest plan takes {cheapest.nfe} evaluations, budget {budget:g}"
    elif target.speedup is not None:
        least = f"the fastest plan gives {num_steps * c2 / costs[cheapest]:.4g}x"
    else:
        least = f"the fastest plan takes {costs[cheapest] * seconds[0]:.3g} s a sample"
    return cheapest, f"{target} is out of reach: {least}"


def _matching(
    front: PlanFront, plans: tuple[PlanEntry, ...], match: str, guidance_scale: float
) -> tuple[PlanEntry, str]:
    """The cheapest plan as accurate as an ordinary solver; the most accurate where none is."""
    wanted = stock_error(front, match, guidance_scale)
    for entry in plans:
        if entry.error_at(guidance_scale) <= wanted * (1 + SLACK):
            return entry, ""
    factor = plans[-1].error_at(guidance_scale) / wanted
    return plans[-1], f"the most accurate plan has {factor:.2f} times the error of {match}"


def stock_error(front: PlanFront, match: str, guidance_scale: float) -> float:
    """Error of an ordinary solver, between measured numbers of steps by powers of N.

    Raises:
        InvalidArgument: a solver that was not measured, or steps beyond those that were.
    """
    solver, num_steps = parse_match(match)
    known = [e for e in front.stock if e.solver == solver]
    if not known:
        names = ", ".join(sorted({entry.solver for entry in front.stock})) or "none"
        raise InvalidArgument("match", match, f"measured in this calibration: {names}.")
    scales = sorted({entry.guidance_scale for entry in known})
    nearest = min(scales, key=lambda scale: abs(scale - guidance_scale))
    rows = sorted((e.num_steps, e.error) for e in known if e.guidance_scale == nearest)
    if not rows[0][0] <= num_steps <= rows[-1][0]:
        remedy = f"{solver} was measured with {rows[0][0]} to {rows[-1][0]} steps."
        raise InvalidArgument("match", match, remedy)
    above = next(i for i, (n, _) in enumerate(rows) if n >= num_steps)
    (n1, e1), (n0, e0) = rows[above], rows[max(above - 1, 0)]
    share = 0.0 if n1 == n0 else math.log(num_steps / n0) / math.log(n1 / n0)
    return math.exp((1 - share) * math.log(e0) + share * math.log(e1)) if share else e1
