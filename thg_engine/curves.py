r"""Calibrated error curves: how much local error tortoise and hare make, over half log-SNR.

A calibration stores c_T(lambda) and c_H(lambda) / (w - 1). Algorithm 2 needs their ratio alone,

    ratio(lambda, w) = c_T(lambda) / c_H(lambda, w) = tortoise(lambda) / ((w - 1) hare(lambda)),

in which the step size cancels, so one calibration serves any rho and number of steps (on Gaussian
mixtures the ratio of 64 steps is within 10 % of that of 128). Dividing by w - 1 is exact along one
trajectory, but w changes the trajectory: there the ratio carried over from w = 4 is off by a factor
of 1.2 to 1.6 at w = 3.5 and 4.5, of 3 to 10 at w = 2 and 7.5. So a rho
means what it says near the measured scale only (one carried up from a smaller scale gives a denser
grid than asked); a budget needs the curves' shape alone.

Source: Tortoise and Hare Guidance, arXiv 2511.04117, section 3.3.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from .documents import fields_of, read_document, write_document
from .errors import CalibrationError, InvalidArgument

FORMAT = "thg-engine-calibration"
VERSION = 1
_KINDS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "tuple[float, ...]": (tuple,),
}


@dataclass(frozen=True)
class Calibration:
    """Error curves of one model and where they come from; saved as readable JSON, never pickled.

    Attributes:
        model: name of the model as the user knows it.
        fingerprint: hash of the denoiser's architecture, "" if unknown; decides whether it fits.
        scheduler_family: noise schedule and prediction type, e.g. "vp/epsilon".
        solver: closed-form solver that Algorithm 3 stepped with.
        order: its order p; spans grow with the p-th root of the ratio.
        guidance_scale: scale w of the trajectories the errors were measured on.
        num_steps: fine steps of these trajectories.
        num_prompts: how many prompts the norms are averaged over.
        prompts_sha256: hash of the prompts, so that a report can name its calibration set.
        date: ISO date of the measurement.
        lambdas: half log-SNR at each measured step, strictly growing, dimensionless.
        tortoise: mean error norm of the conditional state at each lambda, in units of x, > 0.
        hare: mean error norm of the guidance state divided by (w - 1), in units of x, > 0.
    """

    model: str
    fingerprint: str
    scheduler_family: str
    solver: str
    order: int
    guidance_scale: float
    num_steps: int
    num_prompts: int
    prompts_sha256: str
    date: str
    lambdas: tuple[float, ...]
    tortoise: tuple[float, ...]
    hare: tuple[float, ...]

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, _KINDS[str(field.type)]):
                raise InvalidArgument(field.name, value, f"give a value of type {field.type}.")
        if not len(self.lambdas) == len(self.tortoise) == len(self.hare) > 0:
            sizes = (len(self.lambdas), len(self.tortoise), len(self.hare))
            raise InvalidArgument("curves", sizes, "give three curves of equal, positive length.")
        grown = all(b > a for a, b in zip(self.lambdas, self.lambdas[1:], strict=False))
        if not grown or not all(map(math.isfinite, self.lambdas)):
            raise InvalidArgument("lambdas", self.lambdas, "give finite, strictly growing values.")
        for name in ("tortoise", "hare"):
            if not all(math.isfinite(c) and c > 0 for c in getattr(self, name)):
                raise InvalidArgument(name, getattr(self, name), "error norms are finite and > 0.")
        if self.order < 1:
            raise InvalidArgument("order", self.order, "a solver order is at least 1.")

    def ratio(self, lambdas: Sequence[float], guidance_scale: float) -> tuple[float, ...]:
        """c_T / c_H at each of ``lambdas`` for ``guidance_scale`` > 1.

        Log-linear between the measured points and constant beyond them.
        """
        if not 1 < guidance_scale < math.inf:
            remedy = "there is no hare at w <= 1; use a finite scale above 1."
            raise InvalidArgument("guidance_scale", guidance_scale, remedy)
        log_ratio = np.log(self.tortoise) - np.log(self.hare)
        ratios = np.exp(np.interp(lambdas, self.lambdas, log_ratio)) / (guidance_scale - 1)
        return tuple(float(ratio) for ratio in ratios)

    def save(self, path: str | Path) -> None:
        """Write the calibration as JSON."""
        document = {"format": FORMAT, "version": VERSION, **asdict(self)}
        write_document(path, json.dumps(document, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read a calibration.

        Raises:
            CalibrationError: missing file, no JSON, another format or version, bad or missing
                field.
        """
        return cls.from_document(read_document(path, "calibration"), str(path))

    @classmethod
    def from_document(cls, document: object, origin: str) -> Calibration:
        """A calibration from parsed JSON; ``origin`` names it in errors."""
        given = fields_of(
            document, origin, FORMAT, VERSION, "calibrate again: thg-engine calibrate"
        )
        values: dict[str, Any] = {}
        for field in fields(cls):
            if field.name not in given:
                raise CalibrationError(f"{origin!r} lacks the field {field.name!r}.")
            value = given[field.name]
            values[field.name] = tuple(value) if isinstance(value, list) else value
        try:
            return cls(**values)
        except (InvalidArgument, TypeError) as error:
            raise CalibrationError(f"{origin!r} is damaged: {error}") from error
