"""diffusers pipelines: `compile`, `uncompile` and `calibrate`."""

from .calibrate import calibrate
from .compiled import compile, uncompile

__all__ = ["calibrate", "compile", "uncompile"]
