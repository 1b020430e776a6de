"""Closed-form solvers: agreement with known solutions, measured order, refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mixture import Mixture, flow_points, vp_point, vp_points
from thg_engine.engine import Engine
from thg_engine.errors import InvalidArgument
from thg_engine.guidance import CFG
from thg_engine.lowering import plan_from_solver
from thg_engine.schedule import NoiseSchedule, Point, grid_points
from thg_engine.solvers import SOLVERS, get_solver, solver_table
from thg_engine.trace import trace

VP_SOLVERS = ["ddim", "dpm2", "dpmpp2m", "lms2"]


def run(solver: str, mixture: Mixture, points, x, cond, uncond, w, prediction_type="epsilon"):
    plan = plan_from_solver(SOLVERS[solver], points, CFG(), w, prediction_type)
    engine = Engine(mixture.denoiser(points, prediction_type), register_dtype=torch.float64)
    return engine.sample(x, cond, uncond, plan)


@pytest.mark.parametrize("solver", VP_SOLVERS)
def test_measured_order_on_guided_mixture(solver):
    mixture = Mixture.random(seed=3)
    cond, uncond = mixture.weights([0, 2], 5), mixture.weights([0, 1, 2, 3], 5)
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = mixture.solve(x, vp_points(8), cond, uncond, guidance_scale=2.5)
    counts = [64, 128, 256, 512]
    errors = [
        (run(solver, mixture, vp_points(n), x, cond, uncond, 2.5) - exact).norm() for n in counts
    ]
    slope = -np.polyfit(np.log(counts), np.log([float(e) for e in errors]), 1)[0]
    assert slope == pytest.approx(SOLVERS[solver].order, abs=0.2)


@pytest.mark.parametrize("solver", VP_SOLVERS)
@pytest.mark.parametrize("seed", [0, 1])
def test_single_gaussian_has_closed_form_solution(solver, seed):
    """One component: x_t = alpha_t mu + sqrt(alpha_t^2 s^2 + sigma_t^2) z, exactly."""
    mixture = Mixture.random(seed, components=1)
    points = vp_points(400)
    cond = mixture.weights([0], 4)
    z = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    def at(p: Point) -> torch.Tensor:
        spread = math.sqrt(p.alpha_t**2 * float(mixture.stds[0]) ** 2 + p.sigma_t**2)
        return p.alpha_t * mixture.means[0] + spread * z

    found = run(solver, mixture, points, at(points[0]), cond, cond, 1.0)
    error = (found - at(points[-1])).abs().max()
    assert error < (2e-2 if solver == "ddim" else 3e-4)


@pytest.mark.parametrize("solver", VP_SOLVERS)
@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_prediction_types_are_one_model(solver, prediction_type):
    """The same network in another parametrisation gives the same trajectory."""
    mixture = Mixture.random(seed=5)
    points = vp_points(13)
    cond, uncond = mixture.weights([1], 2), mixture.weights([0, 1, 2, 3], 2)
    x = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = run(solver, mixture, points, x, cond, uncond, 4.0)
    found = run(solver, mixture, points, x, cond, uncond, 4.0, prediction_type)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_flow_euler_is_ddim_in_flow_form():
    points = flow_points(9)
    euler = solver_table(SOLVERS["flow_euler"], points, "flow_prediction")
    other = solver_table(SOLVERS["ddim"], points, "flow_prediction")
    for a, b in zip(euler.rows, other.rows, strict=True):
        assert a.sample_weights == pytest.approx(b.sample_weights, abs=1e-14)
        assert a.output_weights == pytest.approx(b.output_weights, abs=1e-14)


@pytest.mark.parametrize("solver", ["flow_euler", "lms2"])
def test_measured_order_for_flow_models(solver):
    """dx/dsigma = v of one Gaussian, whose trajectory is known in closed form."""
    mixture = Mixture.random(seed=2, components=1)
    z = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))

    def at(p: Point) -> torch.Tensor:
        spread = math.sqrt(p.alpha_t**2 * float(mixture.stds[0]) ** 2 + p.sigma_t**2)
        return p.alpha_t * mixture.means[0] + spread * z

    counts, errors = [32, 64, 128, 256], []
    for n in counts:
        points = flow_points(n)
        cond = mixture.weights([0], 3)
        found = run(solver, mixture, points, at(points[0]), cond, cond, 1.0, "flow_prediction")
        errors.append(float((found - at(points[-1])).norm()))
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(SOLVERS[solver].order, abs=0.2)


SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def _traced_and_closed(case: str):
    """(traced table, closed-form table) of a diffusers scheduler and its twin."""
    import diffusers

    if case.startswith("ddim"):
        prediction = case.removeprefix("ddim_")
        scheduler = diffusers.DDIMScheduler(
            **SD,
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type=prediction,
        )
        name, kwargs = "ddim", {}
    elif case == "flow_euler":
        scheduler, name, kwargs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), case, {}
        prediction = "flow_prediction"
    elif case == "lms2":
        scheduler, name, kwargs = diffusers.LMSDiscreteScheduler(**SD), case, {"order": 2}
        prediction = "epsilon"
    else:
        algorithm = {"dpm2": "dpmsolver", "dpmpp2m": "dpmsolver++"}[case]
        final = {"dpm2": "sigma_min", "dpmpp2m": "zero"}[case]
        scheduler = diffusers.DPMSolverMultistepScheduler(
            **SD, algorithm_type=algorithm, final_sigmas_type=final
        )
        name, kwargs, prediction = case, {}, "epsilon"
    scheduler.set_timesteps(20)
    table = trace(scheduler, step_kwargs=kwargs)
    return table, solver_table(get_solver(name), grid_points(scheduler), prediction)


@pytest.mark.parametrize(
    "case",
    ["ddim_epsilon", "ddim_v_prediction", "ddim_sample", "flow_euler", "lms2", "dpm2", "dpmpp2m"],
)
def test_agrees_with_the_traced_scheduler_on_its_grid(case):
    """Roll both tables out on random outputs; the schedulers' own tables are float32."""
    traced, closed = _traced_and_closed(case)
    generator = torch.Generator().manual_seed(7)
    outputs = torch.randn(len(traced.rows), 11, dtype=torch.float64, generator=generator)
    start = torch.randn(11, dtype=torch.float64, generator=generator)

    def rollout(table):
        samples = [start]
        for i, row in enumerate(table.rows):
            x = sum(a * samples[-1 - k] for k, a in enumerate(row.sample_weights))
            samples.append(x + sum(b * outputs[i - k] for k, b in enumerate(row.output_weights)))
        return samples[-1]

    expected = rollout(traced)
    assert (rollout(closed) - expected).norm() / expected.norm() < 2e-6


def test_noise_schedule_points_feed_solvers():
    import diffusers

    schedule = NoiseSchedule.from_scheduler(diffusers.DDIMScheduler(**SD))
    points = [schedule.point(t) for t in (900.0, 450.5, 20.25)]
    table = solver_table(SOLVERS["ddim"], points, "epsilon")
    p, q = points[0], points[1]
    expected = q.sigma_t - q.alpha_t * p.sigma_t / p.alpha_t
    assert table.rows[0].output_weights[0] == pytest.approx(expected, rel=1e-14)


def test_refusals():
    points = vp_points(4)
    with pytest.raises(InvalidArgument, match=r"solver='euler'.*use one of"):
        get_solver("euler")
    with pytest.raises(InvalidArgument, match="half log-SNR must grow"):
        SOLVERS["ddim"].weights([points[2]], points[1], "epsilon")
    with pytest.raises(InvalidArgument, match="half log-SNR must grow"):
        SOLVERS["dpm2"].weights([points[1], points[1]], points[2], "epsilon")
    with pytest.raises(InvalidArgument, match="at least the current point"):
        SOLVERS["ddim"].weights([], points[1], "epsilon")
    with pytest.raises(InvalidArgument, match="prediction_type='noise'"):
        SOLVERS["ddim"].weights([points[0]], points[1], "noise")
    with pytest.raises(InvalidArgument, match="integrates a velocity"):
        SOLVERS["flow_euler"].weights([points[0]], points[1], "epsilon")
    with pytest.raises(InvalidArgument, match="says nothing about"):
        SOLVERS["ddim"].weights([Point(0, 0.0, 1.0)], vp_point(1, 0.0), "epsilon")
    with pytest.raises(InvalidArgument, match="infinite at zero SNR"):
        SOLVERS["lms2"].weights([Point(0, 0.0, 1.0)], vp_point(1, 0.0), "v_prediction")
    with pytest.raises(InvalidArgument, match="at least two"):
        solver_table(SOLVERS["ddim"], points[:1], "epsilon")
