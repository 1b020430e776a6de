"""Plans against an independent two-state implementation of Algorithm 1, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from mixture import Mixture, flow_points, vp_points
from thg_engine.engine import Engine
from thg_engine.errors import InvalidArgument
from thg_engine.guidance import (
    CFG,
    FRESH,
    THG,
    CFGCache,
    GuidanceInterval,
    GuidanceRow,
    SelectiveGuidance,
)
from thg_engine.lowering import plan_from_solver
from thg_engine.plan import SamplingPlan
from thg_engine.solvers import SOLVERS

CASES = [
    (solver, prediction_type)
    for solver in ("ddim", "dpm2", "dpmpp2m", "lms2")
    for prediction_type in ("epsilon", "sample", "v_prediction")
] + [("flow_euler", "flow_prediction"), ("lms2", "flow_prediction")]


def to_x0_eps(out, x, p, prediction_type):
    """(x0, eps) of a model output, written out independently of the package."""
    if prediction_type == "epsilon":
        return (x - p.sigma_t * out) / p.alpha_t, out
    if prediction_type == "sample":
        return out, (x - p.alpha_t * out) / p.sigma_t
    if prediction_type == "v_prediction":
        return p.alpha_t * x - p.sigma_t * out, p.sigma_t * x + p.alpha_t * out
    return x - p.sigma_t * out, x + (1 - p.sigma_t) * out


def solver_step(solver, prediction_type, history, target):
    """One step of a textbook solver. ``history``: [(point, state, output)], newest first."""
    p, x, out = history[0]
    x0, eps = to_x0_eps(out, x, p, prediction_type)
    if solver == "flow_euler":
        return x + (target.sigma_t - p.sigma_t) * out
    if solver == "lms2" and prediction_type == "flow_prediction":
        y, s, s_next, f, scale = x, p.sigma_t, target.sigma_t, out, 1.0
        previous = [(q.sigma_t, o) for q, _, o in history[1:2]]
    elif solver == "lms2":
        y, s, f, scale = x / p.alpha_t, p.sigma_t / p.alpha_t, eps, target.alpha_t
        s_next = target.sigma_t / target.alpha_t
        previous = [
            (q.sigma_t / q.alpha_t, to_x0_eps(o, z, q, prediction_type)[1])
            for q, z, o in history[1:2]
        ]
    elif len(history) == 1 or solver == "ddim":
        return target.alpha_t * x0 + target.sigma_t * eps
    else:
        q, z, o = history[1]
        old_x0, old_eps = to_x0_eps(o, z, q, prediction_type)
        h = target.lambda_t - p.lambda_t
        r = (p.lambda_t - q.lambda_t) / h
        if solver == "dpmpp2m":
            data = x0 + (x0 - old_x0) / (2 * r)
            return target.sigma_t / p.sigma_t * x - target.alpha_t * math.expm1(-h) * data
        noise = eps + (eps - old_eps) / (2 * r)
        return target.alpha_t / p.alpha_t * x - target.sigma_t * math.expm1(h) * noise
    if not previous:
        return scale * (y + (s_next - s) * f)
    # Integrate the line through the last two derivatives from s to s_next.
    s_old, f_old = previous[0]
    slope = (f - f_old) / (s - s_old)
    return scale * (y + (s_next - s) * f + 0.5 * (s_next - s) ** 2 * slope)


def algorithm_1(mixture, points, x_T, cond, uncond, w, grid, boost, cutoff, solver, kind):
    """Two states, two histories, straight from the paper."""
    n = len(points) - 1
    coarse = sorted({*grid, *range(cutoff, n), n})
    tortoise, hare = x_T.clone(), torch.zeros_like(x_T)
    hare_ahead, tortoise_past, hare_past, nfe = {0: hare}, [], [], 0
    for i in range(n):
        hare = hare_ahead[i]
        x = tortoise + hare
        out = mixture.output(x, points[i], cond, kind)
        nfe += 1
        tortoise_past.insert(0, (points[i], tortoise, out))
        if i in coarse:
            span_end = coarse[coarse.index(i) + 1]
            delta = torch.zeros_like(x)
            if i < cutoff:
                delta = out - mixture.output(x, points[i], uncond, kind)
                delta = delta * (boost if span_end - i > 1 else 1.0)
                nfe += 1
            hare_past.insert(0, (points[i], hare, (w - 1) * delta))
            for j in range(i + 1, span_end + 1):
                hare_ahead[j] = solver_step(solver, kind, hare_past[:2], points[j])
        tortoise = solver_step(solver, kind, tortoise_past[:2], points[i + 1])
    return tortoise + hare_ahead[n], nfe


@pytest.mark.parametrize(("solver", "kind"), CASES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_thg_is_algorithm_1_to_the_letter(solver, kind, seed):
    mixture = Mixture.random(seed)
    n = 17 + seed
    points = flow_points(n) if kind == "flow_prediction" else vp_points(n)
    cond, uncond = mixture.weights([seed], 3), mixture.weights([0, 1, 2, 3], 3)
    generator = torch.Generator().manual_seed(seed)
    x_T = torch.randn(3, 3, dtype=torch.float64, generator=generator)
    grid, w, boost, cutoff = (0, 1, 2, 4, 7, 9, 12, 15), 3.0 + seed, 1.1, 11 + 3 * seed
    thg = THG(grid=grid, boost=boost, cutoff=cutoff)
    plan = plan_from_solver(SOLVERS[solver], points, thg, w, kind)
    denoiser = mixture.denoiser(points, kind)
    found = Engine(denoiser, register_dtype=torch.float64).sample(x_T, cond, uncond, plan)
    expected, nfe = algorithm_1(
        mixture, points, x_T, cond, uncond, w, grid, boost, cutoff, solver, kind
    )
    assert (found - expected).abs().max() <= 1e-10 * max(1.0, float(expected.abs().max()))
    assert plan.nfe == nfe == denoiser.rows / 3
    # The JSON round trip must not cost a bit.
    again = SamplingPlan.from_json(plan.to_json())
    assert again == plan


@pytest.mark.parametrize(("solver", "kind"), CASES)
def test_two_forms_agree_where_theory_says_so(solver, kind):
    """Held delta: equal for jump-exact solvers, different otherwise (paper.md 6.1 and 6.2)."""
    mixture = Mixture.random(seed=1)
    points = flow_points(14) if kind == "flow_prediction" else vp_points(14)
    cond, uncond = mixture.weights([1, 3], 2), mixture.weights([0, 1, 2, 3], 2)
    x_T = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    thg = THG(grid=(0, 1, 4, 8, 11))
    ends = {}
    for form in ("combined", "two_state"):
        plan = plan_from_solver(SOLVERS[solver], points, thg, 4.0, kind, form=form)
        engine = Engine(mixture.denoiser(points, kind), register_dtype=torch.float64)
        ends[form] = engine.sample(x_T, cond, uncond, plan)
    gap = float((ends["combined"] - ends["two_state"]).abs().max())
    if SOLVERS[solver].jumps_exactly(kind):
        assert gap < 1e-12
    else:
        assert gap > 1e-4


@pytest.mark.parametrize(("solver", "kind"), CASES)
def test_an_early_cutoff_extrapolates_nothing(solver, kind):
    """Past the cut-off delta is 0 in every row: with no row held, both forms are one again."""
    mixture = Mixture.random(seed=6)
    points = flow_points(30) if kind == "flow_prediction" else vp_points(30)
    cond, uncond = mixture.weights([0], 2), mixture.weights([0, 1, 2, 3], 2)
    x_T = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    ends = []
    for form in ("combined", "two_state"):
        thg = THG(grid=(0, 1, 2, 3), cutoff=4)
        plan = plan_from_solver(SOLVERS[solver], points, thg, 5.0, kind, form=form)
        engine = Engine(mixture.denoiser(points, kind), register_dtype=torch.float64)
        ends.append(engine.sample(x_T, cond, uncond, plan))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-10, atol=1e-10)


def test_a_held_row_has_the_boost_of_its_span():
    rows = (FRESH, GuidanceRow(False, boost=2.0), FRESH)
    points = vp_points(3)
    with pytest.raises(InvalidArgument, match="boost of its span"):
        plan_from_solver(SOLVERS["dpm2"], points, FixedRows(rows), 3.0)


@dataclass(frozen=True)
class FixedRows:
    """Guidance rows as given."""

    given: tuple[GuidanceRow, ...]
    name: str = "fixed"

    def rows(self, lambdas, guidance_scale):
        return self.given


@pytest.mark.parametrize(("solver", "kind"), CASES)
@pytest.mark.parametrize(
    "guidance", [CFG(), GuidanceInterval(0.2, 0.7), SelectiveGuidance(0.5), THG(cutoff=3, grid=1)]
)
def test_two_state_form_of_unheld_methods_is_the_combined_one(solver, kind, guidance):
    """Without held deltas both states see the same points, so linearity makes them one state."""
    mixture = Mixture.random(seed=4)
    points = flow_points(10) if kind == "flow_prediction" else vp_points(10)
    cond, uncond = mixture.weights([2], 2), mixture.weights([0, 1, 2, 3], 2)
    x_T = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    ends = []
    for form in ("combined", "two_state"):
        plan = plan_from_solver(SOLVERS[solver], points, guidance, 5.0, kind, form=form)
        engine = Engine(mixture.denoiser(points, kind), register_dtype=torch.float64)
        ends.append(engine.sample(x_T, cond, uncond, plan))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-10, atol=1e-10)


def test_refusals():
    points = vp_points(6)
    with pytest.raises(InvalidArgument, match="form='both'"):
        plan_from_solver(SOLVERS["ddim"], points, CFG(), 2.0, form="both")
    with pytest.raises(InvalidArgument, match="6 rows"):
        plan_from_solver(SOLVERS["ddim"], points, THG(grid=(0, 9)), 2.0)
    assert plan_from_solver(SOLVERS["ddim"], points, CFG(), 1.0).nfe == 6
    assert plan_from_solver(SOLVERS["ddim"], points, CFGCache(2, 0.0), 2.0).nfe == 9


@pytest.mark.parametrize("scale", ["7", None, float("nan"), float("inf")])
def test_a_scale_that_is_no_number(scale):
    with pytest.raises(InvalidArgument, match=r"^guidance_scale="):
        plan_from_solver(SOLVERS["ddim"], vp_points(4), THG(grid=2), scale)
