"""Watching a user's ``callback_on_step_end`` for edits that make held deltas stale."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor
from torch.utils import _pytree as pytree

from . import hook
from .fingerprint import adapter_state
from .run import PipelineRun

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
LEGACY = "callback"
"""diffusers' deprecated callback, ``callback(step, timestep, latents)``; can edit in place only."""


def watch_callback(
    call: Callable[..., Any],
    pipe: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    run: PipelineRun,
) -> Arguments:
    """The arguments of a pipeline call, its callbacks wrapped to report edits to ``run``.

    diffusers' own callback objects declare their ``tensor_inputs``; the pipeline reads that
    attribute only from them, so it is passed explicitly.
    """
    try:
        bound = inspect.signature(call).bind_partial(pipe, *args, **kwargs)
    except TypeError:
        return args, kwargs  # the pipeline itself will say what is wrong with its arguments
    extra = bound.arguments.get("kwargs", {})
    callback = bound.arguments.get("callback_on_step_end")
    run.watched = callback is not None or extra.get(LEGACY) is not None
    if extra.get(LEGACY) is not None:
        extra[LEGACY] = _watched_legacy(extra[LEGACY], run)
    if callback is not None:
        bound.arguments["callback_on_step_end"] = _watched(callback, run)
    if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
        bound.arguments["callback_on_step_end_tensor_inputs"] = list(callback.tensor_inputs)
    return bound.args[1:], bound.kwargs


def _watched(callback: Callable[..., Any], run: PipelineRun) -> Callable[..., Any]:
    def watched(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> Any:
        before = {name: _mark(value) for name, value in tensors.items()}
        given, adapters = dict(tensors), adapter_state(pipe, run.modules)
        result = _outside(callback, pipe, step, timestep, tensors)
        if adapter_state(pipe, run.modules) != adapters:
            run.adapters_changed()
        for name, value in given.items():
            if _edited(value, before[name]):
                run.invalidate()
        if isinstance(result, dict):
            # Also what was not asked for: the pipeline takes whatever it finds under a known name.
            for name, value in result.items():
                if value is not given.get(name):
                    run.invalidate()
        return result

    return watched


def _watched_legacy(callback: Callable[..., Any], run: PipelineRun) -> Callable[..., Any]:
    def watched(step: int, timestep: Any, latents: Any) -> Any:
        before = _mark(latents)
        result = _outside(callback, step, timestep, latents)
        if _edited(latents, before):
            run.invalidate()
        return result

    return watched


def _outside(callback: Callable[..., Any], *args: Any) -> Any:
    """Call the user's code outside the run: it may use the denoiser for purposes of its own."""
    token = hook.activate(None)
    try:
        return callback(*args)
    finally:
        hook.deactivate(token)


def _mark(value: Any) -> Any:
    """What tells an edit in place: the version, or a copy where inference mode keeps none.

    Edits that bypass the version (``tensor.data``, a numpy view) go unseen, as they do to autograd:
    what is held stays held. The sample itself counts as it is, however it was edited.
    """
    leaves = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
    return [(leaf, leaf.clone() if leaf.is_inference() else leaf._version) for leaf in leaves]


def _edited(value: Any, mark: Any) -> bool:
    leaves = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
    if len(leaves) != len(mark):
        return True
    for leaf, (before, seen) in zip(leaves, mark, strict=True):
        if leaf is not before:
            return True
        if not torch.equal(leaf, seen) if isinstance(seen, Tensor) else leaf._version != seen:
            return True
    return False
