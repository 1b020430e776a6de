"""Held deltas against the denoising loop written out in `pipelines.reference`."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import thg_engine
from pipelines import (
    KINDS,
    METHODS,
    CountRows,
    arguments,
    call,
    make,
    pattern,
    reference,
    tiny,
)
from thg_engine import THG

# numpy's complaint about schedulers that hand it tensors.
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")

TOLERANCE = 1e-5  # of the largest entry; ten times what float32 sums in another order differ by
DPM = "DPMSolverMultistepScheduler"


def matches_reference(pipe, steps=None, tolerance=TOLERANCE, **kwargs):
    """Compiled output against the loop, and counted rows against what the loop evaluated."""
    with CountRows(pipe.unet) as count:
        found = call(pipe, **kwargs)
    steps = pattern(pipe.thg.plan) if steps is None else steps
    plain = thg_engine.uncompile(pipe)
    expected, rows = reference(plain, steps, **kwargs)
    assert count.total == rows
    error = float((found.float() - expected.float()).abs().max())
    assert error <= tolerance * float(expected.float().abs().max()), error
    return found


@pytest.mark.parametrize(
    ("kind", "method"),
    [("text", method) for method in METHODS]
    + [(kind, method) for kind in KINDS[1:] for method in ("thg-grid", "cfg-cache", "selective")],
)
def test_every_method_is_the_loop_written_out(kind, method):
    pipe = tiny(kind, seed=list(METHODS).index(method))
    full = call(pipe, seed=4)
    found = matches_reference(thg_engine.compile(pipe, METHODS[method]), seed=4)
    if method != "cfg":  # the comparison means something only if reuse shows
        assert (found - full).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["text", "img2img", "inpaint9"])
def test_rows_counted_by_hand(kind):
    """Grid (0, 1, 4), boost 1.2, cut off from row 5: written down, not read from the plan."""
    steps = [("both", 1.0), *[("both", 1.2), *[("held", 1.2)] * 2], ("both", 1.0)]
    steps += [("none", 0.0)] * 3
    pipe = tiny(kind, seed=3)
    size = {"num_inference_steps": 8 if kind == "text" else 10}
    thg_engine.compile(pipe, THG(grid=(0, 1, 4), boost=1.2, cutoff=5))
    matches_reference(pipe, steps, **size)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("DDIMScheduler", {"prediction_type": "v_prediction"}),
        ("DDIMScheduler", {"thresholding": True}),
        ("EulerAncestralDiscreteScheduler", {}),
        ("HeunDiscreteScheduler", {}),
        ("PNDMScheduler", {}),
        ("UniPCMultistepScheduler", {}),
        (DPM, {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}),
        ("LMSDiscreteScheduler", {"prediction_type": "v_prediction"}),
        ("LCMScheduler", {}),
    ],
)
def test_thg_is_the_loop_written_out_for_schedulers(name, config):
    seed = len(name)
    pipe = tiny(scheduler=make(name, **config), seed=seed)
    thg_engine.compile(pipe, THG(grid=3, boost=1.1))
    matches_reference(pipe, seed=seed + 5)


@pytest.mark.parametrize(
    ("kind", "kwargs"),
    [
        ("text", {"guidance_rescale": 0.7}),
        ("text", {"prompt": ["a cat", "red"], "negative_prompt": ["bad", "a"], "eta": 0.5}),
        ("text", {"num_images_per_prompt": 3, "height": 24, "width": 8}),
        ("img2img", {"strength": 0.45, "num_inference_steps": 11}),
        ("inpaint", {"strength": 1.0}),
        ("inpaint9", {"strength": 1.0, "prompt": ["a cat", "red dog"]}),
    ],
)
def test_thg_is_the_loop_written_out_for_calls(kind, kwargs):
    pipe = thg_engine.compile(tiny(kind, seed=2), THG(grid=2, boost=1.15))
    matches_reference(pipe, **kwargs)


def test_a_finished_plan_runs_with_its_extrapolation():
    """delta = 2 D_0 - D_1 with 0.3 (c - C_1): columns that no named method uses."""
    pipe = tiny()
    template = thg_engine.compile(pipe, THG(grid=2)).thg.preview(pipe.scheduler, 6, 5.0)
    rows = tuple(
        dataclasses.replace(row, delta_weights=(1.5, -0.5), cond_change_weights=(0.3,))
        if i in (3, 5)
        else dataclasses.replace(row, guidance_weight=4.0, delta_weights=(1.0,))
        for i, row in enumerate(template.rows)
    )
    plan = dataclasses.replace(template, rows=rows)
    found = call(thg_engine.compile(pipe, plan), num_inference_steps=6)
    assert pipe.thg.plan.nfe == plan.nfe == 9
    expected = extrapolated(thg_engine.uncompile(pipe))
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


@torch.no_grad()
def extrapolated(pipe):
    given = arguments(pipe)
    cond, uncond = pipe.encode_prompt(given["prompt"], "cpu", 1, True)
    pipe.scheduler.set_timesteps(6)
    x = pipe.prepare_latents(1, 4, 16, 16, torch.float32, "cpu", given["generator"])
    deltas, before = [], None
    for i, t in enumerate(pipe.scheduler.timesteps):
        c = pipe.unet(x, t, encoder_hidden_states=cond).sample
        if i % 2 == 0:
            deltas.insert(0, c - pipe.unet(x, t, encoder_hidden_states=uncond).sample)
            delta = deltas[0]
        elif i == 1:
            delta = deltas[0]
        else:
            delta = 1.5 * deltas[0] - 0.5 * deltas[1] + 0.3 * (c - before)
        before = c
        x = pipe.scheduler.step(c + 4.0 * delta, t, x, return_dict=False)[0]
    return x


def test_history_lost_in_the_middle_is_filled_before_it_is_read():
    """Rows 4 and 5 read c - C_1 and c - C_2; an edit after row 3 leaves them nothing to read."""

    def callback(pipe, i, t, tensors):
        return {"latents": tensors["latents"] + 0.0} if i == 3 else {}

    pipe = tiny()
    template = thg_engine.compile(pipe, THG(grid=(0,))).thg.preview(pipe.scheduler, 6, 5.0)
    rows = tuple(
        dataclasses.replace(row, cond_change_weights=(0.2, 0.1)) if i > 3 else row
        for i, row in enumerate(template.rows)
    )
    thg_engine.compile(pipe, dataclasses.replace(template, rows=rows))
    with CountRows(pipe.unet) as count:
        call(pipe, num_inference_steps=6, callback_on_step_end=callback)
    assert count.rows == [2, 1, 1, 1, 2, 2]
    assert pipe.thg.stats()["refreshes"] == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_held_delta_of_half_precision_loses_nothing(dtype):
    """Outputs that do not change make reuse exact: bit for bit, if delta is kept wide enough."""
    pipe = tiny(dtype=dtype)
    outputs = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5)).to(dtype)
    pipe.unet.conv_out.register_forward_hook(lambda module, args, out: outputs[-len(out) :])
    stock = call(pipe)
    assert torch.equal(call(thg_engine.compile(pipe, THG(grid=3), fused=False)), stock)
    assert pipe.thg.stats()["last_nfe"] == pipe.thg.plan.nfe == 11


def test_bfloat16_stays_close_to_float32():
    pipe = tiny(dtype=torch.bfloat16)
    exact = call(thg_engine.compile(tiny(), THG(grid=2)))
    thg_engine.compile(pipe, THG(grid=2))
    found = matches_reference(pipe, tolerance=0.02)
    assert found.dtype == torch.bfloat16
    assert (found.float() - exact).norm() < 0.05 * exact.norm()
