"""What this package proposes: extrapolated deltas, and plans chosen from a measured front.

`front_methods` is the place where calibrated plans enter: it turns a front of
`thg_engine.calibrate_plans` into points, one per budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from ..guidance import THG
from .baselines import solvers
from .box import Box
from .methods import Change, Method, guided
from .prompts import selection_prompts
from .settings import SELECTION_SEED, Settings

Say = Callable[[str], None]

PLAN_SOLVER, PLAN_STEPS = "dpmpp2m", 50
"""The call that a chosen plan replaces, and with which its images are compared."""


def our_methods(box: Box, settings: Settings, folder: Path, say: Say) -> Iterator[Method]:
    """Every point of ours; the guidance scale is the call's."""
    for solver in solvers(box, settings):
        for num_steps in settings.reuse_steps:
            for every in (2, 3):
                change = guided(THG(grid=every, reuse="linear"))
                yield Method(f"THG, linear, every {every}", solver, num_steps, change, ours=True)
    front = chosen_front(box, settings, folder, say)
    if front is not None:
        yield from front_methods(front, settings.budgets)


def chosen_front(box: Box, settings: Settings, folder: Path, say: Say) -> Path | None:
    """The file of calibrated plans, fitted for all scales on selection prompts and noise.

    Fitted once and kept in ``folder``, so that a run that goes on measures the same plans.

    Returns:
        None where there are none; ``say`` is told why.
    """
    import thg_engine

    calibrate_plans = getattr(thg_engine, "calibrate_plans", None)
    if calibrate_plans is None:
        say(f"{box.name}: left out: calibrated plans: this version has no calibrate_plans")
        return None
    path = folder / f"plans-{box.name}.json"
    if not path.exists():
        prompts = selection_prompts(settings.selection_prompts)
        # The largest first: grids are chosen there, where errors are largest.
        scales = sorted({*settings.guidance_scales, *settings.quality_scales}, reverse=True)
        with box.as_before():
            front = calibrate_plans(
                box.pipe,
                prompts,
                guidance_scales=scales,
                budgets=settings.budgets,
                seed=SELECTION_SEED,
                work_dir=folder / "calibration",
                **box.options,
            )
        front.save(path)
    return path


def front_methods(front: Any, budgets: Sequence[int]) -> Iterator[Method]:
    """A point per budget: ``thg_engine.compile(pipe, calibration=front, nfe=budget)``."""
    for budget in budgets:
        name = f"calibrated plan, {budget} NFE"
        yield Method(name, PLAN_SOLVER, PLAN_STEPS, _planned(front, budget), ours=True)


def _planned(front: Any, budget: int) -> Change:
    def change(box: Box, _num_steps: int) -> AbstractContextManager[None]:
        from .. import compile

        compile(box.pipe, calibration=front, nfe=budget)
        return nullcontext()

    return change
