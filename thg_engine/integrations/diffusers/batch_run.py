"""Runs of pipelines that call the denoiser once per step, with all branches in the batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from thg_kernels.step_update import BranchRows

from ...errors import ThgError
from ...guidance import GuidanceRow
from .adapter_types import ArgumentLayout
from .adapters import find_layout
from .asking import is_guided, scale_of
from .deferred import BranchSum
from .fused import Outputs
from .graphed import RunGraphs
from .outputs import may_wait, sample_of, with_sample
from .run import Call, PipelineRun, by_name, untouched
from .slicing import CannotSlice, is_extra, slice_half

MOST_ROLLED_BACK = 2
"""Rows taken back in a run before its shape is run without: blended latents, say, in every step."""


class BatchRun(PipelineRun):
    """A run whose denoiser gets [u, c], in the order of the record.

    Args:
        args, kwargs: see `PipelineRun`.
        layout: which arguments of the denoiser carry the batch.
        companions: networks that are called before it with the same batch.
    """

    graphs: RunGraphs | None

    def __init__(
        self,
        *args: Any,
        layout: ArgumentLayout,
        companions: tuple[torch.nn.Module, ...] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._layout, self.companions = layout, companions
        given = {layout.sample, *layout.residuals, *layout.moving}
        self._conditioning = [n for n in (*layout.batched, *layout.lists) if n not in given]
        self._named: Mapping[str, Any] = {}
        self._pending: tuple[int, GuidanceRow, str] | None = None
        self._width = 0
        self._companion_rows: dict[int, int] = {}
        self._is_halved = False
        self._ready: tuple[str, ...] = ()

    def knows(self, module: torch.nn.Module) -> bool:
        """Whether the calls of ``module`` are this run's: a denoiser, or a companion of it."""
        return super().knows(module) or any(module is mine for mine in self.companions)

    def finish(self) -> None:
        """Let go of pipeline and tensors."""
        super().finish()
        self._named, self._pending, self.companions = {}, None, ()

    def prepare(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """See `PipelineRun.prepare`."""
        self._pending = None
        named = by_name(module, args, kwargs)
        if not super().knows(module):
            return self._prepare_companion(module, named, (args, kwargs, untouched))
        if is_extra(named, self._layout):
            self.nfe, self.extras = self.nfe + 1, self.extras + 1
            return args, kwargs, untouched
        index, self.calls, self._source = self.calls, self.calls + 1, None
        if not self._has_branches(named):
            # The pipeline itself feeds the conditional branch alone: nothing to save, and should
            # guidance come back later in the run, what is held would be stale.
            self.nfe += 1
            self.invalidate()
            return args, kwargs, untouched
        self._plan()
        self._watch("all", {name: named[name] for name in self._conditioning if name in named})
        self._ready = self._layout.residuals if self._is_halved else ()
        row, half = self._choose(index, named)
        self._is_halved = False
        if row is not None:
            self._named = named
            self._pending = (index, row, "both" if half is None else "cond")
        if row is None or half is None:
            self.nfe += self.record.branches
            self.coarse.append(index)
            finish = untouched if row is None else partial(self._both, index, row)
            return args, kwargs, finish
        if self.drift is not None and self.drift.wants(index, self._skipped):
            self._pending = None  # what is captured knows no such row
            self.nfe += self.record.branches
            return args, kwargs, partial(self._measured, index, row)
        self.nfe += 1
        return (), half, partial(self._conditional, index, row)

    def _has_branches(self, named: Mapping[str, Any]) -> bool:
        """Whether the call in progress is made for all branches."""
        if not is_guided(self.pipe, self.record, self.arguments):
            return False
        rows = len(named[self._layout.sample])
        if not self._width:
            self._width = rows
        # Some pipelines stop guidance towards the end, and keep the scale.
        return rows * self.record.branches != self._width

    def _prepare_companion(self, module: Any, named: Mapping[str, Any], call: Call) -> Call:
        """The conditional branch alone where the denoiser's next row will be of it alone."""
        layout = find_layout(module)
        if layout is None or not is_guided(self.pipe, self.record, self.arguments):
            return call
        rows, index = len(named[layout.sample]), self.calls
        # Of a row with all branches, whatever this one has.
        first_rows = self._companion_rows.setdefault(id(module), rows)
        if self.plan is None or self._is_full or index >= len(self._rows):
            return call
        if first_rows % self._width:
            return call  # in its guess mode it is called for the conditional branch as it is
        row = self._rows[index]
        if row.evaluates_both or self._is_short(index, row) or self.fallbacks:
            return call
        if self.drift is not None and self.drift.wants(index, self._skipped):
            return call
        try:
            half = self._sliced(named, layout)
        except CannotSlice:
            return call  # the denoiser takes its half of what that makes
        self._is_halved = True
        return (), half, untouched

    def _sliced(self, named: Mapping[str, Any], layout: ArgumentLayout) -> dict[str, Any]:
        """Arguments of the conditional branch; what halved companions have made is so already."""
        rest = {name: value for name, value in named.items() if name not in self._ready}
        half = slice_half(rest, layout, self.record.cond_half, self.record.branches)
        return {name: half.get(name, value) for name, value in named.items()}

    def replayed(self, forward: Callable[..., Any]) -> Any:
        """See `PipelineRun.replayed`."""
        graphs, pending = self.graphs, self._pending
        if graphs is None or pending is None:
            return None
        index, row, variant = pending
        graphs.note(forward, self._named, self._ready)
        output = None
        if self._guides and graphs.has_row:
            output = self._replayed_row(graphs, index, row, variant)
        elif self._guides or not self._defers:
            output = graphs.replay(variant)
        if output is None:
            graphs.count_eager()
        return output

    def _replayed_row(self, graphs: RunGraphs, index: int, row: GuidanceRow, variant: str) -> Any:
        """Denoiser and row in one replay."""
        fused = self.fused
        if fused is None or fused.take_back() or index != fused.row:
            return None
        if fused.rolled_back == MOST_ROLLED_BACK:
            graphs.is_in_vain()
        guidance = replace(row, evaluates_both=variant == "both")
        fused.foresee(guidance, scale_of(self.pipe, self.record, self.arguments))
        output = graphs.replay_row(variant)
        fused.replayed()
        return output

    def _choose(
        self, index: int, named: Mapping[str, Any]
    ) -> tuple[GuidanceRow | None, dict[str, Any] | None]:
        """The row (None: full guidance), and the conditional arguments if they alone are run."""
        row = self._row(index)
        if row is None or self._is_full:
            return row, None
        try:
            # Tried in rows that evaluate both, too: a run that cannot hold is not boosted either.
            half = self._sliced(named, self._layout)
        except CannotSlice as reason:
            self._fall_back(str(reason))
            row = None
        if row is not None and not (row.evaluates_both or self._is_short(index, row)):
            return row, half
        if self._is_halved:
            message = "its companion ran for the conditional branch, and now both are needed"
            raise ThgError(
                f"{self.record.pipeline}: {message}; the arguments have changed within a step."
            )
        if row is not None and not row.evaluates_both:
            self.refreshes += 1
        return row, None

    def _split(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Conditional branch, and the others one after another."""
        parts = list(values.chunk(self.record.branches))
        cond = parts.pop(self.record.cond_half)
        return cond, parts[0] if len(parts) == 1 else torch.cat(parts)

    def _joined(self, cond: Tensor, delta: Tensor) -> Tensor:
        """All branches in the family's order, the others as c - delta."""
        parts = [
            (cond.float() - each).to(cond.dtype) for each in delta.chunk(self.record.branches - 1)
        ]
        parts.insert(self.record.cond_half, cond)
        return torch.cat(parts)

    def _beside(self, cond: Tensor) -> Tensor:
        """The conditional output once for each other branch."""
        others = self.record.branches - 1
        return cond if others == 1 else torch.cat([cond] * others)

    @property
    def _defers(self) -> bool:
        """Whether the next step may be a fused one that forms the guidance."""
        return self.record.branches == 2 and super()._defers

    def _both(self, index: int, row: GuidanceRow, output: Any) -> Any:
        """All branches; the output itself unless the row boosts its delta or is deferred."""
        if self._is_full and not self._defers:
            return output
        values = sample_of(output, self._layout)
        cond, others = self._split(values)
        if not self._guides:
            delta = self._held.fresh(row, self._beside(cond), others)
        if not self._defers or not may_wait(output, self._layout):
            return output if row.boost == 1.0 else self._answer(output, self._joined(cond, delta))

        def make() -> Tensor:
            if row.boost == 1.0:
                whole: Tensor = values.clone()  # may be edited, and the row reads the original
                return whole
            return self._joined(cond, row.boost * (cond.float() - others.float()))

        branches = BranchRows.both(cond.shape[0])
        if self.record.cond_half == 0:
            branches = BranchRows(branches.uncond, branches.cond)
        source = Outputs(index, replace(row, evaluates_both=True), values, branches)
        return self._answer(output, self._deferred(source, values.shape, make))

    def _conditional(self, index: int, row: GuidanceRow, output: Any) -> Any:
        """The conditional output beside the reconstructed others."""
        cond = sample_of(output, self._layout)
        if len(cond) * self.record.branches != self._width:
            kind, rows = type(self.modules[0]).__name__, self._width // self.record.branches
            message = f"{kind} gave {len(cond)} rows of a conditional branch of {rows}"
            raise ThgError(f"{message}; its ArgumentLayout misses an argument with the batch.")
        fused = self.fused if self._guides else None
        delta = None if fused is not None else self._held.held(row, self._beside(cond))
        if delta is not None and not (self._defers and may_wait(output, self._layout)):
            return self._answer(output, self._joined(cond, delta))

        def make() -> Tensor:
            if fused is not None:
                return self._joined(cond, row.boost * fused.held(index, cond))
            return self._joined(cond, torch.zeros_like(cond) if delta is None else delta)

        shape = torch.Size((2 * cond.shape[0], *cond.shape[1:]))
        source = Outputs(index, row, cond, BranchRows.cond_only(cond.shape[0]))
        return self._answer(output, self._deferred(source, shape, make))

    @property
    def _skipped(self) -> tuple[int, ...]:
        """Rows that reuse deltas."""
        rows = enumerate(self._rows)
        return tuple(i for i, row in rows if row.delta_weights and not row.evaluates_both)

    def _measured(self, index: int, row: GuidanceRow, output: Any) -> Any:
        """The conditional output as ever, once the drift check has seen all branches."""
        cond, others = self._split(sample_of(output, self._layout))
        beside, fused = self._beside(cond), self.fused if self._guides else None
        reused = fused.held(index, cond) if fused else self._held.reused(row, beside)
        if self.drift is not None:
            self.drift.compare(reused, beside.float() - others.float())
        return self._conditional(index, row, with_sample(output, cond, self._layout))

    def _answer(self, output: Any, sample: Tensor) -> Any:
        return with_sample(output, sample, self._layout)

    def _deferred(
        self, source: Outputs, shape: torch.Size, make: Callable[[], Tensor]
    ) -> BranchSum:
        self._source = source
        return BranchSum(shape, source.values, source, None, self.record.cond_half, make)
