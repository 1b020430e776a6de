"""The whole evaluation: work-precision measurements, then quality, into a `Store`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from .baselines import baselines, solvers
from .box import Box
from .methods import CFG_NAME, Method, plain, unique
from .ours import our_methods
from .prompts import report_prompts
from .runner import REFERENCE_SOLVER, Bench, measure_c2
from .scores import REFERENCE_STEPS, Judge
from .settings import Settings
from .store import Store, catalogue

Say = Callable[[str], None]


def evaluate(box: Box, settings: Settings, store: Store, say: Say, progress: bool = True) -> None:
    """Measure one pipeline; whatever the store has already is not run again."""
    part = store.part(box.name, weights_digest(box))
    # Fits lie beside the file: from here on it guards them against other settings and weights.
    store.save(force=True)

    def tell(text: str) -> None:
        if text not in store.document["notes"]:
            say(text)
        store.note(text)

    methods: dict[float, list[Method]] = {}

    def methods_at(scale: float) -> list[Method]:
        if scale not in methods:
            found = [*baselines(box, scale, settings, tell)]
            found += our_methods(box, settings, store.path.parent, tell, progress)
            methods[scale] = unique(found)
        return methods[scale]

    try:
        for scale in settings.guidance_scales:
            _curves(box, scale, settings, store, part, methods_at, progress)
        for scale in settings.quality_scales if settings.quality_images else ():
            _quality(box, scale, settings, store, part, methods_at, progress)
    finally:
        store.save(force=True)


def weights_digest(box: Box) -> str:
    """Sixteen hex digits of the denoiser's weights."""
    digest = hashlib.sha256()
    for name, value in sorted(box.denoiser.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


MethodsAt = Callable[[float], list[Method]]


def _curves(
    box: Box,
    scale: float,
    settings: Settings,
    store: Store,
    part: dict[str, Any],
    methods_at: MethodsAt,
    progress: bool,
) -> None:
    """Every method on every seed: seeds outside, so that each method's timings lie far apart."""
    done = {(one["key"], one["seed"]) for one in part["measurements"] if one["scale"] == scale}
    listed = part["catalogues"].get(f"{scale:g}")
    seeds = range(settings.seed, settings.seed + settings.seeds)
    if listed is not None and all((e["key"], seed) in done for e in listed for seed in seeds):
        return
    methods = methods_at(scale)
    part["catalogues"][f"{scale:g}"] = catalogue(methods)
    prompts = report_prompts(settings.prompts)
    part["c2"][f"{scale:g}"] = measure_c2(box, prompts)
    total = len(methods) * len(seeds)
    title = f"{box.name}, w = {scale:g}"
    with tqdm(total=total, desc=title, disable=not progress, mininterval=1) as bar:
        for seed in seeds:
            bench = Bench(box, prompts, scale, seed, settings.reference_steps)
            for method in methods:
                if (method.key, seed) not in done:
                    part["measurements"].append(bench.measure(method).document())
                    store.save()
                bar.update()
    store.save(force=True)


def _quality(
    box: Box,
    scale: float,
    settings: Settings,
    store: Store,
    part: dict[str, Any],
    methods_at: MethodsAt,
    progress: bool,
) -> None:
    """Quality of full guidance and of every other method at ``quality_steps``."""
    done = {one["key"] for one in part["quality"] if one["scale"] == scale}
    if f"{scale:g}" in part.setdefault("quality_done", []):
        return
    judge = Judge(box, scale, settings)
    methods = scored_methods(box, settings, methods_at(scale))
    title = f"{box.name}, quality, w = {scale:g}"
    for method, entry in tqdm(
        list(zip(methods, catalogue(methods), strict=True)), desc=title, disable=not progress
    ):
        if method.key not in done:
            part["quality"].append({**judge.score(method).document(), "entry": entry})
            store.save()
    part["quality_done"].append(f"{scale:g}")
    store.save(force=True)


def scored_methods(box: Box, settings: Settings, methods: list[Method]) -> list[Method]:
    """Full guidance, converged and at ``quality_steps``, and the rest at these steps or by plan."""
    used = solvers(box, settings)
    converged = Method(CFG_NAME, REFERENCE_SOLVER, REFERENCE_STEPS, plain)
    steps = settings.quality_steps
    full = [Method(CFG_NAME, solver, steps, plain) for solver in {*used, REFERENCE_SOLVER}]
    full.sort(key=lambda method: method.key)
    rest = [m for m in methods if not m.full_guidance and (m.num_steps == steps or m.budget)]
    wanted = {method.key: method for method in (converged, *full, *rest)}
    return list(wanted.values())
