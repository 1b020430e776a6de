"""Compiled pipelines that run fitted plans: against loops by hand over the stock networks."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import thg_engine
import zoo_all  # noqa: F401  (it fills the registry)
from fitted_plans import (
    DENSE,
    SPARSE,
    base,
    by_hand,
    close,
    compiled,
    entry_for,
    fitted,
    front,
    front_for,
    sd_by_hand,
)
from pipelines import CountRows, arguments, call, ddim, make, tiny
from thg_engine.errors import InvalidArgument
from thg_engine.fitting.front import base_plan
from thg_engine.integrations.diffusers.plan_scheduler import PlanScheduler
from thg_engine.integrations.diffusers.planned import native_schedule
from zoo import ZOO, build
from zoo import arguments as zoo_arguments
from zoo import call as zoo_call

pytestmark = pytest.mark.filterwarnings("error:thg_engine")


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
