r"""Fitted rows: least-squares corrections of every step towards the converged trajectory.

At row i, on the trajectory of the rows fitted so far, the base step of the plan misses the
converged sample x*_{i+1} by a residual, which is regressed on the registers at hand:

    x*_{i+1} - x_{i+1}  ~  sum_k dx_k X_k + sum_k dc_k C_k + sum_k dd_k D_k

in closed form, with a ridge towards zero, i.e. towards the base row, whose strength is chosen by
cross-validation over samples. The corrected row is a row: it costs nothing when it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

import torch
from torch import Tensor

from ..engine import Engine
from ..plan import Row, SamplingPlan, Weights
from ..step_buffers import Conditioning
from .reference import Batch, Trajectory, evaluate_both
from .registers import Registers
from .ridge import Products, cross_validated

WINDOW = (3, 4, 3)
"""Past samples, conditional outputs and deltas that a correction may read."""
DEPTH = 6
"""Register entries kept: as many as any base solver reads."""

Gather = Callable[[Tensor], Tensor]
"""Rows of a tensor from all processes; the identity in a single one."""


@dataclass(frozen=True)
class Correction:
    """What is added to the weights of one row, newest first.

    Attributes:
        samples, conds, deltas: of X, C and D.
        gain: squared one-step error on samples left out over that of the base row; 1 where the fit
            was refused and nothing is added.
    """

    samples: Weights = ()
    conds: Weights = ()
    deltas: Weights = ()
    gain: float = 1.0


def corrected(plan: SamplingPlan, corrections: Sequence[Correction]) -> SamplingPlan:
    """``plan`` with corrections added to its rows, one each."""
    pairs = zip(plan.rows, corrections, strict=True)
    return replace(plan, rows=tuple(_corrected(row, correction) for row, correction in pairs))


def _corrected(row: Row, correction: Correction) -> Row:
    return replace(
        row,
        sample_weights=_added(row.sample_weights, correction.samples),
        cond_weights=_added(row.cond_weights, correction.conds),
        step_delta_weights=_added(row.step_delta_weights, correction.deltas),
    )


def _added(one: Weights, other: Weights) -> Weights:
    return tuple(a + b for a, b in zip_longest(one, other, fillvalue=0.0))


def fit_rows(
    engine: Engine,
    plan: SamplingPlan,
    nodes: Sequence[int],
    trajectories: Sequence[Trajectory],
    gather: Gather = lambda rows: rows,
    on_row: Callable[[], None] = lambda: None,
) -> tuple[Correction, ...]:
    """Corrections of every row of ``plan``.

    Args:
        engine: around the denoiser.
        plan: the base, deterministic; its rows lie at ``nodes``.
        nodes: index of each row's point among the trajectories' nodes, and of the end.
        trajectories: converged runs of the calibration samples at the plan's guidance scale.
        gather: brings rows of other processes.
        on_row: called after each row.
    """
    runs = at_noise(trajectories)
    found = []
    for row, node in zip(plan.rows, nodes[1:], strict=True):
        found.append(fit_row(engine, row, node, runs, trajectories, gather))
        on_row()
    return tuple(found)


def at_noise(trajectories: Sequence[Trajectory]) -> list[Registers]:
    """Registers of runs that begin where these did."""
    return [Registers([t.samples[0].to(t.batch.noise.device)]) for t in trajectories]


def fit_row(
    engine: Engine,
    row: Row,
    node: int,
    runs: Sequence[Registers],
    trajectories: Sequence[Trajectory],
    gather: Gather = lambda rows: rows,
) -> Correction:
    """The correction of a row that leads to ``node``; ``runs`` take the corrected step."""
    parts, bases, features = [], [], []
    for registers, trajectory in zip(runs, trajectories, strict=True):
        observe(engine, registers, row, trajectory.batch)
        base = registers.following(row)
        target = trajectory.samples[node].to(base.device)
        features.append(_features(registers))
        bases.append(base)
        parts.append(Products.of(features[-1], target - base, trajectory.batch.prompts))
    packed = gather(Products.joined(parts).packed()).cpu()
    fit = cross_validated(Products.unpacked(packed, len(features[0])))
    for registers, base, given in zip(runs, bases, features, strict=True):
        for weight, feature in zip(fit.weights, given, strict=True):
            base = base.add(feature, alpha=weight)
        registers.push(base, DEPTH)
    return _named(fit.weights, runs[0], fit.gain, row)


def observe(engine: Engine, registers: Registers, row: Row, batch: Batch) -> None:
    """Evaluate the denoiser as ``row`` says, and take its outputs in."""
    x = registers.samples[0] * row.input_scale
    if row.evaluates_both:
        registers.observe(row, *evaluate_both(engine, x, row.timestep, batch.cond, batch.uncond))
    else:
        registers.observe(row, evaluate(engine, x, row.timestep, batch.cond), None)


def evaluate(engine: Engine, x: Tensor, timestep: float, cond: Conditioning) -> Tensor:
    """The conditional output in the registers' dtype."""
    fed = x if engine.model_dtype is None else x.to(engine.model_dtype)
    return engine.evaluate(fed, timestep, cond).to(engine.register_dtype)


def _features(registers: Registers) -> list[Tensor]:
    """X, C, D as far back as corrections read; the row's outputs have been observed."""
    samples, conds, deltas = WINDOW
    return [*registers.samples[:samples], *registers.conds[:conds], *registers.deltas[:deltas]]


def _named(weights: Weights, registers: Registers, gain: float, row: Row) -> Correction:
    """Weights of `_features` by register, as many as there were before the sample was pushed."""
    past = min(len(registers.samples) - 1, WINDOW[0])
    conds = min(len(registers.conds), WINDOW[1])
    return Correction(weights[:past], weights[past : past + conds], weights[past + conds :], gain)


@torch.no_grad()
def errors(
    engine: Engine,
    plan: SamplingPlan,
    trajectories: Sequence[Trajectory],
    gather: Gather = lambda rows: rows,
) -> Tensor:
    """Relative error |x_0 - x*_0| / |x*_0| of every sample, shape ``(B,)``, float64."""
    runs = []
    for trajectory in trajectories:
        device = trajectory.batch.noise.device
        registers = Registers([plan.initial_scale * trajectory.samples[0].to(device)])
        for row in plan.rows:
            observe(engine, registers, row, trajectory.batch)
            registers.push(registers.following(row), DEPTH)
        runs.append(registers)
    return distances(runs, trajectories, gather)


def distances(
    runs: Sequence[Registers],
    trajectories: Sequence[Trajectory],
    gather: Gather = lambda rows: rows,
) -> Tensor:
    """`errors` of runs that have come to their ends."""
    found = []
    for registers, trajectory in zip(runs, trajectories, strict=True):
        final = trajectory.final.to(registers.samples[0].device).double().flatten(1)
        gap = registers.samples[0].double().flatten(1) - final
        found.append(gap.norm(dim=1) / final.norm(dim=1))
    return gather(torch.cat(found)).cpu()
