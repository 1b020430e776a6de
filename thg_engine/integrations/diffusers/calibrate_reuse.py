"""Weights of held deltas fitted to a diffusers pipeline: a minute on one's own prompts."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

from ...doctor import machine_line
from ...errors import InvalidArgument
from ...fitting.reference import Batch
from ...fitting.reuse import FittedReuse, ScaleWeights, fit_weights, follow
from ...guidance import THG, GuidanceRow
from ...lowering import plan_from_table
from ...reuse import FALLBACK
from ...table import SolverTable
from ...trace import trace
from .captured import Captured
from .planning import ChosenRows
from .resolve import DEFAULT_NFE, fingerprint, model_name, resolve_guidance
from .sampling import Noises, batches_of, check_counts, check_given, gather, rank


def fit_reuse(
    pipe: Any,
    prompts: Sequence[str],
    *,
    guidance: THG | None = None,
    num_inference_steps: int = 50,
    guidance_scales: Sequence[float] = (7.5,),
    deltas: int = 3,
    cond_changes: int = 0,
    negative_prompt: str = "",
    batch_size: int = 8,
    samples: int = 1,
    seed: int = 0,
    model: str = "",
    progress: bool = True,
    **call: Any,
) -> FittedReuse:
    """Fit the weights of held deltas to a pipeline and its scheduler, for ``THG(reuse=...)``.

    Args:
        pipe, negative_prompt, batch_size, samples, seed, model, progress, call: as in
            `calibrate_plans`.
        prompts: captions like those it will see, at least two; 24 or more are better.
        guidance: whose coarse grid is used, that of the first scale; None: 70 % of full guidance.
        num_inference_steps, guidance_scales: N, of runs to serve, and w; interpolated between.
        deltas, cond_changes: held deltas, and changes of the conditional output, a row may read.
    Raises:
        UnsupportedPipeline, UntraceableScheduler: other guidance; a step that is not linear.
        InvalidArgument: too few prompts, w <= 1, a stochastic scheduler, a guidance with a boost.
    """
    check_counts(num_inference_steps=num_inference_steps)
    check_given(prompts, 2, guidance_scales)
    noises, captured = Noises(samples, seed, batch_size), Captured.of(pipe)
    with torch.no_grad():
        first = (negative_prompt, guidance_scales[0])
        batches = batches_of(captured, prompts, range(len(prompts)), *first, noises, call)
        table = trace(pipe.scheduler, num_inference_steps)
        given = (captured, table, guidance, batches, guidance_scales)
        found = _fitted(*given, (deltas, cond_changes), progress)
    return replace(found, model=model or model_name(pipe), num_samples=len(prompts) * samples)


def _fitted(
    captured: Captured,
    table: SolverTable,
    guidance: THG | None,
    batches: Sequence[Batch],
    scales: Sequence[float],
    sizes: tuple[int, int],
    progress: bool,
) -> FittedReuse:
    """The fits at all scales, on the coarse grid of the first."""
    rows = _rows(guidance, table, scales[0], captured)
    hidden = not progress or rank()[0] != 0
    with tqdm(total=2 * len(rows) * len(scales), desc="fit reuse", disable=hidden) as bar:
        fits = [_fit(captured, table, rows, batches, float(w), sizes, bar) for w in scales]
    return FittedReuse(
        lambdas=tuple(map(float, table.lambdas)),
        coarse_rows=tuple(i for i, row in enumerate(rows) if row.evaluates_both),
        fits=tuple(fits),
        solver=table.name,
        fingerprint=fingerprint(captured.module),
        date=datetime.date.today().isoformat(),
        machine=machine_line(),
    )


def _fit(
    captured: Captured,
    table: SolverTable,
    rows: tuple[GuidanceRow, ...],
    batches: Sequence[Batch],
    scale: float,
    sizes: tuple[int, int],
    bar: Any,
) -> ScaleWeights:
    """Rows at one guidance scale."""
    engine, (deltas, changes) = captured.engine(), sizes
    plan = plan_from_table(table, ChosenRows("thg", rows), scale)
    trajectories = [follow(engine, plan, batch) for batch in batches]
    bar.update(len(rows))
    options: Any = {"gather": gather, "on_row": bar.update}
    return fit_weights(engine, plan, trajectories, deltas=deltas, cond_changes=changes, **options)


def _rows(
    guidance: THG | None, table: SolverTable, scale: float, captured: Captured
) -> tuple[GuidanceRow, ...]:
    """Extrapolating rows on the grid of ``guidance``."""
    method: Any = THG(nfe=DEFAULT_NFE) if guidance is None else guidance
    if not isinstance(method, THG):
        remedy = "give a THG; other methods hold no delta to be weighed."
        raise InvalidArgument("guidance", getattr(method, "name", method), remedy)
    if method.boost != 1.0:
        remedy = "leave it 1: fitted weights leave no room for a factor."
        raise InvalidArgument("guidance.boost", method.boost, remedy)
    found: Any = resolve_guidance(method, None, None, captured.module)[0]
    rows: tuple[GuidanceRow, ...] = replace(found, reuse=FALLBACK).rows(table.lambdas, scale)
    return rows
