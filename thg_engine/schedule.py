r"""Noise schedules on the host: alpha_t, sigma_t and half log-SNR, all float64.

    x_t = alpha_t x_0 + sigma_t eps,      lambda_t = log(alpha_t / sigma_t)

Every schedule of diffusers is one of five kinds. T = ``num_train_timesteps``.

| kind | alpha_t, sigma_t | what the denoiser is told |
|---|---|---|
| ``vp`` | alpha_t**2 = alphas_cumprod[t], sigma_t**2 = 1 - alpha_t**2 | t in [0, T - 1] |
| ``ve`` | alpha_t = 1, sigma_t = sigma_ve of ``vp`` at t (Karras' state x_t / alpha_t) | t |
| ``edm`` | alpha_t = 1, sigma_t = exp(t / r) | t = r log(sigma), r = 1/4 (Karras' c_noise) |
| ``flow`` | sigma_t = t / T, alpha_t = 1 - sigma_t (``reverse``: exchanged) | t in [0, T] |
| ``trig`` | alpha_t = cos(r t), sigma_t = sin(r t) | t in [0, pi / (2 r)] |

Sources: Song et al. 2021 (arXiv 2011.13456), Karras et al. 2022 (2206.00364), Lipman et al. 2023
(2210.02747), Lu and Song 2024 (TrigFlow, 2410.11081).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import InvalidArgument

KINDS = ("vp", "ve", "edm", "flow", "trig")
Float64s = NDArray[np.float64]


@dataclass(frozen=True)
class Point:
    r"""One point of a sampling grid: x = alpha_t x_0 + sigma_t eps, host float64.

    Attributes:
        timestep: training time as the denoiser is told it.
        alpha_t: signal scale, >= 0.
        sigma_t: noise scale, >= 0.
    """

    timestep: float
    alpha_t: float
    sigma_t: float

    def __post_init__(self) -> None:
        for name in ("alpha_t", "sigma_t"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0.0):
                raise InvalidArgument(name, value, "give a finite scale of at least 0.")
        if self.alpha_t == self.sigma_t == 0.0:
            raise InvalidArgument("alpha_t", 0.0, "signal and noise scale cannot both be 0.")

    @property
    def lambda_t(self) -> float:
        """Half log-SNR log(alpha_t / sigma_t): +inf where sigma_t = 0, -inf where alpha_t = 0."""
        if self.sigma_t == 0.0:
            return math.inf
        if self.alpha_t == 0.0:
            return -math.inf
        return math.log(self.alpha_t) - math.log(self.sigma_t)


@dataclass(frozen=True)
class NoiseSchedule:
    r"""Signal and noise scale as functions of the denoiser's timestep.

    Attributes:
        kind: one of `KINDS` (table in the module's docstring).
        num_train_timesteps: T, the length of the training time axis.
        prediction_type: diffusers' string.
        log_snr: half log-SNR at t = 0, 1, ..., T - 1 (kinds ``vp`` and ``ve``), strictly falling;
            between them log-SNR is linear in t, as in diffusers' ``_sigma_to_t``. The last may be
            -inf (zero terminal SNR): alpha_t is then linear in t over the last interval.
        rate: r of the kinds ``edm`` and ``trig`` (there: radians per unit of t).
        reverse: kind ``flow`` with a clock that runs from noise at 0 to data at T.
    """

    kind: str
    num_train_timesteps: int = 1000
    prediction_type: str = "epsilon"
    log_snr: tuple[float, ...] = field(default=(), repr=False)
    rate: float = 0.25
    reverse: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InvalidArgument("kind", self.kind, f"use one of {', '.join(KINDS)}.")
        if self.kind in ("vp", "ve"):
            values = np.asarray(self.log_snr, dtype=np.float64)
            falls = values.size > 1 and bool(np.all(values[1:] < values[:-1]))
            if not falls or not np.all(np.isfinite(values[:-1])):
                remedy = "give two or more half log-SNRs that fall; only the last may be -inf."
                raise InvalidArgument("log_snr", self.log_snr[:4], remedy)

    @classmethod
    def from_alphas_cumprod(
        cls, alphas_cumprod: Any, kind: str = "vp", prediction_type: str = "epsilon"
    ) -> NoiseSchedule:
        """The ``vp`` (or ``ve``) schedule of alpha_t**2, shape ``(T,)``, falling within (0, 1)."""
        values = _float64(alphas_cumprod)
        with np.errstate(divide="ignore", invalid="ignore"):
            log_snr = 0.5 * (np.log(values) - np.log1p(-values))
        return cls(kind, len(values), prediction_type, tuple(log_snr.tolist()))

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> NoiseSchedule:
        """The schedule in which ``scheduler`` keeps its samples.

        Args:
            scheduler: any diffusers-like scheduler; its ``config``, ``alphas_cumprod`` and class
                attributes are read, nothing is called or changed.
        Raises:
            InvalidArgument: no known kind fits; names the class.
        """
        return _from_scheduler(scheduler)

    def point(self, t: float) -> Point:
        """Signal and noise scale at ``t``.

        Raises:
            InvalidArgument: ``t`` is not finite or outside the schedule.
        """
        t = float(t)
        if self.kind == "edm":
            self._check(t, -math.inf, 700.0 * self.rate)  # exp(700) is still finite
            return Point(t, 1.0, math.exp(t / self.rate))
        if self.kind == "flow":
            self._check(t, 0.0, float(self.num_train_timesteps))
            share = t / self.num_train_timesteps
            return Point(t, share, 1.0 - share) if self.reverse else Point(t, 1.0 - share, share)
        if self.kind == "trig":
            self._check(t, 0.0, 0.5 * math.pi / self.rate * (1.0 + 1e-12))
            alpha_t = math.cos(self.rate * t)  # 6e-17 at the end of the axis, where 0 is meant
            return Point(t, alpha_t if alpha_t > 1e-12 else 0.0, math.sin(self.rate * t))
        self._check(t, 0.0, len(self.log_snr) - 1.0)
        alpha_t, sigma_t = self._variance_preserving(t)
        if self.kind == "vp":
            return Point(t, alpha_t, sigma_t)
        if alpha_t == 0.0:
            raise InvalidArgument("t", t, "sigma_ve is infinite where alpha_t = 0; start later.")
        return Point(t, 1.0, sigma_t / alpha_t)

    def alpha_t(self, t: float) -> float:
        """Signal scale at ``t``."""
        return self.point(t).alpha_t

    def sigma_t(self, t: float) -> float:
        """Noise scale at ``t``."""
        return self.point(t).sigma_t

    def lambda_t(self, t: float) -> float:
        """Half log-SNR at ``t``, dimensionless."""
        return self.point(t).lambda_t

    def timestep(self, lambda_: float) -> float:
        """The t with ``lambda_t(t) == lambda_``: the inverse of `lambda_t`.

        A half log-SNR beyond either end of the schedule gives that end's t, as diffusers does.

        Raises:
            InvalidArgument: ``lambda_`` is NaN, or infinite where the time axis has no such end.
        """
        lambda_ = float(lambda_)
        if math.isnan(lambda_) or (self.kind == "edm" and math.isinf(lambda_)):
            raise InvalidArgument("lambda_", lambda_, "give a finite half log-SNR.")
        if self.kind == "edm":
            return -self.rate * lambda_
        if self.kind == "flow":
            return self.num_train_timesteps * _sigmoid(lambda_ if self.reverse else -lambda_)
        if self.kind == "trig":
            return math.atan(math.exp(min(-lambda_, 700.0))) / self.rate
        values = self.log_snr
        last = len(values) - 1
        if math.isinf(values[-1]) and lambda_ < values[-2]:  # last interval: alpha_t linear in t
            share = math.sqrt(_sigmoid(2.0 * lambda_) / _sigmoid(2.0 * values[-2]))
            return last - share
        grid = np.arange(last + 1, dtype=np.float64)
        return float(np.interp(lambda_, np.asarray(values)[::-1], grid[::-1]))

    def _check(self, t: float, low: float, high: float) -> None:
        if not (math.isfinite(t) and low <= t <= high):
            remedy = f"a {self.kind!r} schedule is defined for t in [{low:g}, {high:g}]."
            raise InvalidArgument("t", t, remedy)

    def _variance_preserving(self, t: float) -> tuple[float, float]:
        """(alpha_t, sigma_t) with alpha_t**2 + sigma_t**2 = 1 at a t inside the schedule."""
        low = min(int(t), len(self.log_snr) - 2)
        before, after, share = self.log_snr[low], self.log_snr[low + 1], t - low
        if math.isinf(after):
            alpha_t = (1.0 - share) * math.sqrt(_sigmoid(2.0 * before))
            return alpha_t, math.sqrt(1.0 - alpha_t**2)
        lambda_ = before + share * (after - before)
        return math.sqrt(_sigmoid(2.0 * lambda_)), math.sqrt(_sigmoid(-2.0 * lambda_))


def grid_points(scheduler: Any) -> tuple[Point, ...]:
    """The R + 1 points that a run of ``scheduler`` visits, in order of execution.

    One point per model call (two-stage solvers such as Heun visit points twice) and the final one,
    whose timestep is 0 by convention (T where time runs backwards): nothing is evaluated there.
    Scales are those of the samples that the scheduler hands out, e.g. alpha_t = 1 for Euler.

    Args:
        scheduler: a diffusers-like scheduler whose ``set_timesteps`` has been called.
    Raises:
        InvalidArgument: the scheduler has no timesteps or is of no known kind.
    """
    kind = _kind(scheduler)
    timesteps = model_timesteps(scheduler)
    if kind == "trig":
        return _trig_points(scheduler, timesteps)
    if getattr(scheduler, "sigmas", None) is not None:
        return _sigma_points(scheduler, kind, timesteps)
    return _cumprod_points(scheduler, timesteps)


def model_timesteps(scheduler: Any) -> Float64s:
    """The timestep of every model call of a run, shape ``(R,)``.

    Raises:
        InvalidArgument: ``set_timesteps`` has not been called.
    """
    timesteps = getattr(scheduler, "timesteps", None)
    if timesteps is None or len(timesteps) == 0:
        remedy = "call its set_timesteps first."
        raise InvalidArgument("scheduler", type(scheduler).__name__, remedy)
    values = _float64(timesteps)
    # TrigFlow lists the end of the run among its timesteps; no model call happens there.
    return values[:-1] if setting(scheduler, "prediction_type") == "trigflow" else values


def prediction_type(scheduler: Any) -> str:
    """What the denoiser of ``scheduler`` predicts, as one of diffusers' four strings.

    Schedulers without the setting are flow matching (``flow_prediction``) or use the trigonometric
    schedule, whose network predicts cos(t) eps - sin(t) x_0 (``v_prediction``).
    """
    name = setting(scheduler, "prediction_type")
    kind = _kind(scheduler)
    if name is None or name == "trigflow":
        return {"flow": "flow_prediction", "trig": "v_prediction"}.get(kind, "epsilon")
    return "sample" if name == "original_sample" else str(name)


def _trig_points(scheduler: Any, timesteps: Float64s) -> tuple[Point, ...]:
    """Points of the trigonometric schedules: TrigFlow, and iPNDM's own cosine."""
    if setting(scheduler, "prediction_type") == "trigflow":
        scale = float(setting(scheduler, "sigma_data", 1.0))  # eps there has this deviation
        angles = _float64(scheduler.timesteps)
        alphas, sigmas = np.cos(angles), scale * np.sin(angles)
    else:
        alphas, sigmas = _float64(scheduler.alphas), _float64(scheduler.betas)
    return _points(timesteps, np.maximum(alphas, 0.0), sigmas, 0.0)


def _sigma_points(scheduler: Any, kind: str, timesteps: Float64s) -> tuple[Point, ...]:
    """Points of a scheduler that keeps its grid in ``sigmas``."""
    sigmas = _float64(scheduler.sigmas)
    rows = len(timesteps)
    if len(sigmas) <= rows:  # a run that ends on a row without a step, e.g. LTX with its own sigmas
        sigmas = np.pad(sigmas, (0, rows + 1 - len(sigmas)), mode="edge")
    sigmas = np.append(sigmas[:rows], sigmas[-1])
    between = getattr(scheduler, "sigmas_interpol", None)
    if between is not None:  # DPM-Solver-2: every second call is made at an intermediate point
        behind = 0 if getattr(scheduler, "sigmas_down", None) is None else 1
        sigmas[1:rows:2] = _float64(between)[1 - behind : rows - behind : 2]
    if kind == "flow":
        if setting(scheduler, "invert_sigmas"):
            return _points(timesteps, sigmas, 1.0 - sigmas, float(_train_steps(scheduler)))
        final = 0.0 if setting(scheduler, "num_train_timesteps") else 1.0
        return _points(timesteps, 1.0 - sigmas, sigmas, final)
    if kind == "vp":
        alphas = 1.0 / np.sqrt(1.0 + sigmas**2)
        return _points(timesteps, alphas, alphas * sigmas, 0.0)
    return _points(timesteps, np.ones_like(sigmas), sigmas, 0.0)


def _cumprod_points(scheduler: Any, timesteps: Float64s) -> tuple[Point, ...]:
    """Points of a scheduler that indexes ``alphas_cumprod`` with its timesteps."""
    cumprod = _alphas_cumprod(scheduler)
    indices = timesteps.astype(np.int64)
    if np.any(indices < 0) or np.any(indices >= len(cumprod)):
        remedy = f"its timesteps must index alphas_cumprod, 0 to {len(cumprod) - 1}."
        raise InvalidArgument("scheduler", type(scheduler).__name__, remedy)
    levels = cumprod[indices]
    first = getattr(scheduler, "initial_alpha_cumprod", None)
    if first is not None:  # DDIM inversion: the model is told the *next* level
        gap = len(cumprod) // int(scheduler.num_inference_steps)
        start = cumprod[indices[0] - gap] if indices[0] >= gap else float(first)
        levels = np.append(start, levels)
    else:
        levels = np.append(levels, _final_level(scheduler, cumprod, int(indices[-1])))
    return _points(timesteps, np.sqrt(levels), np.sqrt(1.0 - levels), 0.0)


def _final_level(scheduler: Any, cumprod: Float64s, last: int) -> float:
    """alpha_t**2 of the sample that the last step hands out."""
    final = getattr(scheduler, "final_alpha_cumprod", None)
    if final is None or hasattr(scheduler, "get_scalings_for_boundary_condition_discrete"):
        return 1.0  # DDPM and consistency models end on the denoised sample
    if hasattr(scheduler, "custom_timesteps"):
        return float(cumprod[0])  # TCD steps to timestep 0
    following = last - len(cumprod) // int(scheduler.num_inference_steps)
    return float(cumprod[following]) if following >= 0 else float(final)


def _points(
    timesteps: Float64s, alphas: Float64s, sigmas: Float64s, last: float
) -> tuple[Point, ...]:
    """R + 1 points of R timesteps; ``last`` is the timestep of the final one."""
    times = np.append(timesteps, last)
    rows = zip(times.tolist(), alphas.tolist(), sigmas.tolist(), strict=True)
    return tuple(Point(*row) for row in rows)


def _kind(scheduler: Any) -> str:
    """Which of `KINDS` the samples of ``scheduler`` follow."""
    cumprod = hasattr(scheduler, "alphas_cumprod") or hasattr(scheduler, "sqrt_alphas_cumprod")
    if setting(scheduler, "prediction_type") == "trigflow":
        return "trig"
    if hasattr(scheduler, "ets") and not cumprod:
        return "trig"
    if setting(scheduler, "use_flow_sigmas"):
        return "flow"
    continuous = setting(scheduler, "timestep_type") == "continuous"
    preconditioned = setting(scheduler, "sigma_data") is not None and hasattr(scheduler, "sigmas")
    if preconditioned or (continuous and setting(scheduler, "prediction_type") == "v_prediction"):
        return "edm"
    if cumprod:
        keeps_ratio = hasattr(scheduler, "sigmas") and hasattr(scheduler, "scale_model_input")
        return "ve" if keeps_ratio and not hasattr(scheduler, "_sigma_to_alpha_sigma_t") else "vp"
    sigmas = getattr(scheduler, "sigmas", None)
    values = _float64([] if sigmas is None else sigmas)
    if values.size and values.min() >= 0.0 and values.max() < 1.001:
        return "flow"
    remedy = "no noise schedule found in it (alphas_cumprod, or sigmas after set_timesteps)."
    raise InvalidArgument("scheduler", type(scheduler).__name__, remedy)


def _from_scheduler(scheduler: Any) -> NoiseSchedule:
    """Body of `NoiseSchedule.from_scheduler`."""
    kind, predicts, steps = _kind(scheduler), prediction_type(scheduler), _train_steps(scheduler)
    if kind in ("vp", "ve"):
        return NoiseSchedule.from_alphas_cumprod(_alphas_cumprod(scheduler), kind, predicts)
    if kind == "flow":
        reverse = bool(setting(scheduler, "invert_sigmas")) or steps == 1
        return NoiseSchedule(kind, steps, predicts, reverse=reverse)
    if kind == "trig":
        scale = float(setting(scheduler, "sigma_data", 1.0))
        rate = 1.0 if setting(scheduler, "prediction_type") == "trigflow" else 0.5 * math.pi
        if scale != 1.0:
            remedy = "its noise is scaled by sigma_data; use grid_points for its own grid."
            raise InvalidArgument("sigma_data", scale, remedy)
        return NoiseSchedule(kind, steps, predicts, rate=rate)
    timesteps = model_timesteps(scheduler)
    logs = np.log(_float64(scheduler.sigmas)[: len(timesteps)])
    rate = float(timesteps[0] / logs[0])
    if not np.allclose(timesteps, rate * logs, rtol=1e-4, atol=1e-4 * abs(rate)):
        remedy = "its timesteps are not proportional to log(sigma); use grid_points."
        raise InvalidArgument("scheduler", type(scheduler).__name__, remedy)
    return NoiseSchedule(kind, steps, predicts, rate=round(rate, 3))


def _alphas_cumprod(scheduler: Any) -> Float64s:
    """alpha_t**2 over training time, from whichever table the scheduler keeps."""
    values = getattr(scheduler, "alphas_cumprod", None)
    return _float64(scheduler.sqrt_alphas_cumprod) ** 2 if values is None else _float64(values)


def _train_steps(scheduler: Any) -> int:
    """T; 1 for a scheduler without the setting, whose time runs from 0 (noise) to 1 (data)."""
    return int(setting(scheduler, "num_train_timesteps", 1) or 1)


def setting(scheduler: Any, name: str, default: Any = None) -> Any:
    """One entry of ``scheduler.config``, a mapping or a namespace."""
    config = getattr(scheduler, "config", None)
    if isinstance(config, Mapping):
        return config.get(name, default)
    return getattr(config, name, default)


def _sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)) without overflow."""
    if x >= 0.0:
        return 1.0 / (1.0 + math.exp(-x))
    return math.exp(x) / (1.0 + math.exp(x))


def _float64(values: Any) -> Float64s:
    """A tensor, array or sequence as a float64 host array."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().double().numpy()
    return np.array(values, dtype=np.float64)
