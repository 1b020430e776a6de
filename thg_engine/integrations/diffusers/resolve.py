"""From what the user asked for to one guidance method, with the reasons worth reporting."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...curves import Calibration
from ...documents import read_document
from ...errors import CalibrationError, InvalidArgument
from ...fitting.front import FORMAT as FRONT_FORMAT
from ...fitting.front import PlanFront
from ...fitting.reuse import FittedReuse
from ...guidance import (
    FRESH,
    GUIDANCE_NAMES,
    THG,
    UNGUIDED,
    Guidance,
    GuidanceRow,
    resolve_nfe,
)
from ...plan import SamplingPlan
from ...published import published_grid, shipped_calibration

DEFAULT_NFE = 0.7
"""Share of full guidance that "auto" aims at on a calibrated model: the paper's operating point."""


def fingerprint(module: torch.nn.Module) -> str:
    """Sixteen hex digits that identify a denoiser's architecture: class name and configuration."""
    config = dict(getattr(module, "config", {}))
    named = {key: value for key, value in config.items() if not key.startswith("_")}
    text = json.dumps([type(module).__name__, named], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def model_name(pipe: Any) -> str:
    """Where a pipeline was loaded from, or its class where it was not."""
    return str(getattr(pipe.config, "_name_or_path", "") or type(pipe).__name__)


@dataclass(frozen=True)
class PlannedRows:
    """Guidance columns of a finished plan, for runs of exactly its length."""

    plan: SamplingPlan

    @property
    def name(self) -> str:
        """The plan's method."""
        return self.plan.method

    def rows(self, lambdas: Sequence[float], guidance_scale: float) -> tuple[GuidanceRow, ...]:
        """The plan's rows; refused where the run has another number of model calls."""
        if len(lambdas) != self.plan.num_rows:
            remedy = f"this run makes {len(lambdas)} model calls; give a plan of that length."
            raise InvalidArgument("guidance", f"<plan of {self.plan.num_rows} rows>", remedy)
        scale = self.plan.guidance_scale - 1.0
        rows = []
        for row in self.plan.rows:
            boost = row.guidance_weight / scale if scale else 1.0
            if row.evaluates_both:
                rows.append(replace(FRESH, boost=boost))
            elif row.guidance_weight == 0.0:
                rows.append(UNGUIDED)
            else:
                weights = (row.delta_weights, row.cond_change_weights)
                rows.append(GuidanceRow(False, boost, *weights))
        return tuple(rows)


def load_calibration(
    value: Calibration | PlanFront | str | Path | None,
) -> tuple[Calibration | None, PlanFront | None]:
    """(error curves, fitted plans) as given, or read from a path; a front may hold curves too."""
    if isinstance(value, (str, Path)):
        value = load_either(value)
    if isinstance(value, PlanFront):
        return value.curves, value
    if value is None or isinstance(value, Calibration):
        return value, None
    remedy = "give a Calibration, a PlanFront, or the path of a file of either kind."
    raise InvalidArgument("calibration", value, remedy)


def load_either(path: str | Path) -> Calibration | PlanFront:
    """Error curves or fitted plans, whichever the file says it holds."""
    document = read_document(path, "calibration")
    if isinstance(document, dict) and document.get("format") == FRONT_FORMAT:
        return PlanFront.from_document(document, str(path))
    return Calibration.from_document(document, str(path))


def resolve_guidance(
    guidance: Guidance | SamplingPlan | str,
    calibration: Calibration | None,
    nfe: int | float | None,
    module: torch.nn.Module,
) -> tuple[Guidance, tuple[str, ...]]:
    """The method to run and notes on how it was chosen.

    Args:
        guidance: a method, a finished plan, a name of `GUIDANCE_NAMES`, or "auto".
        calibration: error curves; checked against the architecture of ``module``.
        nfe: budget, evaluations (int) or share of full guidance (float).
        module: the denoiser.
    Raises:
        InvalidArgument: unknown name, or a budget for a method that has none.
        CalibrationError: curves of another architecture.
    """
    _check(guidance, calibration, nfe, module)
    if isinstance(guidance, SamplingPlan):
        note = (
            f"guidance columns of a plan for {guidance.solver} at w = {guidance.guidance_scale:g}"
        )
        return _from_plan(guidance, nfe), (f"{note}; solver and scale are the pipeline's own",)
    if guidance == "auto":
        return _auto(calibration, nfe, module)
    if isinstance(guidance, str):
        if guidance not in GUIDANCE_NAMES:
            names = ", ".join(["auto", *GUIDANCE_NAMES])
            raise InvalidArgument("guidance", guidance, f"use one of {names}, a method or a plan.")
        nfe = DEFAULT_NFE if guidance == "thg" and nfe is None else nfe
        guidance = GUIDANCE_NAMES[guidance]()
    if isinstance(guidance, type) or not isinstance(guidance, Guidance):
        remedy = "give a method such as thg_engine.THG(), a SamplingPlan, or a name."
        raise InvalidArgument("guidance", guidance, remedy)
    if isinstance(guidance, THG):
        return _with_curves(guidance, calibration, nfe, module), ()
    if nfe is not None:
        remedy = f"{guidance.name} has a fixed cost; use THG for a budget."
        raise InvalidArgument("nfe", nfe, remedy)
    return guidance, ()


def _check(guidance: Any, calibration: Any, nfe: Any, module: torch.nn.Module) -> None:
    """Refuse what can be refused whatever the method."""
    if nfe is not None and resolve_nfe(nfe, 2**30) < 2:
        raise InvalidArgument("nfe", nfe, "even one step with guidance takes 2 evaluations.")
    own = guidance.calibration if isinstance(guidance, THG) else None
    for curves in (calibration, own):
        if curves is not None and curves.fingerprint not in ("", fingerprint(module)):
            message = f"the calibration is of {curves.model!r}, another architecture"
            remedy = "calibrate this model with `thg-engine calibrate`"
            raise CalibrationError(f"{message}; {remedy}.")
    reuse = guidance.reuse if isinstance(guidance, THG) else None
    if isinstance(reuse, FittedReuse) and reuse.fingerprint not in ("", fingerprint(module)):
        message = f"the reuse weights are of {reuse.model!r}, another architecture"
        raise CalibrationError(f"{message}; fit this model with thg_engine.fit_reuse.")
    if calibration is not None and own not in (None, calibration):
        remedy = "guidance has a calibration of its own; give one of the two."
        raise InvalidArgument("calibration", f"<of {calibration.model}>", remedy)


def _with_curves(
    guidance: THG, calibration: Calibration | None, nfe: int | float | None, module: torch.nn.Module
) -> THG:
    """THG with the curves and the budget that go with it."""
    if guidance.calibration is None and guidance.grid is None:
        curves = calibration or shipped_calibration(fingerprint(module))
        guidance = guidance if curves is None else guidance.with_calibration(curves)
    return guidance if nfe is None else replace(guidance, nfe=nfe)


def _from_plan(plan: SamplingPlan, nfe: int | float | None) -> Guidance:
    if nfe is not None:
        raise InvalidArgument("nfe", nfe, "a finished plan has its cost; leave nfe out.")
    columns = ("step_delta_weights", "state_weights", "cond_weights")
    if any(getattr(row, column) for row in plan.rows for column in columns):
        remedy = (
            "this plan keeps the hare's own solver history, which a pipeline's scheduler cannot; "
            "make it with form='combined'."
        )
        raise InvalidArgument("guidance", f"<{plan.method} on {plan.solver}>", remedy)
    return PlannedRows(plan)


def _auto(
    calibration: Calibration | None, nfe: int | float | None, module: torch.nn.Module
) -> tuple[Guidance, tuple[str, ...]]:
    """Calibrated curves first, then a published grid, then a conservative default."""
    curves = calibration or shipped_calibration(fingerprint(module))
    if curves is not None:
        budget = DEFAULT_NFE if nfe is None else nfe
        note = f"grid from the calibration of {curves.model} ({curves.date}) for nfe={budget:g}"
        return THG(calibration=curves, nfe=budget), (note,)
    published = published_grid(dict(getattr(module, "config", {})))
    if published is not None and nfe is None:
        origin = f"{published.model} at {published.num_steps} steps"
        note = f"grid published for {origin}, mapped by log-SNR"
        return THG(grid=published.grid, boost=published.boost), (note,)
    if nfe is not None:
        note = "no calibration of this model: the budget is spread evenly over the run"
        return THG(nfe=nfe), (f"{note}; `thg-engine calibrate` places it better",)
    note = "no calibration of this model: conservative default grid (first fifth, then every 2nd)"
    return THG(), (f"{note}; `thg-engine calibrate` finds a better one",)
