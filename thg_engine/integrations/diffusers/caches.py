"""Block caches below a compiled denoiser: each batch size has a state of its own.

The caches of diffusers keep what blocks gave in the last call and take it for this one, whatever
its batch: what a row with both branches left behind broadcasts silently into one of the conditional
branch alone. So the first batch of a run keeps the context that the pipeline has set, and every
other batch has one of its own. Pipelines that call once per branch set one per branch themselves;
their batch is always the same.

Caches that do not let themselves be driven so have a reason, and their runs full guidance.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from diffusers.hooks.hooks import StateManager
from torch import Tensor

from ...fingerprint import foreign_cache

FASTER = "FasterCache leaves the unconditional branch out by itself; give its configuration"
FASTER_REMEDY = f"{FASTER} unconditional_batch_skip_range=1 to keep only its attention part"
BY_CALLS = "keeps one state for the calls of both branches"
SKIPS = "unconditional_batch_skip_range"
"""What only FasterCache's hook on the denoiser has."""
Undo = Callable[[], None]
F = TypeVar("F", bound=Callable[..., Any])
_OTHERS = "_thg_other_batches"


def host_only(function: F) -> F:
    """``function``, which torch.compile never looks into."""
    return cast(F, torch.compiler.disable(function))  # type: ignore[no-untyped-call]


class BlockCaches:
    """Caches of one denoiser, as a run sees them.

    Args:
        module: the denoiser; its hooks are looked for once.

    Attributes:
        is_empty: whether there are none.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        hooks = [hook for _, hook in _stateful_hooks(module)]
        managers = [value for hook in hooks for value in vars(hook).values()]
        found = {id(value): value for value in managers if isinstance(value, StateManager)}
        self._managers = list(found.values())
        self._hooks = [hook for hook in hooks if _keeps_one_state(hook)]
        self._faster = [hook for hook in hooks if hasattr(hook, SKIPS)]
        self._first = 0
        self.is_empty = not (self._managers or self._hooks or self._faster)

    def enter(self, rows: int) -> list[Undo]:
        """Make the states of a batch the current ones; what is returned undoes it."""
        self._first = self._first or rows
        if rows == self._first:
            return []
        undo: list[Undo] = []
        for manager in self._managers:
            context = _context(manager)
            undo.append(partial(manager.set_context, context))
            manager.set_context(_renamed(context, rows))
        for hook in self._hooks:
            undo.append(partial(setattr, hook, "state", hook.state))
            hook.state = _state_of(hook, rows)
        for hook in self._faster:
            # It would split the output into two branches.
            undo.append(partial(setattr, hook, "is_guidance_distilled", hook.is_guidance_distilled))
            hook.is_guidance_distilled = True
        return undo


_RUNS: WeakKeyDictionary[Any, dict[int, BlockCaches]] = WeakKeyDictionary()


class cache_context:  # noqa: N801  (a context manager, like diffusers' own of this name)
    """Around one call of a denoiser: its block caches use the states of this batch.

    Nothing happens where there are no caches.

    Args:
        run: the run in progress; its first batch keeps the context that the pipeline has set.
        module: the denoiser.
        args, kwargs: what it is called with.
    """

    def __init__(
        self, run: Any, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._caches = _RUNS.get(run, {}).get(id(module))
        self._values = (*args, *kwargs.values())
        self._undo: list[Undo] = []

    @host_only
    def __enter__(self) -> None:
        if self._caches is not None and not self._caches.is_empty:
            self._undo = self._caches.enter(_rows(self._values))

    @host_only
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for undo in self._undo:
            undo()


@host_only
def look(run: Any, module: torch.nn.Module) -> None:
    """Before each call of a denoiser: at the first of a run its caches are found and emptied.

    What a broken-off run has left behind is of no use to this one. Where a cache cannot be driven,
    the run is made one of full guidance.

    Args:
        run: the run in progress.
        module: the denoiser that is about to be called.
    """
    known = _RUNS.setdefault(run, {})
    if id(module) in known:
        return
    known[id(module)] = caches = BlockCaches(module)
    reason = why_not_driven(module, calls=getattr(run.record, "calls", False))
    if reason and reason not in run.fallbacks:
        run.refuse(reason)
    if not caches.is_empty:
        _reset(module)


def why_not_driven(module: torch.nn.Module, calls: bool = False) -> str:
    """Why calls of the conditional branch alone would upset a cache of ``module``; "" if none.

    Args:
        module: the denoiser.
        calls: whether the pipeline calls it once per branch.
    """
    found = foreign_cache(module)
    if found:
        return f"{found} keeps what the last call gave, whatever its batch and branch"
    for _, hook in _stateful_hooks(module):
        name = type(hook).__name__.removesuffix("Hook")
        if _skips_branch(hook):
            return FASTER_REMEDY
        managers = [value for value in vars(hook).values() if isinstance(value, StateManager)]
        shared = any(_name(_context(manager)) in (None, "inference") for manager in managers)
        if calls and (shared or hasattr(vars(hook).get("state"), "reset")):
            return f"{name} {BY_CALLS}"
    return ""


def _stateful_hooks(module: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, Any]]:
    """Hooks of diffusers below ``module`` and on it that keep something between calls."""
    for part in module.modules():
        registry = vars(part).get("_diffusers_hook")
        for hook in () if registry is None else registry.hooks.values():
            if hook._is_stateful or any(isinstance(v, StateManager) for v in vars(hook).values()):
                yield part, hook


def _keeps_one_state(hook: Any) -> bool:
    """Whether a hook knows no contexts.

    FasterCache's blocks are made for batches of one and of both branches, unless they are told that
    there is only one: they keep the conditional half and need to see all calls.
    """
    resets = hasattr(vars(hook).get("state"), "reset")
    return resets and bool(getattr(hook, "is_guidance_distilled", True))


def _skips_branch(hook: Any) -> bool:
    """Whether ``hook`` is FasterCache's on the denoiser and leaves branches out."""
    lowest, highest = getattr(hook, "unconditional_batch_timestep_skip_range", (0, 0))
    every = getattr(hook, SKIPS, 1)
    return every > 1 and highest > max(lowest, 0) and not hook.is_guidance_distilled


def _state_of(hook: Any, rows: int) -> Any:
    """The state of ``hook`` for a batch that is not the run's first.

    It lives in the first one's, and goes when that is reset: at the end of the pipeline's call.
    """
    first = hook.state
    others = vars(first).get(_OTHERS)
    if others is None:
        others = vars(first)[_OTHERS] = {}
        plain = first.reset

        def reset(*args: Any, **kwargs: Any) -> None:
            vars(first).pop(_OTHERS, None)
            vars(first).pop("reset", None)
            plain(*args, **kwargs)

        first.reset = reset
    if rows not in others:
        others[rows] = state = copy.copy(first)
        vars(state).pop(_OTHERS, None)
        vars(state).pop("reset", None)
        state.reset()
        if hasattr(hook, "block_skip_range"):
            # So that it computes: FasterCache reads an empty cache where the first call may skip.
            state.iteration = hook.block_skip_range
    return others[rows]


def _context(manager: Any) -> Any:
    """The context of a manager: a `CacheContext`, a string up to diffusers 0.40, or None."""
    held = vars(manager)
    return held["_context"] if "_context" in held else held["_current_context"]


def _name(context: Any) -> str | None:
    """The name of a context."""
    return context if context is None or isinstance(context, str) else str(context.name)


def _renamed(context: Any, rows: int) -> Any:
    """The context of another batch; None stays: the cache itself says what it wants then."""
    if context is None:
        return None
    name = f"{_name(context)}, batch {rows}"
    return name if isinstance(context, str) else replace(context, name=name)


def _rows(values: tuple[Any, ...]) -> int:
    """The batch of a call: that of its sample, which comes first."""
    return next((len(v) for v in values if isinstance(v, Tensor) and v.dim() > 1), 0)


def _reset(module: torch.nn.Module) -> None:
    """Empty the caches of the blocks; the contexts stay as the pipeline has set them.

    Hooks of the module itself stay: one that is around ours has begun with this call already.
    """
    for part, hook in _stateful_hooks(module):
        if part is module or not hook._is_stateful:
            continue
        managers = [value for value in vars(hook).values() if isinstance(value, StateManager)]
        contexts = [_context(manager) for manager in managers]
        hook.reset_state(part)
        for manager, context in zip(managers, contexts, strict=True):
            manager.set_context(context)
