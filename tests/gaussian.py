"""Gaussian data, whose outputs are known exactly, for the tests of fitting."""

from __future__ import annotations

import numpy as np
import torch

from thg_engine import Engine
from thg_engine.fitting.front import PlanEntry, base_plan
from thg_engine.fitting.reference import Batch, converge, make_nodes
from thg_engine.fitting.spans import Grid
from thg_engine.plan import SamplingPlan
from thg_engine.schedule import NoiseSchedule

WIDTH = 6
W = 4.0
TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")


def schedule_of(kind: str) -> NoiseSchedule:
    if kind == "flow":
        return NoiseSchedule("flow", 1000, "flow_prediction")
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    return NoiseSchedule.from_alphas_cumprod(np.cumprod(1 - betas))


VP = schedule_of("vp")


class Gaussian:
    """Data N(mu, s^2) per coordinate, mu = c for either branch: outputs are exact, and linear."""

    s = 0.7

    def __init__(self, schedule: NoiseSchedule, prediction_type: str, bend: float = 0.0) -> None:
        self.schedule, self.type, self.bend = schedule, prediction_type, bend
        self.rows = 0

    def field(self, x, t: float, c):
        """(x_0, eps) as expected by the model; ``bend`` makes it no Gaussian's any more."""
        point = self.schedule.point(t)
        a, b = point.alpha_t, point.sigma_t
        x0 = c + a * self.s**2 / (a**2 * self.s**2 + b**2) * (x - a * c)
        if self.bend:
            x0 = x0 + self.bend * a * torch.tanh(3 * x0) * torch.sin(2 * x + 3 * c)
        return x0, (x - a * x0) / b

    def __call__(self, x, t, c):
        self.rows += len(x)
        x0, eps = self.field(x, float(t[0]), c)
        point = self.schedule.point(float(t[0]))
        made = {"epsilon": eps, "sample": x0, "flow_prediction": eps - x0}
        return made.get(self.type, point.alpha_t * eps - point.sigma_t * x0)

    def engine(self) -> Engine:
        wide = {"register_dtype": torch.float64, "model_dtype": torch.float64}
        return Engine(self, graph=False, **wide)


def batch_of(seed: int, size: int = 4, dim: int = WIDTH):
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(size, dim, generator=generator, dtype=torch.float64) for _ in range(3)]
    return Batch(draw[0], 0.8 * draw[1], 0.3 * draw[2])


class Fixture:
    """Converged runs of a bent Gaussian, and a base plan on some of their nodes."""

    def __init__(self, prediction_type: str, bend: float = 0.3) -> None:
        self.schedule = schedule_of("flow" if prediction_type == "flow_prediction" else "vp")
        self.type, model = prediction_type, Gaussian(self.schedule, prediction_type, bend)
        self.model, self.engine = model, model.engine()
        self.nodes = make_nodes(self.schedule, 24, 3)
        self.fit = [self.converged(batch_of(seed, 6)) for seed in (1, 2, 3, 4)]
        self.held_out = [self.converged(batch_of(seed, 6)) for seed in (9, 10, 11)]

    def converged(self, batch):
        return converge(self.engine, self.schedule, self.nodes, batch, W, self.type)

    def base(self, grid: Grid) -> SamplingPlan:
        times = tuple(self.nodes.points[j].timestep for j in grid.nodes)
        entry = PlanEntry("dpmpp2m", times, grid.coarse_rows, ())
        return base_plan(entry, self.schedule, self.type, W)


NODES = (0, 4, 8, 12, 16, 19, 22)
