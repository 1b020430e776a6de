"""Fitted plans in use: refusals, reports, copies, threads, drift, and a calibration made here."""

from __future__ import annotations

import copy
import importlib
import pickle
import threading
import warnings
from dataclasses import replace

import pytest
import torch

import thg_engine
import zoo_all  # noqa: F401  (it fills the registry)
from fitted_plans import DENSE, SPARSE, close, compiled, entry_for, fitted, front, sd_by_hand
from pipelines import CountRows, arguments, call, ddim, make, tiny
from thg_engine.errors import CalibrationError, InvalidArgument, UnsupportedPipeline
from thg_engine.fitting import search as searching
from thg_engine.fitting.reference import make_nodes
from zoo import ZOO, build
from zoo import call as zoo_call

pytestmark = pytest.mark.filterwarnings("error:thg_engine")


PROMPTS = [f"a {colour} {thing}" for colour in ("red", "blue", "bad") for thing in ("cat", "dog")]


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
