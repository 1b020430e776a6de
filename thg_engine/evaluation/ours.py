"""What this package proposes: extrapolated deltas, and plans chosen from a measured front.

`front_methods` is the place where calibrated plans enter: it turns a front of
`thg_engine.calibrate_plans` into points, one per budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from ..guidance import THG
from .baselines import solvers
from .box import Box
from .methods import Method, guided
from .prompts import selection_prompts
from .settings import SELECTION_SEED, Settings

PLAN_SOLVER, PLAN_STEPS = "dpmpp2m", 50
"""The call that a chosen plan replaces, and with which its images are compared."""


def our_methods(
    box: Box, scale: float, settings: Settings, say: Callable[[str], None]
) -> Iterator[Method]:
    """Every point of ours at this scale."""
    for solver in solvers(box, settings):
        for num_steps in settings.reuse_steps:
            for every in (2, 3):
                change = guided(THG(grid=every, reuse="linear"))
                yield Method(f"THG, linear, every {every}", solver, num_steps, change, ours=True)
    front = chosen_front(box, scale, settings, say)
    if front is not None:
        yield from front_methods(front, settings.budgets)


def chosen_front(
    box: Box, scale: float, settings: Settings, say: Callable[[str], None]
) -> Any | None:
    """The front of calibrated plans, fitted on selection prompts and noise; None without."""
    import thg_engine

    calibrate_plans = getattr(thg_engine, "calibrate_plans", None)
    if calibrate_plans is None:
        say(f"{box.name}: left out: calibrated plans: this version has no calibrate_plans")
        return None
    prompts = selection_prompts(settings.selection_prompts)
    with box.as_before():
        return calibrate_plans(box.pipe, prompts, guidance_scales=(scale,), seed=SELECTION_SEED)


def front_methods(front: Any, budgets: Sequence[int]) -> Iterator[Method]:
    """A point per budget: ``thg_engine.compile(pipe, calibration=front, nfe=budget)``."""
    for budget in budgets:
        name = f"calibrated plan, {budget} NFE"
        yield Method(name, PLAN_SOLVER, PLAN_STEPS, _planned(front, budget), ours=True)


def _planned(front: Any, budget: int) -> Callable[[Box, int], AbstractContextManager[None]]:
    def change(box: Box, _num_steps: int) -> AbstractContextManager[None]:
        from .. import compile

        compile(box.pipe, calibration=front, nfe=budget)
        return nullcontext()

    return change
