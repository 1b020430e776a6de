"""Reuse by least squares: the weights, what they gain, where they do not apply, and the file."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import thg_engine
from mixture import vp_points
from thg_engine import CFG, THG, Engine, FittedReuse
from thg_engine.demo.pipeline_loader import load_pipeline
from thg_engine.errors import CalibrationError, InvalidArgument
from thg_engine.fitting import ridge
from thg_engine.fitting.reference import Batch
from thg_engine.fitting.reuse import ScaleWeights, fit_steps, fit_weights, follow
from thg_engine.integrations.diffusers.guider_config import decode, encode
from thg_engine.lowering import plan_from_solver, plan_from_timesteps
from thg_engine.solvers import SOLVERS

W, STEPS, GRID = 5.0, 12, (0, 1, 2, 4, 6, 8, 10)
COLOURS = ("red", "green", "blue", "yellow")
FITTED_TO = [f"a photo of a {c} {g}" for c in COLOURS for g in ("dress", "bag", "coat")]
HELD_OUT = [f"a photo of a {c} {g}" for c in ("orange", "purple") for g in ("shirt", "sandal")]


def toy(slope: float):
    def denoiser(x, t, c):
        warped = torch.tanh(x * (0.5 + slope * c[:, None]) + torch.sin(3e-3 * t)[:, None])
        return warped + 0.2 * c[:, None] * torch.sin(slope * x)

    return Engine(denoiser, register_dtype=torch.float64, model_dtype=torch.float64)


def batch(seed: int, size: int = 12):
    x = torch.randn(size, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Batch(x, torch.full((size,), 0.3).double(), torch.zeros(size).double())


def toy_plan(guidance=None, solver: str = "ddim", steps: int = 8):
    guidance = guidance or THG(grid=2, reuse="linear")
    return plan_from_solver(SOLVERS[solver], vp_points(steps), guidance, W)


def test_weights_are_those_of_numpy_s_least_squares(monkeypatch) -> None:
    """By hand, without a ridge, on the trajectory of the rows fitted before; one change besides."""
    monkeypatch.setattr(ridge, "PENALTIES", (1e-13,))
    engine, plan, given = toy(0.7), toy_plan(), batch(0, 24)
    full = follow(engine, plan, given)
    fitted = fit_weights(engine, plan, [full], deltas=2, cond_changes=1)
    x, cond, uncond, _ = given
    reference = x
    conds, deltas, refused = [], [], 0
    for i, row in enumerate(plan.rows):
        t = torch.full((len(x),), row.timestep)
        c, u = engine.denoiser(x, t, cond), engine.denoiser(x, t, uncond)
        c_ref, u_ref = engine.denoiser(reference, t, cond), engine.denoiser(reference, t, uncond)
        (a,), (b,) = row.sample_weights, row.guided_weights
        reference = a * reference + b * (c_ref + (W - 1) * (c_ref - u_ref))
        assert torch.allclose(full.samples[i + 1], reference, rtol=1e-12)
        if row.evaluates_both:
            delta = c - u
            deltas.insert(0, delta)
        else:
            wanted = ((reference - a * x) / b - c) / (W - 1)
            features = [*deltas[:2], c - conds[0]]
            columns = np.stack([f.numpy().ravel() for f in features], axis=1)
            by_hand = np.linalg.lstsq(columns, wanted.numpy().ravel(), rcond=None)[0]
            found = [*fitted.deltas[i], *fitted.changes[i]]
            if fitted.gains[i] == 1.0:  # refused on samples left out
                by_hand = np.array([*row.delta_weights])
            refused += fitted.gains[i] == 1.0
            assert found == pytest.approx(by_hand.tolist(), rel=1e-5, abs=1e-5), i
            delta = sum(v * f for v, f in zip(found, features, strict=False))
        conds.insert(0, c)
        x = a * x + b * (c + (W - 1) * delta)
    assert refused <= 1


@pytest.mark.parametrize("solver", ["ddim", "dpmpp2m"])
def test_it_is_nearer_to_full_guidance_than_a_line(solver) -> None:
    """Also where the solver has a history, on samples that nothing was fitted to."""
    engine, plan = toy(0.7), toy_plan(solver=solver, steps=12)
    full = follow(engine, plan, batch(1, 24))
    weights = fit_weights(engine, plan, [full])
    reuse = FittedReuse(tuple(r.lambda_t for r in plan.rows), plan.coarse_grid, (weights,))
    fitted = toy_plan(THG(grid=2, reuse=reuse), solver, 12)
    steps = fit_steps(engine, plan, [full])
    others = batch(2)
    end = follow(engine, plan, others).final

    def error(each) -> float:
        return float((engine.sample(*others[:3], each) - end).norm())

    assert error(fitted) < 0.9 * error(plan)
    assert error(steps) < 0.9 * error(plan)
    assert steps.nfe == fitted.nfe == plan.nfe and steps.coarse_grid == plan.coarse_grid


def test_a_fit_that_does_not_help_is_refused() -> None:
    """Delta that never changes: a line is exact, so there is nothing left to fit."""

    def constant(x, t, c):
        return 0.3 * x + c[:, None]

    engine = Engine(constant, register_dtype=torch.float64, model_dtype=torch.float64)
    plan = toy_plan(THG(grid=2))
    full = follow(engine, plan, batch(3))
    exact = replace(full, samples=full.samples.clone())
    found = fit_weights(engine, plan, [exact], cond_changes=2)
    for row, deltas, changes in zip(plan.rows, found.deltas, found.changes, strict=True):
        assert deltas == pytest.approx(() if row.evaluates_both else (1.0,), abs=1e-6)
        assert changes == pytest.approx((), abs=1e-6)
    noise = torch.randn(full.samples.shape, generator=torch.Generator().manual_seed(4))
    random = replace(full, samples=full.samples + noise.double())
    again = fit_weights(toy(0.0), plan, [random], deltas=1)
    assert any(g == 1.0 for g, r in zip(again.gains, plan.rows, strict=True) if r.delta_weights)


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline()


@pytest.fixture(scope="module")
def fitted(pipe) -> FittedReuse:
    options = {"num_inference_steps": STEPS, "guidance_scales": (W, 3.0), "batch_size": 6}
    guidance = THG(grid=GRID)
    return thg_engine.fit_reuse(
        pipe, FITTED_TO, guidance=guidance, cond_changes=1, **options, progress=False
    )


def images(pipe, steps: int = STEPS, scale: float = W) -> torch.Tensor:
    generator = torch.Generator().manual_seed(11)
    options = {"num_inference_steps": steps, "guidance_scale": scale, "output_type": "latent"}
    return pipe(HELD_OUT, generator=generator, **options).images


def by_hand(pipe, fitted: FittedReuse) -> torch.Tensor:
    """The scheduler's own step, and deltas put together here from the numbers in the fit."""
    generator = torch.Generator().manual_seed(11)
    texts = pipe.encode_prompt(HELD_OUT, "cpu", 1, True, [""] * len(HELD_OUT))[:2]
    x = torch.randn((len(HELD_OUT), 4, 8, 8), generator=generator)
    x = x[:, : pipe.unet.config.in_channels, : pipe.unet.config.sample_size]
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(STEPS)
    fit = next(each for each in fitted.fits if each.guidance_scale == W)
    conds, deltas = [], []
    for i, t in enumerate(scheduler.timesteps):
        c, u = (pipe.unet(x, t, encoder_hidden_states=text).sample for text in texts)
        if i in fitted.coarse_rows:
            delta = c - u
            deltas.insert(0, delta)
        else:
            delta = sum(v * d for v, d in zip(fit.deltas[i], deltas, strict=False))
            for v, past in zip(fit.changes[i], conds, strict=False):
                delta = delta + v * (c - past)
        conds.insert(0, c)
        x = scheduler.step(c + (W - 1) * delta, t, x).prev_sample
    return x


@pytest.mark.parametrize("fused", [True, False])
@torch.no_grad()
def test_in_a_pipeline_it_is_what_it_is_by_hand(pipe, fitted, fused) -> None:
    assert any(any(changes) for changes in fitted.fits[1].changes)
    compiled = thg_engine.compile(pipe, THG(reuse=fitted), fused=fused)
    found = images(compiled)
    plan, stats = pipe.thg.plan, pipe.thg.stats()
    thg_engine.uncompile(pipe)
    assert plan.coarse_grid == fitted.coarse_rows == GRID
    assert stats["last_nfe"] == plan.nfe and not stats["refreshes"] and not plan.notes
    assert (stats["fused_steps"] == STEPS) is fused
    expected = by_hand(pipe, fitted)
    assert float((found - expected).abs().max()) < 1e-3 * float(expected.abs().max())


def test_new_prompts_come_nearer_to_full_guidance(pipe, fitted) -> None:
    """At either scale that was fitted and between them, by a clear margin."""

    def run(guidance, scale) -> torch.Tensor:
        found = images(thg_engine.compile(pipe, guidance), scale=scale)
        thg_engine.uncompile(pipe)
        return found

    for scale, factor in ((W, 0.7), (3.0, 0.7), (4.0, 0.8)):
        full = run(CFG(), scale)
        lines = run(THG(grid=GRID, reuse="linear"), scale)
        fits = run(THG(grid=GRID, reuse=fitted), scale)
        assert float((fits - full).norm()) < factor * float((lines - full).norm()), scale


def test_other_runs_take_a_line_and_say_so(pipe, fitted) -> None:
    lambdas = fitted.lambdas
    line, fits = THG(grid=GRID, reuse="linear"), THG(grid=GRID, reuse=fitted)
    assert fits.rows(lambdas, W) != line.rows(lambdas, W)
    for other, scale, grid, why in (
        (lambdas[1:], W, GRID, "fitted to 12 rows, not to 11"),
        ([v + 0.1 for v in lambdas], W, GRID, "other noise levels"),
        (lambdas, 7.5, GRID, "fitted at w from 3 to 5, not at 7.5"),
        (lambdas, W, 2, "another coarse grid"),
    ):
        method = replace(fits, grid=grid)
        assert method.rows(other, scale) == replace(line, grid=grid).rows(other, scale)
        plan = plan_from_timesteps([0.0] * len(other), other, method, scale, "any")
        assert len(plan.notes) == 1 and why in plan.notes[0] and "linear" in plan.notes[0]
    assert not fits.notes(lambdas, 1.0) and not line.notes(lambdas, W)
    images(thg_engine.compile(pipe, THG(grid=GRID, reuse=fitted), fused=True), steps=11)
    notes = pipe.thg.plan.notes
    thg_engine.uncompile(pipe)
    assert any("not to 11" in note for note in notes)


def test_between_two_scales_weights_are_mixed(fitted) -> None:
    low, high = fitted.fits
    rows = THG(reuse=fitted).rows(fitted.lambdas, 3.5)
    for i, row in enumerate(rows):
        if not row.evaluates_both:
            pairs = zip(low.deltas[i], high.deltas[i], strict=False)
            expected = [0.75 * a + 0.25 * b for a, b in pairs]
            assert row.delta_weights[: len(expected)] == pytest.approx(expected)
    assert fitted.guidance_scales == (3.0, W)


def test_the_file_gives_the_same_weights(fitted, tmp_path) -> None:
    fitted.save(tmp_path / "reuse.json")
    assert FittedReuse.load(tmp_path / "reuse.json") == fitted
    noise = replace(fitted, lambdas=(-math.inf, *fitted.lambdas[1:]))
    noise.save(tmp_path / "noise.json")
    assert FittedReuse.load(tmp_path / "noise.json") == noise
    assert noise.grid_for(noise.lambdas) == noise.coarse_rows
    method = THG(reuse=fitted, cutoff=0.9)
    assert decode(json.loads(json.dumps(encode(method)))) == method


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format": "other"}, "not a thg-engine-reuse file"),
        ({"version": 2}, "version 2"),
        ({"lambdas": [0.0]}, "damaged"),
        ({"fits": []}, "damaged"),
        ({"fits": [{"guidance_scale": 2.0}]}, "damaged"),
        ({"coarse_rows": [0, 99]}, "damaged"),
        ({"surprise": 1}, "damaged"),
    ],
)
def test_damaged_files_are_refused(fitted, tmp_path, change, match) -> None:
    path = tmp_path / "reuse.json"
    path.write_text(json.dumps({**fitted.document(), **change}))
    with pytest.raises(CalibrationError, match=match):
        FittedReuse.load(path)
    path.write_text("{")
    with pytest.raises(CalibrationError, match="cannot read"):
        FittedReuse.load(path)


def test_bad_input(pipe, fitted) -> None:
    fit = thg_engine.fit_reuse
    for name, options in (
        ("prompts", {"prompts": "a bag"}),
        ("prompts", {"prompts": ["a bag"]}),
        ("guidance", {"guidance": CFG()}),
        ("guidance.boost", {"guidance": THG(boost=1.1)}),
        ("guidance_scale", {"guidance_scales": (1.0,)}),
        ("guidance_scales", {"guidance_scales": (2.0, 2.0)}),
        ("num_inference_steps", {"num_inference_steps": 0}),
        ("deltas", {"deltas": 0, "num_inference_steps": 2}),
        ("cond_changes", {"cond_changes": 9, "num_inference_steps": 2}),
        ("samples", {"samples": True}),
    ):
        with pytest.raises(InvalidArgument, match=rf"^{name}="):
            fit(pipe, **{"prompts": HELD_OUT[:2], "progress": False, **options})
    with pytest.raises(InvalidArgument, match=r"^boost="):
        THG(reuse=fitted, boost=1.1)
    with pytest.raises(CalibrationError, match="another architecture"):
        thg_engine.compile(pipe, THG(reuse=replace(fitted, fingerprint="0" * 16)))
    with pytest.raises(InvalidArgument, match=r"^fits="):
        replace(fitted, fits=(ScaleWeights(2.0, ((),), ((),), (1.0,)),))
    state = plan_from_solver(SOLVERS["dpmpp2m"], vp_points(6), THG(grid=2), W, form="two_state")
    with pytest.raises(InvalidArgument, match="combined form"):
        fit_weights(toy(0.7), state, [])
