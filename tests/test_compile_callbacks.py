"""Callbacks that look, edit, drop guidance or raise its cost, against the loop written out."""

from __future__ import annotations

import diffusers
import pytest
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback, SDCFGCutoffCallback

import thg_engine
from pipelines import KINDS, CountRows, call, ddim, reference, tiny
from thg_engine import THG

pytestmark = pytest.mark.filterwarnings("ignore:.callback(_steps)?. is deprecated:FutureWarning")
TOLERANCE = 1e-5  # of the largest entry

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
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


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
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("in_place", [False, True])
def test_embeddings_changed_behind_the_callbacks_refresh_delta(in_place):
    """A hook of the user's on the network, e.g. to travel between prompts."""
    calls = []

    def travel(module, args, kwargs):
        calls.append(kwargs["encoder_hidden_states"])
        if len(calls) == 4 and in_place:
            calls[0].mul_(-1.0)
        elif len(calls) >= 4 and not in_place:
            kwargs["encoder_hidden_states"] = swapped.setdefault("embeds", -calls[0])
        return args, kwargs

    swapped = {}
    pipe = thg_engine.compile(tiny(), HOLD)
    handle = pipe.unet.register_forward_pre_hook(travel, with_kwargs=True)
    found = call(pipe)
    handle.remove()
    assert pipe.thg.stats()["refreshes"] == 1
    edit = lambda i, x, e: (x, -e if i == 2 else e, i == 2)  # noqa: E731
    expected, _ = reference(tiny(), STEPS, edit=edit)
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


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
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()
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
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("hidden", [False, True])
def test_guidance_that_comes_back_starts_with_a_fresh_delta(hidden):
    """Scale and the very same embeddings restored: what was held before the gap is stale.

    Hidden: the callback touches the scale alone, a hook on the network fits the embeddings.
    """
    kept = {}

    def callback(pipe, i, t, tensors):
        pipe._guidance_scale = 1.0 if i in (1, 2) else 5.0
        if i == 1:
            kept["embeds"] = tensors["prompt_embeds"]
            return {} if hidden else {"prompt_embeds": tensors["prompt_embeds"][-1:]}
        return {"prompt_embeds": kept["embeds"]} if i == 3 and not hidden else {}

    def fit(module, args, kwargs):
        if len(args[0]) == 1:
            kwargs["encoder_hidden_states"] = kwargs["encoder_hidden_states"][-1:]
        return args, kwargs

    pipe = thg_engine.compile(tiny(), HOLD)
    pipe.unet.register_forward_pre_hook(fit, with_kwargs=True)
    options = {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    with CountRows(pipe.unet) as count:
        found = call(pipe, callback_on_step_end=callback, **options)
    expected, rows = reference(tiny(), STEPS, scale=lambda i: 1.0 if i in (2, 3) else 5.0)
    # Rows 2 and 3 see the conditional branch alone; row 4 must not use the delta of row 1.
    assert count.rows == [2, 2, 1, 1, 2, 2, 1, 1] and count.total == rows
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


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
