"""Graphs in a pipeline's own loop: the denoiser, and where the step is fused the row with it.

The pipeline still forms the denoiser's input, calls it, combines and steps; the call is a replay.
With a fused step the replay runs the row, too, ahead of the pipeline's combine: what that does is
known from the row before. `FusedStep` checks it when the pipeline gets there, and takes the row
back where the pipeline did something else.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from thg_kernels.step_update import BranchRows, StepState, StepTable, blank_rows, launch

from ...fingerprint import autocast, module_fingerprint, why_not_captured
from ...graph_cache import GraphCache, Lease
from ...graphs import Step
from ...step_buffers import Shape, signature_of
from .adapter_types import AdapterRecord, ArgumentLayout
from .adapters import HOOK_NAME
from .slicing import CannotSlice, slice_half

Forward = Callable[..., Any]


class DenoiserBuffers:
    """The arguments of a denoiser call on fixed addresses.

    Args:
        forward: the denoiser below the hook.
        named: its arguments in a call with all branches, by name; or with one, of a pipeline that
            makes a call for each.
        record: how the branches share the call.
        layout: which arguments carry the batch; None where branches do not share it.
    """

    def __init__(
        self,
        forward: Forward,
        named: Mapping[str, Any],
        record: AdapterRecord,
        layout: ArgumentLayout | None,
    ) -> None:
        self._forward = forward
        self._loaded: dict[int, tuple[Any, int]] = {}
        device = device_of(named)
        # A timestep on the host would be frozen in the capture: here it is on the device.
        self.named = pytree.tree_map_only(
            Tensor, lambda value: value.to(device, copy=True), dict(named)
        )
        self._half: dict[str, Any] | None = None
        self._part = (record.branches, record.cond_half)
        if layout is not None:
            with suppress(CannotSlice):  # then every row evaluates both
                self._half = slice_half(
                    self.named, layout, record.cond_half, branches=record.branches
                )

    def load(self, named: Mapping[str, Any]) -> None:
        """Take over the values of another call; what is still there is not copied again."""
        pairs = zip(pytree.tree_leaves(self.named), pytree.tree_leaves(dict(named)), strict=True)
        for k, (into, value) in enumerate(pairs):
            if not isinstance(into, Tensor):
                continue
            version = -1 if value.is_inference() else value._version  # there edits are not seen
            before, seen = self._loaded.get(k, (None, -1))
            if version < 0 or value is not before or version != seen:
                if value.shape != into.shape:  # what halved companions have made
                    into = into.chunk(self._part[0])[self._part[1]]
                into.copy_(value, non_blocking=True)
                self._loaded[k] = value, version

    def forget(self) -> None:
        """Let go of the caller's tensors at the end of a run."""
        self._loaded.clear()

    def steps(self) -> Mapping[str, Step]:
        """What to capture: each returns the denoiser's output."""
        steps: dict[str, Step] = {"both": lambda: self._run("both", self.named)}
        if self._half is not None:
            half = self._half
            steps["cond"] = lambda: self._run("cond", half)
        return steps

    def _run(self, variant: str, named: Mapping[str, Any]) -> Any:
        return self._forward(**named)


class RowBuffers(DenoiserBuffers):
    """The same with the state of a fused step, which follows the denoiser.

    Args:
        forward, named, record, layout: see `DenoiserBuffers`.
        shape: of the tables to come.
        x: a sample, shape ``(B, *latent)``.
        dtype: of the samples that the step returns.

    Attributes:
        state: registers, table and cursor.
        backup: the registers before the last replay.
        noise: what the next row adds.
        following: the sample that the last replay made.
    """

    def __init__(
        self,
        forward: Forward,
        named: Mapping[str, Any],
        record: AdapterRecord,
        layout: ArgumentLayout | None,
        shape: Shape,
        x: Tensor,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(forward, named, record, layout)
        blank = StepTable(blank_rows(shape.num_rows, shape.num_slots), (0,) * shape.num_rows)
        self.shape = shape
        self.state = StepState(
            blank, x, model_dtype=shape.model_dtype, register_dtype=shape.register_dtype
        )
        self.state.uses = shape.uses
        self.backup = torch.zeros_like(self.state.registers)
        self.noise = torch.zeros_like(self.state.samples())
        self.following = torch.zeros_like(self.noise, dtype=dtype)
        both = BranchRows.both(x.shape[0])
        both = both if record.cond_half == 1 else BranchRows(both.uncond, both.cond)
        self._branches = {"both": both, "cond": BranchRows.cond_only(x.shape[0])}

    def _run(self, variant: str, named: Mapping[str, Any]) -> Any:
        output = self._forward(**named)
        self.backup.copy_(self.state.registers)
        launch(
            self.state,
            output[0],
            self._branches[variant],
            noise=self.noise,
            sample=self.following,
            backend=self.shape.backend,
        )
        return output


class RunGraphs:
    """Graphs in one call of a pipeline.

    Args:
        cache: of the compiled pipeline.
        pipe_state: what the pipeline adds to the fingerprint of its denoisers.
        modules: its denoisers.
        record: how the branches share a call.
        layout: which arguments carry the batch; None where branches do not share it.
        index: of the denoiser whose calls these are.
    """

    def __init__(
        self,
        cache: GraphCache,
        pipe_state: Hashable,
        modules: Sequence[torch.nn.Module],
        record: AdapterRecord,
        layout: ArgumentLayout | None,
        index: int = 0,
    ) -> None:
        self._cache, self._record, self._layout = cache, record, layout
        self._modules, self._index, self._pipe_state = modules, index, pipe_state
        self._forward: Forward | None = None
        self._named: Mapping[str, Any] = {}
        self._first: Mapping[str, Any] = {}
        self._signature: Hashable = None
        self._seen: dict[tuple[str, ...], Hashable] = {}
        self._leases: dict[str, Lease | str] = {}
        self._is_off = False

    def note(self, forward: Forward, named: Mapping[str, Any], apart: tuple[str, ...] = ()) -> None:
        """The call in progress; graphs are of calls like the first.

        Args:
            forward: the denoiser below the hook.
            named: its arguments.
            apart: those that are of the conditional branch alone already, in this call.
        """
        shared = {name: value for name, value in named.items() if name not in apart}
        signature = signature_of((shared, autocast()))
        if self._forward is None:
            self._signature, self._first = signature, dict(named)
        if apart and apart not in self._seen:
            first = {name: value for name, value in self._first.items() if name not in apart}
            self._seen[apart] = signature_of((first, autocast()))
        if signature != self._seen.get(apart, self._signature):
            self.turn_off()
        self._forward, self._named = forward, named

    def start_row(self, shape: Shape, x: Tensor, dtype: torch.dtype) -> RowBuffers | None:
        """Graphs of denoiser and row for the rest of the run; None: there are none."""
        forward, named = self._forward, self._named
        if forward is None or self._signature in self._cache.notes:
            return None
        lease = self._lease(
            "row",
            (shape, signature_of(x), dtype),
            lambda: RowBuffers(forward, named, self._record, self._layout, shape, x, dtype),
        )
        return None if lease is None else lease.buffers

    @property
    def has_row(self) -> bool:
        """Whether `replay_row` can be asked."""
        return isinstance(self._leases.get("row"), Lease) and not self._is_off

    def replay_row(self, variant: str) -> Any:
        """The denoiser's output of the call in progress, and its row; None: run it eagerly."""
        lease = self._leases.get("row")
        return self._replayed(lease if isinstance(lease, Lease) else None, variant)

    def replay(self, variant: str) -> Any:
        """The denoiser's output of the call in progress; None: run it eagerly."""
        forward, named = self._forward, self._named
        if forward is None:
            return None
        build = lambda: DenoiserBuffers(forward, named, self._record, self._layout)  # noqa: E731
        lease = self._lease("call", (), build)
        # Copied: schedulers keep outputs, and the next replay overwrites this one.
        return pytree.tree_map_only(Tensor, torch.clone, self._replayed(lease, variant))

    def count_eager(self) -> None:
        """A call that ran eagerly."""
        self._cache.count(eager_calls=1)

    def is_in_vain(self) -> None:
        """Rows of such calls are taken back: the next run captures the denoiser alone."""
        self._cache.notes.add(self._signature)

    def turn_off(self) -> None:
        """For the rest of the run: what the graphs take for granted has changed."""
        self._is_off = True

    def release(self) -> None:
        """Let other runs have the graphs."""
        for lease in self._leases.values():
            if isinstance(lease, Lease):
                lease.buffers.forget()
                lease.release()
        self._leases.clear()
        self._forward, self._named, self._first = None, {}, {}

    def _replayed(self, lease: Lease | None, variant: str) -> Any:
        if lease is None or self._is_off:
            return None
        lease.buffers.load(self._named)
        return lease.replay(variant)

    def _lease(self, name: str, more: Hashable, build: Callable[[], Any]) -> Lease | None:
        """Graphs for this run, asked for once."""
        if name not in self._leases and not self._is_off:
            self._leases[name] = self._acquired(more, build)
        lease = self._leases.get(name)
        return lease if isinstance(lease, Lease) else None

    def _acquired(self, more: Hashable, build: Callable[[], Any]) -> Lease | str:
        reason = why_not_captured(self._modules[self._index], own=HOOK_NAME)
        if self._signature is None:
            reason = "an argument of the denoiser is neither tensor nor value"
        if reason:
            return self._cache.refuse(reason)
        return self._cache.acquire(
            (self._index, self._signature, more),
            lambda: (*map(module_fingerprint, self._modules), self._pipe_state),
            device_of(self._named),
            build,
        )


class CallGraphs:
    """Graphs of a run whose branches are calls of their own: some per denoiser and signature.

    Args:
        cache: of the compiled pipeline.
        make: the graphs of calls of one denoiser, by its index.
    """

    def __init__(self, cache: GraphCache, make: Callable[[int], RunGraphs]) -> None:
        self._cache, self._make = cache, make
        self._graphs: dict[Hashable, RunGraphs] = {}
        self._is_off = False

    def replay(self, forward: Forward, index: int, named: Mapping[str, Any]) -> Any:
        """The output of a call of the denoiser of that index; None: run it eagerly."""
        if self._is_off:
            return None
        signature = (index, signature_of((dict(named), autocast())))
        if signature not in self._graphs:
            self._graphs[signature] = self._make(index)
        graphs = self._graphs[signature]
        graphs.note(forward, named)
        return graphs.replay("both")

    def count_eager(self) -> None:
        """A call that ran eagerly."""
        self._cache.count(eager_calls=1)

    def turn_off(self) -> None:
        """For the rest of the run: what the graphs take for granted has changed."""
        self._is_off = True

    def release(self) -> None:
        """Let other runs have the graphs."""
        for graphs in self._graphs.values():
            graphs.release()
        self._graphs.clear()


def device_of(named: Mapping[str, Any]) -> torch.device:
    """Where a denoiser is called: the device of its first tensor."""
    return next(value.device for value in named.values() if isinstance(value, Tensor))
