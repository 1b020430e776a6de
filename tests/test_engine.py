"""The loop against hand-written float64 loops over real schedulers, and its manners."""

from __future__ import annotations

import io
from contextlib import redirect_stderr

import pytest
import torch

from engine_cases import BATCH, METHODS, SHAPE, STEPS, WIDTH, Network, inputs, plan_of
from mixture import Mixture, vp_points
from thg_engine.engine import Engine, Run
from thg_engine.errors import ThgError
from thg_engine.guidance import CFG, THG
from thg_engine.lowering import plan_from_solver, plan_from_table
from thg_engine.plan import Row, SamplingPlan
from thg_engine.solvers import SOLVERS
from thg_engine.trace import trace

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def scheduler_of(name: str):
    """(scheduler, arguments of its step)."""
    import diffusers

    made = {
        "ddim": lambda: diffusers.DDIMScheduler(**SD, clip_sample=False, steps_offset=1),
        "ddim-v": lambda: diffusers.DDIMScheduler(
            **SD, clip_sample=False, prediction_type="v_prediction"
        ),
        "ddim-eta": lambda: diffusers.DDIMScheduler(**SD, clip_sample=False, steps_offset=1),
        "dpmpp2m": lambda: diffusers.DPMSolverMultistepScheduler(**SD),
        "euler": lambda: diffusers.EulerDiscreteScheduler(**SD),
        "ancestral": lambda: diffusers.EulerAncestralDiscreteScheduler(**SD),
        "unipc": lambda: diffusers.UniPCMultistepScheduler(**SD),
        "flow": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    }[name]()
    made.set_timesteps(STEPS)
    return made, ({"eta": 0.7} if name == "ddim-eta" else {})


def loop(scheduler, network, x, cond, uncond, guidance, w, generator=None, **step_kwargs):
    """Guidance and scheduler written out: as a pipeline, one branch at a time, float64."""
    rows = guidance.rows(trace(scheduler, step_kwargs=step_kwargs).lambdas, w)
    delta = None
    for row, t in zip(rows, scheduler.timesteps, strict=True):
        model_input = scheduler.scale_model_input(x, t) if hasattr(
            scheduler, "scale_model_input"
        ) else x  # fmt: skip
        time = torch.full((len(x),), float(t), dtype=torch.float32)
        out = network(model_input, time, cond)
        if row.evaluates_both:
            delta = out - network(model_input, time, uncond)
        if row.evaluates_both or row.delta_weights:
            out = out + (w - 1) * row.boost * delta
        kwargs = dict(step_kwargs, return_dict=False)
        if generator is not None:
            kwargs["generator"] = generator
        x = scheduler.step(out, t, x, **kwargs)[0].double()
    return x


def relative(found, expected) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("guidance", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("name", ["ddim", "ddim-v", "dpmpp2m", "euler", "unipc", "flow"])
def test_traced_schedulers_against_a_hand_written_loop(name, guidance):
    """Schedulers keep float32 tables and samples, hence the tolerance."""
    scheduler, _ = scheduler_of(name)
    x_T, cond, uncond = inputs(seed=len(name))
    table = trace(scheduler)
    plan = plan_from_table(table, guidance, 4.0)
    x_T = x_T * plan.initial_scale
    network = Network()
    found = Engine(network, register_dtype=torch.float64).sample(x_T, cond, uncond, plan)
    expected = loop(scheduler, Network(), x_T, cond, uncond, guidance, 4.0)
    assert relative(found, expected) < 2e-6
    assert network.rows == BATCH * plan.nfe and network.calls == plan.num_rows


@pytest.mark.parametrize("guidance", METHODS[:3], ids=lambda method: method.name)
@pytest.mark.parametrize("name", ["ancestral", "ddim-eta"])
@pytest.mark.parametrize("seed", [1, 2])
def test_stochastic_schedulers_with_the_same_noise(name, seed, guidance):
    scheduler, kwargs = scheduler_of(name)
    x_T, cond, uncond = inputs(seed)
    table = trace(scheduler, step_kwargs=kwargs)
    assert table.stochastic
    plan = plan_from_table(table, guidance, 4.0)
    x_T = x_T * plan.initial_scale
    engine = Engine(Network(), register_dtype=torch.float64)

    def run(noise_seed):
        generator = torch.Generator().manual_seed(noise_seed)
        return engine.sample(x_T, cond, uncond, plan, generator=generator)

    generator = torch.Generator().manual_seed(seed)
    expected = loop(
        scheduler, Network(), x_T, cond, uncond, guidance, 4.0, generator=generator, **kwargs
    )
    assert relative(run(seed), expected) < 2e-6
    assert torch.equal(run(seed), run(seed)) and not torch.equal(run(seed), run(seed + 1))


@pytest.mark.parametrize("guidance", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("solver", ["ddim", "dpmpp2m"])
def test_float32_registers_lose_only_rounding(solver, guidance):
    mixture, points = Mixture.random(seed=6), vp_points(STEPS)
    cond, uncond = mixture.weights([1], 2), mixture.weights([0, 1, 2, 3], 2)
    x_T = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plan = plan_from_solver(SOLVERS[solver], points, guidance, 4.0)
    wide, narrow = (
        Engine(mixture.denoiser(points), register_dtype=dtype).sample(x_T, cond, uncond, plan)
        for dtype in (torch.float64, torch.float32)
    )
    assert 0 < relative(narrow, wide) < 1e-5


@pytest.mark.parametrize("guidance", METHODS, ids=lambda method: method.name)
def test_begin_step_result_equal_sample(guidance):
    plan, (x_T, cond, uncond) = plan_of(guidance), inputs()
    engine, network = Engine(Network()), Network()
    expected = engine.sample(x_T, cond, uncond, plan)
    stepper = Engine(network)
    run = stepper.begin(x_T, cond, uncond, plan)
    assert network.calls == 0 and not run.done and torch.equal(run.sample, x_T.float())
    spent = 0
    for i in range(plan.num_rows):
        assert run.row == i
        x = stepper.step(run)
        spent += plan.rows[i].nfe
        assert torch.equal(x, run.sample) and run.nfe == spent == network.rows / BATCH
    assert run.done and run.nfe == plan.nfe
    assert torch.equal(stepper.result(run).to(x_T.dtype), expected)


def test_step_after_the_end_and_result_too_early():
    plan, (x_T, cond, uncond) = plan_of(), inputs()
    network = Network()
    engine = Engine(network)
    run = engine.begin(x_T, cond, uncond, plan)
    with pytest.raises(ThgError, match=f"row 0 of {STEPS}"):
        engine.result(run)
    engine.step(run)
    with pytest.raises(ThgError, match=f"row 1 of {STEPS}"):
        engine.result(run)
    while not run.done:
        engine.step(run)
    calls = network.calls
    with pytest.raises(ThgError, match="over"):
        engine.step(run)
    assert network.calls == calls


def test_callback_and_progress():
    plan, (x_T, cond, uncond) = plan_of(), inputs()
    engine = Engine(Network())
    seen: list[tuple[int, int, torch.Tensor]] = []

    def note(run: Run) -> None:
        seen.append((run.row, run.nfe, run.sample.clone()))

    screen = io.StringIO()
    with redirect_stderr(screen):
        found = engine.sample(x_T, cond, uncond, plan, callback=note)
    assert screen.getvalue() == ""
    assert [row for row, _, _ in seen] == list(range(1, STEPS + 1))
    assert seen[-1][1] == plan.nfe and torch.equal(seen[-1][2].to(found.dtype), found)
    with redirect_stderr(screen):
        again = engine.sample(x_T, cond, uncond, plan, progress=True)
    assert torch.equal(again, found) and f"{STEPS}/{STEPS}" in screen.getvalue()


def test_a_callback_may_edit_the_sample_but_the_noise_stays():
    plan, (x_T, cond, uncond) = plan_of(solver="ddim"), inputs()
    kept = x_T.clone()
    engine = Engine(Network(), register_dtype=torch.float64)
    run = engine.begin(x_T, cond, uncond, plan)
    run.sample.mul_(2.0)
    while not run.done:
        engine.step(run)
    assert torch.equal(x_T, kept)
    assert torch.equal(engine.result(run), engine.sample(2.0 * x_T, cond, uncond, plan))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_model_dtype(dtype):
    """A half-precision model: coarse outputs, but float32 in between."""
    plan, (x_T, cond, uncond) = plan_of(), inputs()
    network = Network()
    found = Engine(network, model_dtype=dtype).sample(x_T.float(), cond, uncond, plan)
    assert found.dtype == torch.float32
    assert {(seen[0], seen[1]) for seen in network.seen} == {(dtype, torch.float32)}
    assert {seen[2] for seen in network.seen} == {(BATCH,), (2 * BATCH,)}
    exact = Engine(Network(), register_dtype=torch.float64).sample(x_T, cond, uncond, plan)
    assert relative(found, exact) < 60 * torch.finfo(dtype).eps
    # Registers of the model's own precision would have quantised the sample.
    assert not torch.equal(found, found.to(dtype).float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_result_has_the_dtype_of_the_noise(dtype):
    plan, (x_T, cond, uncond) = plan_of(), inputs(dtype=dtype)
    network = Network()
    found = Engine(network).sample(x_T, cond, uncond, plan)
    assert found.dtype == dtype and network.seen[0][0] == dtype
    exact = Engine(Network(), register_dtype=torch.float64, model_dtype=torch.float64).sample(
        x_T, cond, uncond, plan
    )
    assert relative(found, exact.double()) < 60 * max(torch.finfo(dtype).eps, 1e-7)


@pytest.mark.parametrize("guidance", METHODS, ids=lambda method: method.name)
def test_nested_conditioning(guidance):
    plan, (x_T, cond, uncond) = plan_of(guidance), inputs()
    expected = Engine(Network()).sample(x_T, cond, uncond, plan)
    network = Network()

    def nested(x, timestep, conditioning):
        assert conditioning["mask"] is None and conditioning["size"] == 512
        first, (second,) = conditioning["parts"]
        assert first.shape == (len(x), 1) and second.shape == (len(x), WIDTH - 1)
        return network(x, timestep, torch.cat([first, second], dim=1))

    def wrap(c):
        return {"parts": [c[:, :1], (c[:, 1:],)], "mask": None, "size": 512}

    assert torch.equal(Engine(nested).sample(x_T, wrap(cond), wrap(uncond), plan), expected)
    assert network.rows == BATCH * plan.nfe


def test_uncond_may_be_missing_where_no_row_evaluates_it():
    plan, (x_T, cond, _) = plan_of(CFG(), w=1.0), inputs()
    network = Network()
    Engine(network).sample(x_T, cond, None, plan)
    assert network.rows == BATCH * STEPS == BATCH * plan.nfe


def test_scale_one_ignores_the_unconditional_branch_exactly():
    (x_T, cond, _), plan = inputs(), plan_of(CFG(), w=1.0)
    full = plan_of(CFG(), w=1.0 + 1e-300)  # rounds to 1: guidance weight 0
    both = Engine(Network()).sample(x_T, cond, cond, full)
    assert torch.equal(Engine(Network()).sample(x_T, cond, None, plan), both)


def test_a_failed_step_can_be_repeated():
    plan, (x_T, cond, uncond) = plan_of(), inputs()
    network = Network()
    fail_at = 5

    def sometimes(x, timestep, conditioning):
        if network.calls == fail_at and not sometimes.failed:
            sometimes.failed = True
            raise RuntimeError("out of memory")
        return network(x, timestep, conditioning)

    sometimes.failed = False
    engine = Engine(sometimes)
    run = engine.begin(x_T, cond, uncond, plan)
    for _ in range(fail_at):
        engine.step(run)
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.step(run)
    assert run.row == fail_at
    while not run.done:
        engine.step(run)
    expected = Engine(Network()).sample(x_T, cond, uncond, plan)
    assert torch.equal(engine.result(run).to(x_T.dtype), expected)


@pytest.mark.parametrize("guidance", METHODS, ids=lambda method: method.name)
def test_a_denoiser_may_reuse_its_output_buffer(guidance):
    """As a captured graph does: what registers keep must not change under them."""
    x_T, cond, uncond = inputs(dtype=torch.float32)
    for form in ("combined", "two_state"):
        plan = plan_from_solver(
            SOLVERS["dpmpp2m"], vp_points(STEPS), guidance, 4.0, "epsilon", form=form
        )
        found = Engine(Network(buffer=True)).sample(x_T, cond, uncond, plan)
        assert torch.equal(found, Engine(Network()).sample(x_T, cond, uncond, plan))


def test_no_gradients_are_recorded():
    layer = torch.nn.Conv2d(SHAPE[0], SHAPE[0], 1)
    x_T, cond, uncond = inputs(dtype=torch.float32)
    x_T.requires_grad_()
    found = Engine(lambda x, t, c: layer(x)).sample(x_T, cond, uncond, plan_of())
    assert not found.requires_grad


def test_empty_batch_and_single_row():
    plan = plan_of()
    x_T, cond, uncond = inputs()
    found = Engine(Network()).sample(x_T[:0], cond[:0], uncond[:0], plan)
    assert found.shape == (0, *SHAPE)
    row = Row(500.0, 0.0, 0.5, True, 2.0, sample_weights=(0.25,), guided_weights=(-3.0,))
    one = SamplingPlan((row,), "cfg", "hand", 3.0)
    network, check = Network(), Network()
    found = Engine(network, register_dtype=torch.float64).sample(x_T, cond, uncond, one)
    t = torch.full((BATCH,), 500.0)
    c, u = check(0.5 * x_T, t, cond), check(0.5 * x_T, t, uncond)
    torch.testing.assert_close(found, 0.25 * x_T - 3.0 * (c + 2.0 * (c - u)), rtol=1e-13, atol=0)


def test_batch_members_do_not_mix():
    plan, (x_T, cond, uncond) = plan_of(), inputs()
    whole = Engine(Network()).sample(x_T, cond, uncond, plan)
    for i in range(BATCH):
        part = [v[i : i + 1] for v in (x_T, cond, uncond)]
        torch.testing.assert_close(
            Engine(Network()).sample(*part, plan), whole[i : i + 1], rtol=1e-6, atol=1e-6
        )


def test_a_result_does_not_keep_the_registers_alive():
    plan = plan_from_solver(SOLVERS["dpmpp2m"], vp_points(5), THG(grid=2), 3.0)
    x_T, cond, uncond = inputs(dtype=torch.float32)
    found = Engine(Network()).sample(x_T, cond, uncond, plan)
    assert found.untyped_storage().nbytes() == found.numel() * found.element_size()
