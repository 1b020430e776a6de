"""diffusers pipelines: `compile`, `uncompile`, `calibrate`; the guider `TortoiseHareGuidance`."""

from .calibrate import calibrate
from .compiled import compile, uncompile
from .guider import TortoiseHareGuidance

__all__ = ["TortoiseHareGuidance", "calibrate", "compile", "uncompile"]
