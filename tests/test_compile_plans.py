"""Compiled pipelines that run fitted plans: against loops by hand over the stock networks."""

from __future__ import annotations

import copy
import functools
import importlib
import pickle
import threading
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import thg_engine
import zoo_all  # noqa: F401  (it fills the registry)
from pipelines import CountRows, arguments, call, ddim, make, tiny
from test_fitting import Plain
from test_front import STOCK
from thg_engine.doctor import machine_line
from thg_engine.errors import CalibrationError, InvalidArgument, UnsupportedPipeline
from thg_engine.fitting import search as searching
from thg_engine.fitting.front import PlanEntry, PlanFront, ScaleFit, base_plan
from thg_engine.fitting.reference import make_nodes
from thg_engine.fitting.rows import Correction
from thg_engine.integrations.diffusers.plan_scheduler import PlanScheduler
from thg_engine.integrations.diffusers.planned import native_schedule, schedule_digest
from thg_engine.integrations.diffusers.resolve import fingerprint
from zoo import ZOO, build
from zoo import arguments as zoo_arguments
from zoo import call as zoo_call

pytestmark = pytest.mark.filterwarnings("error:thg_engine")
SCALES = (3.0, 7.0)
PROMPTS = [f"a {colour} {thing}" for colour in ("red", "blue", "bad") for thing in ("cat", "dog")]
DENSE, SPARSE = {"nfe": 12}, {"nfe": 10}
"""Targets that choose six rows of full guidance, and seven with both branches in three."""


def entry_of(schedule, times, coarse, error, size=0.02) -> PlanEntry:
    """A plan with corrections drawn by chance: big enough to show, small enough to stay finite."""
    rng, deltas, rows = np.random.default_rng(len(times)), 0, []
    for i in range(len(times)):
        deltas += i in coarse
        rows.append([min(i + 1, 3), min(i + 1, 4), min(deltas, 3)])

    def fit(w: float) -> ScaleFit:
        made = [Correction(*(tuple(size * rng.normal(size=n)) for n in row), 0.5) for row in rows]
        return ScaleFit(w, error, 0.1 * error, 3 * error, tuple(made))

    return PlanEntry("dpmpp2m", tuple(times), coarse, tuple(map(fit, SCALES)))


def front_for(pipe, module, **changes) -> PlanFront:
    schedule, predicts = native_schedule(pipe.scheduler)
    whole = np.rint if schedule.kind == "vp" else np.asarray
    full = whole(np.linspace(999, 60, 6)).tolist()
    held = whole(np.linspace(999, 30, 7)).tolist()
    values = {
        "model": "tiny",
        "fingerprint": fingerprint(module),
        "scheduler_family": f"{schedule.kind}/{predicts}",
        "schedule_digest": schedule_digest(schedule),
        "prompts_sha256": "",
        "num_prompts": 4,
        "num_held_out": 2,
        "reference_steps": 240,
        "date": "2026-01-01",
        "machine": machine_line(),
        "seconds": (0.1, 0.2),
        "shape": (4, 8, 8),
        "plans": (
            entry_of(schedule, full, tuple(range(6)), 0.02),
            entry_of(schedule, held, (0, 2, 4), 0.03),
        ),
        "stock": STOCK,
    }
    return PlanFront(**{**values, **changes})


@functools.cache
def front() -> PlanFront:
    pipe = tiny()
    return front_for(pipe, pipe.unet)


def compiled(target=None, **options):
    pipe = tiny()
    return thg_engine.compile(pipe, calibration=front(), **(target or SPARSE), **options)


def entry_for(target) -> PlanEntry:
    return next(e for e in front().plans if e.is_full is (target is DENSE))


@torch.no_grad()
def by_hand(plan, x, network):
    """The rows of ``plan`` in float64 over the outputs of the network as it is.

    Args:
        plan: its rows.
        x: first sample.
        network: (cond, uncond) outputs of a float32 sample at a timestep.
    """
    plain = Plain(x.double().numpy())
    for row in plan.rows:
        fed = torch.from_numpy(plain.X[0]).to(x.dtype)
        c, u = network(fed, torch.tensor(row.timestep))
        plain.run(row, c.double().numpy(), u.double().numpy())
    return torch.from_numpy(plain.X[0])


def sd_by_hand(plan, seed: int = 1, **changes):
    """Stable Diffusion's own embeddings and latents, and `by_hand`."""
    pipe = tiny()
    given = arguments(pipe, seed, **changes)
    copies = given.get("num_images_per_prompt", 1)
    prompts = given["prompt"] if isinstance(given["prompt"], list) else [given["prompt"]]
    negative = given.get("negative_prompt", "")
    negative = [negative] * len(prompts)
    cond, uncond = pipe.encode_prompt(prompts, "cpu", copies, True, negative)
    size = (given["height"], given["width"])
    x = pipe.prepare_latents(len(cond), 4, *size, cond.dtype, "cpu", given["generator"])

    def network(fed, t):
        pair = torch.cat([fed, fed]), t, torch.cat([cond, uncond])
        return pipe.unet(*pair).sample.chunk(2)

    return by_hand(plan, x, network)


def close(found, expected, rtol: float = 3e-5) -> None:
    scale = float(expected.abs().max())
    assert float((found.double() - expected.double()).abs().max()) < rtol * scale


def fitted(target, scale: float = 5.0):
    schedule, predicts = native_schedule(ddim())
    return entry_for(target).plan(schedule, predicts, scale)


def base(target, scale: float = 5.0):
    schedule, predicts = native_schedule(ddim())
    return base_plan(entry_for(target), schedule, predicts, scale)


@pytest.mark.parametrize("target", [DENSE, SPARSE], ids=["cfg", "thg"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"guidance_scale": 7.0},
        {"prompt": ["a red cat", "bad dog"], "num_images_per_prompt": 2},
        {"negative_prompt": "bad dog", "num_inference_steps": 31},
    ],
    ids=["between", "calibrated", "batch", "negative"],
)
def test_compiled_call_is_the_plan_by_hand(target, changes) -> None:
    pipe = compiled(target)
    with CountRows(pipe.unet) as count:
        found = call(pipe, **changes)
    scale = changes.get("guidance_scale", 5.0)
    plan = fitted(target, scale)
    close(found, sd_by_hand(plan, **changes))
    with pytest.raises(AssertionError):
        close(found, sd_by_hand(base(target, scale), **changes), 1e-3)
    entry, stats = entry_for(target), pipe.thg.stats()
    assert count.total == entry.nfe * len(found)
    assert stats["last_nfe"] == entry.nfe and stats["last_rows"] == entry.num_steps
    assert stats["fused_steps"] == entry.num_steps and not stats["fallbacks"]
    assert pipe.thg.plan == plan


@pytest.mark.parametrize("target", [DENSE, SPARSE], ids=["cfg", "thg"])
def test_flow_matching_transformer_by_hand(target) -> None:
    entry = ZOO["sd3"]
    pipe, stock = build(entry), build(entry)
    made = front_for(pipe, pipe.transformer)
    thg_engine.compile(pipe, calibration=made, **target)
    found = zoo_call(entry, pipe)
    chosen = next(e for e in made.plans if e.is_full is (target is DENSE))
    plan = chosen.plan(*native_schedule(stock.scheduler), 5.0)
    assert pipe.thg.plan == plan and pipe.thg.stats()["last_nfe"] == chosen.nfe
    given = zoo_arguments(entry)
    texts = {"prompt": given["prompt"], "prompt_2": None, "prompt_3": None}
    texts |= {"negative_prompt": given["negative_prompt"], "max_sequence_length": 16}
    cond, uncond, pooled, unpooled = stock.encode_prompt(**texts)
    size = (given["height"], given["width"])
    x = stock.prepare_latents(1, 4, *size, cond.dtype, "cpu", given["generator"])

    def network(fed, t):
        embeds, pools = torch.cat([cond, uncond]), torch.cat([pooled, unpooled])
        twice = torch.cat([fed, fed])
        return stock.transformer(twice, embeds, pools, t.float().expand(2)).sample.chunk(2)

    close(found, by_hand(plan, x, network))


@pytest.mark.parametrize("target", [DENSE, SPARSE], ids=["cfg", "thg"])
def test_base_rows_where_the_fused_step_is_off(target) -> None:
    pipe = compiled(target, fused=False)
    close(call(pipe), sd_by_hand(base(target)))
    assert pipe.thg.stats()["last_nfe"] == entry_for(target).nfe
    assert pipe.thg.plan == base(target)
    assert "base rows" in pipe.thg.report()


def rescaled(row, c, u, factor: float = 0.7):
    out = c + row.guidance_weight * (c - u)
    spread = c.std((1, 2, 3), keepdim=True) / out.std((1, 2, 3), keepdim=True)
    return factor * out * spread + (1 - factor) * out


def test_rescaled_guidance_runs_base_rows() -> None:
    """What the pipeline makes of the guided output is stepped by the solver of the plan."""
    pipe = compiled(DENSE)
    found = call(pipe, guidance_rescale=0.7)
    plan, given = base(DENSE), {}

    stock = tiny()
    embeds = torch.cat(stock.encode_prompt("a photo of cat", "cpu", 1, True)[::1])
    x = stock.prepare_latents(1, 4, 16, 16, embeds.dtype, "cpu", arguments(stock)["generator"])
    given = iter(plan.rows)

    def network(fed, t):
        row = next(given)
        c, u = stock.unet(torch.cat([fed, fed]), t, embeds).sample.chunk(2)
        # As a guided output without any guidance left to form.
        return rescaled(row, c, u), rescaled(row, c, u)

    with torch.no_grad():
        close(found, by_hand(plan, x, network))
    report = pipe.thg.report()
    assert "changes the guided output" in report and pipe.thg.plan == plan
    fit = entry_for(DENSE)
    assert f"error {100 * fit.error_at(5.0, fitted=False):.2f} %" in report, "of what ran"
    assert f"error {100 * fit.error_at(5.0):.2f} %" not in report
    held = compiled(SPARSE)
    assert torch.isfinite(call(held, guidance_rescale=0.7)).all()
    assert held.thg.stats()["last_nfe"] == entry_for(SPARSE).nfe
    close(call(held), sd_by_hand(fitted(SPARSE)))


def test_guidance_changed_in_the_middle_of_a_run_goes_on_with_base_rows() -> None:
    """Fitted rows 0 and 1; from row 2 the plan's solver, its history begun anew."""

    def change(pipe, i, t, tensors):
        if i == 1:
            pipe._guidance_rescale = 0.7
        return {}

    pipe = compiled(DENSE)
    found = call(pipe, callback_on_step_end=change)
    assert pipe.thg.stats()["fused_steps"] == 2
    seen = []

    def stop(pipe, i, t, tensors):
        seen.append(tensors["latents"].clone())
        return {}

    call(pipe, callback_on_step_end=stop)
    stock, entry = tiny(), entry_for(DENSE)
    embeds = torch.cat(stock.encode_prompt("a photo of cat", "cpu", 1, True))
    schedule, predicts = native_schedule(ddim())
    later = replace(entry, timesteps=entry.timesteps[2:], coarse_rows=(0, 1, 2, 3))
    plan = base_plan(later, schedule, predicts, 5.0)
    rows = iter(plan.rows)

    def network(fed, t):
        row = next(rows)
        c, u = stock.unet(torch.cat([fed, fed]), t, embeds).sample.chunk(2)
        return rescaled(row, c, u), rescaled(row, c, u)

    with torch.no_grad():
        close(found, by_hand(plan, seen[1], network))


def test_scales_that_were_not_calibrated_run_base_rows() -> None:
    for scale in (2.0, 9.0):
        pipe = compiled(SPARSE)
        with pytest.warns(UserWarning, match=f"w = {scale:g} lies outside the calibrated") as seen:
            found = call(pipe, guidance_scale=scale)
        assert Path(seen[0].filename).parent == Path(__file__).parent
        close(found, sd_by_hand(base(SPARSE, scale), guidance_scale=scale))
        nearest = min(front().guidance_scales, key=lambda w: abs(w - scale))
        report = pipe.thg.report()
        assert f"w = {scale:g} was not calibrated" in report
        assert f"errors are those of unfitted rows at w = {nearest:g}" in report
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            call(pipe, guidance_scale=scale)  # said once


def test_guidance_off() -> None:
    """One branch in every row, on the grid of a plan, by its solver."""
    pipe = compiled(DENSE)
    with CountRows(pipe.unet) as count:
        found = call(pipe, guidance_scale=1.0)
    assert count.rows == [1] * pipe.thg.stats()["last_rows"]
    entry = pipe.thg._planner.choice.entry
    plan = base_plan(entry, *native_schedule(ddim()), 1.0)
    close(found, sd_by_hand(plan, guidance_scale=1.0))
    assert "guidance was off" in pipe.thg.report()


def test_uncompile_and_the_scheduler_of_the_pipeline() -> None:
    pipe = tiny()
    stock, own, before = call(pipe), pipe.scheduler, dict(pipe.config)
    thg_engine.compile(pipe, calibration=front(), **SPARSE)
    seen = []

    def look(pipe, i, t, tensors):
        seen.append(
            (isinstance(pipe.scheduler, PlanScheduler), pipe.scheduler.config == own.config)
        )
        if i == 2:
            raise KeyError("stop")
        return {}

    with pytest.raises(KeyError):
        call(pipe, callback_on_step_end=look)
    assert seen == [(True, True)] * 3 and pipe.scheduler is own
    call(pipe)
    assert pipe.scheduler is own and type(own) is type(ddim())
    assert dict(pipe.config) == before
    assert thg_engine.uncompile(pipe) is pipe and pipe.scheduler is own
    assert torch.equal(call(pipe), stock)


def test_a_scheduler_given_in_a_callback_stays() -> None:
    pipe, other = compiled(SPARSE), make("EulerDiscreteScheduler")

    def swap(pipe, i, t, tensors):
        if i == entry_for(SPARSE).num_steps - 1:
            pipe.scheduler = other
        return {}

    call(pipe, callback_on_step_end=swap)
    assert pipe.scheduler is other


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_any_scheduler_of_the_same_noise(name) -> None:
    """The plan brings its solver: Karras' scaled samples and others make no difference."""
    pipe = tiny(scheduler=make(name))
    thg_engine.compile(pipe, calibration=front(), **SPARSE)
    close(call(pipe), sd_by_hand(fitted(SPARSE)))


@pytest.mark.parametrize("name", ["timesteps", "sigmas"])
def test_grids_of_the_caller_are_refused_before_anything_runs(name) -> None:
    pipe = compiled(SPARSE)
    own = pipe.scheduler
    with CountRows(pipe.unet) as count, pytest.raises(InvalidArgument, match=rf"^{name}="):
        call(pipe, **{name: [900, 500, 100]})
    assert count.total == 0 and pipe.scheduler is own
    close(call(pipe), sd_by_hand(fitted(SPARSE)))


def test_fronts_of_another_model_or_noise_are_refused() -> None:
    pipe = tiny()
    kind, own = type(pipe), pipe.scheduler
    stock = call(pipe)
    for wrong, message in (
        ({"fingerprint": "0" * 16}, "another architecture"),
        ({"schedule_digest": "0" * 16}, "another noise schedule"),
        ({"scheduler_family": "vp/v_prediction"}, "another noise schedule"),
    ):
        with pytest.raises(CalibrationError, match=message):
            thg_engine.compile(pipe, calibration=replace(front(), **wrong))
    assert type(pipe) is kind and pipe.scheduler is own and "thg" not in vars(pipe)
    thg_engine.compile(pipe, calibration=front(), **SPARSE)
    with pytest.raises(CalibrationError):
        thg_engine.compile(pipe, calibration=replace(front(), fingerprint="0"))
    close(call(pipe), sd_by_hand(fitted(SPARSE)))
    pipe.scheduler = ddim(beta_end=0.02)
    with CountRows(pipe.unet) as count, pytest.raises(CalibrationError, match="noise schedule"):
        call(pipe)
    assert count.total == 0
    pipe.scheduler = own
    close(call(pipe), sd_by_hand(fitted(SPARSE)))
    assert torch.equal(call(thg_engine.uncompile(pipe)), stock)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        *(({"speedup": 2.0}, "speedup"), ({"seconds": 1.0}, "seconds")),
        *(({"match": "ddim@20"}, "match"), ({"drift": 0}, "drift"), ({"drift": True}, "drift")),
        ({"calibration": front, "guidance": "thg"}, "guidance"),
        ({"calibration": front, "nfe": 12, "speedup": 2.0}, "target"),
        ({"calibration": front, "match": "lms@20"}, "match"),
        ({"calibration": front, "match": "ddim@99"}, "match"),
    ],
)
def test_arguments_that_make_no_sense(options, name) -> None:
    pipe = tiny()
    if "calibration" in options:
        options = {**options, "calibration": front()}
    with pytest.raises(InvalidArgument, match=rf"^{name}="):
        thg_engine.compile(pipe, **options)
    assert "thg" not in vars(pipe)


def test_unmet_targets_warn_at_compile() -> None:
    pipe = tiny()
    with (
        CountRows(pipe.unet) as count,
        pytest.warns(UserWarning, match="cheapest plan takes 10 ev") as seen,
    ):
        thg_engine.compile(pipe, calibration=front(), nfe=6)
    assert seen[0].filename == __file__
    assert count.total == 0 and "target missed" in pipe.thg.report()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close(call(pipe), sd_by_hand(fitted(SPARSE)))


def test_pipelines_that_plans_are_not_fitted_to() -> None:
    for kind in ("img2img", "inpaint"):
        pipe = tiny(kind)
        with pytest.raises(UnsupportedPipeline, match="start from noise"):
            thg_engine.compile(pipe, calibration=front())
        assert "thg" not in vars(pipe)
    for name, message in (("wan", "one call of one denoiser"), ("sdxl_modular", "not by a guider")):
        with pytest.raises(UnsupportedPipeline, match=message):
            thg_engine.compile(build(ZOO[name]), calibration=front())


def test_copies_and_pickles_run_the_same_plan() -> None:
    pipe = compiled(SPARSE, drift=3)
    expected = call(pipe)
    for twin in (copy.deepcopy(pipe), copy.copy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert torch.equal(call(twin), expected)
        assert twin.thg.settings == pipe.thg.settings
        assert twin.thg.stats()["runs"] == 1


def test_reports_and_previews() -> None:
    pipe = compiled(SPARSE)
    usual = fitted(SPARSE, 7.0)
    assert pipe.thg.plan == usual and pipe.thg.stats()["runs"] == 0
    assert pipe.thg.preview(pipe.scheduler, 20, 3.0) == fitted(SPARSE, 3.0)
    with pytest.raises(InvalidArgument, match="num_inference_steps"):
        pipe.thg.preview(pipe.scheduler, 0)
    before = pipe.thg.report()
    call(pipe)
    report = pipe.thg.report()
    for text in (before, report):
        assert text.startswith("thg_engine: calibrated plans")
        assert "plan for nfe=10: fitted thg, 7 steps, NFE 10, error 3.00 %" in text
        assert "beside it: fitted cfg, 6 steps, NFE 12, error 2.00 %" in text
        assert (
            "calibrated 2026-01-01 at w = 3, 7\n  both branches cost c2 = 2.00 times one "
            "(of the calibration, one sample of 4x8x8)" in text
        )
        assert "guidance thg" not in text and "conservative" not in text
    # Of 8 steps of full guidance.
    # Seven rows, of which three evaluate both branches: 7 + 3 (c2 - 1) evaluations of 0.1 s.
    assert "1.60x, 1 s a sample" in report and "last call: NFE 10 on dpmpp2m, w = 5" in report
    assert "fused step: 7 row(s)" in report and "one state for tortoise" not in report


def test_calls_from_two_threads() -> None:
    """The second begins while the first is in progress, and runs on a scheduler of its own."""
    pipe = compiled(SPARSE)
    expected = [call(pipe, seed=seed) for seed in (1, 2)]
    own, results, reached, go = pipe.scheduler, {}, threading.Event(), threading.Event()

    def wait(pipe, i, t, tensors):
        if i == 1:
            reached.set()
            assert go.wait(60)
        return {}

    def first() -> None:
        results[1] = call(pipe, seed=1, callback_on_step_end=wait)

    thread = threading.Thread(target=first)
    thread.start()
    try:
        assert reached.wait(60)
        results[2] = call(pipe, seed=2)
        results[3] = call(pipe, seed=1)
    finally:
        go.set()
        thread.join()
    assert torch.equal(results[1], expected[0]) and torch.equal(results[2], expected[1])
    assert torch.equal(results[3], expected[0]) and pipe.scheduler is own


@pytest.mark.parametrize("boost", [None, 1.5])
@pytest.mark.parametrize("fused", [None, False])
def test_drift_changes_nothing_and_measures_the_reused_delta(fused, boost) -> None:
    """Against deltas of the stock UNet at the samples of the run."""
    if boost is None:
        options = {"calibration": front(), **SPARSE}
        coarse, count = entry_for(SPARSE).coarse_rows, 7
    else:
        options, coarse, count = {"guidance": thg_engine.THG(grid=3, boost=boost)}, (0, 3, 6), 8
    options["fused"] = fused if boost is None else fused is None
    plain = thg_engine.compile(tiny(), **options)
    pipe = thg_engine.compile(tiny(), **options, drift=2)
    assert "drift: not measured yet" in pipe.thg.report()
    samples = []

    def keep(pipe, i, t, tensors):
        samples.append((t, tensors["latents"].clone()))
        return {}

    nfe = count + len(coarse)
    skipped = [i for i in range(count) if i not in coarse]
    for k in range(5):
        samples.clear()
        found = call(pipe, callback_on_step_end=keep)
        # The conditional branch comes out of another batch size: rounding, and no more.
        close(found, call(plain), 1e-5)
        assert pipe.thg.stats()["last_nfe"] == nfe + (k % 2 == 0)
    drift = pipe.thg.stats()["drift"]
    assert list(drift) == skipped[:3] and all(len(v) == 1 for v in drift.values())
    stock = tiny()
    x = stock.prepare_latents(1, 4, 16, 16, torch.float32, "cpu", arguments(stock)["generator"])
    states = [x, *(s for _, s in samples[:-1])]
    embeds = torch.cat(stock.encode_prompt("a photo of cat", "cpu", 1, True))
    fresh, rows = [], plain.thg.plan.rows
    for (t, _), state in zip(samples, states, strict=True):
        with torch.no_grad():
            c, u = stock.unet(torch.cat([state, state]), t, embeds).sample.chunk(2)
        fresh.append(c - u)
    for row, errors in drift.items():
        held = [fresh[i] for i in reversed(range(row)) if i in coarse]
        reused = sum(w * d for w, d in zip(rows[row].delta_weights, held, strict=False))
        expected = float((reused - fresh[row]).norm() / fresh[row].norm())
        assert errors[0] == pytest.approx(expected, rel=1e-3)
    worst = max(drift, key=lambda row: drift[row][0])
    mean = 100 * sum(v[0] for v in drift.values()) / 3
    line = f"drift: reused deltas off by {mean:.1f} % in 3 check(s), most in row {worst}"
    assert line in pipe.thg.report()


@pytest.mark.parametrize("fused", [None, False])
def test_drift_beside_a_controlnet(fused) -> None:
    """The companion, too, runs for all branches in the row that is measured."""
    entry = ZOO["sd_controlnet"]
    # Two prompts: residuals of one would be broadcast over both branches unseen.
    given = {**entry.batch, "num_inference_steps": 6}
    options = {"guidance": thg_engine.THG(grid=2), "fused": fused}
    expected = zoo_call(entry, thg_engine.compile(build(entry), **options), **given)
    pipe = thg_engine.compile(build(entry), **options, drift=1)
    for _ in range(2):
        close(zoo_call(entry, pipe, **given), expected, 1e-5)
        assert pipe.thg.stats()["last_nfe"] == 6 + 3 + 1
    assert list(pipe.thg.stats()["drift"]) == [1, 3]


def test_drift_where_nothing_can_be_measured() -> None:
    pipe = thg_engine.compile(build(ZOO["wan"]), thg_engine.THG(grid=2), drift=1)
    zoo_call(ZOO["wan"], pipe)
    assert "drift: not measured where each branch has a call of its own" in pipe.thg.report()
    pipe = compiled(DENSE, drift=1)
    call(pipe)
    assert "drift: no row reuses a delta" in pipe.thg.report()
    with pytest.raises(InvalidArgument, match=r"^drift="):
        thg_engine.compile(build(ZOO["sdxl_modular"]), drift=1)


def test_kill_switch(monkeypatch) -> None:
    pipe, stock = compiled(SPARSE), call(tiny())
    monkeypatch.setenv("THG_DISABLE", "1")
    assert torch.equal(call(pipe), stock)
    monkeypatch.delenv("THG_DISABLE")
    close(call(pipe), sd_by_hand(fitted(SPARSE)))


@pytest.fixture
def quick(monkeypatch) -> None:
    """Few nodes and stock solvers: a second, not a minute."""
    monkeypatch.setattr(
        searching, "make_nodes", lambda schedule, end: make_nodes(schedule, 16, 2, end)
    )
    calibrating = importlib.import_module("thg_engine.integrations.diffusers.calibrate_plans")
    monkeypatch.setattr(calibrating, "STOCK_STEPS", (4, 8))
    monkeypatch.setattr(calibrating, "STOCK_BY_KIND", {"vp": ("ddim", "dpm++2m")})


def interrupt(module, args) -> None:
    raise InterruptedError


def test_calibrated_here_and_compiled(quick, tmp_path) -> None:
    """A compiled pipeline is calibrated as the plain one is, nothing of it is touched, and the
    errors of the front are those of calls on the prompts held out."""
    options = {"guidance_scales": (5.0,), "budgets": (8, 12), "progress": False}
    plain, pipe = tiny(), compiled(SPARSE)
    state = torch.get_rng_state()
    made = thg_engine.calibrate_plans(
        pipe, PROMPTS, work_dir=tmp_path, height=16, width=16, **options
    )
    assert torch.equal(torch.get_rng_state(), state) and pipe.thg.stats()["runs"] == 0
    with CountRows(plain.unet) as count:
        again = thg_engine.calibrate_plans(
            plain, PROMPTS, work_dir=tmp_path, height=16, width=16, **options
        )
    assert count.total == 0 and again == made, "all of it was kept"
    assert (made.num_prompts, made.num_held_out) == (4, 2) and made.shape == (4, 8, 8)
    other = tiny(seed=3)
    other.unet.conv_in.register_forward_pre_hook(interrupt)
    with pytest.raises(InterruptedError):  # of other weights nothing has been kept
        thg_engine.calibrate_plans(
            other, PROMPTS, work_dir=tmp_path, height=16, width=16, **options
        )
    entry = max((e for e in made.plans if e.is_full), key=lambda e: e.num_steps)
    thg_engine.compile(pipe, calibration=replace(made, plans=(entry,)), nfe=entry.nfe)
    reference = fine_run(tiny())
    given = {"height": 16, "width": 16, "guidance_scale": 5.0, "output_type": "latent"}
    found = []
    for i in (2, 5):
        x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(i))
        end = pipe(PROMPTS[i], latents=x, negative_prompt="", **given).images
        expected = reference(PROMPTS[i], x)
        found.append(float((end - expected).norm() / expected.norm()))
    assert sum(found) / 2 == pytest.approx(entry.fits[0].error, rel=0.15)


def fine_run(pipe):
    """The solution by DPM-Solver++ 2M of diffusers, 150 steps of full guidance."""
    pipe.scheduler = make("DPMSolverMultistepScheduler", timestep_spacing="trailing")

    def run(prompt: str, x):
        given = {"height": 16, "width": 16, "guidance_scale": 5.0, "output_type": "latent"}
        return pipe(prompt, latents=x, negative_prompt="", num_inference_steps=150, **given).images

    return run
