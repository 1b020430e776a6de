"""The baselines of one pipeline at one guidance scale, and what is chosen for them beforehand.

Whatever is fitted or chosen (the calibration of Algorithm 3, the threshold of Adaptive Guidance)
sees the selection prompts and selection noise alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch

from ..curves import Calibration
from ..errors import UnsupportedPipeline
from ..guidance import THG, CFGCache, GuidanceInterval, SelectiveGuidance
from ..published import published
from .box import Box
from .branches import AdaptiveGuidance, installed
from .caches import (
    deep_cache,
    faster_cache,
    pyramid_attention_broadcast,
    why_no_attention_caches,
    why_no_deepcache,
)
from .methods import (
    CFG_NAME,
    Change,
    Method,
    OneGate,
    adaptive,
    frequency_cache,
    guided,
    plain,
)
from .prompts import selection_prompts
from .settings import SELECTION_SEED, Settings
from .solvers import FLOW, NOISE, SOLVERS, build

PUBLISHED = ((50, 1.1, 38 / 50), (35, 1.7, 30 / 35), (20, 3.5, 17 / 20))
"""Rows N, rho and cut-off of Stable Diffusion 1.5 in the paper; boost 1.1 in all of them."""
BOOST = 1.1
SHARE = 0.7
"""Of full guidance's evaluations: what the paper compares methods at."""
MAIN_SOLVERS = {
    NOISE: ("ddim", "dpmpp2m", "unipc", "deis"),
    FLOW: ("euler", "dpmpp2m", "unipc", "deis"),
}
"""Run with many steps, too: those that other methods build on, and those that lead with 50."""

Say = Callable[[str], None]


def baselines(box: Box, scale: float, settings: Settings, say: Say) -> Iterator[Method]:
    """Full guidance under every solver first, then whatever leaves evaluations out."""
    for solver in SOLVERS[box.family]:
        steps = {*settings.solver_steps}
        if solver in MAIN_SOLVERS[box.family]:
            steps |= {*settings.main_steps}
        for num_steps in sorted(steps):
            yield Method(CFG_NAME, solver, num_steps, plain)
    for solver in solvers(box, settings):
        curves = calibrated(box, scale, solver, settings)
        gamma = chosen_gamma(box, scale, solver, settings)
        for name, change in _changes(gamma, box, say):
            for num_steps in settings.reuse_steps:
                yield Method(name, solver, num_steps, change)
        for num_steps in settings.reuse_steps:
            for name, guidance in published_thg(box, num_steps, curves):
                yield Method(name, solver, num_steps, guided(guidance))


def solvers(box: Box, settings: Settings) -> tuple[str, ...]:
    """Solvers under the methods that reuse guidance; a flow's DDIM is Euler."""
    if box.family == FLOW:
        return tuple("euler" if name == "ddim" else name for name in settings.reuse_solvers)
    return settings.reuse_solvers


def _changes(gamma: float, box: Box, say: Say) -> Iterator[tuple[str, Change]]:
    """Names and changes of the published methods that build on a solver."""
    yield "CFG-Cache without FFT", guided(CFGCache())
    yield "CFG-Cache", frequency_cache()
    yield "Guidance Interval", guided(GuidanceInterval())
    yield "Selective Guidance", guided(SelectiveGuidance())
    yield "Adaptive Guidance", adaptive()
    yield f"Adaptive Guidance ({SHARE:.0%})", adaptive(gamma)
    yield "one-gate delta reuse", guided(OneGate())
    reason = why_no_deepcache(box)
    if reason:
        say(f"{box.name}: left out: {reason}")
    else:
        yield "DeepCache", deep_cache(3)
    reason = why_no_attention_caches(box)
    if reason:
        say(f"{box.name}: left out: {reason}")
    else:
        yield "FasterCache", faster_cache()
        yield "PAB", pyramid_attention_broadcast()


def published_thg(
    box: Box, num_steps: int, curves: Calibration | None
) -> Iterator[tuple[str, THG]]:
    """THG as the paper sets it, and with its boost and cut-off at 70 % of full guidance."""
    if curves is None:
        flow = published("stable-diffusion-3.5-large")
        yield "THG (published)", THG(grid=flow.grid, boost=flow.boost)
        return
    _, rho, cutoff = min(PUBLISHED, key=lambda row: abs(row[0] - num_steps))
    thg = THG(rho=rho, boost=BOOST, cutoff=cutoff, calibration=curves)
    yield "THG (published)", thg
    yield f"THG (published, {SHARE:.0%})", dataclasses.replace(thg, rho=None, nfe=SHARE)


def calibrated(box: Box, scale: float, solver: str, settings: Settings) -> Calibration | None:
    """Curves of Algorithm 3 at this scale; None where this pipeline cannot be calibrated."""
    from .. import calibrate

    names = {"ddim": "ddim", "dpmpp2m": "dpmpp2m", "euler": "flow_euler"}
    with box.as_before():
        box.pipe.scheduler = build(box.family, solver, box.pipe.scheduler.config)
        try:
            return calibrate(
                box.pipe,
                selection_prompts(settings.selection_prompts),
                guidance_scale=scale,
                num_inference_steps=max((*settings.reuse_steps, 10)),
                solver=names.get(solver, "ddim"),
                batch_size=40,
                seed=SELECTION_SEED,
                progress=False,
            )
        except UnsupportedPipeline:
            return None


def chosen_gamma(box: Box, scale: float, solver: str, settings: Settings) -> float:
    """The threshold of Adaptive Guidance that spends `SHARE` on the selection prompts."""
    prompts = selection_prompts(settings.selection_prompts)
    noise = box.noise(len(prompts), SELECTION_SEED + 1)
    policy = AdaptiveGuidance(gamma=2.0)

    def watched(box: Box, _num_steps: int) -> object:
        return installed(box.denoiser, policy)

    steps = min((n for n in settings.reuse_steps if n >= 20), default=20)
    with Method("watched", solver, steps, watched).prepared(box) as call:  # type: ignore[arg-type]
        call(prompts, noise, scale)
    cosines = torch.stack(policy.cosines).double()
    return gamma_for_share(cosines, SHARE)


def gamma_for_share(cosines: torch.Tensor, share: float) -> float:
    """The threshold at which images with these cosines ``(N, B)`` spend ``share`` of 2 N.

    An image runs both branches up to the first step whose cosine exceeds the threshold, so that
    what counts is the running maximum.
    """
    num_steps = len(cosines)
    peaks = cosines.cummax(dim=0).values
    wanted = (2 * share - 1) * num_steps

    def guided_steps(gamma: float) -> float:
        below = (peaks <= gamma).sum(dim=0)
        return float((below + 1).clamp(max=num_steps).double().mean())

    candidates: list[float] = sorted(set(peaks.flatten().tolist()))
    return min(candidates, key=lambda gamma: abs(guided_steps(gamma) - wanted))
