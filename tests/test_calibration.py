"""Algorithm 3 on the Gaussian mixture against a float64 implementation written out here."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from mixture import Mixture
from thg_engine.calibration import calibrate_denoiser, fine_points, local_errors, merge
from thg_engine.curves import Calibration
from thg_engine.engine import Engine
from thg_engine.errors import InvalidArgument
from thg_engine.grid import grid_for_rho
from thg_engine.schedule import NoiseSchedule
from thg_engine.solvers import SOLVERS

TRAIN = 512
"""Training steps; uniform in lambda, so that every local error is one of equal h."""


def vp_schedule() -> NoiseSchedule:
    """Half log-SNR falls linearly from 3 at t = 0 to -3."""
    log_snr = np.linspace(3.0, -3.0, TRAIN + 1)
    return NoiseSchedule("vp", TRAIN + 1, "epsilon", tuple(log_snr.tolist()))


def timesteps(n: int) -> list[float]:
    """Even steps; multiples of 1/8, which the engine's float32 time holds exactly."""
    return [round(8 * TRAIN * (1 - i / n)) / 8 for i in range(n)]


class Problem:
    """A mixture behind a denoiser that looks its point up in a schedule."""

    def __init__(self, seed: int = 0, batch: int = 4, schedule=None, kind="epsilon") -> None:
        self.mixture, self.kind = Mixture.random(seed), kind
        self.schedule = schedule or vp_schedule()
        generator = torch.Generator().manual_seed(seed)
        self.x_T = torch.randn(batch, 3, dtype=torch.float64, generator=generator)
        self.cond = self.mixture.weights([0, 2], batch)
        self.uncond = self.mixture.weights([0, 1, 2, 3], batch)
        self.rows = 0
        self.dtypes: set[torch.dtype] = set()

    def out(self, x, t, weights):
        return self.mixture.output(x, self.schedule.point(float(t)), weights, self.kind)

    def __call__(self, x, timestep, weights):
        self.rows += len(x)
        self.dtypes.add(x.dtype)
        return self.out(x.double(), timestep[0], weights).to(x.dtype)

    @property
    def batch(self):
        return self.x_T, self.cond, self.uncond

    def calibrate(self, n: int, w: float, solver: str = "ddim", **options) -> Calibration:
        engine = Engine(self, register_dtype=torch.float64)
        return calibrate_denoiser(
            engine, self.schedule, timesteps(n), [self.batch], guidance_scale=w,
            prediction_type=self.kind, solver=solver, **options,
        )  # fmt: skip


def ddim(p, q, x, eps):
    """DDIM for a noise prediction, as in its paper."""
    x0 = (x - p.sigma_t * eps) / p.alpha_t
    return q.alpha_t * x0 + q.sigma_t * eps


def two_m(p, q, x, eps, past):
    """DPM-Solver++ 2M; ``past`` is (point, x, eps) before, or None."""
    if past is None:
        return ddim(p, q, x, eps)
    o, x_old, eps_old = past
    h, h_old = q.lambda_t - p.lambda_t, p.lambda_t - o.lambda_t
    x0 = (x - p.sigma_t * eps) / p.alpha_t
    x0_old = (x_old - o.sigma_t * eps_old) / o.alpha_t
    data = x0 + h / (2 * h_old) * (x0 - x0_old)
    return q.sigma_t / p.sigma_t * x - q.alpha_t * math.expm1(-h) * data


def algorithm_3(problem: Problem, n: int, w: float, second_order: bool):
    """Error norms (N, B) of tortoise and hare, straight from the paper."""

    def step(p, q, x, eps, past):
        return two_m(p, q, x, eps, past) if second_order else ddim(p, q, x, eps)

    def both(x, p):
        cond = problem.out(x, p.timestep, problem.cond)
        return cond, (w - 1) * (cond - problem.out(x, p.timestep, problem.uncond))

    times = [*timesteps(n), 0.0]
    tortoise, hare = problem.x_T, torch.zeros_like(problem.x_T)
    past_t = past_h = None
    c_t, c_h = [], []
    for t, t_next in pairwise(times):
        p, m, q = (problem.schedule.point(v) for v in (t, (t + t_next) / 2, t_next))
        eps, delta = both(tortoise + hare, p)
        one_t, one_h = step(p, q, tortoise, eps, past_t), step(p, q, hare, delta, past_h)
        mid_t, mid_h = step(p, m, tortoise, eps, past_t), step(p, m, hare, delta, past_h)
        eps_m, delta_m = both(mid_t + mid_h, m)
        two_t = step(m, q, mid_t, eps_m, (p, tortoise, eps))
        two_h = step(m, q, mid_h, delta_m, (p, hare, delta))
        c_t.append((one_t - two_t).norm(dim=1))
        c_h.append((one_h - two_h).norm(dim=1))
        past_t, past_h = (p, tortoise, eps), (p, hare, delta)
        tortoise, hare = one_t, one_h
    return torch.stack(c_t), torch.stack(c_h)


@pytest.mark.parametrize("solver", ["ddim", "dpmpp2m"])
@pytest.mark.parametrize(("seed", "n", "w"), [(0, 9, 7.5), (1, 16, 2.0), (2, 5, 4.0)])
def test_algorithm_3(solver, seed, n, w):
    problem = Problem(seed)
    engine = Engine(problem, register_dtype=torch.float64)
    points = fine_points(problem.schedule, timesteps(n))
    found = local_errors(
        engine, problem.schedule, points, problem.batch, w, SOLVERS[solver], "epsilon"
    )
    assert problem.rows == 4 * n * len(problem.x_T)
    expected = algorithm_3(problem, n, w, solver == "dpmpp2m")
    for a, b in zip(found, expected, strict=True):
        assert a.shape == (n, len(problem.x_T)) and a.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("solver", ["ddim", "dpmpp2m"])
def test_curves_are_means_over_all_batches(solver):
    problems = [Problem(seed=5, batch=b) for b in (3, 2)]
    problems[1].x_T = problems[1].x_T + 0.3
    ticks = []
    curves = calibrate_denoiser(
        Engine(problems[0], register_dtype=torch.float64), problems[0].schedule, timesteps(8),
        (problem.batch for problem in problems), guidance_scale=3.0, solver=solver,
        model="mixture", fingerprint="f", prompts=["a", "b"], on_step=lambda: ticks.append(1),
    )  # fmt: skip
    parts = [algorithm_3(problem, 8, 3.0, solver == "dpmpp2m") for problem in problems]
    tortoise, hare = (torch.cat(part, dim=1).mean(dim=1) for part in zip(*parts, strict=True))
    np.testing.assert_allclose(curves.tortoise, tortoise.numpy(), rtol=1e-9)
    np.testing.assert_allclose(curves.hare, hare.numpy() / 2.0, rtol=1e-9)
    assert len(ticks) == 2 * 8 and curves.num_prompts == 5 and curves.num_steps == 8
    assert (curves.order, curves.solver) == (SOLVERS[solver].order, solver)
    assert (curves.model, curves.fingerprint, curves.guidance_scale) == ("mixture", "f", 3.0)
    assert curves.scheduler_family == "vp/epsilon"
    expected = [problems[0].schedule.lambda_t(t) for t in timesteps(8)]
    assert curves.lambdas == pytest.approx(expected, rel=1e-14)
    other = replace(curves, prompts_sha256=problems[0].calibrate(2, 3.0).prompts_sha256)
    assert other.prompts_sha256 != curves.prompts_sha256


@pytest.mark.parametrize(
    ("solver", "order"), [("ddim", 1), ("dpm2", 2), ("dpmpp2m", 2), ("lms2", 2)]
)
def test_local_errors_shrink_as_the_theory_says(solver, order):
    """c ~ h^(p+1): slopes of both curves at fixed lambda, within 0.2."""
    problem = Problem(seed=3)
    counts = [32, 64, 128]
    curves = [problem.calibrate(n, 3.0, solver) for n in counts]
    for name in ("tortoise", "hare"):
        # Means over the same stretches of lambda; the first steps of a multistep solver are DDIM's.
        errors = [np.mean(np.reshape(getattr(c, name), (4, -1))[1:]) for c in curves]
        slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
        assert slope == pytest.approx(order + 1, abs=0.2), name


WHERE = np.linspace(-2.2, 2.5, 40).tolist()


def log_gap(a, b) -> float:
    """Median over lambda of the relative difference."""
    return float(np.median(np.abs(np.log(np.asarray(a) / np.asarray(b)))))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("solver", "at_32", "at_64"), [("ddim", 0.3, 0.1), ("dpmpp2m", 0.2, 0.04)])
def test_ratio_does_not_depend_on_the_number_of_steps(seed, solver, at_32, at_64):
    """h cancels: 32 steps predict the ratio of 128 to 5-25 % (DDIM), 64 steps to 2-8 %."""
    problem = Problem(seed)
    ratios = {n: problem.calibrate(n, 4.0, solver).ratio(WHERE, 4.0) for n in (32, 64, 128)}
    assert log_gap(ratios[32], ratios[128]) < at_32
    assert log_gap(ratios[64], ratios[128]) < at_64


@pytest.mark.parametrize("solver", ["ddim", "dpmpp2m"])
@pytest.mark.parametrize("seed", range(4))
def test_hare_is_proportional_to_w_on_a_given_trajectory_only(seed, solver):
    """What dividing by w - 1 is worth.

    Without feedback it is exact (next test). Along whole guided trajectories it is not: here the
    branches agree as soon as the sample has found its component, the sooner the larger w. Measured
    over both solvers and four mixtures, the factor (median over lambda) between the true ratio and
    the one carried over from w = 4 is 1.2 to 1.6 at w = 3.5 and 4.5, 2.6 to 7.2 at w = 2, and
    2.6 to 9.7 at w = 7.5.
    """
    problem = Problem(seed)
    curves = {w: problem.calibrate(48, w, solver) for w in (2.0, 3.5, 4.0, 4.5, 7.5)}
    ratios = {w: curve.ratio(WHERE, 4.0) for w, curve in curves.items()}
    for near in (3.5, 4.5):
        assert log_gap(ratios[near], ratios[4.0]) < 0.5
    for far in (2.0, 7.5):
        assert 0.7 < log_gap(ratios[far], ratios[4.0]) < 2.5
    # The sign is always this one: curves of a smaller w ask for a denser grid than is needed.
    median = {w: np.median(np.log(ratio)) for w, ratio in ratios.items()}
    assert sorted(median, key=lambda w: median[w]) == sorted(median)


@pytest.mark.parametrize("seed", range(3))
def test_hare_without_feedback_is_exactly_proportional(seed):
    """Where the outputs do not depend on the sample, w cancels to rounding."""
    problem = Problem(seed)

    def without_feedback(x, timestep, weights):
        return problem.out(problem.x_T.repeat(len(x) // 4, 1), timestep[0], weights)

    def hare(w):
        engine = Engine(without_feedback, register_dtype=torch.float64)
        return calibrate_denoiser(
            engine, problem.schedule, timesteps(12), [problem.batch], guidance_scale=w
        ).hare

    for w in (2.0, 7.5):
        np.testing.assert_allclose(hare(w), hare(4.0), rtol=1e-9)


def test_flow_and_backward_time():
    """Flow matching ends at sigma = 0; a clock that runs backwards changes nothing else."""
    forward = NoiseSchedule("flow", 1000, "flow_prediction")
    backward = replace(forward, reverse=True)
    times = [900.0, 700.0, 400.0, 100.0]
    results = []
    for schedule, steps in ((forward, times), (backward, [1000.0 - t for t in times])):
        points = fine_points(schedule, steps)
        assert [p.sigma_t for p in points] == pytest.approx([0.9, 0.7, 0.4, 0.1, 0.0])
        problem = Problem(1, schedule=schedule, kind="flow_prediction")
        curves = calibrate_denoiser(
            Engine(problem, register_dtype=torch.float64), schedule, steps, [problem.batch],
            guidance_scale=3.0, prediction_type="flow_prediction", solver="flow_euler",
        )  # fmt: skip
        assert curves.scheduler_family == "flow/flow_prediction"
        results.append((curves.tortoise, curves.hare, curves.lambdas))
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_log_sigma_time_has_no_end_of_its_own():
    """In Karras' time t = log(sigma) / 4, t = 0 is sigma = 1: no end, and no extra point either."""
    schedule = NoiseSchedule("edm", prediction_type="sample")
    points = fine_points(schedule, [0.5, 0.1, -0.4, -0.9])
    assert [p.timestep for p in points] == [0.5, 0.1, -0.4, -0.9]


def test_order_of_timesteps_and_duplicates_do_not_matter():
    schedule = vp_schedule()
    expected = fine_points(schedule, [300, 200, 100])
    assert [p.timestep for p in expected] == [300, 200, 100, 0]
    # Two-stage solvers name points twice; many schedulers name t = 0 themselves.
    assert fine_points(schedule, [100, 300, 300, 200, 0, 0]) == expected


def test_infinite_log_snr_is_entered_at_the_bound():
    schedule = NoiseSchedule("flow", 1000, "flow_prediction")
    problem = Problem(1, schedule=schedule, kind="flow_prediction")
    # The mixture knows no velocity at alpha = 0 exactly by formula; any finite model will do.
    curves = calibrate_denoiser(
        Engine(lambda x, t, c: torch.sin(x) + c[:, :3]), schedule, [1000.0, 600.0, 200.0],
        [problem.batch], guidance_scale=2.0, prediction_type="flow_prediction",
        solver="flow_euler",
    )  # fmt: skip
    assert curves.lambdas[0] == -20.0 and len(curves.lambdas) == 3


def test_equal_branches_keep_a_positive_curve():
    problem = Problem(2)
    problem.uncond = problem.cond
    curves = problem.calibrate(6, 5.0)
    assert set(curves.hare) == {1e-12}
    assert len(grid_for_rho(curves, curves.lambdas, 5.0, 1.0)) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_model_dtype_is_respected(dtype):
    """Noise in float32, network in half precision, errors in between in float32."""
    problem = Problem(3)
    problem.x_T = problem.x_T.float()
    engine = Engine(problem, model_dtype=dtype)
    curves = calibrate_denoiser(
        engine, problem.schedule, timesteps(6), [problem.batch], guidance_scale=4.0
    )
    assert problem.dtypes == {dtype}
    exact = Problem(3).calibrate(6, 4.0)
    rounding = 40 * torch.finfo(dtype).eps  # an error norm is a small difference of outputs
    assert curves.tortoise == pytest.approx(exact.tortoise, rel=rounding)


def test_no_gradients_are_recorded():
    problem = Problem(0)
    problem.x_T.requires_grad_()
    layer = torch.nn.Linear(3, 3).double()
    norms = local_errors(
        Engine(lambda x, t, c: layer(x) + c[:, :3]), problem.schedule,
        fine_points(problem.schedule, timesteps(3)), problem.batch, 2.0, SOLVERS["ddim"],
        "epsilon",
    )  # fmt: skip
    assert not any(norm.requires_grad for norm in norms)


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        *(("guidance_scale", {"guidance_scale": w}) for w in (1.0, 0.0, -2.0, math.nan, math.inf)),
        ("batches", {"batches": []}),
        ("solver", {"solver": "euler"}),
        ("timesteps", {"timesteps": []}),
        ("timesteps", {"timesteps": [0.0]}),
        ("t", {"timesteps": [2000.0]}),
        ("x_T", {"batches": [(torch.zeros(3), torch.zeros(3, 4), torch.zeros(3, 4))]}),
        ("cond", {"batches": [(torch.zeros(3, 3), torch.zeros(2, 4), torch.zeros(3, 4))]}),
        ("uncond", {"batches": [(torch.zeros(3, 3), torch.zeros(3, 4), None)]}),
        ("uncond", {"batches": [(torch.zeros(3, 3), torch.zeros(3, 4), torch.zeros(3, 5))]}),
    ],
)
def test_refusals_come_before_any_evaluation(argument, changes):
    problem = Problem(0)
    values = {"timesteps": timesteps(4), "batches": [problem.batch], "guidance_scale": 3.0}
    with pytest.raises(InvalidArgument) as caught:
        calibrate_denoiser(Engine(problem), problem.schedule, **(values | changes))
    assert caught.value.argument == argument and problem.rows == 0


@pytest.mark.parametrize("seed", range(3))
def test_merged_parts_equal_one_measurement(seed):
    """Disjoint prompt sets of 2 and 3: the weighted mean is the curve of all five."""
    problems = [Problem(seed, batch=b) for b in (2, 3)]
    problems[1].x_T = problems[1].x_T - 0.4
    parts = [problem.calibrate(10, 3.0) for problem in problems]
    whole = calibrate_denoiser(
        Engine(problems[0], register_dtype=torch.float64), problems[0].schedule, timesteps(10),
        [problem.batch for problem in problems], guidance_scale=3.0, prompts=["a", "b"],
    )  # fmt: skip
    found = merge(parts, ["a", "b"])
    np.testing.assert_allclose(found.tortoise, whole.tortoise, rtol=1e-12)
    np.testing.assert_allclose(found.hare, whole.hare, rtol=1e-12)
    assert (found.num_prompts, found.prompts_sha256) == (5, whole.prompts_sha256)
    with pytest.raises(InvalidArgument, match="parts="):
        merge([], [])
    with pytest.raises(InvalidArgument):
        merge([parts[0], problems[1].calibrate(10, 4.0)], [])
