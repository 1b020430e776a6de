"""Tortoise and Hare Guidance for diffusers: fewer network evaluations, the same images.

    import thg_engine
    pipe = thg_engine.compile(pipe)                # in place; returns the pipeline
    image = pipe("a cat", num_inference_steps=50, guidance_scale=7.5).images[0]
    print(pipe.thg.report())
    thg_engine.uncompile(pipe)

Source: Tortoise and Hare Guidance, NeurIPS 2025, arXiv 2511.04117.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .curves import Calibration
from .engine import Engine
from .fitting.front import PlanFront
from .fitting.reuse import FittedReuse
from .guidance import CFG, THG, CFGCache, Guidance, GuidanceInterval, SelectiveGuidance
from .plan import SamplingPlan

if TYPE_CHECKING:
    from . import adapters
    from .integrations.diffusers import TortoiseHareGuidance

__version__ = "0.1.0"

__all__ = [
    "CFG",
    "THG",
    "CFGCache",
    "Calibration",
    "Engine",
    "FittedReuse",
    "GuidanceInterval",
    "PlanFront",
    "SamplingPlan",
    "SelectiveGuidance",
    "TortoiseHareGuidance",
    "adapters",
    "calibrate",
    "calibrate_plans",
    "compile",
    "fit_reuse",
    "uncompile",
]


def __getattr__(name: str) -> Any:
    """What knows diffusers is imported when it is asked for."""
    if name == "adapters":
        return import_module(".adapters", __name__)
    if name != "TortoiseHareGuidance":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .integrations.diffusers import TortoiseHareGuidance

    return TortoiseHareGuidance


def compile(
    pipe: Any,
    guidance: Guidance | SamplingPlan | str = "auto",
    calibration: Calibration | PlanFront | str | Path | None = None,
    nfe: int | float | None = None,
    fused: bool | None = None,
    graph: bool | None = None,
    denoiser: str | None = None,
    attention: str | None = None,
    *,
    speedup: float | None = None,
    seconds: float | None = None,
    match: str | None = None,
    drift: int | None = None,
) -> Any:
    """Accelerate a diffusers pipeline in place; see `thg_engine.integrations.diffusers.compile`."""
    from .integrations.diffusers import compile as compile_pipeline

    return compile_pipeline(
        *(pipe, guidance, calibration, nfe, fused, graph, denoiser, attention),
        speedup=speedup,
        seconds=seconds,
        match=match,
        drift=drift,
    )


def uncompile(pipe: Any) -> Any:
    """Undo `compile`: the original class and modules, nothing left behind."""
    from .integrations.diffusers import uncompile as uncompile_pipeline

    return uncompile_pipeline(pipe)


def calibrate(pipe: Any, prompts: Sequence[str], **options: Any) -> Calibration:
    """Measure a pipeline's error curves; see `thg_engine.integrations.diffusers.calibrate`."""
    from .integrations.diffusers import calibrate as calibrate_pipeline

    return calibrate_pipeline(pipe, prompts, **options)


def calibrate_plans(pipe: Any, prompts: Sequence[str], **options: Any) -> PlanFront:
    """Fit plans to a pipeline; see `thg_engine.integrations.diffusers.calibrate_plans`."""
    from .integrations.diffusers import calibrate_plans as calibrate_pipeline_plans

    return calibrate_pipeline_plans(pipe, prompts, **options)


def fit_reuse(pipe: Any, prompts: Sequence[str], **options: Any) -> FittedReuse:
    """Fit THG's reuse to a pipeline; see `thg_engine.integrations.diffusers.fit_reuse`."""
    from .integrations.diffusers import fit_reuse as fit_pipeline_reuse

    return fit_pipeline_reuse(pipe, prompts, **options)
