"""The guidance hook on the denoiser: hands its calls to the run that is in progress.

The hook itself keeps no state: all of it is in the `PipelineRun` of the current call, which a
context variable carries, so calls in several threads, nested calls, and pipelines that share a
denoiser with a compiled one do not see each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar, cast
from weakref import WeakSet

import torch
from diffusers.hooks import HookRegistry, ModelHook

from .adapters import HOOK_NAME
from .caches import cache_context, look
from .run import PipelineRun

Forward = Callable[..., Any]
F = TypeVar("F", bound=Forward)


def _host_only(function: F) -> F:
    """``function``, never compiled, nor what it calls."""
    return cast(F, torch.compiler.disable(function))  # type: ignore[no-untyped-call]


def _transparent(function: F) -> F:
    """``function``, not compiled itself; what it calls may be."""
    return cast(F, torch.compiler.disable(function, recursive=False))  # type: ignore[no-untyped-call]


_ACTIVE: ContextVar[PipelineRun | None] = ContextVar("thg_engine_run", default=None)


def current_run() -> PipelineRun | None:
    """The run in progress in this thread."""
    return _ACTIVE.get()


def activate(run: PipelineRun | None) -> Any:
    """Make ``run`` the current one of this thread, or none; returns the token for `deactivate`."""
    return _ACTIVE.set(run)


def deactivate(token: Any) -> None:
    """End the run that `activate` began."""
    _ACTIVE.reset(token)


class GuidanceHook(ModelHook):  # type: ignore[misc]
    """Hands the call to the current run, or straight through when there is none.

    Attributes:
        owners: the controllers of the compiled pipelines that share the denoiser and still exist.
        inner: the ``forward`` below this hook.
        outer: the ``forward`` that this hook put in its place.
        made_registry: whether the module had no hook registry before.
    """

    def __init__(self, inner: Forward, made_registry: bool) -> None:
        super().__init__()
        self.owners: WeakSet[Any] = WeakSet()
        self.inner, self.made_registry = inner, made_registry
        self.outer: Forward | None = None

    @_transparent
    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Replacement of ``module.forward``."""
        run = _ACTIVE.get()
        original = self.fn_ref.original_forward
        # A hook that somebody's wrapper kept when it was replaced passes everything through.
        if run is None or not run.knows(module) or _hook_of(module) is not self:
            return original(*args, **kwargs)
        look(run, module)
        args, kwargs, finish = _prepare(run, module, args, kwargs)
        output = _replayed(run, original)
        if output is None:
            with cache_context(run, module, args, kwargs):
                output = original(*args, **kwargs)
        return _finish(finish, output)


@_host_only
def _prepare(run: PipelineRun, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return run.prepare(module, args, kwargs)


@_host_only
def _replayed(run: PipelineRun, forward: Forward) -> Any:
    return run.replayed(forward)


@_host_only
def _finish(finish: Callable[[Any], Any], output: Any) -> Any:
    return finish(output)


def attach(module: torch.nn.Module, owner: Any) -> None:
    """Hook ``module`` for ``owner``, once however many pipelines share it."""
    hook = _hook_of(module)
    owners: list[Any] = [owner]
    if hook is not None and _cut_off(module, hook):
        owners += remove(module)
        hook = None
    if hook is None:
        made = not hasattr(module, "_diffusers_hook")
        registry = HookRegistry.check_if_exists_or_initialize(module)
        hook = GuidanceHook(module.forward, made)
        registry.register_hook(hook, HOOK_NAME)
        hook.outer = module.forward
    hook.owners.update(owners)


def detach(module: torch.nn.Module, owner: Any) -> None:
    """Undo one `attach`; the last one leaves the module as it was before the first."""
    hook = _hook_of(module)
    if hook is None:
        return
    hook.owners.discard(owner)
    if not hook.owners:
        remove(module)


def _hook_of(module: torch.nn.Module) -> GuidanceHook | None:
    registry = getattr(module, "_diffusers_hook", None)
    return None if registry is None else registry.get_hook(HOOK_NAME)


def remove(module: Any) -> list[Any]:
    """Take the hook off entirely, wherever in the chain it is; returns its owners."""
    hook = _hook_of(module)
    if hook is None:
        return []
    registry: Any = module._diffusers_hook
    above, forward = _hook_above(registry), module.forward
    above_forward = None if above is None else above.forward
    registry.remove_hook(HOOK_NAME, recurse=False)
    if above is not None and above.original_forward is not None:
        # The registry cuts a hook with a forward of its own off together with the one below it.
        above.forward, above.original_forward = above_forward, hook.inner
    elif above is None and forward is not hook.outer:
        # Somebody outside the registry (accelerate's offload) has wrapped the module since.
        module.forward = forward
        if vars(module).get("_old_forward") is hook.outer:
            module._old_forward = hook.inner
    if hook.made_registry and not registry.hooks:
        del module._diffusers_hook
    if getattr(vars(module).get("forward"), "__func__", None) is type(module).forward:
        vars(module).pop("forward")
    return list(hook.owners)


def restore(module: torch.nn.Module, owners: Sequence[Any]) -> None:
    """Put the hook back for ``owners`` after `remove`."""
    for owner in owners:
        attach(module, owner)


def _cut_off(module: torch.nn.Module, hook: GuidanceHook) -> bool:
    """Whether somebody has put the module's own ``forward`` back past our hook.

    accelerate does when an offload from before `attach` is removed or renewed.
    """
    if _hook_above(module._diffusers_hook) is not None:
        return False
    forward: Any = module.forward
    while forward is not None and forward is not hook.outer:
        if getattr(forward, "__func__", None) is type(module).forward:
            return True
        forward = getattr(forward, "__wrapped__", None)
    return False


def _hook_above(registry: Any) -> Any:
    """The registry's record of the hook registered right after ours, None if ours is the last."""
    index = registry._hook_order.index(HOOK_NAME) + 1
    return registry._fn_refs[index] if index < len(registry._fn_refs) else None
