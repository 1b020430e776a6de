"""Sentences of ``pipe.thg.report()``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ...guidance import THG, Guidance
from ...plan import SamplingPlan
from .adapter_types import AdapterRecord
from .run import PipelineRun
from .settings import KILL_SWITCH, Settings


def switch_lines() -> list[str]:
    """Whether calls are the plain pipeline's at the moment."""
    off = os.environ.get(KILL_SWITCH) == "1"
    return [f"  {KILL_SWITCH}=1: calls run the plain pipeline until it is unset"] if off else []


def tuning_lines(settings: Settings) -> list[str]:
    """What has been changed of the denoiser."""
    lines = ["  denoiser: repeated blocks compiled"] if settings.denoiser else []
    return [*lines, f"  attention: {settings.attention}"] if settings.attention else lines


def guidance_line(guidance: Guidance | None) -> str:
    """The method, and how deltas are reused where that is not the paper's way."""
    name = "none" if guidance is None else guidance.name
    if not isinstance(guidance, THG) or guidance.reuse == "hold":
        return f"thg_engine: guidance {name}"
    reuse = guidance.reuse if isinstance(guidance.reuse, str) else "fitted"
    return f"thg_engine: guidance {name}, {reuse} reuse"


def call_lines(run: PipelineRun, record: AdapterRecord, planned: bool = False) -> list[str]:
    """The last call: its cost, where it ran all branches, and what did not go as planned.

    Args:
        run: the call.
        record: of the pipeline.
        planned: whether a calibrated plan chose the number of steps too; its cost is then told
            beside its neighbours'.
    """
    plan = run.plan
    if run.error and not run.calls:
        return [f"  last call: raised {run.error} before its first step"]
    if plan is None:
        off = f"guidance was off ({record.scale} of 1 or less, or no negative prompt)"
        return [f"  last call: NFE {run.nfe}, one branch: {off}"]
    whole = "" if planned else f" of {record.branches * plan.num_rows + run.extras}"
    lines = [
        f"  last call: NFE {run.nfe}{whole} on {plan.solver}, w = {plan.guidance_scale:g}",
        branches_line(run.coarse, record.branches),
    ]
    if run.extras:
        lines.append(f"  {run.extras} further call(s), for guidance of another kind or a picture")
    if run.refreshes:
        lines.append(f"  {run.refreshes} row(s) refreshed: an edit had made the held delta stale")
    if plan.nfe == 2 * plan.num_rows and plan.method != "cfg":
        lines.append("  nothing saved: this grid or budget has both branches at every row")
    if run.error or run.calls < plan.num_rows:
        why = f": {run.error}" if run.error else ""
        lines.append(f"  ended after {run.calls} of {plan.num_rows} rows{why}")
    holds = any(row.delta_weights and not row.evaluates_both for row in plan.rows)
    fitted = any(row.cond_weights for row in plan.rows)  # makes up for it
    if holds and plan.method == "thg" and not fitted:
        lines.append("  one state for tortoise and hare: exact where the solver has no history")
    return [*lines, *(f"  {note}" for note in plan.notes)]


def branches_line(rows: Sequence[int], branches: int = 2) -> str:
    """Where all branches were evaluated."""
    each = "both branches" if branches == 2 else f"all {branches} branches"
    return f"  {each} at rows {', '.join(map(str, rows))}" if rows else f"  {each} at no row"


def plan_lines(plan: SamplingPlan | None) -> list[str]:
    """Before the first call."""
    if plan is None:
        return ["  no call yet; thg.preview(scheduler, num_inference_steps) shows a plan"]
    return ["  no call yet; print(pipe.thg.plan.explain()) shows the plan of 50 steps"]


def why_unfused(run: PipelineRun | None, settings: Settings) -> str:
    """Why the scheduler steps by itself; "" where the fused step runs, or may yet."""
    if settings.fused is False:
        return "off, as asked for"
    return run.unfused if run is not None and run.plan is not None else ""


def step_line(run: PipelineRun | None, settings: Settings) -> str:
    """Who steps."""
    if settings.fused is False:
        return f"  fused step: {why_unfused(run, settings)}"
    if run is None:
        return "  fused step: on where the scheduler's step is linear"
    if run.plan is None:
        return "  fused step: off; guidance was off"
    if run.unfused:
        return f"  fused step: off; {run.unfused}"
    return f"  fused step: {run.fused_steps} row(s) on the {run.backend} backend"


def graph_line(found: dict[str, Any], settings: Settings) -> str:
    """What is replayed, from the report of the graphs."""
    if settings.graph is False:
        return "  graphs: off, as asked for"
    reasons = "; ".join(found["refusals"])
    if not found["captures"]:
        return f"  graphs: none; {reasons or 'nothing has run'}"
    calls = f"{found['replays']} replay(s), {found['eager_calls']} eager call(s)"
    size = f"{found['pool_bytes'] / 2**20:.0f} MiB"
    line = f"  graphs: {found['captures']} captured, {calls}, {size}"
    return f"{line}; not in every run: {reasons}" if reasons else line
