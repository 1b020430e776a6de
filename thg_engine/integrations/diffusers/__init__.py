"""diffusers pipelines: `compile`, `uncompile`, `calibrate`, `calibrate_plans`; the guider `TortoiseHareGuidance`."""

from .calibrate import calibrate
from .calibrate_plans import calibrate_plans
from .compiled import compile, uncompile
from .guider import TortoiseHareGuidance

__all__ = ["TortoiseHareGuidance", "calibrate", "calibrate_plans", "compile", "uncompile"]
