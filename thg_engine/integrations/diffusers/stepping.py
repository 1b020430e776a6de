"""``scheduler.step`` of a pipeline in progress, answered by the run's fused step.

While a compiled pipeline runs, its scheduler is an instance of a subclass of its class, made once
per class and under the same name, whose ``step`` asks the current run first, and so does
``scale_model_input``, which may read what only the scheduler's own step would have kept. Where the
run has no answer, or the scheduler is a copy or somebody else's, its own code runs as ever.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from diffusers.utils import BaseOutput
from torch import Tensor

from . import hook
from .deferred import BranchSum
from .run import PipelineRun

_lock = threading.Lock()
_users: Counter[int] = Counter()
"""How many runs in progress drive a scheduler, by its id; it lives as long as they do."""


class SteppedScheduler:
    """Mixin of every class made here. Copies and pickles are of the scheduler's own class."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        own = tuple(base_class(self) if value is type(self) else value for value in reduced[1])
        return (reduced[0], own, *reduced[2:])


@dataclass
class SteppedOutput(BaseOutput):  # type: ignore[misc]
    """What ``scheduler.step`` returns for a fused row: the sample, and nothing else."""

    prev_sample: Tensor

    def __getattr__(self, name: str) -> Any:
        remedy = "compile(pipe, fused=False) leaves the step to the scheduler"
        raise AttributeError(f"a fused step makes no {name!r}; {remedy}.")


@contextmanager
def stepping(scheduler: Any) -> Iterator[None]:
    """Let runs answer for ``scheduler.step``; its class is as before afterwards."""
    with _lock:
        if not _users[id(scheduler)]:
            base: Any = type(scheduler)
            scheduler.__class__ = _stepped_class(base)
        _users[id(scheduler)] += 1
    try:
        yield
    finally:
        with _lock:
            _users[id(scheduler)] -= 1
            if not _users[id(scheduler)]:
                del _users[id(scheduler)]
                scheduler.__class__ = base_class(scheduler)


def base_class(scheduler: Any) -> type[Any]:
    """The scheduler's own class, also while a run drives it."""
    found: type[Any] = type(scheduler)
    return found.__mro__[2] if issubclass(found, SteppedScheduler) else found


def _scaling(original: Any) -> Any:
    """``scale_model_input`` that takes the scale from the row once a fused step has been taken."""

    @functools.wraps(original)
    def scale_model_input(self: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        run = hook.current_run()
        if run is not None and run.pipe.scheduler is self and run.fused is not None:
            return run.fused.scaled(sample)
        return original(self, sample, *args, **kwargs)

    return scale_model_input


def _unscaled(self: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
    """For pipelines that compare the type of a scheduler that has none: ours is another."""
    return sample


@functools.cache
def _stepped_class(base: type[Any]) -> type[Any]:
    """The subclass of ``base`` whose ``step`` asks the run; carries the name of ``base``."""
    original = base.step
    further = list(inspect.signature(original).parameters)[4:]

    @functools.wraps(original)
    def step(
        self: Any, model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any
    ) -> Any:
        run = hook.current_run()
        following = None
        if run is not None and run.pipe.scheduler is self:
            named = {**dict(zip(further, args, strict=False)), **kwargs}
            following = _fused(run, self, model_output, timestep, sample, named)
        if following is not None:
            whole = named.get("return_dict", True)
            return SteppedOutput(prev_sample=following) if whole else (following,)
        if isinstance(model_output, BranchSum):
            model_output = model_output.value()
        return original(self, model_output, timestep, sample, *args, **kwargs)

    body: dict[str, Any] = {
        "step": step,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    scales = getattr(base, "scale_model_input", None)
    body["scale_model_input"] = _unscaled if scales is None else _scaling(scales)
    return type(base.__name__, (SteppedScheduler, base), body)


def _fused(
    run: PipelineRun,
    scheduler: Any,
    model_output: Tensor,
    timestep: Any,
    sample: Tensor,
    kwargs: dict[str, Any],
) -> Tensor | None:
    """One fused step; the scheduler's own counter goes on, since its other methods read it."""
    following = run.step(model_output, sample, kwargs)
    if following is not None and hasattr(scheduler, "_step_index"):
        if scheduler._step_index is None:
            scheduler._init_step_index(timestep)
        scheduler._step_index += 1
    return following
