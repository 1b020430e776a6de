"""A small model that counts what it evaluates, its inputs, and plans for it."""

from __future__ import annotations

import torch

from mixture import vp_points
from thg_engine.guidance import CFG, THG, CFGCache, GuidanceInterval, SelectiveGuidance
from thg_engine.lowering import plan_from_solver
from thg_engine.plan import SamplingPlan
from thg_engine.solvers import SOLVERS

STEPS, BATCH, SHAPE, WIDTH = 11, 3, (2, 5, 3), 4
METHODS = [
    CFG(),
    THG(grid=(0, 1, 3, 6), boost=1.2, cutoff=9),
    CFGCache(3, 0.2),
    GuidanceInterval(0.2, 0.6),
    SelectiveGuidance(0.4),
]


class Network:
    """A small nonlinear model; counts its calls and the rows it evaluates."""

    def __init__(self, seed: int = 0, buffer: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.mix = torch.randn(WIDTH, SHAPE[0], generator=generator, dtype=torch.float64)
        self.calls = self.rows = 0
        self.seen: list[tuple] = []
        self.buffer = torch.empty(0) if buffer else None

    def __call__(self, x, timestep, conditioning):
        self.calls += 1
        self.rows += len(x)
        self.seen.append((x.dtype, timestep.dtype, tuple(timestep.shape)))
        shift = (conditioning.double() @ self.mix)[:, :, None, None]
        time = timestep.double()[:, None, None, None] / 1000
        out = torch.tanh(0.7 * x.double() + shift) + 0.3 * torch.sin(x.double() * time)
        out = out.to(x.dtype)
        if self.buffer is None:
            return out
        if self.buffer.shape != out.shape:
            self.buffer = torch.empty_like(out)
        return self.buffer.copy_(out)


def inputs(seed: int = 0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x_T = torch.randn(BATCH, *SHAPE, generator=generator, dtype=torch.float64).to(dtype)
    cond = torch.randn(BATCH, WIDTH, generator=generator, dtype=torch.float64)
    uncond = torch.randn(BATCH, WIDTH, generator=generator, dtype=torch.float64)
    return x_T, cond, uncond


def plan_of(guidance=METHODS[1], solver="dpmpp2m", w=4.0) -> SamplingPlan:
    return plan_from_solver(SOLVERS[solver], vp_points(STEPS), guidance, w)
