"""What a call of a pipeline in progress has been asked for; not every pipeline keeps it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ...schedule import model_timesteps
from .adapter_types import AdapterRecord


def call_arguments(
    call: Callable[..., Any], pipe: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of a pipeline's call by name, defaults included."""
    try:
        bound = inspect.signature(call).bind_partial(pipe, *args, **kwargs)
    except TypeError:
        return {}  # the pipeline itself will say what is wrong with its arguments
    bound.apply_defaults()
    return dict(bound.arguments)


def has_own_grid(arguments: Mapping[str, Any]) -> bool:
    """Whether the caller has given timesteps or sigmas."""
    return any(arguments.get(name) is not None for name in ("timesteps", "sigmas"))


def scale_of(pipe: Any, record: AdapterRecord, arguments: Mapping[str, Any]) -> float:
    """w of the call at this moment; its mean where frames have one each."""
    kept = hasattr(type(pipe), record.scale)
    scale = getattr(pipe, record.scale) if kept else arguments[record.scale]
    mean = float(scale.float().mean()) if isinstance(scale, Tensor) else float(scale)
    return mean + record.anchor


def is_guided(pipe: Any, record: AdapterRecord, arguments: Mapping[str, Any]) -> bool:
    """Whether the pipeline runs both branches at this moment."""
    if hasattr(type(pipe), "do_classifier_free_guidance"):
        return bool(pipe.do_classifier_free_guidance)
    return scale_of(pipe, record, arguments) > 1.0


def num_rows_of(pipe: Any, arguments: Mapping[str, Any]) -> int:
    """Model calls of the run; image-to-image takes the last ones of its schedule only.

    Args:
        pipe: its timesteps are set.
        arguments: of the call, for pipelines that keep no count.
    """
    if hasattr(type(pipe), "num_timesteps"):
        return int(pipe.num_timesteps)
    num_rows = len(model_timesteps(pipe.scheduler))
    strength = arguments.get("strength", arguments.get("inpaint_strength"))
    if strength is None:
        return num_rows
    num_steps = int(arguments["num_inference_steps"])
    left_out = num_steps - min(int(num_steps * strength), num_steps)
    return num_rows - left_out * int(getattr(pipe.scheduler, "order", 1))
