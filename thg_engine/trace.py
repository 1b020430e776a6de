r"""Solver tables from schedulers: run the scheduler on basis vectors and read its coefficients off.

The step of a linear scheduler maps past samples X_k, past model outputs E_k and fresh noise z to

    x_next = sum_k a_k X_k + sum_k b_k E_k + s z

with numbers that only the timesteps decide. One run in which the initial sample, every model output
and every noise draw is its own unit vector therefore shows each sample as an explicit linear form
of all of them; the shortest window (k < n_E outputs, k < n_X samples) whose least-squares fit
reproduces every form is the table. A second run, of the untouched scheduler on random numbers of
size 1 and 1000, checks the table: what is not linear does not survive it.

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
from numpy.typing import NDArray

from .errors import InvalidArgument, UntraceableScheduler
from .schedule import grid_points, model_timesteps, prediction_type, setting
from .scheduler_run import NoiseMode, NotLinear, SchedulerRun, clone, fingerprint, on_cpu
from .table import SolverRow, SolverTable

MAX_RESIDUAL = 1e-5  # float32 samples inside a step give up to 1e-6, clipping more than 1e-2
FIT_TOLERANCE = 1e-10  # misfit of a linear form, relative to its norm, that counts as reproduced
MAX_WINDOW = 16  # outputs or samples; PNDM's Runge-Kutta warm-up needs most of it
CACHE_SIZE = 128

_PROBE_SHAPE = (2, 5, 3, 7)  # odd, and no channel count that learned-variance code looks for
_DRAWS_PER_ROW = 3  # room in the basis; CogVideoX' DPM draws twice and uses one
_CLIPPING = ("thresholding", "clip_sample", "clip_denoised")
_UNFUSED = "run it with its own step (no solver table)"

Float64s = NDArray[np.float64]
_cache: OrderedDict[tuple[type, str | None], SolverTable] = OrderedDict()
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
    """`_trace`, once per scheduler class, state and arguments."""
    digest = fingerprint(prepared, [start, upcast, step_kwargs])
    key = (type(prepared), digest)  # the class itself: names of local classes repeat
    with _cache_lock:
        if key in _cache:
            _cache.move_to_end(key)
            return _cache[key]
    table = _trace(clone(prepared, float64=upcast), start, step_kwargs, upcast)
    if digest is None:  # some state, e.g. a function, has no canonical form
        return table
    with _cache_lock:
        table = _cache.setdefault(key, table)  # another thread may have been first
        while len(_cache) > CACHE_SIZE:
            _cache.popitem(last=False)
    return table


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
    prepared = clone(scheduler)
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
    """Unroll, fit, assemble and verify."""
    try:
        forms, noises, scales = _unroll(clone(prepared), start, step_kwargs)
        lambdas, predicts = _noise_levels(prepared)
        timesteps = model_timesteps(prepared)[start:]
        table = SolverTable(
            name=type(prepared).__name__,
            prediction_type=predicts,
            rows=tuple(
                SolverRow(float(t), scale, a, b, s)
                for t, scale, (a, b, s) in zip(timesteps, scales, _fit(forms, noises), strict=True)
            ),
            lambdas=lambdas[start:],
            initial_scale=float(getattr(prepared, "init_noise_sigma", 1.0)),
        )
        residual = _residual(table, clone(prepared), start, step_kwargs, wide=upcast)
    except (NotLinear, InvalidArgument) as error:
        raise _explained(prepared, str(error)) from error
    if not residual <= MAX_RESIDUAL:
        cause = f"its step is not linear (relative deviation {residual:.1e})"
        raise _explained(prepared, cause)
    return dataclasses.replace(table, residual=residual)


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


def _unroll(
    scheduler: Any, start: int, step_kwargs: Mapping[str, Any]
) -> tuple[Float64s, list[tuple[int, ...]], list[float]]:
    """Linear forms of all samples: run in float64 with every input a unit vector.

    Returns:
        forms, shape ``(R + 1, D)``: sample i in the basis [x_T, E_0 .. E_{R-1}, noise draws];
        the basis indices of the noise drawn in each row; the input scale of each row.
    """
    rows = len(model_timesteps(scheduler)) - start
    size = 1 + rows * (1 + _DRAWS_PER_ROW)
    drawn: list[int] = []

    def draw(shape: Sequence[int]) -> torch.Tensor:
        if tuple(shape) != (1, 1, 1, size):
            raise NotLinear(f"it draws noise of shape {tuple(shape)}, not of its sample")
        if len(drawn) == rows * _DRAWS_PER_ROW:
            raise NotLinear(f"it draws more than {_DRAWS_PER_ROW} noises a step")
        drawn.append(1 + rows + len(drawn))
        return unit(drawn[-1])

    def unit(index: int) -> torch.Tensor:
        vector = torch.zeros((1, 1, 1, size), dtype=torch.float64)
        vector[..., index] = 1.0
        return vector

    run = SchedulerRun(scheduler, start, step_kwargs)
    forms, noises, scales = [unit(0)], [], []
    with torch.no_grad(), on_cpu(), NoiseMode(draw, wide=True):
        for i in range(rows):
            before = len(drawn)
            scales.append(_ratio(run.scaled(i, forms[i]), forms[i]))
            forms.append(run.step(i, unit(1 + i), forms[i]))
            noises.append(tuple(drawn[before:]))
            if forms[-1].shape != forms[0].shape:
                raise NotLinear("it changes the shape of the sample")
            if not torch.isfinite(forms[-1]).all():
                raise NotLinear(f"row {start + i} has coefficients that are not finite")
    return torch.cat(forms).reshape(rows + 1, size).numpy(), noises, scales


def _ratio(scaled: torch.Tensor, sample: torch.Tensor) -> float:
    """The c with ``scaled == c * sample``."""
    scale = float((scaled * sample).sum() / (sample * sample).sum())
    if not torch.allclose(scaled, scale * sample, rtol=1e-9, atol=0.0):
        raise NotLinear("its scale_model_input does more than scale the sample")
    return scale


def _fit(
    forms: Float64s, noises: Sequence[tuple[int, ...]]
) -> list[tuple[tuple[float, ...], tuple[float, ...], float]]:
    """(sample weights, output weights, noise weight) of every row in the smallest common window.

    The window of the whole run is chosen first, because it is what a run keeps in memory; within it
    each row takes the fewest terms.
    """
    targets, weights = forms[1:].copy(), []
    for i, drawn in enumerate(noises):
        used = [d for d in drawn if targets[i, d] != 0.0]
        if len(used) > 1:
            raise NotLinear("it adds more than one noise in a step")
        weights.append(float(targets[i, used[0]]) if used else 0.0)
        targets[i, used] = 0.0
    rows = range(len(targets))
    sizes = range(1, min(MAX_WINDOW, len(targets)) + 1)
    windows = sorted(((e, x) for e in sizes for x in sizes), key=lambda w: (max(w), sum(w), w[1]))
    window = next((w for w in windows if all(_solve(forms, targets[i], i, *w) for i in rows)), None)
    if window is None:
        noisy = " (it may reuse the noise of earlier steps)" if any(weights) else ""
        raise NotLinear(f"no window of {MAX_WINDOW} past samples and outputs explains it{noisy}")
    smaller = sorted(
        ((e, x) for e in range(window[0] + 1) for x in range(window[1] + 1)),
        key=lambda w: (sum(w), w[1]),
    )
    fits = [next(f for w in smaller if (f := _solve(forms, targets[i], i, *w))) for i in rows]
    return [(a, b, s) for (a, b), s in zip(fits, weights, strict=True)]


def _solve(
    forms: Float64s, target: Float64s, i: int, outputs: int, samples: int
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Weights of row i in one window, or None if the window does not reproduce ``target``.

    Output k is the unit vector 1 + i - k, so its weight is read off after the samples' weights have
    been fitted on all other coordinates.
    """
    outputs, samples = min(outputs, i + 1), min(samples, i + 1)
    free = np.ones(len(target), dtype=bool)
    taken = [1 + i - k for k in range(outputs)]
    free[taken] = False
    past = forms[[i - k for k in range(samples)]]
    scale = np.linalg.norm(past, axis=1)
    a = np.zeros(samples)
    if samples:
        columns = (past / scale[:, None]).T[free]
        a = np.linalg.lstsq(columns, target[free], rcond=1e-14)[0] / scale
    size = float(np.linalg.norm(target))
    if np.linalg.norm(target[free] - a @ past[:, free]) > FIT_TOLERANCE * size:
        return None
    b = target[taken] - a @ past[:, taken]
    a[np.abs(a) * scale < 1e-15 * size] = 0.0  # rounding of an exact zero
    b[np.abs(b) < 1e-15 * size] = 0.0
    return tuple(a.tolist()) or (0.0,), tuple(b.tolist()) or (0.0,)


def _residual(
    table: SolverTable, scheduler: Any, start: int, step_kwargs: Mapping[str, Any], wide: bool
) -> float:
    """Largest relative error of ``table`` against ``scheduler`` itself, over rows and magnitudes.

    Both roll out from the same random numbers; the first batch element has size 1, the second 1000.
    """
    generator = torch.Generator().manual_seed(20)
    size = torch.tensor([1.0, 1e3], dtype=torch.float64).reshape(2, 1, 1, 1)
    noise: list[torch.Tensor] = []

    def normal() -> torch.Tensor:
        return torch.randn(_PROBE_SHAPE, generator=generator, dtype=torch.float64)

    def draw(shape: Sequence[int]) -> torch.Tensor:
        noise.append(torch.randn(tuple(shape), generator=generator, dtype=torch.float64))
        return noise[-1]

    run = SchedulerRun(scheduler, start, step_kwargs)
    x = normal() * size * table.initial_scale
    samples, worst = [x], 0.0
    outputs: list[torch.Tensor] = []
    with torch.no_grad(), on_cpu():
        for i, row in enumerate(table.rows):
            outputs.insert(0, normal() * size)
            with NoiseMode(draw, wide):
                scaled, x = run.scaled(i, x), run.step(i, outputs[0], x)
            worst = max(worst, _deviation(row.input_scale * samples[0], scaled))
            following = row.noise_weight * noise[-1] if row.noise_weight else torch.zeros(())
            for weight, past in zip(row.sample_weights, samples, strict=False):
                following = following + weight * past
            for weight, past in zip(row.output_weights, outputs, strict=False):
                following = following + weight * past
            samples.insert(0, following)
            worst = max(worst, _deviation(following, x))
    return worst
