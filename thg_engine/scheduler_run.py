"""Driving a third-party scheduler: copies, a run as pipelines drive it, and its noise.

A scheduler is whatever has ``timesteps`` and ``step``; nothing here imports diffusers.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

Draw = Callable[[Sequence[int], torch.dtype | None], torch.Tensor]
_PASSING = ("is_scale_input_called", "_use_default_values")  # state without influence on a run


class NotLinear(Exception):
    """Internal: why the step is not of the form that a row can hold."""


class SchedulerRun:
    """One run of a scheduler, driven as diffusers' pipelines drive it."""

    SUPPLIED = ("old_pred_original_sample", "timestep_back")  # CogVideoX' own calling convention

    def __init__(self, scheduler: Any, start: int, step_kwargs: Mapping[str, Any]) -> None:
        self.scheduler, self.kwargs = scheduler, dict(step_kwargs)
        self.timesteps = list(scheduler.timesteps)[start:]
        self.parameters = inspect.signature(scheduler.step).parameters
        if "return_dict" in self.parameters:
            self.kwargs["return_dict"] = False
        self.intervals: list[tuple[float, float]] = []
        self.shape: torch.Size = torch.Size()
        self.denoised: torch.Tensor | None = None
        if hasattr(scheduler, "noise_sampler"):
            scheduler.noise_sampler = self._brownian

    def scaled(self, i: int, sample: torch.Tensor) -> torch.Tensor:
        """What the denoiser is fed in call ``i``."""
        if not hasattr(self.scheduler, "scale_model_input"):
            return sample
        scaled: torch.Tensor = self.scheduler.scale_model_input(sample, self.timesteps[i])
        return scaled

    def step(self, i: int, output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """The sample after call ``i``."""
        t, self.shape = self.timesteps[i], sample.shape
        if "prev_timestep" in self.parameters:  # unCLIP is told where it goes
            ahead = self.timesteps[i + 1] if i + 1 < len(self.timesteps) else None
            self.kwargs["prev_timestep"] = ahead
        inputs: tuple[Any, ...] = (output, t, sample)
        if "old_pred_original_sample" in self.parameters:  # the caller keeps CogVideoX' history
            back = self.timesteps[i - 1] if i else None
            inputs = (output, self.denoised, t, back, sample)
        try:
            result = self.scheduler.step(*inputs, **self.kwargs)
        except NotLinear:
            raise
        except Exception as error:  # a third-party step may raise anything on such inputs
            raise NotLinear(f"its step raises {type(error).__name__}: {error}") from error
        if not hasattr(result, "prev_sample"):
            self.denoised = result[1] if len(result) > 1 else None
            result = result[0]
        following: torch.Tensor = getattr(result, "prev_sample", result)
        return following

    def _brownian(self, start: Any, end: Any) -> torch.Tensor:
        """Stands in for a Brownian noise sampler: independent as long as no interval overlaps."""
        low, high = sorted((float(start), float(end)))
        if any(low < b and a < high for a, b in self.intervals):
            raise NotLinear("it reuses Brownian noise, which a noise column cannot hold")
        self.intervals.append((low, high))
        return torch.randn(self.shape, dtype=torch.float64)  # `NoiseMode` sees this call


class NoiseMode(TorchFunctionMode):
    """While active, normal noise comes from ``draw``, and float32 means float64 if ``wide``.

    ``wide`` undoes the casts of samples to float32 that many steps make. Coefficients that a
    scheduler computes from float32 tables stay as they are: 0-dim tensors do not promote.
    """

    NORMAL = frozenset({torch.randn, torch.randn_like})
    OTHER = frozenset(
        {torch.rand, torch.rand_like, torch.randint, torch.randint_like, torch.randperm}
        | {torch.normal, torch.multinomial, torch.bernoulli}
        | {torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.exponential_}
    )
    CASTS = frozenset({torch.Tensor.to, torch.Tensor.type, torch.Tensor.float})
    WATCHED = NORMAL | OTHER | CASTS

    def __init__(self, draw: Draw, wide: bool) -> None:
        super().__init__()
        self.draw, self.wide = draw, wide

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in self.WATCHED:  # nearly every call, and LMS makes 100,000 of them
            return func(*args, **kwargs)
        if func in self.OTHER:
            raise NotLinear(f"it draws random numbers by torch's {func.__name__}, not randn")
        if func in self.NORMAL:
            like = func is torch.randn_like
            shape = args[0].shape if like else kwargs.get("size", args)
            nested = len(shape) == 1 and not isinstance(shape[0], int)
            dtype = kwargs.get("dtype", args[0].dtype if like else None)
            return self.draw(shape[0] if nested else shape, dtype)
        if self.wide:
            func = torch.Tensor.double if func is torch.Tensor.float else func
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()}
        return func(*args, **kwargs)


def on_cpu() -> AbstractContextManager[Any]:
    """Makes the CPU the default device; costs nothing where it already is (a mode costs time)."""
    return nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")


def clone(value: Any, float64: bool = False) -> Any:
    """A CPU copy of a scheduler (or of a value inside one); float tensors as float64 on request."""
    if isinstance(value, torch.Tensor):
        value = value.detach().to("cpu", copy=True)
        return value.double() if float64 and value.is_floating_point() else value
    if isinstance(value, np.ndarray):
        wide = float64 and np.issubdtype(value.dtype, np.floating)
        return value.astype(np.float64 if wide else value.dtype)
    if type(value) in (list, tuple):
        return type(value)(clone(item, float64) for item in value)
    if type(value) is dict:
        return {k: clone(item, float64) for k, item in value.items()}
    if callable(getattr(value, "step", None)):  # a scheduler; its frozen config is shared
        twin = copy.copy(value)
        state = {k: clone(v, float64) for k, v in vars(value).items()}
        vars(twin).update(state)
        return twin
    return value if isinstance(value, Mapping) else copy.deepcopy(value)


def fingerprint(scheduler: Any, arguments: Any) -> str | None:
    """A key of all that decides the table, or None where something in it has no canonical form."""
    digest = hashlib.sha256()

    def add(value: Any) -> bool:
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu()
            value = value.numpy() if value.dtype is not torch.bfloat16 else value.double().numpy()
        if isinstance(value, (np.ndarray, np.generic)):
            digest.update(f"array {value.dtype} {value.shape}".encode())
            digest.update(value.tobytes())
            return value.dtype != object
        if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
            digest.update(f"{type(value).__name__} {value!r};".encode())
            return True
        if isinstance(value, Mapping):
            kept = [item for item in value.items() if item[0] not in _PASSING]
            items = sorted(kept, key=lambda item: repr(item[0]))
            return all(add(k) and add(v) for k, v in [(None, len(items)), *items])
        if isinstance(value, (list, tuple)):
            return all(add(item) for item in [type(value).__name__, len(value), *value])
        if callable(getattr(value, "step", None)):
            return add(f"{type(value).__module__}.{type(value).__qualname__}") and add(vars(value))
        return False

    complete = add(scheduler) and add(arguments)
    return digest.hexdigest() if complete else None
