r"""The converged trajectory: what rows are fitted to, and what errors are measured against.

Full guidance is integrated on a fine grid, DPM-Solver++ 2M, and kept at its *nodes*: samples,
conditional outputs and guidance deltas. Every fitted plan has its points among the nodes, so that
the value it should have there is known and nothing is interpolated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..engine import Engine
from ..errors import InvalidArgument
from ..schedule import NoiseSchedule, Point
from ..solvers import get_solver, solver_table
from ..step_buffers import Conditioning
from .registers import Registers

LAMBDA_SHARE = 0.35
"""How far nodes are spaced by half log-SNR and not by time: both ends of a run need more of them
than even timesteps give."""
FLOW_SHIFT = 2.0
"""Time shift by which nodes of a flow are denser near noise: guidance changes fastest there, and
a grid cannot be finer than the nodes."""
LAMBDA_LIMITS = (-3.5, 6.0)
"""Half log-SNR beyond which a node counts as lying at an end; sigma_t is 0.0025 at the second.
Runs of noise models end before, those of flows at zero noise."""


class Batch(NamedTuple):
    """Samples that are evaluated together, batch first.

    Attributes:
        noise: x_T.
        cond, uncond: conditioning of both branches.
        prompts: index of each sample's prompt: samples of one prompt are left out together when
            fits are validated. (): every sample has a prompt of its own.
    """

    noise: Tensor
    cond: Conditioning
    uncond: Conditioning
    prompts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Nodes:
    """Points that plans choose theirs from.

    Attributes:
        points: K + 1, from noise to data; nothing is evaluated at the last.
        substeps: steps of the converged run between each two, K values.
    """

    points: tuple[Point, ...]
    substeps: tuple[int, ...]

    @property
    def last(self) -> int:
        """K, the index of the end."""
        return len(self.points) - 1

    @property
    def num_steps(self) -> int:
        """Steps of the converged run."""
        return sum(self.substeps)


DATA = Point(0.0, 1.0, 0.0)
"""The end of a run without any noise left."""


def make_nodes(
    schedule: NoiseSchedule, count: int = 60, substeps: int = 4, end: Point = DATA
) -> Nodes:
    """Nodes of a schedule.

    Args:
        schedule: kinds ``vp`` and ``flow``; timesteps of ``vp`` are whole, as in training.
        count: K.
        substeps: steps of the converged run between two of them.
        end: where runs end; its timestep is 0.
    Raises:
        InvalidArgument: another kind of schedule, or fewer than two nodes.
    """
    if schedule.kind not in ("vp", "flow") or schedule.reverse:
        remedy = "plans are fitted on variance-preserving and flow-matching schedules."
        raise InvalidArgument("schedule", schedule.kind, remedy)
    if count < 2 or substeps < 1:
        raise InvalidArgument("count", count, "give at least two nodes, and a step between them.")
    whole = schedule.kind == "vp"
    # Of a flow too: at T itself there is no half log-SNR, and no multistep solver begins there.
    top = schedule.num_train_timesteps - 1.0
    bottom = max(1.0, 0.001 * top)
    times = _spaced(schedule, top, bottom, count)
    times = sorted({round(t) if whole else t for t in times}, reverse=True)
    gaps = [a - b for a, b in zip(times, [*times[1:], 0.0], strict=True)]
    steps = [int(min(substeps, gap)) if whole else substeps for gap in gaps[:-1]]
    points = [schedule.point(t) for t in times]
    return Nodes((*points, end), (*steps, 1))


def _spaced(schedule: NoiseSchedule, top: float, bottom: float, count: int) -> list[float]:
    """``count`` times between ``top`` and ``bottom``, by time and half log-SNR together."""
    dense = np.linspace(top, bottom, 2000)
    raw = np.array([schedule.point(float(t)).lambda_t for t in dense])
    lambdas = np.clip(raw, *LAMBDA_LIMITS)
    times = dense / schedule.num_train_timesteps
    if schedule.kind == "flow":
        times = times / (FLOW_SHIFT - (FLOW_SHIFT - 1) * times)
    by_time = (times[0] - times) / (times[0] - times[-1])
    by_lambda = (lambdas - lambdas[0]) / (lambdas[-1] - lambdas[0])
    mixed = (1 - LAMBDA_SHARE) * by_time + LAMBDA_SHARE * by_lambda
    found: list[float] = np.interp(np.linspace(0, 1, count), mixed, dense).tolist()
    return found


@dataclass
class Trajectory:
    """One batch's converged run at the nodes.

    Attributes:
        batch: noise and conditioning.
        samples: ``(K + 1, B, ...)``, the registers' dtype, on the host.
        conds: conditional outputs, ``(K, B, ...)``.
        deltas: guidance deltas, ``(K, B, ...)``.
    """

    batch: Batch
    samples: Tensor
    conds: Tensor
    deltas: Tensor

    @property
    def final(self) -> Tensor:
        """x_0, shape ``(B, ...)``."""
        return self.samples[-1]


def converge(
    engine: Engine,
    schedule: NoiseSchedule,
    nodes: Nodes,
    batch: Batch,
    guidance_scale: float,
    prediction_type: str,
    on_step: Callable[[], None] = lambda: None,
) -> Trajectory:
    """Integrate full guidance along ``nodes``; two evaluations per step and sample."""
    points, kept = _fine(schedule, nodes)
    table = solver_table(get_solver("dpmpp2m"), points, prediction_type)
    x = batch.noise.to(engine.register_dtype)
    registers = Registers([x])
    samples, conds, deltas = [x], [], []
    for i, row in enumerate(table.rows):
        c, u = evaluate_both(engine, x, row.timestep, batch.cond, batch.uncond)
        guided = c + (guidance_scale - 1) * (c - u)
        if i in kept:
            conds.append(c)
            deltas.append(c - u)
        registers.guided.insert(0, guided)
        x = _step(registers, row.sample_weights, row.output_weights)
        registers.push(x, 3)
        if i + 1 in kept:
            samples.append(x)
        on_step()
    return Trajectory(batch, *(torch.stack(v).cpu() for v in (samples, conds, deltas)))


def _fine(schedule: NoiseSchedule, nodes: Nodes) -> tuple[list[Point], set[int]]:
    """Points of the converged run, and which of them are nodes."""
    points: list[Point] = []
    kept = set()
    for k, steps in enumerate(nodes.substeps):
        here, there = nodes.points[k], nodes.points[k + 1]
        kept.add(len(points))
        points.append(here)
        for j in range(1, steps):
            t = here.timestep + (there.timestep - here.timestep) * j / steps
            points.append(schedule.point(t))
    kept.add(len(points))
    return [*points, nodes.points[-1]], kept


def _step(registers: Registers, samples: Sequence[float], outputs: Sequence[float]) -> Tensor:
    total = torch.zeros_like(registers.samples[0])
    for weight, value in zip(samples, registers.samples, strict=False):
        total = total + weight * value
    for weight, value in zip(outputs, registers.guided, strict=False):
        total = total + weight * value
    return total


def evaluate_both(
    engine: Engine, x: Tensor, timestep: float, cond: Conditioning, uncond: Conditioning
) -> tuple[Tensor, Tensor]:
    """(conditional, unconditional) outputs in the registers' dtype."""
    fed = x if engine.model_dtype is None else x.to(engine.model_dtype)
    pair = engine.evaluate_both(fed, timestep, cond, uncond)
    return pair[0].to(engine.register_dtype), pair[1].to(engine.register_dtype)
