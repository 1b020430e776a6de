"""What the user asked `compile` for."""

from __future__ import annotations

from dataclasses import dataclass

from ...curves import Calibration
from ...fitting.choose import Target
from ...fitting.front import PlanFront
from ...guidance import Guidance
from ...plan import SamplingPlan

KILL_SWITCH = "THG_DISABLE"
"""Set to 1 in the environment, it makes every call the plain pipeline's."""


@dataclass(frozen=True)
class Settings:
    """Arguments of `compile`; enough to compile a copy the same way."""

    guidance: Guidance | SamplingPlan | str = "auto"
    calibration: Calibration | None = None
    nfe: int | float | None = None
    fused: bool | None = None
    graph: bool | None = None
    denoiser: str | None = None
    attention: str | None = None
    front: PlanFront | None = None
    target: Target | None = None
    drift: int | None = None
