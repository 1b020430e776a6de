"""diffusers pipelines: compiling them, calibrating them, and the guider."""

from .calibrate import calibrate
from .calibrate_plans import calibrate_plans
from .calibrate_reuse import fit_reuse
from .compiled import compile, uncompile
from .guider import TortoiseHareGuidance

__all__ = [
    "TortoiseHareGuidance",
    "calibrate",
    "calibrate_plans",
    "compile",
    "fit_reuse",
    "uncompile",
]
