"""What an evaluation runs, checked before anything does."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..errors import InvalidArgument
from .solvers import check_steps

BOXES = ("sd", "flow")
SELECTION_SEED = 900_000
"""Of all noise that plans, calibrations and thresholds are chosen on; reports begin at `seed`."""


@dataclass(frozen=True)
class Settings:
    """The grid of an evaluation.

    Attributes:
        pipelines: boxed pipelines, of `BOXES`.
        guidance_scales: w of the work-precision curves.
        quality_scales: w of the quality scores.
        solver_steps: N of full guidance under every solver.
        main_steps: further N of the main solvers.
        reuse_steps: N of the methods that leave out evaluations.
        reuse_solvers: solvers under these methods.
        prompts: of the report, an image each per seed.
        selection_prompts: what plans are calibrated and chosen on; none is in the report.
        seeds: how many seeds of noise, at least 3.
        seed: the first of them.
        reference_steps: of the converged solution, DPM-Solver++ 2M.
        quality_images: per method and scale; 0 leaves quality out.
        quality_steps: N of the methods whose quality is scored.
        budgets: evaluations per image asked of plans chosen from a measured front.
        data: folder of Fashion-MNIST test files as the reference of quality; empty: none.
    """

    pipelines: tuple[str, ...] = BOXES
    guidance_scales: tuple[float, ...] = (2.0, 3.0, 5.0, 7.5)
    quality_scales: tuple[float, ...] = (2.0, 3.0, 5.0, 7.5)
    solver_steps: tuple[int, ...] = (8, 10, 20, 25, 40, 50)
    main_steps: tuple[int, ...] = (100, 200)
    reuse_steps: tuple[int, ...] = (10, 20, 25, 50)
    reuse_solvers: tuple[str, ...] = ("ddim", "dpmpp2m")
    prompts: int = 20
    selection_prompts: int = 16
    seeds: int = 5
    seed: int = 0
    reference_steps: int = 500
    quality_images: int = 480
    quality_steps: int = 25
    budgets: tuple[int, ...] = (16, 20, 24, 32, 40, 56, 80)
    data: str = ""

    def __post_init__(self) -> None:
        for name in BOXES:
            if self.pipelines.count(name) > 1:
                raise InvalidArgument("pipelines", self.pipelines, "name each once.")
        for name in self.pipelines:
            if name not in BOXES:
                raise InvalidArgument("pipelines", name, f"use one of {', '.join(BOXES)}.")
        least = {"prompts": 1, "selection_prompts": 6, "seeds": 3, "seed": 0, "quality_images": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise InvalidArgument(name, getattr(self, name), f"give at least {bound}.")
        if self.prompts > 40 or self.selection_prompts > 40:
            remedy = "the 80 prompts are split in halves: at most 40 for each of the two."
            raise InvalidArgument("prompts", max(self.prompts, self.selection_prompts), remedy)
        if self.seed + self.seeds > SELECTION_SEED:
            remedy = f"seeds from {SELECTION_SEED} are for choosing plans."
            raise InvalidArgument("seed", self.seed, remedy)
        if self.quality_images and self.quality_images < 8:
            raise InvalidArgument("quality_images", self.quality_images, "give 0 or at least 8.")
        self._check_scales_and_steps()

    def _check_scales_and_steps(self) -> None:
        for name in ("guidance_scales", "quality_scales"):
            for scale in getattr(self, name):
                if not 1 < scale < float("inf"):
                    remedy = "there is nothing to compare without guidance; use scales above 1."
                    raise InvalidArgument(name, scale, remedy)
        for name in ("solver_steps", "main_steps", "reuse_steps"):
            for steps in getattr(self, name):
                check_steps(name, steps)
        check_steps("quality_steps", self.quality_steps)
        check_steps("reference_steps", self.reference_steps)
        longest = max((*self.solver_steps, *self.main_steps, *self.reuse_steps), default=0)
        if self.reference_steps < 2 * longest:
            remedy = f"the reference takes at least twice the steps of what it judges ({longest})."
            raise InvalidArgument("reference_steps", self.reference_steps, remedy)

    def document(self) -> dict[str, Any]:
        """JSON-able, equal for equal settings."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


QUICK: dict[str, Any] = {
    "guidance_scales": (5.0,),
    "quality_scales": (2.0, 7.5),
    "solver_steps": (10, 20),
    "main_steps": (50,),
    "reuse_steps": (10, 20),
    "reuse_solvers": ("ddim",),
    "prompts": 4,
    "selection_prompts": 12,
    "seeds": 3,
    "reference_steps": 200,
    "quality_images": 32,
    "quality_steps": 10,
    "budgets": (20, 40),
}
"""What ``--quick`` changes."""
