"""Noise schedules against diffusers' own tables and against closed forms."""

from __future__ import annotations

import math

import diffusers
import numpy as np
import pytest
import torch

from scheduler_cases import CLASSES, SD, build
from thg_engine.errors import InvalidArgument
from thg_engine.schedule import (
    NoiseSchedule,
    Point,
    grid_points,
    model_timesteps,
    prediction_type,
)


def _sd_cumprod():
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    return np.cumprod(1.0 - betas)


# --- Point ---------------------------------------------------------------------------------------


def test_point_half_log_snr():
    assert Point(3.0, 0.8, 0.6).lambda_t == pytest.approx(math.log(0.8 / 0.6), rel=1e-15)
    assert Point(0.0, 1.0, 0.0).lambda_t == math.inf
    assert Point(999.0, 0.0, 1.0).lambda_t == -math.inf


@pytest.mark.parametrize(
    ("scales", "argument"),
    [((-0.1, 1.0), "alpha_t"), ((1.0, math.nan), "sigma_t"), ((0.0, 0.0), "alpha_t"),
     ((math.inf, 1.0), "alpha_t")],
)  # fmt: skip
def test_point_refuses_scales_that_are_none(scales, argument):
    with pytest.raises(InvalidArgument, match=argument):
        Point(0.0, *scales)


# --- NoiseSchedule -------------------------------------------------------------------------------


def test_vp_reads_the_table_at_whole_timesteps():
    cumprod = _sd_cumprod()
    schedule = NoiseSchedule.from_alphas_cumprod(cumprod)
    for t in (0, 1, 250, 998, 999):
        assert schedule.alpha_t(t) == pytest.approx(math.sqrt(cumprod[t]), rel=1e-13)
        assert schedule.sigma_t(t) == pytest.approx(math.sqrt(1.0 - cumprod[t]), rel=1e-12)
        assert schedule.alpha_t(t) ** 2 + schedule.sigma_t(t) ** 2 == pytest.approx(1.0, rel=1e-14)


def test_vp_is_linear_in_log_snr_between_timesteps():
    schedule = NoiseSchedule.from_alphas_cumprod(_sd_cumprod())
    low, high = schedule.lambda_t(400), schedule.lambda_t(401)
    assert schedule.lambda_t(400.3) == pytest.approx(0.7 * low + 0.3 * high, rel=1e-12)
    # as diffusers does when it turns a sigma into a timestep
    euler = diffusers.EulerDiscreteScheduler(**SD)
    logs = np.log(((1 - euler.alphas_cumprod.numpy()) / euler.alphas_cumprod.numpy()) ** 0.5)
    sigma = np.array(2.345)
    ours = NoiseSchedule.from_scheduler(euler).timestep(-math.log(2.345))
    assert ours == pytest.approx(float(euler._sigma_to_t(sigma, logs)), abs=1e-3)


@pytest.mark.parametrize(
    "schedule",
    [
        NoiseSchedule.from_alphas_cumprod(_sd_cumprod()),
        NoiseSchedule.from_alphas_cumprod(_sd_cumprod(), kind="ve"),
        NoiseSchedule.from_alphas_cumprod(np.append(_sd_cumprod()[:-1], 0.0)),
        NoiseSchedule("flow"),
        NoiseSchedule("flow", reverse=True),
        NoiseSchedule("flow", 1),
        NoiseSchedule("edm"),
        NoiseSchedule("edm", rate=250.0),
        NoiseSchedule("trig", rate=math.pi / 2),
        NoiseSchedule("trig", rate=1.0),
    ],
    ids=["vp", "ve", "zero-snr", "flow", "reverse", "flow-unit", "edm", "cm", "trig", "trig-1"],
)
def test_timestep_is_the_inverse_of_lambda(schedule):
    for lambda_ in (-2.5, -1.0, -0.2, 0.0, 0.7, 3.0):
        t = schedule.timestep(lambda_)
        assert schedule.lambda_t(t) == pytest.approx(lambda_, abs=1e-9)


def test_zero_terminal_snr_interval_is_linear_in_alpha():
    cumprod = np.append(_sd_cumprod()[:-1], 0.0)
    schedule = NoiseSchedule.from_alphas_cumprod(cumprod)
    assert schedule.point(999).alpha_t == 0.0
    assert schedule.lambda_t(999) == -math.inf
    assert schedule.timestep(-math.inf) == 999.0
    assert schedule.alpha_t(998.25) == pytest.approx(0.75 * math.sqrt(cumprod[998]), rel=1e-12)


def test_timestep_clamps_to_the_table_and_reaches_the_ends():
    schedule = NoiseSchedule.from_alphas_cumprod(_sd_cumprod())
    assert schedule.timestep(99.0) == 0.0
    assert schedule.timestep(math.inf) == 0.0
    assert schedule.timestep(-99.0) == 999.0
    assert NoiseSchedule("flow").timestep(math.inf) == 0.0
    assert NoiseSchedule("flow").timestep(-math.inf) == 1000.0
    assert NoiseSchedule("trig", rate=1.0).timestep(-math.inf) == pytest.approx(math.pi / 2)


def test_flow_and_ve_scales():
    assert NoiseSchedule("flow").point(250.0) == Point(250.0, 0.75, 0.25)
    assert NoiseSchedule("flow", reverse=True).point(250.0) == Point(250.0, 0.25, 0.75)
    vp = NoiseSchedule.from_alphas_cumprod(_sd_cumprod())
    ve = NoiseSchedule.from_alphas_cumprod(_sd_cumprod(), kind="ve")
    assert ve.alpha_t(321.5) == 1.0
    assert ve.lambda_t(321.5) == pytest.approx(vp.lambda_t(321.5), rel=1e-13)
    assert NoiseSchedule("edm").sigma_t(0.25 * math.log(80.0)) == pytest.approx(80.0, rel=1e-12)


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: NoiseSchedule("cosine"), "kind"),
        (lambda: NoiseSchedule("vp"), "log_snr"),
        (lambda: NoiseSchedule("vp", log_snr=(1.0, 2.0)), "log_snr"),
        (lambda: NoiseSchedule("vp", log_snr=(-math.inf, -math.inf)), "log_snr"),
        (lambda: NoiseSchedule.from_alphas_cumprod([0.9, 1.1]), "log_snr"),
        (lambda: NoiseSchedule("flow").point(1000.5), "t="),
        (lambda: NoiseSchedule("flow").point(math.nan), "t="),
        (lambda: NoiseSchedule.from_alphas_cumprod(_sd_cumprod()).point(-0.1), "t="),
        (lambda: NoiseSchedule.from_alphas_cumprod(_sd_cumprod()).point(999.5), "t="),
        (lambda: NoiseSchedule("edm").timestep(math.inf), "lambda_"),
        (lambda: NoiseSchedule("flow").timestep(math.nan), "lambda_"),
        (lambda: NoiseSchedule.from_scheduler(object()), "scheduler"),
    ],
)
def test_bad_arguments_are_named(make, argument):
    with pytest.raises(InvalidArgument, match=argument):
        make()


def test_schedules_are_frozen_and_hashable():
    schedule = NoiseSchedule("flow")
    assert hash(schedule) == hash(NoiseSchedule("flow"))
    with pytest.raises(AttributeError):
        schedule.kind = "vp"


# --- schedulers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "predicts"),
    [
        ("DDIMScheduler", "vp", "epsilon"),
        ("DPMSolverMultistepScheduler", "vp", "epsilon"),
        ("UniPCMultistepScheduler", "vp", "epsilon"),
        ("ConsistencyDecoderScheduler", "vp", "epsilon"),
        ("EulerDiscreteScheduler", "ve", "epsilon"),
        ("HeunDiscreteScheduler", "ve", "epsilon"),
        ("LMSDiscreteScheduler", "ve", "epsilon"),
        ("FlowMatchEulerDiscreteScheduler", "flow", "flow_prediction"),
        ("FlowMatchHeunDiscreteScheduler", "flow", "flow_prediction"),
        ("MiniMaxH3Scheduler", "flow", "flow_prediction"),
        ("EDMEulerScheduler", "edm", "epsilon"),
        ("CMStochasticIterativeScheduler", "edm", "epsilon"),
        ("IPNDMScheduler", "trig", "v_prediction"),
    ],
)
def test_kind_and_grid_of_a_scheduler(name, kind, predicts):
    """The schedule at the timesteps that the denoiser is told gives the grid's half log-SNR."""
    scheduler = build(name)
    scheduler.set_timesteps(num_inference_steps=2 if name.startswith("ConsistencyD") else 9)
    schedule, points = NoiseSchedule.from_scheduler(scheduler), grid_points(scheduler)
    assert schedule.kind == kind
    assert schedule.prediction_type == predicts == prediction_type(scheduler)
    assert len(points) == len(model_timesteps(scheduler)) + 1
    assert [p.timestep for p in points[:-1]] == model_timesteps(scheduler).tolist()
    # sigmas are interpolated linearly, rounded to float32 or have rounded timesteps in diffusers
    loose = kind in ("vp", "ve") and hasattr(scheduler, "sigmas")
    for point in points[:-1]:
        expected = schedule.lambda_t(point.timestep)
        assert point.lambda_t == pytest.approx(expected, abs=2e-3 if loose else 1e-4)


@pytest.mark.parametrize("name", [n for n, c in CLASSES.items() if c.kind == "deterministic"])
def test_grid_runs_from_noise_to_data(name):
    scheduler = build(name)
    scheduler.set_timesteps(num_inference_steps=8)
    lambdas = [point.lambda_t for point in grid_points(scheduler)]
    if "Inverse" in name:
        lambdas.reverse()
    if name == "PNDMScheduler":  # its second call comes back to the point of the third
        assert lambdas[1] == lambdas[2]
    steps = np.diff(np.clip(lambdas, -50.0, 50.0))
    assert np.all(steps >= -1e-9)
    assert np.count_nonzero(steps > 1e-9) >= 7


@pytest.mark.parametrize("set_alpha_to_one", [True, False])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_final_point_of_ddim(set_alpha_to_one, spacing):
    """The last point is where DDIM's own last step goes, e.g. alphas_cumprod[0]."""
    scheduler = build("DDIMScheduler", set_alpha_to_one=set_alpha_to_one, timestep_spacing=spacing)
    for num_steps in (10, 7, 3):  # 1000 / 7 and 1000 / 3 leave a remainder: trailing ends above 0
        scheduler.set_timesteps(num_steps)
        final = grid_points(scheduler)[-1]
        t = scheduler.timesteps[-1]
        x0 = torch.tensor([2.0], dtype=torch.float64)
        start = grid_points(scheduler)[-2]
        sample = start.alpha_t * x0  # without noise the step shows alpha_t alone
        stepped = scheduler.step(torch.zeros_like(x0), t, sample, return_dict=False)[0]
        assert final.alpha_t == pytest.approx(float(stepped / x0), rel=1e-6)


def test_grid_follows_final_sigmas_and_flow_shift():
    euler = build("EulerDiscreteScheduler", final_sigmas_type="sigma_min")
    euler.set_timesteps(5)
    assert grid_points(euler)[-1].sigma_t == pytest.approx(float(euler.sigmas[-1]), rel=1e-12)
    flow = build("FlowMatchEulerDiscreteScheduler")
    flow.set_timesteps(4)
    shares = [point.sigma_t for point in grid_points(flow)]
    assert shares == pytest.approx([float(s) for s in flow.sigmas], rel=1e-12)
    assert all(p.alpha_t + p.sigma_t == pytest.approx(1.0) for p in grid_points(flow))


def test_two_stage_solvers_name_the_intermediate_points():
    """Each model call of DPM-Solver-2 is where its input scale 1 / sqrt(sigma**2 + 1) says."""
    for name in ("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"):
        scheduler = build(name)
        scheduler.set_timesteps(6)
        x = torch.ones(1, dtype=torch.float64)
        for point, t in zip(grid_points(scheduler), scheduler.timesteps, strict=False):
            scale = float(scheduler.scale_model_input(x, t))
            assert scale == pytest.approx(1.0 / math.sqrt(point.sigma_t**2 + 1.0), rel=1e-6)
            scheduler.step(x, t, x)


def test_backward_clocks():
    mochi = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    mochi.set_timesteps(4)
    points = grid_points(mochi)
    assert points[-1].lambda_t == math.inf
    assert points[-1].timestep == 1000.0
    schedule = NoiseSchedule.from_scheduler(mochi)
    assert schedule.reverse
    assert schedule.point(points[1].timestep).alpha_t == pytest.approx(points[1].alpha_t)


def test_grid_needs_timesteps_it_can_read():
    with pytest.raises(InvalidArgument, match="set_timesteps"):
        grid_points(diffusers.PNDMScheduler())
    ddim = build("DDIMScheduler")
    ddim.set_timesteps(5)
    ddim.timesteps = ddim.timesteps + 900
    with pytest.raises(InvalidArgument, match="alphas_cumprod"):
        grid_points(ddim)
