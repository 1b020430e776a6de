"""One call of a compiled pipeline: its plan, what is held, and who steps.

How the branches share the denoiser's calls is in the two kinds of run: `batch_run.BatchRun` (one
call per step, all branches in the batch) and `calls_run.CallsRun` (one call per branch). On
tortoise-only rows the conditional branch runs alone. What the pipeline gets back depends on who
steps:

- the fused step: a `BranchSum`, which remembers c and u while the pipeline forms its guidance on
  paper, and which the row kernel then reads;
- the scheduler itself: c beside a reconstructed unconditional output ``u_hat = c - delta_hat``, so
  that combine, rescale and scheduler run unchanged.

Where both branches are evaluated without boost, the denoiser's output passes through untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ...guidance import GuidanceRow
from ...plan import SamplingPlan
from .adapter_types import AdapterRecord
from .adapters import argument_names
from .deferred import BranchSum
from .drift import Probe
from .fused import FusedStep, Outputs
from .graphed import CallGraphs, RunGraphs
from .held import HeldGuidance
from .planning import FusedPlan

Rows = tuple[GuidanceRow, ...]
Call = tuple[tuple[Any, ...], dict[str, Any], Callable[[Any], Any]]
"""What the denoiser is called with, and what becomes of its output."""
NOT_YET = "no step has been taken"
CHANGED = "the pipeline changes the guided output, which fitted rows do not know: base rows"


class PipelineRun:
    """State of one call of a compiled pipeline.

    Args:
        pipe: the pipeline that runs.
        record: its adapter record.
        modules: its denoisers; more than one where experts take over.
        make_plan: gives guidance rows and plan once the pipeline has set its timesteps; those of
            full guidance if asked.
        make_fused: gives the plan with solver columns for these arguments of ``scheduler.step``
            and this sample, or the reason why there is none; None: the scheduler steps.
        graphs: of this run; None: every call runs eagerly.

    Attributes:
        plan: plan of this run; None before the first guided model call.
        nfe: denoiser evaluations per sample so far, further calls included.
        extras: further calls, for guidance of another kind.
        calls: rows so far.
        coarse: those of them that evaluated all branches.
        error: what ended the call, "" where nothing did.
        refreshes: rows that evaluated both branches although the plan holds a delta there.
        fallbacks: reasons for which rows ran full guidance against the plan.
        fused: the fused step, once the first step has been taken by it.
        unfused: why the scheduler steps by itself, "" where it does not.
        watched: whether a callback sees the samples.
        drift: the drift check of this run, if it has one.
        arguments: of the pipeline's call, by name.
    """

    def __init__(
        self,
        pipe: Any,
        record: AdapterRecord,
        modules: tuple[torch.nn.Module, ...],
        make_plan: Callable[[bool], tuple[Rows, SamplingPlan]],
        make_fused: Callable[[Rows, dict[str, Any], Tensor], FusedPlan | str] | None = None,
        graphs: RunGraphs | CallGraphs | None = None,
    ) -> None:
        self.pipe, self.record, self.modules = pipe, record, modules
        self.arguments: Mapping[str, Any] = {}
        self._make_plan: Any = make_plan
        self._make_fused: Any = make_fused
        self.plan: SamplingPlan | None = None
        self.nfe = self.calls = self.extras = self.refreshes = self.fused_steps = 0
        self.fallbacks: list[str] = []
        self.coarse: list[int] = []
        self.error = ""
        self.fused: FusedStep | None = None
        self.backend = ""
        self.unfused = NOT_YET if make_fused is not None else "turned off"
        self._rows: Rows = ()
        self._is_full = self._refused = self._needs_branches = False
        self._held = HeldGuidance()
        self._seen: dict[Any, tuple[Tensor, int]] = {}
        self._source: Outputs | None = None
        self.watched = False
        self.drift: Probe | None = None
        self.graphs = graphs

    def knows(self, module: torch.nn.Module) -> bool:
        """Whether the calls of ``module`` are this run's."""
        return any(module is mine for mine in self.modules)

    def invalidate(self) -> None:
        """Forget held deltas: the next row evaluates both branches."""
        self._held.clear()
        if self.fused is not None:
            self.fused.invalidate()

    def finish(self) -> None:
        """Let go of pipeline and tensors: a controller keeps the run for its report."""
        self.invalidate()
        self._seen.clear()
        self.pipe = self._make_plan = self._make_fused = self.fused = self._source = None
        self.modules, self.arguments = (), {}
        if self.graphs is not None:
            self.graphs.release()

    def adapters_changed(self) -> None:
        """Somebody has turned an adapter: nothing held or captured is of this denoiser."""
        self.invalidate()
        if self.graphs is not None:
            self.graphs.turn_off()

    def prepare(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """What ``module`` is called with in this row, and what becomes of its output."""
        raise NotImplementedError

    def replayed(self, forward: Callable[..., Any]) -> Any:
        """The output of the prepared call without running it; None where it is to be run.

        Args:
            forward: the denoiser below the hook.
        """
        raise NotImplementedError

    def _plan(self) -> None:
        """Make the plan, once guidance is on and the timesteps are set."""
        if self.plan is None:
            self._rows, self.plan = self._make_plan(self._refused)
            self._held = HeldGuidance(self._rows)
            self._is_full = all(row.evaluates_both and row.boost == 1.0 for row in self._rows)

    def _row(self, index: int) -> GuidanceRow | None:
        """The plan's row; None beyond its end: full guidance, with the reason noted."""
        if index < len(self._rows):
            return self._rows[index]
        self._fall_back(f"more model calls than the {len(self._rows)} timesteps of the run")
        return None

    def _is_short(self, index: int, row: GuidanceRow) -> bool:
        """Whether ``row`` reads deltas or outputs that nobody has kept, or that are stale."""
        if self.fused is not None and self.fused.guides:
            return index != self.fused.row or self.fused.is_short(index)
        return self._held.is_short(row)

    @property
    def _guides(self) -> bool:
        """Whether the fused step keeps what is held."""
        return self.fused is not None and self.fused.guides

    @property
    def _defers(self) -> bool:
        """Whether the next step may be a fused one that forms the guidance."""
        return self._guides or (self.fused is None and self.unfused == NOT_YET)

    def step(self, output: Tensor, sample: Tensor, kwargs: Mapping[str, Any]) -> Tensor | None:
        """The next sample by the fused step; None where the scheduler has to step itself."""
        if self.fused is None and self.unfused == NOT_YET:
            self.unfused = self._start_fused(output, sample, dict(kwargs))
        if self._needs_branches and self.fused is not None and not _is_sum(output):
            # Fitted rows were made for the sum of the branches: the plan's scheduler goes on.
            self.fused.take_back()
            self.fused, self.unfused = None, CHANGED
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
        kwargs.pop("return_dict", None)
        if self.record.whole_step:
            return "the pipeline wants more than the sample from its scheduler's step"
        made = self._make_fused(self._rows, kwargs, sample)
        if isinstance(made, str):
            return made
        deferred = _is_sum(output)
        if made.needs_branches and not deferred:
            return CHANGED
        self._needs_branches = made.needs_branches
        if not deferred and isinstance(output, BranchSum):
            output = output.value()
        # The rows were chosen before the step was known, and so was what there is to say of them.
        notes = dict.fromkeys((*self.plan.notes, *made.plan.notes))
        self.plan = replace(made.plan, notes=tuple(notes))
        self.fused = FusedStep(
            made.plan,
            made.solver,
            sample,
            output.dtype,
            guides=deferred,
            dtype=made.result_dtype(sample.dtype, output.dtype),
            watches=self.watched,
            graphs=self.graphs if isinstance(self.graphs, RunGraphs) else None,
        )
        self.backend = self.fused.backend
        if deferred:
            self._held.clear()  # the registers hold from here on
        return ""

    def refuse(self, reason: str) -> None:
        """Full guidance in this run, whose plan has not been made yet."""
        self._refused = True
        self._fall_back(reason)

    def _watch(self, branch: str, conditioning: Mapping[str, Any]) -> None:
        """Drop held deltas when what a branch is conditioned on was swapped or edited meanwhile."""
        if self._is_full:
            return  # nothing held is ever read
        for name, value in enumerate(pytree.tree_leaves(dict(conditioning))):
            if isinstance(value, Tensor) and self._is_new((branch, name), value):
                self.invalidate()

    def _is_new(self, key: Any, value: Tensor) -> bool:
        """Whether a tensor has other values than at the same place in the row before."""
        # Tensors of inference mode keep no version: there only a swap is seen, not an edit in
        # place.
        version = 0 if value.is_inference() else value._version
        before, seen = self._seen.get(key, (value, version))
        self._seen[key] = (value, version)
        if value is before:
            return version != seen
        # Some pipelines make them anew in every step.
        return value.shape != before.shape or not torch.equal(value, before)

    def _fall_back(self, reason: str) -> None:
        """Full guidance in this row, and nothing held beyond it."""
        self.invalidate()
        if reason not in self.fallbacks:
            self.fallbacks.append(reason)


def by_name(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of ``module``."""
    kind: Any = type(module)
    names = argument_names(kind)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _is_sum(output: Tensor) -> bool:
    """Whether the pipeline has left its guidance to the row."""
    return isinstance(output, BranchSum) and output.guidance_scale is not None


def untouched(output: Any) -> Any:
    """What becomes of an output that is the pipeline's as it is."""
    return output
