"""The calibration file: fitted plans of one model, their measured errors, and where they come from.

Saved as readable JSON, never pickled. A plan is stored as its grid, its base solver and the fitted
corrections, so that loading builds the base rows anew and adds numbers to them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

from ..curves import Calibration
from ..documents import fields_of, read_document, write_document
from ..errors import CalibrationError, InvalidArgument
from ..guidance import CFG, THG
from ..lowering import plan_from_table
from ..plan import SamplingPlan, Weights
from ..schedule import NoiseSchedule, Point
from ..solvers import get_solver, solver_table
from .rows import Correction, corrected

FORMAT = "thg-engine-front"
VERSION = 1
DIGITS = 9
"""Significant digits of stored coefficients; registers are float32."""


@dataclass(frozen=True)
class ScaleFit:
    """A plan's rows at one guidance scale.

    Attributes:
        guidance_scale: w.
        error: mean relative error |x_0 - x*_0| / |x*_0| to the converged solution, on prompts and
            noise that the rows were not fitted to.
        ci95: half width of its 95 % confidence interval.
        base_error: the same of the base rows.
        corrections: one per row; () where the fit did not help and the base rows are kept.
    """

    guidance_scale: float
    error: float
    ci95: float
    base_error: float
    corrections: tuple[Correction, ...] = ()

    @property
    def is_finite(self) -> bool:
        """Whether neither the fitted nor the base rows overflowed."""
        return math.isfinite(self.error) and math.isfinite(self.base_error)


@dataclass(frozen=True)
class PlanEntry:
    """One plan of a front.

    Attributes:
        solver: closed-form solver of the base rows, a name in `thg_engine.solvers.SOLVERS`.
        timesteps: of the rows, falling.
        coarse_rows: rows that evaluate both branches.
        fits: at each calibrated guidance scale, growing.
        end: (alpha_t, sigma_t) of the sample that the last row makes.
    """

    solver: str
    timesteps: tuple[float, ...]
    coarse_rows: tuple[int, ...]
    fits: tuple[ScaleFit, ...]
    end: tuple[float, float] = (1.0, 0.0)

    def points(self, schedule: NoiseSchedule) -> tuple[Point, ...]:
        """Of the rows, and the end."""
        return (*(schedule.point(t) for t in self.timesteps), Point(0.0, *self.end))

    @property
    def num_steps(self) -> int:
        """N, the rows."""
        return len(self.timesteps)

    @property
    def nfe(self) -> int:
        """Evaluations per sample."""
        return self.num_steps + len(self.coarse_rows)

    @property
    def is_full(self) -> bool:
        """Whether every row evaluates both branches."""
        return len(self.coarse_rows) == self.num_steps

    @property
    def name(self) -> str:
        """As reports print it."""
        kind = "cfg" if self.is_full else "thg"
        return f"fitted {kind}, {self.num_steps} steps"

    def cost(self, c2: float) -> float:
        """In evaluations of one branch, where a row with both costs ``c2``."""
        return self.num_steps + (c2 - 1.0) * len(self.coarse_rows)

    def nearest(self, guidance_scale: float) -> float:
        """The calibrated scale next to w."""
        scales = [fit.guidance_scale for fit in self.fits]
        return min(scales, key=lambda scale: abs(scale - guidance_scale))

    def error_at(self, guidance_scale: float, fitted: bool = True) -> float:
        """Expected relative error, interpolated in w.

        Beyond the fits it is that of the base rows at the nearest scale: the error of another
        scale, since none was measured there. ``fitted=False``: of the base rows everywhere.
        """
        low, high, share = self._between(guidance_scale)
        if not self.covers(guidance_scale):
            return low.base_error
        pairs = (low.error, high.error)
        if not (fitted and low.corrections and high.corrections):
            # Between scales of which one was not fitted the base rows run.
            pairs = (low.base_error, high.base_error)
        return math.exp((1 - share) * math.log(pairs[0]) + share * math.log(pairs[1]))

    def covers(self, guidance_scale: float) -> bool:
        """Whether w lies among the scales that the rows were fitted at."""
        return (
            self.fits[0].guidance_scale - 1e-9
            <= guidance_scale
            <= self.fits[-1].guidance_scale + 1e-9
        )

    def plan(
        self, schedule: NoiseSchedule, prediction_type: str, guidance_scale: float
    ) -> SamplingPlan:
        """The rows at ``guidance_scale``.

        Corrections are interpolated linearly between the two nearest calibrated scales; beyond them
        the base rows run, which the report of a pipeline says.
        """
        base = base_plan(self, schedule, prediction_type, guidance_scale)
        if not self.covers(guidance_scale):
            return base
        low, high, share = self._between(guidance_scale)
        if not (low.corrections and high.corrections):
            return base
        pairs = zip(low.corrections, high.corrections, strict=True)
        return corrected(base, [_mixed(a, b, share) for a, b in pairs])

    def _between(self, guidance_scale: float) -> tuple[ScaleFit, ScaleFit, float]:
        """The nearest fits below and above w, and where w lies between them in [0, 1]."""
        low = max(
            (f for f in self.fits if f.guidance_scale <= guidance_scale + 1e-9),
            key=lambda f: f.guidance_scale,
            default=self.fits[0],
        )
        high = min(
            (f for f in self.fits if f.guidance_scale >= guidance_scale - 1e-9),
            key=lambda f: f.guidance_scale,
            default=self.fits[-1],
        )
        width = high.guidance_scale - low.guidance_scale
        return low, high, (guidance_scale - low.guidance_scale) / width if width > 0 else 0.0


@lru_cache(maxsize=256)
def base_plan(
    entry: PlanEntry, schedule: NoiseSchedule, prediction_type: str, guidance_scale: float
) -> SamplingPlan:
    """The rows of ``entry`` before any correction."""
    table = solver_table(get_solver(entry.solver), entry.points(schedule), prediction_type)
    guidance = CFG() if entry.is_full else THG(grid=entry.coarse_rows, reuse="linear")
    return plan_from_table(table, guidance, guidance_scale)


def _mixed(one: Correction, other: Correction, share: float) -> Correction:
    def mix(a: Weights, b: Weights) -> Weights:
        pairs = zip_longest(a, b, fillvalue=0.0)
        return tuple((1 - share) * x + share * y for x, y in pairs)

    return Correction(
        mix(one.samples, other.samples),
        mix(one.conds, other.conds),
        mix(one.deltas, other.deltas),
        (1 - share) * one.gain + share * other.gain,
    )


@dataclass(frozen=True)
class StockEntry:
    """Full guidance with an ordinary solver, measured beside the plans.

    Attributes:
        solver: short name, e.g. "dpm++2m".
        num_steps: N.
        guidance_scale: w.
        error: mean relative error, as in `ScaleFit`.
    """

    solver: str
    num_steps: int
    guidance_scale: float
    error: float


@dataclass(frozen=True)
class PlanFront:
    """Fitted plans of one model.

    Attributes:
        model, fingerprint: as in `Calibration`.
        scheduler_family: noise schedule and prediction type, e.g. "vp/epsilon".
        schedule_digest: hash of the noise schedule, which must be the pipeline's.
        prompts_sha256, num_prompts: of the prompts that rows were fitted to.
        num_held_out: prompts that errors were measured on.
        reference_steps: steps of the converged runs.
        date, machine: of the calibration.
        seconds: (one branch, both branches) of a denoiser call per sample, on that machine.
        shape: of the samples they were timed with.
        plans: by cost.
        stock: ordinary solvers, for comparison.
        curves: Algorithm 3's error curves, where they were measured too.
    """

    model: str
    fingerprint: str
    scheduler_family: str
    schedule_digest: str
    prompts_sha256: str
    num_prompts: int
    num_held_out: int
    reference_steps: int
    date: str
    machine: str
    seconds: tuple[float, float]
    shape: tuple[int, ...]
    plans: tuple[PlanEntry, ...]
    stock: tuple[StockEntry, ...] = ()
    curves: Calibration | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not self.plans or not all(entry.fits for entry in self.plans):
            raise InvalidArgument("plans", len(self.plans), "give fitted plans, at least one.")
        if len(self.seconds) != 2 or not all(0 < s < math.inf for s in self.seconds):
            raise InvalidArgument("seconds", self.seconds, "give two positive times.")
        if any(self._scales(entry) != self._scales(self.plans[0]) for entry in self.plans):
            raise InvalidArgument("plans", "", "fit all plans at the same guidance scales.")
        if not all(fit.is_finite for entry in self.plans for fit in entry.fits):
            raise InvalidArgument("plans", "", "errors of plans are finite numbers.")
        if self.scheduler_family.count("/") != 1:
            remedy = "it is a kind and a prediction type, e.g. 'vp/epsilon'."
            raise InvalidArgument("scheduler_family", self.scheduler_family, remedy)
        ordered = sorted(self.plans, key=lambda entry: (entry.nfe, entry.num_steps))
        object.__setattr__(self, "plans", tuple(ordered))

    @staticmethod
    def _scales(entry: PlanEntry) -> tuple[float, ...]:
        return tuple(fit.guidance_scale for fit in entry.fits)

    @property
    def c2(self) -> float:
        """Time of a call with both branches over that of one branch, where it was calibrated."""
        return self.seconds[1] / self.seconds[0]

    @property
    def prediction_type(self) -> str:
        """diffusers' string."""
        return self.scheduler_family.split("/")[1]

    @property
    def guidance_scales(self) -> tuple[float, ...]:
        """Scales that rows were fitted at, growing."""
        return self._scales(self.plans[0])

    def pareto(self, guidance_scale: float, c2: float) -> tuple[PlanEntry, ...]:
        """Plans that no other beats in both cost and expected error, by cost."""
        found: list[PlanEntry] = []
        best = math.inf
        for entry in sorted(self.plans, key=lambda e: (e.cost(c2), e.error_at(guidance_scale))):
            if entry.error_at(guidance_scale) < best:
                best = entry.error_at(guidance_scale)
                found.append(entry)
        return tuple(found)

    def save(self, path: str | Path) -> None:
        """Write the front as JSON."""
        write_document(path, self.to_json() + "\n")

    def to_json(self) -> str:
        """The front as JSON, one plan a line."""
        document = {"format": FORMAT, "version": VERSION, **asdict(self)}
        plans = document.pop("plans")
        for plan in plans:
            for fit in plan["fits"]:
                fit["corrections"] = [_compact(row) for row in fit["corrections"]]
        head = json.dumps(document, indent=1)
        lines = ",\n  ".join(json.dumps(plan) for plan in plans)
        return f'{head[:-2]},\n "plans": [\n  {lines}\n ]\n}}'

    @classmethod
    def load(cls, path: str | Path) -> PlanFront:
        """Read a front.

        Raises:
            CalibrationError: missing file, no JSON, another format or version, bad or missing
                field.
        """
        return cls.from_document(read_document(path, "plans"), str(path))

    @classmethod
    def from_document(cls, document: Any, origin: str) -> PlanFront:
        """A front from parsed JSON; ``origin`` names it in errors."""
        remedy = "make one with `thg-engine calibrate --plans`"
        values = fields_of(document, origin, FORMAT, VERSION, remedy)
        try:
            values["plans"] = tuple(map(_entry, values["plans"]))
            values["stock"] = tuple(StockEntry(**each) for each in values["stock"])
            values["seconds"], values["shape"] = tuple(values["seconds"]), tuple(values["shape"])
            if values["curves"] is not None:
                values["curves"] = Calibration(**_tuples(values["curves"]))
            return cls(**values)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CalibrationError(f"{origin!r} is damaged: {error}") from error


def _compact(row: dict[str, Any]) -> list[Any]:
    """A correction as a list; as many digits as float32 registers can tell."""
    columns: Iterable[Sequence[float]] = (row["samples"], row["conds"], row["deltas"])
    parts = [[float(f"{v:.{DIGITS}g}") for v in column] for column in columns]
    return [*parts, float(f"{row['gain']:.4g}")]


def _entry(document: dict[str, Any]) -> PlanEntry:
    """A plan from its JSON object.

    Raises:
        ValueError: numbers that no plan can have.
    """
    fits = []
    for each in document["fits"]:
        rows = [
            Correction(_numbers(x), _numbers(c), _numbers(d), float(gain))
            for x, c, d, gain in each["corrections"]
        ]
        if rows and len(rows) != len(document["timesteps"]):
            raise ValueError("a plan needs one correction per timestep")
        fits.append(ScaleFit(**{**each, "corrections": tuple(rows)}))
    timesteps, coarse = _numbers(document["timesteps"]), tuple(document["coarse_rows"])
    get_solver(document["solver"])
    if not timesteps or any(not b < a for a, b in pairwise(timesteps)):
        raise ValueError("the timesteps of a plan fall")
    if coarse[:1] != (0,) or any(not a < b < len(timesteps) for a, b in pairwise(coarse)):
        raise ValueError("coarse_rows of a plan begin with 0 and grow")
    if any(not a.guidance_scale < b.guidance_scale for a, b in pairwise(fits)):
        raise ValueError("the guidance scales of a plan grow")
    if any(not 0.0 < error < math.inf for fit in fits for error in (fit.error, fit.base_error)):
        raise ValueError("the errors of a plan are positive numbers")
    alpha_t, sigma_t = document["end"]
    Point(0.0, alpha_t, sigma_t)
    return PlanEntry(document["solver"], timesteps, coarse, tuple(fits), (alpha_t, sigma_t))


def _numbers(values: Iterable[Any]) -> tuple[float, ...]:
    return tuple(map(float, values))


def _tuples(document: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in document.items()}
