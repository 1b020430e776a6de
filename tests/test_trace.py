"""Traced tables against the real schedulers, stepping on random latents."""

from __future__ import annotations

import copy
import math
import threading

import diffusers
import pytest
import torch

from scheduler_cases import (
    CLASSES,
    MATRIX,
    SD,
    available,
    build,
    exported,
    name_of,
    names,
    prepared,
    real_run,
    table_error,
)
from thg_engine.errors import InvalidArgument
from thg_engine.trace import trace, trace_cache_clear

# A table reproduces a scheduler's own coefficients; what is left is the float32 rounding of samples
# that some schedulers cast inside `step`.
TOLERANCE = 1e-6
# With float32 latents, as in a pipeline, every step rounds; one or two steps down from sigma = 80
# to 0 also cancel two digits.
FLOAT32_TOLERANCE = 2e-6
FEW_STEPS_TOLERANCE = 2e-5

pytestmark = pytest.mark.filterwarnings("ignore:.*algorithm_type.*:FutureWarning")


def _table(name, num_steps, scheduler, **kwargs):
    case = CLASSES[name]
    return trace(
        scheduler,
        num_steps,
        set_timesteps_kwargs=case.set_kwargs,
        step_kwargs=case.step_kwargs,
        **kwargs,
    )


def test_every_scheduler_of_diffusers_has_a_case():
    """A new class in diffusers must be looked at: add it to tests/scheduler_cases.py."""
    assert exported() == set(CLASSES)


@pytest.mark.parametrize("num_steps", [1, 4, 7, 20])
@pytest.mark.parametrize("name", names("deterministic"))
def test_deterministic_class(name, num_steps):
    if name == "MiniMaxH3Scheduler" and num_steps == 1:
        pytest.skip("its set_timesteps needs two steps")
    table = _table(name, num_steps, build(name))
    assert not table.stochastic
    assert table.name == name
    assert table.residual <= TOLERANCE
    for seed, shape in ((0, (1, 4, 3, 5)), (1, (2, 1, 7, 3))):
        run = real_run(prepared(name, num_steps), seed=seed, shape=shape)
        assert table_error(table, run) <= TOLERANCE
    run = real_run(prepared(name, num_steps), seed=2, dtype=torch.float32)
    assert table_error(table, run) <= (FLOAT32_TOLERANCE if num_steps > 4 else FEW_STEPS_TOLERANCE)


@pytest.mark.parametrize(
    ("name", "config"),
    [pytest.param(n, c, id=name_of(n, c)) for n, configs in MATRIX.items() for c in configs],
)
def test_deterministic_config(name, config):
    num_steps = 9 if config.get("solver_order") == 3 else 7
    table = trace(build(name, **config), num_steps)
    assert not table.stochastic
    run = real_run(prepared(name, num_steps, **config), seed=3)
    assert table_error(table, run) <= TOLERANCE
    assert all(math.isfinite(value) for value in table.lambdas[1:])
    assert len(table.lambdas) == len(table.rows)


@pytest.mark.parametrize("name", names("stochastic"))
def test_stochastic_class(name, monkeypatch):
    """The same noise, drawn from a fixed generator, gives the same samples."""
    case = available(name)
    table = _table(name, case.steps, build(name))
    assert table.stochastic
    assert any(row.noise_weight > 0.0 for row in table.rows)
    scheduler = prepared(name, case.steps)
    if hasattr(scheduler, "noise_sampler"):
        run = _brownian_run(scheduler, monkeypatch)
    else:
        run = real_run(scheduler, seed=4, dtype=torch.float32)
    assert table_error(table, run) <= FLOAT32_TOLERANCE


def _brownian_run(scheduler, monkeypatch):
    """A run whose Brownian increments are recorded where they enter the step."""
    recorded, generator = [], torch.Generator().manual_seed(11)

    def sampler(sigma, sigma_next):
        recorded.append(torch.randn((1, 4, 3, 5), generator=generator, dtype=torch.float64))
        return recorded[-1]

    monkeypatch.setattr(scheduler, "noise_sampler", sampler)
    run = real_run(scheduler, seed=4)
    run.noises = list(recorded)
    return run


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_eta_has_a_noise_column(eta):
    scheduler = build("DDIMScheduler")
    table = trace(scheduler, 10, step_kwargs={"eta": eta})
    scheduler.set_timesteps(10)
    run = real_run(scheduler, step_kwargs={"eta": eta})
    assert table_error(table, run) <= TOLERANCE
    expected = [eta * float(scheduler._get_variance(int(t), int(t) - 100)) ** 0.5
                for t in scheduler.timesteps]  # fmt: skip
    assert [row.noise_weight for row in table.rows] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("algorithm", ["sde-dpmsolver", "sde-dpmsolver++"])
def test_sde_dpm_solver(algorithm):
    config = {"algorithm_type": algorithm, "final_sigmas_type": "sigma_min"}
    table = trace(build("DPMSolverMultistepScheduler", **config), 8)
    run = real_run(prepared("DPMSolverMultistepScheduler", 8, **config), dtype=torch.float32)
    assert table_error(table, run) <= FLOAT32_TOLERANCE


def test_euler_churn():
    kwargs = {"s_churn": 2.0, "s_noise": 1.01}
    table = trace(build("EulerDiscreteScheduler"), 8, step_kwargs=kwargs)
    run = real_run(prepared("EulerDiscreteScheduler", 8), step_kwargs=kwargs)
    assert table_error(table, run) <= TOLERANCE


# Smallest windows, past (model outputs, samples), of a 20-step run with noise prediction.
WINDOWS = [
    ((1, 1), "DDIMScheduler", {}),
    ((1, 1), "EulerDiscreteScheduler", {}),
    ((1, 1), "FlowMatchEulerDiscreteScheduler", {}),
    ((1, 1), "EDMEulerScheduler", {}),
    ((1, 1), "CogVideoXDDIMScheduler", {}),
    (
        (2, 1),
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    ),
    ((2, 1), "DEISMultistepScheduler", {}),
    ((1, 2), "KDPM2DiscreteScheduler", {}),
    ((2, 2), "DPMSolverSinglestepScheduler", {}),
    ((2, 2), "HeunDiscreteScheduler", {}),
    ((2, 2), "FlowMatchHeunDiscreteScheduler", {}),
    ((2, 2), "DPMSolverMultistepScheduler", {}),
    ((2, 2), "EDMDPMSolverMultistepScheduler", {}),
    ((3, 3), "DPMSolverMultistepScheduler", {"solver_order": 3}),
    ((3, 3), "UniPCMultistepScheduler", {}),
    ((2, 2), "SASolverScheduler", {"tau_func": lambda t: 0}),
    ((4, 1), "LMSDiscreteScheduler", {}),
    ((5, 2), "PNDMScheduler", {"skip_prk_steps": True}),
    ((4, 4), "UniPCMultistepScheduler", {"solver_order": 3}),
    ((4, 4), "IPNDMScheduler", {}),
]


@pytest.mark.parametrize(
    ("window", "name", "config"), [pytest.param(*w, id=name_of(w[1], w[2])) for w in WINDOWS]
)
def test_window_is_minimal(window, name, config):
    assert trace(build(name, **config), 20).window == window


@pytest.mark.parametrize("name", names("deterministic"))
def test_tables_hold_where_samples_are_edited_between_steps(name):
    """As inpainting and callbacks do: the scheduler's own memory must be in the rows."""
    table = _table(name, 7, build(name))
    assert table.edits
    for seed, size in ((0, 0.1), (1, 2.0)):
        run = real_run(prepared(name, 7), seed=seed, edits=size)
        assert table_error(table, run) <= TOLERANCE


@pytest.mark.parametrize("order", [1, 2, 3])
def test_corrected_sample_is_a_state(order):
    """UniPC over samples and outputs alone needs weights near 100 that cancel; a state does not."""
    table = trace(build("UniPCMultistepScheduler", solver_order=order), 20)
    assert table.has_state
    columns = ("sample_weights", "output_weights", "state_weights", "state_update")
    columns += ("state_sample_update", "state_output_update")
    weights = [w for row in table.rows for column in columns for w in getattr(row, column)]
    assert max(map(abs, weights)) < 10.0


def test_upcast_table_is_exact():
    """In float64 DPM-Solver++ 2M equals its closed form; in the scheduler's float32 it does not."""
    scheduler = build("DPMSolverMultistepScheduler", use_karras_sigmas=True)
    table = trace(scheduler, 20, upcast=True)
    assert table.residual < 1e-12
    scheduler.set_timesteps(20)
    sigma_cur, sigma_next = (float(s) for s in scheduler.sigmas[:2])
    alpha = [1.0 / math.sqrt(1.0 + s**2) for s in (sigma_cur, sigma_next)]
    row = table.rows[0]  # first order: x_next = alpha_next / alpha_cur (x - ...) + ...
    shrink = alpha[1] * sigma_next / (alpha[0] * sigma_cur)
    grow = alpha[1] * (1.0 - sigma_next / sigma_cur) / alpha[0]
    assert row.sample_weights == pytest.approx((shrink + grow,), rel=1e-12)
    assert row.output_weights == pytest.approx((-grow * alpha[0] * sigma_cur,), rel=1e-12)


def test_closely_spaced_points_keep_the_scheduler_s_rounding():
    """Third-order DEIS on beta sigmas: float32 cancellation is part of what the scheduler does."""
    config = {"solver_order": 3, "use_beta_sigmas": True, "prediction_type": "sample"}
    run = real_run(prepared("DEISMultistepScheduler", 20, **config))
    scheduler = build("DEISMultistepScheduler", **config)
    assert table_error(trace(scheduler, 20), run) <= TOLERANCE
    assert table_error(trace(scheduler, 20, upcast=True), run) > 1e-4


# --- arguments, state, cache ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "argument"),
    [
        ({"num_steps": 0}, "num_steps"),
        ({"num_steps": 2.5}, "num_steps"),
        ({"num_steps": True}, "num_steps"),
        ({"num_steps": 5000}, "num_steps"),
        ({"timesteps": [9, 5]}, "timesteps"),
        ({"sigmas": [1.0, 0.5]}, "sigmas"),
        ({"num_steps": 5, "start": 5}, "start"),
        ({"num_steps": 5, "start": -1}, "start"),
        ({"num_steps": 5, "step_kwargs": {"colour": 1}}, "colour"),
        ({"num_steps": 5, "step_kwargs": {"generator": torch.Generator()}}, "generator"),
        ({"set_timesteps_kwargs": {"mu": 1.0}}, "set_timesteps_kwargs"),
    ],
)
def test_bad_arguments(kwargs, argument):
    scheduler = build("DDIMScheduler")
    scheduler.set_timesteps(5)
    with pytest.raises(InvalidArgument, match=argument):
        trace(scheduler, **kwargs)


def test_custom_timesteps_and_sigmas():
    scheduler = build("EulerDiscreteScheduler")
    steps = [999.0, 700.0, 333.0, 20.0]
    table = trace(scheduler, timesteps=steps)
    assert table.timesteps == tuple(steps)
    scheduler.set_timesteps(timesteps=steps)
    assert table_error(table, real_run(scheduler)) <= TOLERANCE
    sigmas = [14.0, 5.0, 1.0, 0.3, 0.0]
    table = trace(scheduler, sigmas=sigmas)
    assert table.lambdas == pytest.approx([-math.log(s) for s in sigmas[:-1]], rel=1e-6)
    flow = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    table = trace(flow, sigmas=[1.0, 0.6, 0.2], set_timesteps_kwargs={"mu": 0.8})
    flow.set_timesteps(sigmas=[1.0, 0.6, 0.2], mu=0.8)
    assert table_error(table, real_run(flow)) <= TOLERANCE


@pytest.mark.parametrize(
    "name",
    ["DDIMScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler", "PNDMScheduler"],
)
def test_truncated_run(name):
    """Image-to-image: pipelines slice the timesteps and set begin_index where there is one."""
    scheduler = build(name)
    start = 4 * scheduler.order
    scheduler.set_timesteps(10)
    table = trace(scheduler, start=start)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
        assert trace(scheduler) is table
    assert len(table.rows) == len(scheduler.timesteps) - start
    assert table.timesteps == tuple(float(t) for t in scheduler.timesteps[start:])
    assert table_error(table, real_run(scheduler, start=start)) <= TOLERANCE


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "PNDMScheduler"])
def test_a_run_under_way_is_refused(name):
    scheduler = build(name)
    scheduler.set_timesteps(6)
    expected = trace(scheduler)
    x = torch.zeros(1, 4, 2, 2)
    scheduler.scale_model_input(x, scheduler.timesteps[0])
    assert trace(scheduler).rows == expected.rows  # nothing has been stepped yet
    scheduler.step(x, scheduler.timesteps[0], x)
    if name == "DDIMScheduler":  # it keeps no state
        assert trace(scheduler) is expected
        return
    with pytest.raises(InvalidArgument, match="middle of a run"):
        trace(scheduler)
    assert trace(scheduler, 6).rows == expected.rows


@pytest.mark.parametrize("name", names("deterministic", "stochastic"))
def test_the_caller_s_scheduler_is_unchanged(name):
    case = available(name)
    scheduler = build(name)
    scheduler.set_timesteps(num_inference_steps=case.steps, **case.set_kwargs)
    before, identities = (
        copy.deepcopy(vars(scheduler)),
        {k: id(v) for k, v in vars(scheduler).items()},
    )
    _table(name, 4 if case.steps != 2 else 2, scheduler)
    trace(scheduler)
    assert {k: id(v) for k, v in vars(scheduler).items()} == identities
    for key, value in vars(scheduler).items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, before[key], rtol=0, atol=0, equal_nan=True)
        elif not hasattr(value, "shape"):
            assert repr(value) == repr(before[key])


def test_global_random_state_is_untouched():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    trace(build("EulerAncestralDiscreteScheduler"), 6)
    assert torch.equal(torch.get_rng_state(), state)


def test_cache_returns_the_identical_table_and_tells_configs_apart():
    trace_cache_clear()
    first = trace(build("DPMSolverMultistepScheduler"), 6)
    assert trace(build("DPMSolverMultistepScheduler"), 6) is first
    scheduler = build("DPMSolverMultistepScheduler")
    scheduler.set_timesteps(6)
    assert trace(scheduler) is first
    others = [
        trace(build("DPMSolverMultistepScheduler"), 7),
        trace(build("DPMSolverMultistepScheduler", use_karras_sigmas=True), 6),
        trace(build("DPMSolverMultistepScheduler"), 6, start=1),
        trace(build("DPMSolverMultistepScheduler"), 6, upcast=True),
        trace(build("DDIMScheduler"), 6),
        trace(build("DDIMScheduler"), 6, step_kwargs={"eta": 0.5}),
    ]
    assert len({first, *others}) == 7
    scheduler.sigmas = scheduler.sigmas * 1.01  # custom sigmas, set by hand
    assert trace(scheduler).rows != first.rows
    trace_cache_clear()
    again = trace(build("DPMSolverMultistepScheduler"), 6)
    assert again is not first
    assert again == first


def test_tracing_in_threads_is_safe():
    trace_cache_clear()
    schedulers = [build("EulerAncestralDiscreteScheduler", **SD) for _ in range(4)]
    tables = [None] * 4

    def work(i):
        tables[i] = trace(schedulers[i], 12)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(table is tables[0] for table in tables)
