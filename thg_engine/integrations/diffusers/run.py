"""One call of a compiled pipeline: which branches run in each row, and what stands in for the rest.

On tortoise-only rows the conditional branch runs alone. What the pipeline gets back depends on who
steps:

- the fused step: a `BranchSum`, which remembers c and u while the pipeline forms its guidance on
  paper, and which the row kernel then reads;
- the scheduler itself: the pair [u_hat, c] with a reconstructed unconditional output
  ``u_hat = c - delta_hat``, so that combine, rescale and scheduler run unchanged.

Where both branches are evaluated without boost, the denoiser's output passes through untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from thg_kernels.step_update import BranchRows

from ...guidance import GuidanceRow
from ...plan import SamplingPlan
from .adapter_types import AdapterRecord, ArgumentLayout
from .adapters import argument_names
from .asking import is_guided, scale_of
from .deferred import BranchSum
from .fused import FusedStep, Outputs
from .graphed import RunGraphs
from .held import HeldGuidance
from .planning import FusedPlan
from .slicing import CannotSlice, slice_half

Rows = tuple[GuidanceRow, ...]
NOT_YET = "no step has been taken"
MOST_ROLLED_BACK = 2
"""Rows taken back in a run before its shape is run without: blended latents, say, in every step."""


class PipelineRun:
    """State of one call of a compiled pipeline.

    Args:
        pipe: the pipeline that runs.
        module: its denoiser.
        record: its adapter record.
        layout: which arguments of the denoiser carry the batch.
        make_plan: gives guidance rows and plan once the pipeline has set its timesteps.
        make_fused: gives the plan with solver columns for these arguments of ``scheduler.step``
            and this sample, or the reason why there is none; None: the scheduler steps.
        graphs: of this run; None: every call runs eagerly.

    Attributes:
        plan: plan of this run; None before the first guided model call.
        nfe: denoiser evaluations per sample so far.
        refreshes: rows that evaluated both branches although the plan holds a delta there.
        fallbacks: reasons for which rows ran full guidance against the plan.
        fused: the fused step, once the first step has been taken by it.
        unfused: why the scheduler steps by itself, "" where it does not.
        watched: whether a callback sees the samples.
        arguments: of the pipeline's call, by name.
    """

    def __init__(
        self,
        pipe: Any,
        module: torch.nn.Module,
        record: AdapterRecord,
        layout: ArgumentLayout,
        make_plan: Callable[[], tuple[Rows, SamplingPlan]],
        make_fused: Callable[[Rows, dict[str, Any], Tensor], FusedPlan | str] | None = None,
        graphs: RunGraphs | None = None,
    ) -> None:
        self.pipe, self.module, self.record, self.layout = pipe, module, record, layout
        self.arguments: Mapping[str, Any] = {}
        self._make_plan: Any = make_plan
        self._make_fused: Any = make_fused
        self.plan: SamplingPlan | None = None
        self.nfe = self.calls = self.refreshes = self.fused_steps = 0
        self.fallbacks: list[str] = []
        self.fused: FusedStep | None = None
        self.backend = ""
        self.unfused = NOT_YET if make_fused is not None else "turned off"
        self._rows: Rows = ()
        self._is_full = False
        self._held = HeldGuidance()
        self._embeds: tuple[Tensor, int] | None = None
        self._named: Mapping[str, Any] = {}
        self._source: Outputs | None = None
        self.watched = False
        self.graphs = graphs
        self._pending: tuple[int, GuidanceRow, str] | None = None

    def invalidate(self) -> None:
        """Forget held deltas: the next row evaluates both branches."""
        self._held.clear()
        if self.fused is not None:
            self.fused.invalidate()

    def finish(self) -> None:
        """Let go of pipeline and tensors: a controller keeps the run for its report."""
        self.invalidate()
        self._embeds = self.pipe = self._make_plan = self._make_fused = self.fused = None
        self._source = self._pending = None
        if self.graphs is not None:
            self.graphs.release()

    def adapters_changed(self) -> None:
        """Somebody has turned an adapter: nothing held or captured is of this denoiser."""
        self.invalidate()
        if self.graphs is not None:
            self.graphs.turn_off()

    def prepare(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any], Callable[[Any], Any]]:
        """What the denoiser is called with in this row, and what becomes of its output."""
        index, self.calls, self._source = self.calls, self.calls + 1, None
        self._pending = None
        if not is_guided(self.pipe, self.record, self.arguments):
            # The pipeline itself feeds the conditional branch alone: nothing to save, and should
            # guidance come back later in the run, what is held would be stale.
            self.nfe += 1
            self.invalidate()
            return args, kwargs, _untouched
        if self.plan is None:
            self._rows, self.plan = self._make_plan()
            self._held = HeldGuidance(self._rows)
            self._is_full = all(row.evaluates_both and row.boost == 1.0 for row in self._rows)
        kind: Any = type(self.module)
        named = {**dict(zip(argument_names(kind), args, strict=False)), **kwargs}
        self._watch_embeds(named)
        row, half = self._choose(index, named)
        if row is not None:
            self._named = named
            self._pending = (index, row, "both" if half is None else "cond")
        if row is None or half is None:
            self.nfe += 2
            finish = _untouched if row is None else partial(self._both, index, row)
            return args, kwargs, finish
        self.nfe += 1
        return (), half, partial(self._conditional, index, row)

    def replayed(self, forward: Callable[..., Any]) -> Any:
        """The output of the prepared call by a replay; None where it is to be run.

        Args:
            forward: the denoiser below the hook.
        """
        graphs, pending = self.graphs, self._pending
        if graphs is None or pending is None:
            return None
        index, row, variant = pending
        graphs.note(forward, self._named)
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
        if index >= len(self._rows):
            self._fall_back(f"more model calls than the {len(self._rows)} timesteps of the run")
            return None, None
        row = self._rows[index]
        if self._is_full:
            return row, None
        try:
            # Tried in rows that evaluate both, too: a run that cannot hold is not boosted either.
            half = slice_half(named, self.layout, self.record.cond_half)
        except CannotSlice as reason:
            self._fall_back(str(reason))
            return None, None
        if row.evaluates_both:
            return row, None
        if self._is_short(index, row):
            self.refreshes += 1
            return row, None
        return row, half

    def _is_short(self, index: int, row: GuidanceRow) -> bool:
        """Whether ``row`` reads deltas or outputs that nobody has kept, or that are stale."""
        if self.fused is not None and self.fused.guides:
            return index != self.fused.row or self.fused.is_short(index)
        return self._held.is_short(row)

    def _both(self, index: int, row: GuidanceRow, output: Any) -> Any:
        """Both branches; the output itself unless the row boosts its delta or is deferred."""
        if self._is_full and not self._defers:
            return output
        halves = output[0].chunk(2)
        cond, uncond = halves[self.record.cond_half], halves[1 - self.record.cond_half]
        if not self._guides:
            delta = self._held.fresh(row, cond, uncond)
        if not self._defers:
            return output if row.boost == 1.0 else _with_sample(output, self._pair(cond, delta))

        def make() -> Tensor:
            if row.boost == 1.0:
                whole: Tensor = output[0].clone()  # may be edited, and the row reads the original
                return whole
            return self._pair(cond, row.boost * (cond.float() - uncond.float()))

        branches = BranchRows.both(cond.shape[0])
        if self.record.cond_half == 0:
            branches = BranchRows(branches.uncond, branches.cond)
        source = Outputs(index, replace(row, evaluates_both=True), output[0], branches)
        return _with_sample(output, self._deferred(source, output[0].shape, make))

    def _conditional(self, index: int, row: GuidanceRow, output: Any) -> Any:
        """The conditional output beside the reconstructed unconditional one."""
        cond = output[0]
        fused = self.fused if self._guides else None
        delta = None if fused is not None else self._held.held(row, cond)
        if delta is not None and not self._defers:
            return _with_sample(output, self._pair(cond, delta))

        def make() -> Tensor:
            if fused is not None:
                return self._pair(cond, row.boost * fused.held(index, cond))
            return self._pair(cond, torch.zeros_like(cond) if delta is None else delta)

        shape = torch.Size((2 * cond.shape[0], *cond.shape[1:]))
        source = Outputs(index, row, cond, BranchRows.cond_only(cond.shape[0]))
        return _with_sample(output, self._deferred(source, shape, make))

    @property
    def _guides(self) -> bool:
        """Whether the fused step keeps what is held."""
        return self.fused is not None and self.fused.guides

    @property
    def _defers(self) -> bool:
        """Whether the next step may be a fused one that forms the guidance."""
        return self._guides or (self.fused is None and self.unfused == NOT_YET)

    def _deferred(
        self, source: Outputs, shape: torch.Size, make: Callable[[], Tensor]
    ) -> BranchSum:
        self._source = source
        return BranchSum(shape, source.values, source, None, self.record.cond_half, make)

    def _pair(self, cond: Tensor, delta: Tensor) -> Tensor:
        """[c - delta, c] in the family's order."""
        uncond = (cond.float() - delta).to(cond.dtype)
        return torch.cat([uncond, cond] if self.record.cond_half == 1 else [cond, uncond])

    def step(self, output: Tensor, sample: Tensor, kwargs: Mapping[str, Any]) -> Tensor | None:
        """The next sample by the fused step; None where the scheduler has to step itself."""
        if self.fused is None and self.unfused == NOT_YET:
            self.unfused = self._start_fused(output, sample, dict(kwargs))
        if self.fused is None:
            return None
        following = self.fused.step(output, sample, kwargs.get("generator"), self._source)
        self.fused_steps += 1
        return following

    def _start_fused(self, output: Tensor, sample: Tensor, kwargs: dict[str, Any]) -> str:
        """Make the fused step on the first step of the run; returns why it cannot be."""
        if self.plan is None:
            return "guidance was off when the run began"
        if self.fallbacks:
            return "full guidance runs as in the plain pipeline"
        if kwargs.pop("return_dict", True):
            return "the pipeline wants more than the sample from its scheduler's step"
        made = self._make_fused(self._rows, kwargs, sample)
        if isinstance(made, str):
            return made
        deferred = isinstance(output, BranchSum) and output.guidance_scale is not None
        if not deferred and isinstance(output, BranchSum):
            output = output.value()
        self.plan = made.plan
        self.fused = FusedStep(
            made.plan,
            made.solver,
            sample,
            output.dtype,
            guides=deferred,
            dtype=made.result_dtype(sample.dtype, output.dtype),
            watches=self.watched,
            graphs=self.graphs,
        )
        self.backend = self.fused.backend
        if deferred:
            self._held.clear()  # the registers hold from here on
        return ""

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


def _with_sample(output: Any, sample: Tensor) -> Any:
    """``output`` with another sample in its first place."""
    if isinstance(output, tuple):
        return (sample, *output[1:])
    return type(output)(sample=sample)
