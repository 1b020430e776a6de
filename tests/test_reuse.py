"""Extrapolated deltas: exact on polynomials, of the promised order, the same in a pipeline."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import thg_engine
import zoo_all  # noqa: F401  (it fills the registry)
from by_hand import ByHand
from mixture import vp_points
from thg_engine import THG, Engine
from thg_engine.errors import InvalidArgument
from thg_engine.lowering import plan_from_solver
from thg_engine.reuse import coordinates, weights
from thg_engine.solvers import SOLVERS
from zoo import ZOO, build, call

LAMBDAS = sorted(np.random.default_rng(0).uniform(-5, 5, 20))


@pytest.mark.parametrize("along", ["time", "lambda", "row"])
@pytest.mark.parametrize(("reuse", "degree"), [("linear", 1), ("quadratic", 2)])
def test_polynomials_are_met_exactly(reuse, degree, along) -> None:
    """Once there are as many deltas as the degree needs; the reference is numpy's polyval."""
    guidance = THG(grid=(0, 1, 2, 5, 9, 14), reuse=reuse, along=along)
    rows, x = guidance.rows(LAMBDAS, 5.0), coordinates(LAMBDAS, along)
    polynomial = np.random.default_rng(degree).normal(size=degree + 1)
    delta = np.polyval(polynomial, x)
    held: list[float] = []
    for i, row in enumerate(rows):
        if row.evaluates_both:
            held.insert(0, delta[i])
            continue
        found = sum(w * d for w, d in zip(row.delta_weights, held, strict=False))
        assert len(row.delta_weights) == degree + 1
        assert found == pytest.approx(delta[i], rel=1e-9, abs=1e-9)


def test_the_paper_s_method_is_the_default() -> None:
    assert THG(grid=3).rows(LAMBDAS, 5.0) == THG(grid=3, reuse="hold").rows(LAMBDAS, 5.0)
    for row in THG(grid=3, boost=1.1, cutoff=9).rows(LAMBDAS, 5.0):
        assert row.delta_weights in ((), (1.0,))


def test_first_span_damping_and_what_follows_the_cutoff() -> None:
    rows = THG(grid=4, reuse="linear", along="row", boost=1.2, cutoff=10).rows(LAMBDAS, 5.0)
    assert [row.delta_weights for row in rows[1:4]] == [(1.0,)] * 3, "one delta: held"
    assert rows[5].delta_weights == (1.25, -0.25) and rows[5].boost == 1.2
    assert all(not row.delta_weights for row in rows[10:])
    half = THG(grid=4, reuse="linear", along="row", damping=0.5).rows(LAMBDAS, 5.0)
    assert half[5].delta_weights == (1.125, -0.125)
    assert THG(grid=4, reuse="linear", damping=0.0).rows(LAMBDAS, 5.0)[5].delta_weights == (1, 0)
    kept = THG(grid=4, cutoff=10, after="hold").rows(LAMBDAS, 5.0)
    assert all(row.delta_weights == (1.0,) for row in kept[10:])
    assert sum(1 + row.evaluates_both for row in kept) == 20 + 3
    never = THG(grid=4, cutoff=0, after="hold").rows(LAMBDAS, 5.0)
    assert all(not row.delta_weights and not row.evaluates_both for row in never)


def test_ends_of_the_noise_levels() -> None:
    """Pure noise has no half log-SNR: there the newest delta is held; its time is 1."""
    lambdas = [-math.inf, -1.0, 0.0, 1.0, math.inf]
    assert coordinates(lambdas, "time") == pytest.approx(
        [1, 1 / (1 + math.e**-1), 0.5, 1 / (1 + math.e), 0]
    )
    assert coordinates([-2000.0, 2000.0], "time") == [1.0, 0.0]
    assert weights([-1.0, -math.inf], 0.0, 1, 1.0) == (1.0,)
    assert weights([1.0, 1.0], 2.0, 1, 1.0) == (1.0,)


@pytest.mark.parametrize("degree", [0, 1, 2])
def test_order(degree) -> None:
    """Halving the spans divides the error at their end by 2 ** (degree + 1)."""

    def error(span: float) -> float:
        held = [0.3 - k * span for k in range(3)]
        values = np.exp(np.sin(held))
        given = weights(held, 0.3 + span, degree, 1.0)
        found = sum(w * d for w, d in zip(given, values, strict=False))
        return abs(found - math.exp(math.sin(0.3 + span)))

    assert math.log2(error(2e-3) / error(1e-3)) == pytest.approx(degree + 1, abs=0.05)


@pytest.mark.parametrize("solver", ["ddim", "dpmpp2m"])
def test_runs_are_nearer_to_full_guidance(solver) -> None:
    """A network whose branches differ by a smooth function of time and sample, in float64."""

    def denoiser(x, t, c):
        return torch.tanh(x * (0.5 + c[:, None]) + torch.sin(3e-3 * t)[:, None])

    x_T = torch.randn(2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cond, uncond = torch.full((2,), 0.3).double(), torch.zeros(2).double()
    engine = Engine(denoiser, register_dtype=torch.float64, model_dtype=torch.float64)

    def run(guidance) -> torch.Tensor:
        plan = plan_from_solver(SOLVERS[solver], vp_points(64), guidance, 4.0)
        return engine.sample(x_T, cond, uncond, plan)

    full = run(thg_engine.CFG())
    errors = [float((run(THG(grid=2, reuse=r)) - full).norm()) for r in ("hold", "linear")]
    assert errors[1] < 0.8 * errors[0]


class Line(ByHand):
    """By hand with numpy's line through the last two deltas, along the rows."""

    def calls(self, values):
        if self.cond is None:
            self.step, self.cond = self.step + 1, values
            return values
        cond, self.cond = self.cond, None
        if self.step in self.coarse:
            self.deltas = [(self.step, cond - values), *(self.delta or ())][:2]
            self.delta = self.deltas
            return values
        steps, deltas = zip(*self.deltas, strict=True)
        flat = np.stack([delta.numpy().ravel().astype(float) for delta in deltas])
        slope, level = np.polyfit(steps, flat, 1) if len(steps) > 1 else (0.0, flat[0])
        delta = torch.from_numpy(slope * self.step + level).to(cond.dtype)
        return cond - delta.reshape(cond.shape)


@pytest.mark.parametrize("fused", [None, False])
def test_in_a_pipeline_it_is_what_it_is_by_hand(fused) -> None:
    entry = ZOO["wan"]
    guidance, steps = THG(grid=2, reuse="linear", along="row"), {"num_inference_steps": 7}
    pipe = thg_engine.compile(build(entry), guidance, fused=fused)
    found = call(entry, pipe, **steps)
    plan = pipe.thg.plan
    assert pipe.thg.stats()["last_nfe"] == plan.nfe == 11 and not pipe.thg.stats()["refreshes"]
    with Line(thg_engine.uncompile(pipe), entry, set(plan.coarse_grid)):
        expected = call(entry, pipe, **steps)
    held = call(entry, thg_engine.compile(pipe, THG(grid=2)), **steps)
    scale = float(expected.abs().max())
    assert float((found - expected).abs().max()) < 1e-4 * scale
    assert float((held - expected).abs().max()) > 1e-3 * scale


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("reuse", "cubic"), ("reuse", 1), ("along", "t"), ("damping", 1.5), ("damping", "1")),
        *(("damping", True), ("after", "keep")),
    ],
)
def test_what_makes_no_sense_is_refused(name, value) -> None:
    with pytest.raises(InvalidArgument, match=rf"^{name}="):
        THG(**{name: value})
