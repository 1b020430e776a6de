r"""Solver tables from schedulers: run the scheduler on basis vectors and read its coefficients off.

The step of a linear scheduler maps past samples X_k, past model outputs E_k and fresh noise z to

    x_next = sum_k a_k X_k + sum_k b_k E_k + s z

with numbers that only the timesteps decide. `forms.py` lets it run on unit vectors and fits the
shortest window that reproduces every sample. A second run, of the untouched scheduler on random
numbers of size 1 and 1000, checks the table: what is not linear does not survive it.

Nothing here imports diffusers: a scheduler is whatever has ``timesteps`` and ``step``.
"""

from __future__ import annotations

import dataclasses
import inspect
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from .errors import InvalidArgument, UntraceableScheduler
from .forms import fit_rows, unroll
from .schedule import grid_points, model_timesteps, prediction_type, setting
from .scheduler_run import NoiseMode, NotLinear, SchedulerRun, clone, fingerprint, on_cpu
from .table import SolverRow, SolverTable

MAX_RESIDUAL = 1e-5  # float32 samples inside a step give up to 1e-6, clipping more than 1e-2
CACHE_SIZE = 128

_PROBE_SHAPE = (2, 5, 3, 7)  # odd, and no channel count that learned-variance code looks for
_CLIPPING = ("thresholding", "clip_sample", "clip_denoised")
_UNFUSED = "run it with its own step (no solver table)"

_cache: OrderedDict[tuple[type, str | None], SolverTable | UntraceableScheduler] = OrderedDict()
_cache_lock = threading.Lock()


def trace(
    scheduler: Any,
    num_steps: int | None = None,
    *,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    start: int | None = None,
    set_timesteps_kwargs: Mapping[str, Any] | None = None,
    step_kwargs: Mapping[str, Any] | None = None,
    upcast: bool = False,
) -> SolverTable:
    r"""Solver table of one sampling run of a diffusers-like scheduler, in host float64.

    Args:
        scheduler: any object with ``timesteps`` and ``step``; it is copied, never changed.
        num_steps: N for its ``set_timesteps``. Without ``num_steps``, ``timesteps`` and ``sigmas``
            the run is the one that is already set.
        timesteps, sigmas: custom grids, shape ``(N,)``, where ``set_timesteps`` takes them.
        start: first model call of a truncated run (image-to-image). Default: ``begin_index``.
        set_timesteps_kwargs: further arguments of ``set_timesteps``, e.g. ``{"mu": 0.8}``.
        step_kwargs: arguments of ``step``, e.g. ``{"eta": 0.5}``; no generators or noise tensors.
        upcast: compute coefficients in float64. By default they keep the scheduler's own (mostly
            float32) rounding, which its samples show: up to 2e-3 where points almost coincide.
    Returns:
        The table; the identical object for the same class, config, timesteps and arguments.
    Raises:
        InvalidArgument: arguments that the scheduler does not take, or a run that has begun.
        UntraceableScheduler: the step is not of a row's form; names class, cause and remedy.
    """
    kwargs = dict(step_kwargs or {})
    custom = {"timesteps": timesteps, "sigmas": sigmas}
    prepared = _prepare(scheduler, num_steps, custom, dict(set_timesteps_kwargs or {}))
    start = _begin(prepared, start)
    _check_step(prepared, kwargs)
    return _cached(prepared, start, kwargs, upcast)


def _cached(prepared: Any, start: int, step_kwargs: Mapping[str, Any], upcast: bool) -> SolverTable:
    """`_trace`, or its refusal, once per scheduler class, state and arguments."""
    digest = fingerprint(prepared, [start, upcast, step_kwargs])
    key = (type(prepared), digest)  # the class itself: names of local classes repeat
    with _cache_lock:
        found = _cache.get(key)
        if found is not None:
            _cache.move_to_end(key)
    if found is None:
        try:
            found = _trace(clone(prepared, float64=upcast), start, step_kwargs, upcast)
        except UntraceableScheduler as refusal:
            found = refusal.with_traceback(None)
        if digest is not None:  # some state, e.g. a function, has no canonical form
            with _cache_lock:
                found = _cache.setdefault(key, found)  # another thread may have been first
                while len(_cache) > CACHE_SIZE:
                    _cache.popitem(last=False)
    if isinstance(found, UntraceableScheduler):
        raise type(found)(*found.args)
    return found


def trace_cache_clear() -> None:
    """Forget every traced table."""
    with _cache_lock:
        _cache.clear()


def _prepare(
    scheduler: Any, num_steps: int | None, custom: Mapping[str, Any], kwargs: dict[str, Any]
) -> Any:
    """A CPU copy of ``scheduler`` whose timesteps are set and whose run has not begun."""
    name = type(scheduler).__name__
    if not callable(getattr(scheduler, "step", None)):
        raise _refusal(scheduler, "it has no method `step`", _UNFUSED)
    try:
        prepared = clone(scheduler)
    except Exception as error:  # locks, generators, handles: whatever an attribute holds
        raise _refusal(scheduler, f"it cannot be copied ({error})", _UNFUSED) from error
    chosen = {k: v for k, v in custom.items() if v is not None}
    if num_steps is None and not chosen:
        if kwargs:
            raise InvalidArgument("set_timesteps_kwargs", kwargs, "give num_steps with them.")
        return prepared
    for argument, value in chosen.items():
        if argument not in inspect.signature(prepared.set_timesteps).parameters:
            remedy = f"{name} takes no custom {argument}; give num_steps."
            raise InvalidArgument(argument, value, remedy)
    if num_steps is not None:
        if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
            raise InvalidArgument("num_steps", num_steps, "give a whole number of at least 1.")
        kwargs["num_inference_steps"] = num_steps
    try:
        prepared.set_timesteps(**kwargs, **chosen)
    except Exception as error:  # whatever a third-party scheduler raises is about the arguments
        argument, value = next(iter(chosen.items()), ("num_steps", num_steps))
        remedy = f"{name}.set_timesteps refuses it: {type(error).__name__}: {error}"
        raise InvalidArgument(argument, value, remedy) from error
    return clone(prepared)


def _begin(prepared: Any, start: int | None) -> int:
    """Put the run of ``prepared`` before its first row; returns that row's index."""
    rows = len(model_timesteps(prepared))
    begin = getattr(prepared, "begin_index", None)
    start = (begin or 0) if start is None else start
    if isinstance(start, bool) or not isinstance(start, int) or not 0 <= start < rows:
        raise InvalidArgument("start", start, f"give a row from 0 to {rows - 1}.")
    at = getattr(prepared, "_step_index", None)
    counter: object = getattr(prepared, "counter", None)  # PNDM's
    if at not in (None, start) or counter not in (None, 0):
        remedy = "it is in the middle of a run; call set_timesteps, or give num_steps."
        raise InvalidArgument("scheduler", type(prepared).__name__, remedy)
    if at is not None:
        prepared._step_index = None
    if start != (begin or 0) and hasattr(prepared, "set_begin_index"):
        prepared.set_begin_index(start)
    return start


def _check_step(prepared: Any, step_kwargs: Mapping[str, Any]) -> None:
    """Refuse what the signature and the config already rule out."""
    parameters = inspect.signature(prepared.step).parameters
    for argument in step_kwargs:
        known = argument in parameters or any(p.kind == p.VAR_KEYWORD for p in parameters.values())
        if not known or argument in ("generator", "variance_noise", "return_dict"):
            remedy = f"{type(prepared).__name__}.step does not take it in a traced run."
            raise InvalidArgument(f"step_kwargs[{argument!r}]", step_kwargs[argument], remedy)
    if "LongTensor" in str(getattr(parameters.get("sample"), "annotation", None)):
        raise _refusal(prepared, "it samples discrete tokens, not a diffusion ODE", _UNFUSED)
    needed = [
        p.name
        for p in list(parameters.values())[3:]
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    missing = [n for n in needed if n not in step_kwargs and n not in SchedulerRun.SUPPLIED]
    if missing and "old_pred_original_sample" not in parameters:
        cause = f"its step needs {', '.join(missing)} besides sample and model output"
        raise _refusal(prepared, cause, _UNFUSED)
    variance = setting(prepared, "variance_type")
    if str(variance).startswith("learned"):
        cause = f"variance_type={variance!r} reads a variance from the model output"
        raise _refusal(prepared, cause, "use a fixed variance_type")


def _trace(prepared: Any, start: int, step_kwargs: Mapping[str, Any], upcast: bool) -> SolverTable:
    """Unroll, fit, assemble and verify; samples may be edited between steps if that can be told."""
    table, failure = None, None
    for edits in (True, False):
        try:
            table = _assemble(prepared, start, step_kwargs, edits)
            residual = _residual(table, clone(prepared), start, step_kwargs, upcast, edits)
        except (NotLinear, InvalidArgument) as error:
            failure = failure or error
            continue
        if residual <= MAX_RESIDUAL:
            return dataclasses.replace(table, residual=residual)
    if table is None:
        raise _explained(prepared, str(failure)) from failure
    raise _explained(prepared, f"its step is not linear (relative deviation {residual:.1e})")


def _assemble(
    prepared: Any, start: int, step_kwargs: Mapping[str, Any], edits: bool
) -> SolverTable:
    """The table as the forms give it, not yet verified."""
    forms = unroll(clone(prepared), start, step_kwargs, edits)
    lambdas, predicts = _noise_levels(prepared)
    timesteps = model_timesteps(prepared)[start:]
    return SolverTable(
        name=type(prepared).__name__,
        prediction_type=predicts,
        rows=fit_rows(forms, timesteps),
        lambdas=lambdas[start:],
        initial_scale=float(getattr(prepared, "init_noise_sigma", 1.0)),
        edits=edits,
    )


def _noise_levels(prepared: Any) -> tuple[tuple[float, ...], str]:
    """Half log-SNR of every row, and what the denoiser predicts."""
    try:
        points = grid_points(prepared)
        return tuple(point.lambda_t for point in points[:-1]), prediction_type(prepared)
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise NotLinear(f"its noise schedule cannot be read ({error})") from error


def _deviation(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest relative 2-norm error over the batch."""
    if value.shape != reference.shape:
        raise NotLinear(f"it turns a sample of shape {tuple(value.shape)} into another shape")
    error = (value - reference).flatten(1).norm(dim=1)
    size = reference.flatten(1).norm(dim=1)
    ratio = torch.where(size > 0.0, error / size, error)  # an exact zero must be met exactly
    return float(ratio.nan_to_num(nan=np.inf).max())


def _explained(scheduler: Any, cause: str) -> UntraceableScheduler:
    """The refusal of a step that failed; a clipping setting that is on is the likelier cause."""
    for name in _CLIPPING:
        if setting(scheduler, name):
            remedy = f"set {name}=False in its config, or {_UNFUSED}"
            return _refusal(scheduler, f"{name}=True makes its step non-linear ({cause})", remedy)
    return _refusal(scheduler, cause, _UNFUSED)


def _refusal(scheduler: Any, cause: str, remedy: str) -> UntraceableScheduler:
    return UntraceableScheduler(f"{type(scheduler).__name__}: {cause}; {remedy}.")


def _residual(
    table: SolverTable,
    scheduler: Any,
    start: int,
    step_kwargs: Mapping[str, Any],
    wide: bool,
    edits: bool,
) -> float:
    """Largest relative error of ``table`` against ``scheduler`` itself, over rows and magnitudes.

    Both roll out from the same random numbers; the first batch element has size 1, the second 1000.
    With ``edits`` both have the same random numbers added to every sample between two steps.
    """
    generator = torch.Generator().manual_seed(20)
    size = torch.tensor([1.0, 1e3], dtype=torch.float64).reshape(2, 1, 1, 1)
    noise: list[torch.Tensor] = []

    def normal() -> torch.Tensor:
        return torch.randn(_PROBE_SHAPE, generator=generator, dtype=torch.float64)

    def draw(shape: Sequence[int], dtype: torch.dtype | None) -> torch.Tensor:
        noise.append(torch.randn(tuple(shape), generator=generator, dtype=torch.float64))
        return noise[-1]

    run = SchedulerRun(scheduler, start, step_kwargs)
    x = normal() * size * table.initial_scale
    follow, worst = _Follow(x), 0.0
    with torch.no_grad(), on_cpu():
        for i, row in enumerate(table.rows):
            if edits and i:
                edit = 0.1 * normal() * size
                follow.samples[0], x = follow.samples[0] + edit, x + edit
            output = normal() * size
            noise.clear()
            with NoiseMode(draw, wide):
                scaled, x = run.scaled(i, x), run.step(i, output, x)
            worst = max(worst, _deviation(row.input_scale * follow.samples[0], scaled))
            worst = max(worst, _deviation(follow.step(row, output, noise), x))
    return worst


class _Follow:
    """Runs the rows of a table on values, newest first."""

    def __init__(self, x: torch.Tensor) -> None:
        self.samples: list[torch.Tensor] = [x]
        self.outputs: list[torch.Tensor] = []
        self.states: list[torch.Tensor] = []

    def step(
        self, row: SolverRow, output: torch.Tensor, noise: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        self.outputs.insert(0, output)
        if row.state_weights:
            update = (row.state_update, self.states), (row.state_sample_update, self.samples)
            self.states = [_sum(*update, (row.state_output_update, self.outputs))]
        following = _sum(
            (row.sample_weights, self.samples),
            (row.output_weights, self.outputs),
            (row.state_weights, self.states),
        )
        if row.noise_weight != 0.0:
            following = following + row.noise_weight * noise[row.noise_draw]
        self.samples.insert(0, following)
        return following


def _sum(*columns: tuple[Sequence[float], Sequence[torch.Tensor]]) -> torch.Tensor:
    """sum_k weight_k value_k over all columns."""
    total = torch.zeros((), dtype=torch.float64)
    for weights, values in columns:
        for weight, value in zip(weights, values, strict=False):
            total = total + weight * value
    return total
