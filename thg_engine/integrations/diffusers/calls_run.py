"""Runs of pipelines that call the denoiser once per branch, the conditional one first.

The conditional call runs in every row. Whether guidance is on, the pipeline tells by making the
second call; on rows that hold, that call is answered with ``u_hat = c - delta_hat`` and the network
does not run. Which branch a call is of, its place in the row tells: rows end with
``scheduler.step``. The embeddings of the calls before have to agree with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from thg_kernels.step_update import BranchRows

from ...guidance import GuidanceRow
from .adapter_types import ArgumentLayout
from .deferred import BranchSum, Family
from .fused import Outputs
from .graphed import CallGraphs
from .outputs import may_wait, sample_of, with_sample
from .run import Call, PipelineRun, by_name, untouched

PLAIN = ArgumentLayout("hidden_states", ())
"""Of an output that is one tensor."""
OUT_OF_TURN = "the calls of the two branches do not alternate"


class CallsRun(PipelineRun):
    """A run whose denoiser is called for c, then for u. See `PipelineRun`."""

    graphs: CallGraphs | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._is_open = False
        self._expert = 0
        self._named: Mapping[str, Any] = {}
        self._conditioning: tuple[str, ...] = ()
        self._uncond_objects: tuple[int, ...] = ()
        self._output: Any = None
        self._token: Any = None
        self._family: Family | None = None
        self._answer: Any = None
        self._call: tuple[int, Mapping[str, Any]] | None = None

    def finish(self) -> None:
        """Let go of pipeline and tensors."""
        super().finish()
        self._output = self._token = self._family = None
        self._answer = self._call = None
        self._named = {}

    def prepare(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """See `PipelineRun.prepare`."""
        named = by_name(module, args, kwargs)
        index = next(i for i, mine in enumerate(self.modules) if mine is module)
        text = named.get("encoder_hidden_states")
        if isinstance(text, Tensor) and not text.numel():
            # A picture alone, ahead of the loop: it belongs to no branch.
            self._answer = self._call = None
            self.nfe, self.extras = self.nfe + 1, self.extras + 1
            return args, kwargs, untouched
        self._answer, self._call = None, (index, named)
        if not self._is_second(named):
            return args, kwargs, self._first(index, named)
        self._is_open = False
        return args, kwargs, self._second(named)

    def replayed(self, forward: Callable[..., Any]) -> Any:
        """See `PipelineRun.replayed`."""
        if self._answer is not None:
            return self._answer
        if self.graphs is None or self._call is None:
            return None
        output = None
        if self._guides or not self._defers:
            output = self.graphs.replay(forward, *self._call)
        if output is None:
            self.graphs.count_eager()
        return output

    def step(self, output: Tensor, sample: Tensor, kwargs: Mapping[str, Any]) -> Tensor | None:
        """See `PipelineRun.step`; ends the row."""
        following = super().step(output, sample, kwargs)
        self.end_row()
        return following

    def end_row(self) -> None:
        """The next call is the conditional one of another row."""
        if self._is_open:
            # Guidance is off in this row; should it come back, what is held would be stale.
            self.invalidate()
        self._is_open = False

    def _is_second(self, named: Mapping[str, Any]) -> bool:
        """Whether the call in progress is the unconditional one of a row that has begun."""
        if not self._is_open:
            return False
        names = self._conditioning or _differing(self._named, named)
        if names and _objects(names, named) != _objects(names, self._named):
            self._conditioning = names
            return True
        # The same branch again, and no step between them: a loop that steps by other means.
        self.end_row()
        return False

    def _first(self, expert: int, named: Mapping[str, Any]) -> Callable[[Any], Any]:
        """Begin a row with its conditional call."""
        if self._conditioning and _objects(self._conditioning, named) == self._uncond_objects:
            self._fall_back(OUT_OF_TURN)
        index, self.calls, self._source = self.calls, self.calls + 1, None
        self.nfe += 1
        self._is_open, self._named = True, named
        if expert != self._expert:
            self.invalidate()
            self._expert = expert
        return partial(self._cond, index)

    def _cond(self, index: int, output: Any) -> Any:
        self._output, self._token, self._family = output, object(), None
        if not self._defers or not may_wait(output, PLAIN):
            return output
        cond = sample_of(output, PLAIN)
        # May be edited, and the row reads the original.
        made = BranchSum(cond.shape, cond, self._token, (0.0, 1.0), 1, lambda: cond.clone())
        self._family = made.family
        if self._rows and index < len(self._rows):
            row = replace(self._rows[index], evaluates_both=False)
            self._source = Outputs(index, row, cond, BranchRows.cond_only(len(cond)))
        return with_sample(output, made, PLAIN)

    def _second(self, named: Mapping[str, Any]) -> Callable[[Any], Any]:
        """The unconditional call: run, or answered with what is held."""
        self._plan()
        index, names = self.calls - 1, self._conditioning
        self._uncond_objects = _objects(names, named)
        for branch, given in (("cond", self._named), ("uncond", named)):
            self._watch(branch, {name: given.get(name) for name in names})
        row = None if OUT_OF_TURN in self.fallbacks else self._row(index)
        if row is not None and not row.evaluates_both:
            if not self._is_short(index, row):
                self._answer = self._reconstructed(index, row)
                return untouched
            self.refreshes += 1
        self.nfe += 1
        self.coarse.append(index)
        return untouched if row is None else partial(self._uncond, index, row)

    def _uncond(self, index: int, row: GuidanceRow, output: Any) -> Any:
        """Both branches have run; the output itself unless the row boosts its delta or defers."""
        if self._is_full and not self._defers:
            return output
        cond, uncond = sample_of(self._output, PLAIN), sample_of(output, PLAIN)
        if not self._guides:
            delta = self._held.fresh(row, cond, uncond)
        if not self._defers:
            return output if row.boost == 1.0 else with_sample(output, _less(cond, delta), PLAIN)

        def make() -> Tensor:
            if row.boost == 1.0:
                return uncond.clone()
            return _less(cond, row.boost * (cond.float() - uncond.float()))

        values, branches = torch.cat([uncond, cond]), BranchRows.both(len(cond))
        self._source = Outputs(index, replace(row, evaluates_both=True), values, branches)
        return with_sample(output, self._deferred(uncond, make), PLAIN)

    def _reconstructed(self, index: int, row: GuidanceRow) -> Any:
        """The unconditional output that is held beside the conditional one."""
        cond = sample_of(self._output, PLAIN)
        fused = self.fused if self._guides else None
        delta = None if fused is not None else self._held.held(row, cond)
        if delta is not None and not self._defers:
            return with_sample(self._output, _less(cond, delta), PLAIN)

        def make() -> Tensor:
            if fused is not None:
                return _less(cond, row.boost * fused.held(index, cond))
            return _less(cond, torch.zeros_like(cond) if delta is None else delta)

        self._source = Outputs(index, row, cond, BranchRows.cond_only(len(cond)))
        return with_sample(self._output, self._deferred(cond, make), PLAIN)

    def _deferred(self, like: Tensor, make: Callable[[], Tensor]) -> BranchSum:
        return BranchSum(like.shape, like, self._token, (1.0, 0.0), 1, make, self._family)


def _differing(cond: Mapping[str, Any], uncond: Mapping[str, Any]) -> tuple[str, ...]:
    """Arguments that tell the branches apart: their conditioning."""
    return tuple(name for name, value in uncond.items() if not _alike(value, cond.get(name)))


def _alike(one: Any, other: Any) -> bool:
    pairs = pytree.tree_leaves(one), pytree.tree_leaves(other)
    tensors = [[leaf for leaf in leaves if isinstance(leaf, Tensor)] for leaves in pairs]
    return len(tensors[0]) == len(tensors[1]) and all(
        a is b or (a.shape == b.shape and torch.equal(a, b)) for a, b in zip(*tensors, strict=True)
    )


def _objects(names: tuple[str, ...], named: Mapping[str, Any]) -> tuple[int, ...]:
    """Which tensors are given under these names; they live as long as the run refers to them."""
    leaves = pytree.tree_leaves([named.get(name) for name in names])
    return tuple(id(leaf) for leaf in leaves if isinstance(leaf, Tensor))


def _less(cond: Tensor, delta: Tensor) -> Tensor:
    """c - delta."""
    return (cond.float() - delta).to(cond.dtype)
