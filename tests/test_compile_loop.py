"""Held deltas and callbacks, against the denoising loop written out in `pipelines.reference`."""

from __future__ import annotations

import dataclasses

import diffusers
import pytest
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback, SDCFGCutoffCallback

import thg_engine
from pipelines import (
    KINDS,
    METHODS,
    CountRows,
    arguments,
    call,
    ddim,
    make,
    pattern,
    reference,
    tiny,
)
from thg_engine import THG

# numpy's complaint about schedulers that hand it tensors.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.callback(_steps)?. is deprecated:FutureWarning"),
]

DPM = "DPMSolverMultistepScheduler"


# -- held deltas -----------------------------------------------------------------------------------


def matches_reference(pipe, steps=None, tolerance=2e-4, **kwargs):
    """Compiled output against the loop, and counted rows against what the loop evaluated."""
    with CountRows(pipe.unet) as count:
        found = call(pipe, **kwargs)
    steps = pattern(pipe.thg.plan) if steps is None else steps
    plain = thg_engine.uncompile(pipe)
    expected, rows = reference(plain, steps, **kwargs)
    assert count.total == rows
    error = float((found.float() - expected.float()).abs().max())
    print("REL", error / float(expected.float().abs().max()))
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
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


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


def test_bfloat16_holds_its_deltas_in_float32():
    pipe = tiny(dtype=torch.bfloat16)
    exact = call(thg_engine.compile(tiny(), THG(grid=2)))
    thg_engine.compile(pipe, THG(grid=2))
    found = matches_reference(pipe, tolerance=0.02)
    assert found.dtype == torch.bfloat16
    assert (found.float() - exact).norm() < 0.05 * exact.norm()


# -- callbacks -------------------------------------------------------------------------------------

HOLD = THG(grid=(0, 1, 5))
STEPS = [("both" if i in (0, 1, 5) else "held", 1.0) for i in range(8)]


@pytest.mark.parametrize("inference_mode", [False, True])
@pytest.mark.parametrize("how", ["new", "in place", "not asked for", "legacy"])
def test_edited_latents_refresh_delta(how, inference_mode):
    def edit(x):
        x += 0.3
        return x

    def callback(pipe, i, t, tensors):
        if i != 2:
            return tensors
        if how == "in place":
            edit(tensors["latents"])
            return {}
        seen = latents[-1] if how == "not asked for" else tensors["latents"]
        return {"latents": edit(seen.clone())}

    latents = []
    options = {"callback_on_step_end": callback}
    pipe = thg_engine.compile(tiny(), HOLD)
    if how == "not asked for":
        options["callback_on_step_end_tensor_inputs"] = ["prompt_embeds"]
        step = pipe.scheduler.step

        def spied(*args, **kwargs):
            latents.append(step(*args, **kwargs)[0])
            return (latents[-1],)

        pipe.scheduler.step = spied
    elif how == "legacy":
        options = {"callback_steps": 1, "callback": lambda i, t, x: edit(x) if i == 2 else None}
    with CountRows(pipe.unet) as count, torch.inference_mode(inference_mode):
        found = call(pipe, **options).clone()
    expected, rows = reference(tiny(), STEPS, edit=lambda i, x, e: (x + 0.3 * (i == 2), e, i == 2))
    assert count.total == rows == pipe.thg.plan.nfe + 1
    assert pipe.thg.stats()["refreshes"] == 1
    assert "1 row(s) refreshed" in pipe.thg.report()
    assert (found - expected).abs().max() <= 2e-4 * expected.abs().max()


@pytest.mark.parametrize("inference_mode", [False, True])
@pytest.mark.parametrize("how", ["new", "in place"])
def test_edited_embeddings_refresh_delta(how, inference_mode):
    def callback(pipe, i, t, tensors):
        if i == 3:
            if how == "in place":
                tensors["prompt_embeds"].mul_(-1.0)
            else:
                tensors["prompt_embeds"] = -tensors["prompt_embeds"]
        return tensors

    pipe = thg_engine.compile(tiny(), HOLD)
    with CountRows(pipe.unet) as count, torch.inference_mode(inference_mode):
        options = {"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
        found = call(pipe, callback_on_step_end=callback, **options).clone()
    edit = lambda i, x, e: (x, -e if i == 3 else e, i == 3)  # noqa: E731
    expected, rows = reference(tiny(), STEPS, edit=edit)
    assert count.total == rows == pipe.thg.plan.nfe + 1
    assert (found - expected).abs().max() <= 2e-4 * expected.abs().max()


def test_edited_mask_refreshes_delta():
    def callback(pipe, i, t, tensors):
        return {"mask": torch.ones_like(tensors["mask"])} if i == 2 else {}

    pipe = thg_engine.compile(tiny("inpaint9"), HOLD)
    options = {"callback_on_step_end_tensor_inputs": ["mask"], "strength": 1.0}
    call(pipe, callback_on_step_end=callback, **options)
    assert pipe.thg.stats()["refreshes"] == 1


@pytest.mark.parametrize("inference_mode", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_callbacks_that_only_look_change_nothing(kind, inference_mode):
    seen = []

    def callback(pipe, i, t, tensors):
        seen.append((i, sorted(tensors), float(tensors["latents"].sum())))
        return tensors if i % 2 else {}

    pipe = thg_engine.compile(tiny(kind), HOLD)
    plain = call(pipe, num_inference_steps=9)
    options = {"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    with torch.inference_mode(inference_mode):
        found = call(pipe, num_inference_steps=9, callback_on_step_end=callback, **options)
    assert torch.equal(found, plain)
    assert pipe.thg.stats()["refreshes"] == 0
    assert [i for i, *_ in seen] == list(range(pipe.thg.plan.num_rows))
    assert seen[0][1] == ["latents", "prompt_embeds"]


def test_guidance_scale_edited_in_the_middle_keeps_what_is_held():
    def callback(pipe, i, t, tensors):
        pipe._guidance_scale = 5.0 - 0.5 * (i + 1)
        return tensors

    pipe = thg_engine.compile(tiny(), HOLD)
    found = call(pipe, callback_on_step_end=callback)
    expected, _ = reference(tiny(), STEPS, scale=lambda i: 5.0 - 0.5 * i)
    assert (found - expected).abs().max() <= 2e-4 * expected.abs().max()
    assert pipe.thg.stats()["refreshes"] == 0


class Look(PipelineCallback):
    tensor_inputs = ("latents",)

    def callback_fn(self, pipeline, step_index, timestep, tensors):
        assert set(tensors) <= {"latents", "prompt_embeds"} and "latents" in tensors
        return tensors


class HalveMask(SDCFGCutoffCallback):
    """The inpainting pipeline doubles its mask, which the stock callback forgets."""

    tensor_inputs = ("prompt_embeds", "mask", "masked_image_latents")

    def callback_fn(self, pipeline, step_index, timestep, tensors):
        if step_index == self.config.cutoff_step_index:
            tensors["mask"] = tensors["mask"][-1:]
            tensors["masked_image_latents"] = tensors["masked_image_latents"][-1:]
        return super().callback_fn(pipeline, step_index, timestep, tensors)


class OddlyNamed:
    """Not one of diffusers' callbacks, so its attribute means nothing to the pipeline."""

    tensor_inputs = ("prompt_embeds",)

    def __call__(self, pipe, i, t, tensors):
        assert list(tensors) == ["latents"]
        return tensors


@pytest.mark.parametrize("kind", ["text", "img2img", "inpaint9"])
@pytest.mark.parametrize("index", [0, 1, 3])
def test_guidance_dropped_by_diffusers_own_callback(kind, index):
    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=index)
    callback = MultiPipelineCallbacks([cutoff, Look()]) if index == 1 else cutoff
    extra = {} if kind == "text" else {"strength": 1.0}
    if kind == "inpaint9":
        callback = HalveMask(cutoff_step_ratio=None, cutoff_step_index=index)
    pipe = thg_engine.compile(tiny(kind), HOLD)
    with CountRows(pipe.unet) as count:
        found = call(pipe, callback_on_step_end=callback, **extra)
    scale = lambda i: 5.0 if i <= index else 0.0  # noqa: E731
    expected, rows = reference(tiny(kind), STEPS, scale=scale, **extra)
    assert count.total == rows == pipe.thg.stats()["last_nfe"]
    assert (found - expected).abs().max() <= 2e-4 * expected.abs().max()


def test_guidance_that_comes_back_starts_with_a_fresh_delta():
    """Scale and the very same embeddings restored: what was held before the gap is stale."""
    kept = {}

    def callback(pipe, i, t, tensors):
        if i == 1:
            kept["embeds"] = tensors["prompt_embeds"]
            pipe._guidance_scale = 1.0
            return {"prompt_embeds": tensors["prompt_embeds"][-1:]}
        if i == 3:
            pipe._guidance_scale = 5.0
            return {"prompt_embeds": kept["embeds"]}
        return {}

    pipe = thg_engine.compile(tiny(), HOLD)
    options = {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    with CountRows(pipe.unet) as count:
        found = call(pipe, callback_on_step_end=callback, **options)
    expected, rows = reference(tiny(), STEPS, scale=lambda i: 1.0 if i in (2, 3) else 5.0)
    # Rows 2 and 3 see the conditional branch alone; row 4 must not use the delta of row 1.
    assert count.rows == [2, 2, 1, 1, 2, 2, 1, 1] and count.total == rows
    assert (found - expected).abs().max() <= 2e-4 * expected.abs().max()


def test_callback_arguments_reach_the_pipeline_as_given():
    pipe = thg_engine.compile(tiny(), HOLD)
    plain = call(pipe)
    assert torch.equal(call(pipe, callback_on_step_end=OddlyNamed()), plain)
    assert torch.equal(call(pipe, callback_on_step_end=Look()), plain)
    generator = torch.Generator().manual_seed(1)
    steps = []
    positional = (
        *("a photo of cat", 16, 16, 8, None, None, 5.0, None, 1, 0.0, generator),
        *(None, None, None, None, None, "latent", True, None, 0.0, None),
        lambda pipe, i, t, tensors: steps.append(i) or tensors,
    )
    assert torch.equal(pipe(*positional).images, plain)
    assert steps == list(range(8))


def test_callback_may_use_the_denoiser_itself():
    """A preview by an uncompiled twin, and a bare call of the network, inside a running call."""
    pipe = tiny()
    twin = diffusers.StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    twin.scheduler = ddim()
    twin.set_progress_bar_config(disable=True)
    stock = call(twin, seed=9, num_inference_steps=3)
    previews = []

    def callback(pipe, i, t, tensors):
        if i == 2:
            previews.append(call(twin, seed=9, num_inference_steps=3))
            pipe.unet(tensors["latents"], 5, torch.zeros(1, 16, 16))
        return tensors

    thg_engine.compile(pipe, HOLD)
    plain = call(pipe)
    assert torch.equal(call(pipe, callback_on_step_end=callback), plain)
    assert torch.equal(previews[0], stock)
    assert pipe.thg.stats()["last_nfe"] == pipe.thg.plan.nfe


@pytest.mark.parametrize("how", ["lora", "ip-adapter", "call"])
def test_turned_adapter_refreshes_delta(how):
    """Strengths that act inside the network: nothing the callback is given changes."""
    pipe = thg_engine.compile(tiny(), HOLD)
    adapter = pipe.unet.mid_block
    adapter.scaling, adapter.scale = {"style": 1.0}, [1.0]

    def callback(pipe, i, t, tensors):
        if i == 2 and how == "lora":
            adapter.scaling["style"] = 0.5
        if i == 2 and how == "ip-adapter":
            adapter.scale[0] = 0.0
        if i == 2 and how == "call":
            pipe._cross_attention_kwargs = {"gligen": None}
        return tensors

    call(pipe, callback_on_step_end=callback)
    assert pipe.thg.stats()["refreshes"] == 1
