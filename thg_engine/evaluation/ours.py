"""What this package proposes: extrapolated and fitted deltas, and plans chosen from a front."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from ..guidance import THG
from .baselines import solvers
from .box import Box
from .methods import Change, Method, guided
from .prompts import selection_prompts
from .settings import SELECTION_SEED, Settings
from .solvers import build

if TYPE_CHECKING:
    from ..fitting.front import PlanFront
    from ..fitting.reuse import FittedReuse

Say = Callable[[str], None]

PLAN_SOLVER, PLAN_STEPS = "dpmpp2m", 50
"""The call that a chosen plan replaces, and with which its images are compared."""
COARSE = ("every 2", "every 3", "70%")
"""Coarse grids whose deltas are extrapolated and fitted; the last within 70 % of full guidance."""


def coarse_grid(name: str, num_steps: int) -> tuple[int, ...]:
    """Rows, evenly spread, that evaluate both branches."""
    count = max(1, int(0.4 * num_steps)) if name == "70%" else -(-num_steps // int(name[-1]))
    return tuple(i * num_steps // count for i in range(count))


def our_methods(
    box: Box, settings: Settings, folder: Path, say: Say, progress: bool = True
) -> Iterator[Method]:
    """Every point of ours; the guidance scale is the call's."""
    for solver in solvers(box, settings):
        for num_steps in settings.reuse_steps:
            for name in COARSE:
                point, grid = (solver, num_steps), coarse_grid(name, num_steps)
                linear = guided(THG(grid=grid, reuse="linear"))
                yield Method(f"THG, linear, {name}", *point, linear, ours=True)
                fitted = fitted_reuse(box, settings, folder, point, name, progress)
                weighed = guided(THG(reuse=fitted))
                yield Method(f"THG, least squares, {name}", *point, weighed, ours=True)
    front = chosen_front(box, settings, folder, say, progress)
    for budget in settings.budgets:
        change = _planned(front, budget)
        yield Method("calibrated plan", PLAN_SOLVER, PLAN_STEPS, change, ours=True, budget=budget)


def fitted_reuse(
    box: Box,
    settings: Settings,
    folder: Path,
    point: tuple[str, int],
    coarse: str,
    progress: bool = False,
) -> FittedReuse:
    """Weights of held deltas for one (solver, N) and grid, fitted on selection prompts and noise.

    Like plans, fitted once and kept in ``folder``, so that a run that goes on measures the same.
    """
    from .. import fit_reuse
    from ..fitting.reuse import FittedReuse

    solver, num_steps = point
    grid = "70-percent" if coarse == "70%" else coarse.replace(" ", "-")
    path = folder / f"reuse-{box.name}-{solver}-{num_steps}-{grid}.json"
    if path.exists():
        return FittedReuse.load(path)
    with box.as_before():
        box.pipe.scheduler = build(box.family, solver, box.pipe.scheduler.config)
        found = fit_reuse(
            box.pipe,
            selection_prompts(settings.selection_prompts),
            guidance=THG(grid=coarse_grid(coarse, num_steps)),
            num_inference_steps=num_steps,
            guidance_scales=_scales(settings),
            batch_size=settings.selection_prompts,
            seed=SELECTION_SEED,
            progress=progress,
            **box.options,
        )
    found.save(path)
    return found


def chosen_front(
    box: Box, settings: Settings, folder: Path, say: Say, progress: bool = False
) -> PlanFront:
    """Calibrated plans: those that ship with the pipeline, else fitted on the selection prompts.

    Shipped plans were fitted on selection prompts and noise, too (``training/fit_plans.py``).
    """
    from .. import calibrate_plans
    from ..fitting.front import PlanFront
    from ..fitting.shipped import shipped_front
    from ..integrations.diffusers.resolve import fingerprint

    path = folder / f"plans-{box.name}.json"
    if path.exists():
        return PlanFront.load(path)
    scales = _scales(settings)
    front = shipped_front(fingerprint(box.denoiser))
    if front is not None and all(front.plans[0].covers(scale) for scale in scales):
        say(f"{box.name}: calibrated plans: those in the box, of {front.date}")
    else:
        with box.as_before():
            front = calibrate_plans(
                box.pipe,
                selection_prompts(settings.selection_prompts),
                guidance_scales=scales,
                budgets=settings.budgets,
                seed=SELECTION_SEED,
                work_dir=folder / "calibration",
                progress=progress,
                **box.options,
            )
    front.save(path)
    return front


def _scales(settings: Settings) -> list[float]:
    """All w of an evaluation, the largest first: grids are made for it, where errors are."""
    quality = settings.quality_scales if settings.quality_images else ()
    return sorted({*settings.guidance_scales, *quality}, reverse=True)


def _planned(front: PlanFront, budget: int) -> Change:
    def change(box: Box, _num_steps: int) -> AbstractContextManager[None]:
        from .. import compile

        compile(box.pipe, calibration=front, nfe=budget)
        return nullcontext()

    return change
