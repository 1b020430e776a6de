"""``compile(pipe)``: the pipeline stays the same object and gains ``pipe.thg``.

The instance is moved to a subclass of its own class, made once per class and under the same name,
whose ``__call__`` opens a `PipelineRun` around the original one. ``uncompile`` moves it back.

With fitted plans (``thg_engine.calibrate_plans``) each call runs the most accurate one within the
budget, on its own grid and solver, whatever ``num_inference_steps`` says. Besides ``nfe``, one of
these is the budget: ``speedup`` over full guidance with as many steps as the call asks for, in
denoiser time; ``seconds`` of all denoiser calls of one image; or ``match``, the cheapest plan as
accurate as an ordinary solver, e.g. "dpm++2m@50", which is the default.
"""

from __future__ import annotations

import copy
import functools
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ...curves import Calibration
from ...errors import InvalidArgument, UnsupportedPipeline, warn
from ...fitting.front import PlanFront
from ...guidance import Guidance
from ...plan import SamplingPlan
from .adapters import find_record
from .controller import Controller
from .guided import GuiderSwap, denoiser_of_guided, guiders_of, swap_guider
from .guided_controller import GuidedController
from .networks import Networks
from .planned import check_drift, shipped_for, target_of
from .reasons import reason_for
from .records import RECORDS
from .resolve import load_calibration, resolve_guidance
from .settings import KILL_SWITCH, Settings
from .tuning import check_tuning


class CompiledPipeline:
    """Mixin of every compiled pipeline class: copying and pickling."""

    thg: Controller | GuidedController

    def __copy__(self) -> Any:
        """A shallow copy that shares the components and has a controller of its own."""
        twin = object.__new__(_base_class(self))
        vars(twin).update({key: value for key, value in vars(self).items() if key != "thg"})
        return compile_with(twin, self.thg.settings)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A deep copy, compiled anew: hooks refer to their module and cannot be copied with it."""
        with _plain(self):
            twin = copy.deepcopy(self, memo)
        return compile_with(twin, self.thg.settings)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled as the plain pipeline plus the settings, compiled again when loaded."""
        with _plain(self):
            payload = pickle.dumps(self, protocol)
        return _unpickle, (payload, self.thg.settings)


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
    """Accelerate a diffusers pipeline in place; the same object gains ``pipe.thg``.

    Args:
        pipe: a pipeline with classifier-free guidance; another is left as it is, with a warning.
        guidance: "auto" (calibrated, published or default grid), a name ("thg", "cfg", ...), a
            method such as ``thg_engine.THG(...)``, or a finished `SamplingPlan`.
        calibration: error curves, or fitted plans (see the module), or a file of either.
        nfe: evaluation budget per sample: a count (int) or a share of full guidance (float).
        fused: whether ``scheduler.step`` becomes one fused launch, equal but for rounding. None:
            yes, unless both branches are always evaluated: images stay bit-identical.
        graph: replay CUDA graphs. None: where that is faster; True: wherever it is possible.
        denoiser: "compile" compiles its repeated blocks with torch.compile.
        attention: "sdpa", "xformers" or "native" (plain matrix products); None leaves it.
        speedup, seconds, match: what fitted plans are chosen for (see the module).
        drift: in every so many calls one skipped row evaluates both branches, and the report says
            how far the reused delta was off; images change by rounding alone.
    Raises:
        InvalidArgument, CalibrationError, UnsupportedPipeline: the pipeline is then unchanged.
    """
    _check(pipe, fused=fused, graph=graph)
    wanted = {"nfe": nfe, "speedup": speedup, "seconds": seconds, "match": match}
    tuning = (fused, graph, denoiser, attention)
    if calibration is None and any(value is not None for value in (speedup, seconds, match)):
        calibration = shipped_for(pipe)
    return compile_with(pipe, _settings(guidance, calibration, wanted, tuning, drift))


def _settings(
    guidance: Guidance | SamplingPlan | str,
    calibration: Calibration | PlanFront | str | Path | None,
    wanted: dict[str, Any],
    tuning: tuple[bool | None, bool | None, str | None, str | None],
    drift: int | None,
) -> Settings:
    """Arguments of `compile`, checked."""
    check_tuning(*tuning[2:])
    curves, front = load_calibration(calibration)
    target = target_of(front, guidance, **wanted)
    check_drift(drift)
    budget = None if target is not None else wanted["nfe"]
    return Settings(guidance, curves, budget, *tuning, front, target, drift)


def _check(pipe: Any, **switches: bool | None) -> None:
    """Refuse what is no pipeline and no switch."""
    if isinstance(pipe, type) or not hasattr(pipe, "components") or not callable(pipe):
        remedy = "give a loaded pipeline, e.g. StableDiffusionPipeline.from_pretrained(...)."
        raise InvalidArgument("pipe", getattr(pipe, "__name__", type(pipe).__name__), remedy)
    for name, value in switches.items():
        if not (value is None or isinstance(value, bool)):
            raise InvalidArgument(name, value, "give True, False or None.")


def compile_with(pipe: Any, settings: Settings) -> Any:
    """`compile` from settings; a compiled pipeline gets the new ones.

    Raises:
        InvalidArgument, CalibrationError: see `compile`.
    """
    base: Any = _base_class(pipe)
    record = find_record(base)
    networks = Networks() if record is None else Networks.of(pipe, record)
    if record is not None and not networks.why_not(pipe, record):
        controller = Controller(settings, record, networks, pipe=pipe)
        with _as_before(pipe):
            controller.tune()
        controller.attach()
        return _under(pipe, controller)
    module = denoiser_of_guided(pipe) or torch.nn.Module()
    if settings.front is not None and guiders_of(pipe):
        needed = "plans are fitted to pipelines that guide in their own loop, not by a guider"
        raise UnsupportedPipeline(f"{base.__name__}: {needed}.")
    if settings.drift is not None and guiders_of(pipe):
        raise InvalidArgument("drift", settings.drift, "leave it out: a guider holds its deltas.")
    method, notes = resolve_guidance(settings.guidance, settings.calibration, settings.nfe, module)
    with _as_before(pipe):
        swap = swap_guider(pipe, method, notes)
        if isinstance(swap, GuiderSwap):
            return _under(pipe, GuidedController(settings, swap, pipe))
    reason = swap
    if record is not None:
        reason = networks.why_not(pipe, record)
    elif not guiders_of(pipe):
        reason = _why_unknown(base)
    warn(f"this pipeline is left as it is: {reason}")
    vars(pipe)["thg"] = Controller(settings, None, Networks(), reason)
    return pipe


@contextmanager
def _as_before(pipe: Any) -> Iterator[None]:
    """The plain pipeline; compiled again as it was if the block raises."""
    before = vars(pipe).get("thg") if isinstance(pipe, CompiledPipeline) else None
    uncompile(pipe)
    try:
        yield
    except BaseException:
        if before is not None:
            compile_with(pipe, before.settings)
        raise


def _why_unknown(base: type[Any]) -> str:
    """Why a pipeline without record and guider is left alone."""
    known = reason_for(base)
    if known:
        return f"{base.__name__}: {known}"
    remedy = "thg_engine.adapters.register describes one"
    return (
        f"no adapter record describes {base.__name__} ({len(RECORDS)} pipelines have one; {remedy})"
    )


def _under(pipe: Any, controller: Controller | GuidedController) -> Any:
    """The pipeline with its calls under a controller."""
    base: Any = _base_class(pipe)
    pipe.__class__ = _compiled_class(base)
    vars(pipe)["thg"] = controller
    return pipe


def uncompile(pipe: Any) -> Any:
    """Undo `compile`: the original class, the original modules, nothing left behind.

    Returns:
        The pipeline; one that was never compiled comes back as it is.
    """
    if not hasattr(pipe, "__dict__"):
        raise InvalidArgument("pipe", pipe, "give the pipeline that was compiled.")
    controller = vars(pipe).pop("thg", None)
    if isinstance(controller, (Controller, GuidedController)):
        controller.release(pipe)
    if isinstance(pipe, CompiledPipeline):
        pipe.__class__ = _base_class(pipe)
    return pipe


def _base_class(pipe: Any) -> type[Any]:
    found: type[Any] = type(pipe)
    return found.__mro__[2] if issubclass(found, CompiledPipeline) else found


@functools.cache
def _compiled_class(base: type[Any]) -> type[Any]:
    """The subclass of ``base`` whose calls run under a plan; carries the name of ``base``."""

    @functools.wraps(base.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        original = base.__call__  # libraries replace it on the class
        controller: Controller | GuidedController = self.thg
        if os.environ.get(KILL_SWITCH) == "1":
            return original(self, *args, **kwargs)
        with controller.apart(self) as pipe:
            return controller.call(original, pipe, args, kwargs)

    def plain_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return base.__call__(self, *args, **kwargs)

    body = {
        "__call__": call,
        "plain_call": plain_call,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    return type(base.__name__, (CompiledPipeline, base), body)


@contextmanager
def _plain(pipe: Any) -> Iterator[None]:
    """The pipeline without class, controller and hook, put back afterwards whatever happens."""
    controller: Controller | GuidedController = vars(pipe).pop("thg")
    compiled_class = type(pipe)
    pipe.__class__ = _base_class(pipe)
    try:
        with controller.aside(pipe):
            yield
    finally:
        pipe.__class__ = compiled_class
        vars(pipe)["thg"] = controller


def _unpickle(payload: bytes, settings: Settings) -> Any:
    # Only reached through pickle itself, whose trust the caller has already given.
    return compile_with(pickle.loads(payload), settings)
