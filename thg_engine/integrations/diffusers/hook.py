r"""The guidance hook: on tortoise-only steps the conditional branch runs alone.

The hook answers with a reconstructed unconditional output

    u_hat = c - delta_hat,

so the pipeline's own combine ``u + w (c - u)``, its rescaling and its scheduler run unchanged.
Where both branches are evaluated without boost, the denoiser's output passes through untouched,
bit by bit.

The hook itself keeps no state: all of it is in the `PipelineRun` of the current call, which a
context variable carries, so calls in several threads, nested calls, and pipelines that share a
denoiser with a compiled one do not see each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any, TypeVar, cast
from weakref import WeakSet

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor
from torch.utils import _pytree as pytree

from ...guidance import GuidanceRow
from ...plan import SamplingPlan
from .adapters import AdapterRecord

HOOK_NAME = "thg_engine.guidance"
Forward = Callable[..., Any]
F = TypeVar("F", bound=Forward)


def _host_only(function: F) -> F:
    """``function``, never compiled, nor what it calls."""
    return cast(F, torch.compiler.disable(function))  # type: ignore[no-untyped-call]


def _transparent(function: F) -> F:
    """``function``, not compiled itself; what it calls may be."""
    return cast(F, torch.compiler.disable(function, recursive=False))  # type: ignore[no-untyped-call]


class CannotSlice(Exception):
    """Why a call cannot run on half of its batch."""


class PipelineRun:
    """State of one call of a compiled pipeline.

    Args:
        pipe: the pipeline that runs.
        module: its denoiser.
        record: its adapter record.
        make_plan: gives guidance rows and plan once the pipeline has set its timesteps.

    Attributes:
        plan: plan of this run; None before the first guided model call.
        nfe: denoiser evaluations per sample so far.
        refreshes: rows that evaluated both branches although the plan holds a delta there.
        fallbacks: reasons for which rows ran full guidance against the plan.
    """

    def __init__(
        self,
        pipe: Any,
        module: torch.nn.Module,
        record: AdapterRecord,
        make_plan: Callable[[], tuple[tuple[GuidanceRow, ...], SamplingPlan]],
    ) -> None:
        self.pipe, self.module, self.record = pipe, module, record
        self._make_plan: Any = make_plan
        self.plan: SamplingPlan | None = None
        self.nfe = self.calls = self.refreshes = 0
        self.fallbacks: list[str] = []
        self._rows: tuple[GuidanceRow, ...] = ()
        self._deltas: list[Tensor] = []
        self._conds: list[Tensor] = []
        self._embeds: tuple[Tensor, int] | None = None

    def invalidate(self) -> None:
        """Forget held deltas: the next row evaluates both branches."""
        self._deltas.clear()
        self._conds.clear()

    def finish(self) -> None:
        """Let go of pipeline and tensors: a controller keeps the run for its report."""
        self.invalidate()
        self._embeds = self.pipe = self._make_plan = None

    @_transparent
    def forward(self, original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Evaluate one row of the plan; under ``torch.compile`` only ``original`` is compiled."""
        args, kwargs, finish = self._prepare(args, kwargs)
        return finish(original(*args, **kwargs))

    @_host_only
    def _prepare(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any], Callable[[Any], Any]]:
        """What the denoiser is called with in this row, and what becomes of its output."""
        index, self.calls = self.calls, self.calls + 1
        if not self.pipe.do_classifier_free_guidance:
            # The pipeline itself feeds the conditional branch alone: nothing to save, and should
            # guidance come back later in the run, what is held would be stale.
            self.nfe += 1
            self.invalidate()
            return args, kwargs, _untouched
        if self.plan is None:
            self._rows, self.plan = self._make_plan()
        named = {**dict(zip(self.record.arguments, args, strict=False)), **kwargs}
        self._watch_embeds(named)
        row, half = self._choose(index, named)
        if row is None or half is None:
            self.nfe += 2
            return args, kwargs, _untouched if row is None else partial(self._both, row)
        self.nfe += 1
        return (), half, partial(self._conditional, row)

    def _choose(
        self, index: int, named: Mapping[str, Any]
    ) -> tuple[GuidanceRow | None, dict[str, Any] | None]:
        """The row (None: full guidance), and the conditional arguments if they alone are run."""
        if index >= len(self._rows):
            self._fall_back(f"more model calls than the {len(self._rows)} timesteps of the run")
            return None, None
        row = self._rows[index]
        if all(other.evaluates_both and other.boost == 1.0 for other in self._rows):
            return row, None
        try:
            # Tried in rows that evaluate both, too: a run that cannot hold is not boosted either.
            half = slice_half(named, self.record)
        except CannotSlice as reason:
            self._fall_back(str(reason))
            return None, None
        if row.evaluates_both:
            return row, None
        short = len(self._deltas) < len(row.delta_weights)
        if short or len(self._conds) < len(row.cond_change_weights):
            self.refreshes += 1
            return row, None
        return row, half

    @_host_only
    def _both(self, row: GuidanceRow, output: Any) -> Any:
        """Both branches; the output itself unless the row boosts its delta."""
        halves = output[0].chunk(2)
        cond, uncond = halves[self.record.cond_half], halves[1 - self.record.cond_half]
        # Differences of half-precision outputs are held in float32: w would amplify their rounding.
        delta = cond.float() - uncond.float()
        self._remember(delta, cond)
        return output if row.boost == 1.0 else self._replace(output, cond, row.boost * delta)

    @_host_only
    def _conditional(self, row: GuidanceRow, output: Any) -> Any:
        """The conditional output beside the reconstructed unconditional one."""
        cond = output[0]
        delta = torch.zeros_like(cond, dtype=torch.float32)
        for weight, held in zip(row.delta_weights, self._deltas, strict=False):
            delta = delta + row.boost * weight * held
        for weight, past in zip(row.cond_change_weights, self._conds, strict=False):
            delta = delta + row.boost * weight * (cond.float() - past)
        self._remember(None, cond)
        return self._replace(output, cond, delta)

    def _replace(self, output: Any, cond: Tensor, delta: Tensor) -> Any:
        """``output`` with [c - delta, c] (in the family's order) as its sample."""
        uncond = (cond.float() - delta).to(cond.dtype)
        sample = torch.cat([uncond, cond] if self.record.cond_half == 1 else [cond, uncond])
        if isinstance(output, tuple):
            return (sample, *output[1:])
        return type(output)(sample=sample)

    def _remember(self, delta: Tensor | None, cond: Tensor) -> None:
        """Shift a fresh delta and this row's conditional output in, as deep as any row reads."""
        if delta is not None:
            self._deltas.insert(0, delta)
        depth = max((len(row.delta_weights) for row in self._rows), default=0)
        del self._deltas[depth:]
        changes = max((len(row.cond_change_weights) for row in self._rows), default=0)
        if changes:
            # A copy: a captured graph overwrites its outputs in the next call.
            self._conds.insert(0, cond.to(torch.float32, copy=True))
        del self._conds[changes:]

    def _watch_embeds(self, named: Mapping[str, Any]) -> None:
        """Drop held deltas when the embeddings have been swapped or edited between two rows."""
        embeds = named.get("encoder_hidden_states")
        if not isinstance(embeds, Tensor):
            return
        # Tensors of inference mode keep no version: there only a swap is seen, not an edit in
        # place.
        version = 0 if embeds.is_inference() else embeds._version
        if self._embeds is not None:
            before, seen = self._embeds
            if embeds is not before or version != seen:
                self.invalidate()
        self._embeds = (embeds, version)

    def _fall_back(self, reason: str) -> None:
        """Full guidance in this row, and nothing held beyond it."""
        self.invalidate()
        if reason not in self.fallbacks:
            self.fallbacks.append(reason)


def _untouched(output: Any) -> Any:
    return output


_ACTIVE: ContextVar[PipelineRun | None] = ContextVar("thg_engine_run", default=None)


def activate(run: PipelineRun | None) -> Any:
    """Make ``run`` the current one of this thread, or none; returns the token for `deactivate`."""
    return _ACTIVE.set(run)


def deactivate(token: Any) -> None:
    """End the run that `activate` began."""
    _ACTIVE.reset(token)


def slice_half(named: Mapping[str, Any], record: AdapterRecord) -> dict[str, Any]:
    """The arguments of a doubled call, conditional half only.

    Raises:
        CannotSlice: an argument has a layout that the record does not describe.
    """
    sample_name = record.arguments[0]
    sample = named[sample_name]
    full = sample.shape[0]
    if full % 2:
        raise CannotSlice(f"{sample_name} has an odd batch of {full}")

    def half(argument: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        shape = tuple(value.shape)
        if value.ndim and shape[0] == full:
            return value.chunk(2)[record.cond_half]
        if argument in record.unbatched and (value.ndim == 0 or shape[0] == 1):
            return value
        raise CannotSlice(f"{argument} has shape {shape}, its batch is not {full}")

    sliced = {}
    for argument, value in named.items():
        if argument in (sample_name, *record.batched, *record.unbatched):
            sliced[argument] = pytree.tree_map(lambda leaf, a=argument: half(a, leaf), value)
        elif any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)):
            raise CannotSlice(f"{argument} holds tensors of unknown layout")
        else:
            sliced[argument] = value
    return sliced


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
        if run is None or run.module is not module:
            return original(*args, **kwargs)
        return run.forward(original, args, kwargs)


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
