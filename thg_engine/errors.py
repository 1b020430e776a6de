"""Typed errors: each names the argument, the value it had, and what to do instead; and warnings."""

from __future__ import annotations

import sys
import warnings

BETWEEN = (
    "thg_engine",
    "diffusers",
    "diffusers_modules",
    "torch",
    "accelerate",
    "peft",
    "contextlib",
)
"""Packages whose frames lie between a warning and the line that it is about."""


class ThgError(Exception):
    """Base class of every error that thg_engine raises on purpose."""


class InvalidArgument(ThgError, ValueError):
    """A bad value at the public edge.

    Args:
        argument: name of the offending argument as the caller wrote it.
        value: what was passed.
        remedy: one sentence that says what to pass instead.
    """

    def __init__(self, argument: str, value: object, remedy: str) -> None:
        self.argument, self.value, self.remedy = argument, value, remedy
        super().__init__(f"{argument}={value!r}: {remedy}")

    def __reduce__(self) -> tuple[type[InvalidArgument], tuple[str, object, str]]:
        return type(self), (self.argument, self.value, self.remedy)


class InvalidPlan(InvalidArgument):
    """A sampling plan that contradicts itself, e.g. a row that reads a register nobody wrote."""


class UntraceableScheduler(ThgError):
    """A scheduler whose step is not linear in samples and outputs (clipping, thresholding)."""


class UnsupportedPipeline(ThgError):
    """A pipeline class that no adapter record describes."""


class MissingWeights(ThgError, FileNotFoundError):
    """A model in the box whose files are not there; the message says how to come by them."""


class MissingPackage(ThgError, ImportError):
    """An optional package that is not installed or cannot be imported; the message says how."""


class CalibrationError(ThgError):
    """A calibration file that is unreadable, of another version, or does not fit the model."""


def warn(message: str) -> None:
    """Warn at the user's own line: the nearest that is neither ours nor a framework's.

    In a thread that runs nothing else, that is the line of the standard library that started it.
    """
    frame, level = sys._getframe(1), 2
    while frame.f_back and str(frame.f_globals.get("__name__")).partition(".")[0] in BETWEEN:
        frame, level = frame.f_back, level + 1
    warnings.warn(f"thg_engine: {message}.", stacklevel=level)
