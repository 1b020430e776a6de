"""Part 5 of the GPU suite, end to end: diffusers, diffusers compiled, and the engine, in turns.

A row is one way to make one image: `Way`. All start from the same noise and conditions, and every
output is compared with that of diffusers, so that nothing is timed which computes something else.
Between them run bursts of the denoiser alone, batch 2 and batch 1, in the same mode: the c2 behind
the ideal speed-up c2 / (h c2 + 1 - h), and the denoiser's share where a replayed graph hides it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from gpu_curve import Calls, ideal_speedup
from gpu_models import Backbone
from gpu_timing import Samples, Subject, Watch, first_line, run_rounds
from torch import Tensor

import thg_engine
from thg_engine import CFG, THG, Engine
from thg_engine.lowering import plan_from_table
from thg_engine.plan import SamplingPlan
from thg_engine.trace import trace

NFE = 0.7
"""Share of full guidance that THG spends."""
SHORT = 2
"""Steps of a run that warms up."""
AGREE = 0.1
"""Largest distance from diffusers' output, relative, with which a speed-up is stated."""
STOCK, STOCK_COMPILED = "diffusers CFG", "diffusers + torch.compile CFG"
ENGINE, ENGINE_THG, ENGINE_COMPILED = "engine CFG", "engine THG", "engine THG + compile"
PIPELINE_THG, FASTER_CACHE = "compile(pipe) THG", "diffusers + FasterCache"


def make_engine(
    backbone: Backbone, graph: bool | str | None = None, watch: Watch | None = None
) -> Engine:
    """An engine whose graphs hold as long as the model's weights stay where they are."""
    denoiser = backbone if watch is None else watch.around(backbone)
    return Engine(denoiser, graph=graph, watch=backbone.model)


def make_plan(backbone: Backbone, guidance: Any, steps: int) -> SamplingPlan:
    """The plan of the model's own scheduler."""
    table = trace(backbone.spec.scheduler(), steps)
    return plan_from_table(table, guidance, backbone.spec.guidance_scale)


class Loop:
    """A plan on an engine."""

    def __init__(self, backbone: Backbone, engine: Engine) -> None:
        self.backbone, self.engine = backbone, engine
        self.cond, self.uncond = backbone.conditioning(3), backbone.conditioning(4)

    def noise(self, plan: SamplingPlan) -> Tensor:
        """The noise that the pipeline gets, scaled as it would scale it."""
        return self.backbone.noise() * plan.initial_scale

    def warm_up(self, plan: SamplingPlan) -> None:
        """Capture what ``plan`` needs."""
        self.engine.warm_up(self.noise(plan), self.cond, self.uncond, plan)

    def __call__(self, plan: SamplingPlan) -> Tensor:
        return self.engine.sample(self.noise(plan), self.cond, self.uncond, plan)


@dataclass
class Way:
    """One way to make an image.

    Attributes:
        rows: model calls of the run.
        both: those of them that evaluate both branches; None where nobody counts.
        run: ``run(short)`` makes the image, or one of few steps that warms up.
        capture: makes the graphs that the run needs.
        stats: graphs so far, {} where there are none.
    """

    name: str
    run: Callable[[bool], Tensor]
    rows: int
    both: int | None
    compiled: bool = False
    watch: Watch | None = None
    stats: Callable[[], dict[str, Any]] = dict
    capture: Callable[[], None] = lambda: None
    reason: str = ""
    mode: str = "eager"
    output: Tensor | None = None

    @property
    def nfe(self) -> int | None:
        """Evaluations per image."""
        return None if self.both is None else self.rows + self.both


def stock(backbone: Backbone, compiled: bool) -> Way:
    """The genuine pipeline."""
    pipe, steps = backbone.pipeline(), backbone.steps
    name = STOCK_COMPILED if compiled else STOCK

    def run(short: bool) -> Tensor:
        return backbone.run_pipeline(pipe, min(steps, SHORT) if short else steps)

    return Way(name, run, steps, steps, compiled, Watch(backbone.device, backbone.model))


def on_engine(name: str, loop: Loop, watch: Watch, guidance: Any, compiled: bool = False) -> Way:
    """`Engine` on the model, graphs where they measure faster."""
    plan = make_plan(loop.backbone, guidance, loop.backbone.steps)
    short_guidance = guidance if isinstance(guidance, CFG) else THG(grid=2)
    short_plan = make_plan(loop.backbone, short_guidance, SHORT)

    def run(short: bool) -> Tensor:
        return loop(short_plan if short else plan)

    both = sum(row.evaluates_both for row in plan.rows)
    stats, capture = loop.engine.stats, partial(loop.warm_up, plan)
    return Way(name, run, plan.num_rows, both, compiled, watch, stats, capture)


def on_pipeline(backbone: Backbone) -> Way:
    """`thg_engine.compile` on a pipeline with a model of its own: it hooks into the model."""
    other = replace(backbone, model=copy.deepcopy(backbone.model), _compiled={})
    pipe = thg_engine.compile(other.pipeline(), THG(nfe=NFE))
    plan = make_plan(backbone, THG(nfe=NFE), backbone.steps)
    both = sum(row.evaluates_both for row in plan.rows)

    def run(short: bool) -> Tensor:
        return other.run_pipeline(pipe, SHORT if short else backbone.steps)

    def graphs() -> dict[str, Any]:
        found: dict[str, Any] = pipe.thg.stats()["graphs"]
        return found

    return Way(PIPELINE_THG, run, plan.num_rows, both, stats=graphs)


def faster_cache(backbone: Backbone) -> Way:
    """diffusers' FasterCache on the stock pipeline, as its paper sets it."""
    from diffusers import FasterCacheConfig, apply_faster_cache
    from diffusers.hooks import HookRegistry
    from diffusers.hooks import faster_cache as names

    pipe, steps = backbone.pipeline(), backbone.steps
    keys = ("hidden_states", "encoder_hidden_states", "timestep", "pooled_projections")

    def run(short: bool) -> Tensor:
        scheduler, count = backbone.spec.scheduler(), min(steps, SHORT) if short else steps
        scheduler.set_timesteps(count)
        timesteps, now = scheduler.timesteps.tolist(), [0]

        def advance(_pipe: Any, step: int, _t: Any, given: dict[str, Any]) -> dict[str, Any]:
            now[0] = min(step + 1, len(timesteps) - 1)  # read on the host: a timestep there syncs
            return given

        config = FasterCacheConfig(
            tensor_format="BCHW",
            attention_weight_callback=lambda _: 0.5,
            current_timestep_callback=lambda: timesteps[now[0]],
            _unconditional_conditional_input_kwargs_identifiers=keys,
        )
        apply_faster_cache(backbone.model, config)
        try:
            return backbone.run_pipeline(pipe, count, callback_on_step_end=advance)
        finally:
            registry = HookRegistry.check_if_exists_or_initialize(backbone.model)
            for name in (names._FASTER_CACHE_DENOISER_HOOK, names._FASTER_CACHE_BLOCK_HOOK):
                registry.remove_hook(name, recurse=True)

    watch = Watch(backbone.device, backbone.model)
    return Way(FASTER_CACHE, run, steps, None, watch=watch, reason=backbone.spec.faster_cache)


def ways(backbone: Backbone) -> list[Way]:
    """Every way, in the order of the report; those that do not apply carry the reason."""
    watch, thg = Watch(backbone.device), THG(nfe=NFE)
    # One engine serves both plans with the same two graphs; compiled blocks are other kernels.
    plain, compiled = (Loop(backbone, make_engine(backbone, watch=watch)) for _ in range(2))
    found = [
        stock(backbone, False),
        stock(backbone, True),
        on_engine(ENGINE, plain, watch, CFG()),
        on_engine(ENGINE_THG, plain, watch, thg),
        on_engine(ENGINE_COMPILED, compiled, watch, thg, compiled=True),
        faster_cache(backbone),
    ]
    if backbone.spec.name == "sd15":
        found.append(on_pipeline(backbone))
    return found


def warm_up(backbone: Backbone, way: Way) -> None:
    """Compile, capture, load; sets the mode that the way has settled on, or why it cannot run."""
    try:
        backbone.set_compiled(way.compiled)
        way.capture()
        before = way.stats().get("replays", 0)
        way.run(True)
        graphed = way.stats().get("replays", 0) > before
        way.mode = "+".join(["compiled"] * way.compiled + ["graphed"] * graphed) or "eager"
    except Exception as error:  # it costs this way alone
        way.reason = first_line(error)


@torch.no_grad()
def end_to_end(backbone: Backbone, seconds: float) -> dict[str, Any]:
    """All ways and the denoiser's bursts in turns; see the module."""
    found = ways(backbone)
    for way in found:
        if not way.reason:
            warm_up(backbone, way)
    running = [way for way in found if not way.reason]
    calls = Calls(backbone, sample=0.3)
    for mode in dict.fromkeys(["eager", *(way.mode for way in running)]):
        calls.add(mode, (1, 2))
    subjects: dict[Any, Subject] = dict(calls.subjects)
    for way in running:
        subjects[way.name] = Subject(
            partial(_run, way), partial(backbone.set_compiled, way.compiled), way.watch
        )
    samples = run_rounds(subjects, backbone.device, seconds, min_rounds=2 if backbone.smoke else 1)
    ms: dict[str, dict[int, float]] = {}
    for point in calls.subjects:
        ms.setdefault(point[0], {})[point[1]] = calls.milliseconds(point, samples[point])
    for way in running:
        if way.output is not None and not torch.isfinite(way.output).all():
            way.reason = "the output is not finite"
    rows = [_row(way, samples.get(way.name), ms.get(way.mode, {})) for way in found]
    _add_differences(rows, found)
    return {
        **{"steps": backbone.steps, "full_steps": backbone.spec.steps, "rows": rows},
        "calls_ms": {mode: {str(b): value for b, value in at.items()} for mode, at in ms.items()},
        **compare(rows, ms),
    }


def _run(way: Way) -> None:
    way.output = way.run(False)


def _row(way: Way, samples: Samples | None, ms: dict[int, float]) -> dict[str, Any]:
    """Columns of one way; figures are None where it did not run."""
    row: dict[str, Any] = {"way": way.name, "mode": way.mode, "reason": way.reason}
    row.update(rows=way.rows, both=way.both, nfe=way.nfe, graphs=way.stats())
    if samples is None or way.reason:
        return {**row, **dict.fromkeys(FIGURES)}
    denoiser = samples.median("denoiser_s")
    if "graphed" in way.mode:  # a graph hides its calls: bursts of the same mode stand in for them
        denoiser = None
    if "graphed" in way.mode and way.both is not None and {1, 2} <= set(ms):
        denoiser = 1e-3 * (way.both * ms[2] + (way.rows - way.both) * ms[1])
    host = samples.median("host_s")
    return {
        **row,
        "seconds": samples.seconds,
        "wall_s": samples.median("wall_s"),
        "wall_iqr_s": samples.spread("wall_s"),
        "gpu_s": samples.median("gpu_s"),
        "host_ms_per_step": None if host is None else 1e3 * host / way.rows,
        "denoiser_share": None if denoiser is None else denoiser / samples.seconds,
        "joules": samples.mean("joules"),
        "peak_bytes": samples.peak_bytes,
        "rounds": samples.rounds,
    }


FIGURES = (
    *("seconds", "wall_s", "wall_iqr_s", "gpu_s", "host_ms_per_step", "denoiser_share"),
    *("joules", "peak_bytes", "rounds"),
)


def _add_differences(rows: list[dict[str, Any]], found: list[Way]) -> None:
    """``difference``: distance from diffusers' output, relative; of CFG ways it is rounding."""
    outputs = {way.name: way.output for way in found}
    base = outputs[STOCK]
    for row in rows:
        value = outputs[row["way"]]
        row["difference"] = None
        if base is not None and value is not None:
            distance = (value.double() - base.double()).norm() / base.double().norm()
            row["difference"] = float(distance)


def compare(rows: list[dict[str, Any]], ms: dict[str, dict[int, float]]) -> dict[str, Any]:
    """Speed-ups within these rounds; None with the reason where one may not be stated."""
    by_name = {row["way"]: row for row in rows}
    seconds = {name: row["seconds"] for name, row in by_name.items()}
    result: dict[str, Any] = {"refusal": ""}
    difference = by_name[ENGINE]["difference"]
    if difference is None or not difference <= AGREE:  # NaN is not
        result["refusal"] = f"engine CFG is {difference} away from diffusers, more than {AGREE}"
        seconds = dict.fromkeys(seconds)

    def ratio(base: str, name: str) -> float | None:
        pair = seconds[base], seconds[name]
        return pair[0] / pair[1] if pair[0] and pair[1] else None

    thg = by_name[ENGINE_THG]
    at = ms.get(thg["mode"], {})
    result["h"] = h = thg["both"] / thg["rows"]
    result["c2"] = c2 = at[2] / at[1] if {1, 2} <= set(at) else None
    result["ideal"] = ideal = None if c2 is None else ideal_speedup(c2, h)
    result["measured"] = measured = ratio(ENGINE, ENGINE_THG)
    result["of_ideal"] = measured / ideal if measured and ideal else None
    result["thg_over_stock"] = ratio(STOCK, ENGINE_THG)
    result["compiled_over_stock_compiled"] = ratio(STOCK_COMPILED, ENGINE_COMPILED)
    return result
