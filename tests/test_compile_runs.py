"""What compiling leaves behind, and how it lives with copies, other hooks and threads."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import threading

import accelerate.hooks
import diffusers
import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook

import thg_engine
from pipelines import CountRows, call, ddim, tiny
from thg_engine import THG, CFGCache
from thg_engine.errors import InvalidArgument

# numpy's complaint about schedulers that hand it tensors.
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")
HELD = THG(grid=3, boost=1.1)


def fresh(seed=0, kind="text", **kwargs):
    """What a pipeline compiled just now gives."""
    return call(thg_engine.compile(tiny(kind, seed=seed), HELD), **kwargs)


def state(pipe):
    """Everything that `compile` could touch, by identity."""
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    found = {"pipe": (type(pipe), {k: id(v) for k, v in vars(pipe).items() if k != "_callback"})}
    for module in modules:
        for name, part in module.named_modules():
            found[type(module).__name__, name] = {k: id(v) for k, v in vars(part).items()}
    return found


# -- nothing left behind ---------------------------------------------------------------------------


class Stop(Exception):
    pass


@pytest.mark.parametrize("row", [0, 1, 2, 4])
def test_next_call_after_an_exception_in_a_callback(row):
    def callback(pipe, i, t, tensors):
        if i == row:
            raise Stop
        return tensors

    pipe = thg_engine.compile(tiny(), HELD)
    with pytest.raises(Stop):
        call(pipe, seed=8, prompt="red dog", callback_on_step_end=callback)
    assert pipe.thg.stats()["failed_runs"] == 1
    assert pipe.thg.stats()["last_rows"] == row + 1
    with CountRows(pipe.unet) as count:
        assert torch.equal(call(pipe), fresh())
    assert count.total == pipe.thg.plan.nfe
    twin = call(thg_engine.uncompile(pipe), seed=2)
    assert torch.equal(twin, call(tiny(), seed=2))


@pytest.mark.parametrize("row", [0, 1, 3])
def test_next_call_after_the_denoiser_raised(row):
    pipe = thg_engine.compile(tiny(), HELD)
    calls = []

    def fail(module, inputs):
        calls.append(1)
        if len(calls) == row + 1:
            raise Stop

    handle = pipe.unet.conv_in.register_forward_pre_hook(fail)
    with pytest.raises(Stop):
        call(pipe, seed=8)
    handle.remove()
    # Outside a call the network is the network again, at once.
    x = torch.randn(2, 4, 8, 8)
    embeds = torch.randn(2, 16, 16)
    assert torch.equal(pipe.unet(x, 5, embeds).sample, tiny().unet(x, 5, embeds).sample)
    assert torch.equal(call(pipe), fresh())


@pytest.mark.parametrize("row", [0, 2, 3])
def test_next_call_after_an_interrupt(row):
    def callback(pipe, i, t, tensors):
        pipe._interrupt = i == row
        return tensors

    pipe = thg_engine.compile(tiny(), HELD)
    cut = call(pipe, callback_on_step_end=callback)
    assert pipe.thg.stats()["last_rows"] == row + 1
    assert f"ended after {row + 1} of 8 rows" in pipe.thg.report()
    assert torch.equal(cut, call(thg_engine.compile(tiny(), HELD), callback_on_step_end=callback))
    assert torch.equal(call(pipe), fresh())


def test_calls_of_other_shapes_leave_nothing():
    pipe = thg_engine.compile(tiny(), HELD)
    for kwargs in (
        {"guidance_scale": 1.0},
        {"height": 24, "width": 8},
        {"prompt": ["a cat", "red dog", "bad"], "num_inference_steps": 5},
        {"num_images_per_prompt": 2, "guidance_scale": 0.5},
        {},
    ):
        assert torch.equal(call(pipe, **kwargs), fresh(**kwargs)), kwargs


def test_a_run_without_guidance_is_stock_and_said_so():
    pipe = thg_engine.compile(tiny(), HELD)
    assert torch.equal(call(pipe, guidance_scale=1.0), call(tiny(), guidance_scale=1.0))
    assert pipe.thg.plan is None
    assert pipe.thg.stats()["last_nfe"] == 8
    assert "guidance was off" in pipe.thg.report()


def test_a_finished_run_holds_no_tensor_and_no_pipeline():
    pipe = thg_engine.compile(tiny(), HELD)
    call(pipe)
    kept = vars(pipe.thg._last)
    assert (
        kept["pipe"] is None
        and kept["fused"] is None
        and not kept["_seen"]
        and not kept["arguments"]
    )
    assert not kept["_held"]._deltas and not kept["_held"]._conds


# -- uncompile -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["text", "img2img", "inpaint"])
@pytest.mark.parametrize("runs", [0, 1])
def test_uncompile_restores_the_identical_objects(kind, runs):
    pipe = tiny(kind)
    call(pipe)  # what a call leaves in the pipeline itself is not compile's doing
    before = state(pipe)
    thg_engine.compile(pipe, HELD)
    assert isinstance(pipe, before["pipe"][0]) and type(pipe).__name__ == before["pipe"][0].__name__
    thg_engine.compile(pipe, "cfg")
    for _ in range(runs):
        call(pipe)
    assert thg_engine.uncompile(pipe) is pipe
    after = state(pipe)
    changing = {"_guidance_scale", "_num_timesteps", "_cross_attention_kwargs", "_clip_skip"}
    changing |= {"_interrupt", "_guidance_rescale", "_progress_bar_config", "_execution_device"}
    for found in (before, after):
        found["pipe"] = (
            found["pipe"][0],
            {k: v for k, v in found["pipe"][1].items() if k not in changing},
        )
    assert after == before
    assert thg_engine.uncompile(pipe) is pipe
    assert state(pipe)["pipe"][0] is before["pipe"][0]


class Doubling(ModelHook):
    """Changes the output, so that its loss shows; with or without a forward of its own."""

    def post_forward(self, module, output):
        return (output[0] * 0.5, *output[1:])


class OwnForward(ModelHook):
    def new_forward(self, module, *args, **kwargs):
        output = self.fn_ref.original_forward(*args, **kwargs)
        return (output[0] * 0.5, *output[1:])


@pytest.mark.parametrize("other", [Doubling, OwnForward])
@pytest.mark.parametrize("when", ["before", "after", "both"])
def test_other_hooks_survive(other, when):
    def register(name):
        HookRegistry.check_if_exists_or_initialize(pipe.unet).register_hook(other(), name)

    pipe = tiny()
    register("stock")
    if when == "both":
        register("second")
    stock = call(pipe)
    pipe = tiny()
    if when != "after":
        register("before")
    registry = getattr(pipe.unet, "_diffusers_hook", None)
    thg_engine.compile(pipe, "cfg")
    if when != "before":
        register("after")
    assert torch.equal(call(pipe), stock)
    thg_engine.compile(pipe, HELD)
    with CountRows(pipe.unet) as count:
        call(pipe)
    assert count.total == pipe.thg.plan.nfe < 16
    thg_engine.uncompile(pipe)
    assert registry is None or pipe.unet._diffusers_hook is registry
    assert torch.equal(call(pipe), stock)
    names = {"before": ["before"], "after": ["after"], "both": ["before", "after"]}[when]
    assert list(pipe.unet._diffusers_hook.hooks) == names


class Halving(accelerate.hooks.ModelHook):
    """Stands for accelerate's offload hooks, which wrap ``forward`` outside diffusers' registry."""

    def post_forward(self, module, output):
        return (output[0] * 0.5, *output[1:])


@pytest.mark.parametrize("order", ["before", "after", "renewed"])
def test_offload_hooks_survive(order):
    pipe = tiny()
    accelerate.hooks.add_hook_to_module(pipe.unet, Halving())
    stock = call(pipe)
    pipe = tiny()
    if order != "after":
        accelerate.hooks.add_hook_to_module(pipe.unet, Halving())
    thg_engine.compile(pipe, HELD)
    if order == "renewed":  # as enable_model_cpu_offload does when it is called again
        accelerate.hooks.remove_hook_from_module(pipe.unet)
    if order != "before":
        accelerate.hooks.add_hook_to_module(pipe.unet, Halving())
    with CountRows(pipe.unet) as count:
        call(pipe)
    assert count.total == pipe.thg.plan.nfe < 16
    thg_engine.uncompile(pipe)
    assert torch.equal(call(pipe), stock)
    accelerate.hooks.remove_hook_from_module(pipe.unet)
    assert torch.equal(call(pipe), call(tiny()))
    assert not hasattr(pipe.unet, "_diffusers_hook")


# -- sharing, copying, moving ----------------------------------------------------------------------


def test_uncompiled_twin_with_the_same_unet_runs_stock():
    pipe = thg_engine.compile(tiny(), HELD)
    accelerated = call(pipe)
    twin = diffusers.StableDiffusionImg2ImgPipeline(
        **pipe.components, requires_safety_checker=False
    )
    other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    for derived in (twin, other):
        derived.scheduler = ddim()
        derived.set_progress_bar_config(disable=True)
        assert type(derived) is diffusers.StableDiffusionImg2ImgPipeline
        assert derived.unet is pipe.unet and not hasattr(derived, "thg")
        assert torch.equal(call(derived), call(tiny("img2img")))
    assert torch.equal(call(pipe), accelerated)
    thg_engine.compile(twin, "cfg")
    thg_engine.uncompile(pipe)
    assert torch.equal(call(twin), call(tiny("img2img")))
    assert torch.equal(call(pipe), call(tiny()))
    thg_engine.uncompile(twin)
    assert not hasattr(pipe.unet, "_diffusers_hook") and "forward" not in vars(pipe.unet)


def test_a_dropped_pipeline_does_not_keep_the_hook():
    pipe = thg_engine.compile(tiny(), HELD)
    call(copy.copy(pipe))
    gc.collect()
    thg_engine.uncompile(pipe)
    assert not hasattr(pipe.unet, "_diffusers_hook")


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_copies_are_compiled_and_independent(how):
    pipe = thg_engine.compile(tiny(), HELD)
    expected = call(pipe)
    twin = how(pipe)
    twin.set_progress_bar_config(disable=True)
    assert type(twin) is type(pipe) and twin.thg is not pipe.thg
    assert (twin.unet is pipe.unet) == (how is copy.copy)
    assert twin.thg.settings == pipe.thg.settings and twin.thg.stats()["runs"] == 0
    assert torch.equal(call(twin), expected)
    thg_engine.uncompile(twin)
    assert torch.equal(call(twin), call(tiny()))
    assert torch.equal(call(pipe), expected)
    thg_engine.uncompile(pipe)
    assert not hasattr(pipe.unet, "_diffusers_hook") and not hasattr(twin.unet, "_diffusers_hook")


def test_compiling_again_changes_the_settings_only():
    pipe = thg_engine.compile(tiny(), HELD)
    call(pipe)
    assert thg_engine.compile(pipe, CFGCache(2, 0.0)) is pipe
    assert pipe.thg.stats()["runs"] == 0
    with CountRows(pipe.unet) as count:
        call(pipe)
    assert count.total == pipe.thg.plan.nfe == 12
    assert len(pipe.unet._diffusers_hook.hooks) == 1
    before = pipe.thg
    with pytest.raises(InvalidArgument, match="guidance='tortoise'"):
        thg_engine.compile(pipe, "tortoise")
    assert pipe.thg is before


def test_new_scheduler_and_dtype_after_compile():
    pipe = thg_engine.compile(tiny(), HELD)
    call(pipe)
    pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(ddim().config)
    expected = tiny()
    expected.scheduler = diffusers.HeunDiscreteScheduler.from_config(ddim().config)
    assert torch.equal(call(pipe), call(thg_engine.compile(expected, HELD)))
    assert pipe.thg.plan.num_rows == 15 and pipe.thg.plan.solver == "HeunDiscreteScheduler"
    pipe.to(torch.bfloat16)
    assert call(pipe).dtype == torch.bfloat16
    assert pipe.thg.stats()["last_nfe"] == pipe.thg.plan.nfe
    pipe.to(torch.float32)


EMBEDS = {
    "prompt": None,
    "prompt_embeds": torch.ones(1, 16, 16),
    "negative_prompt_embeds": torch.zeros(1, 16, 16),
}


def test_new_denoiser_after_compile_takes_the_hook_along():
    pipe, other = thg_engine.compile(tiny(), HELD), tiny(seed=5)
    call(pipe)
    first, pipe.unet = pipe.unet, other.unet
    with CountRows(pipe.unet) as count:
        found = call(pipe, **EMBEDS)
    assert count.total == pipe.thg.plan.nfe < 16
    assert not hasattr(first, "_diffusers_hook")
    reference = thg_engine.compile(other, HELD)
    again = call(reference, **EMBEDS)
    assert torch.equal(found, again)
    thg_engine.uncompile(pipe)
    thg_engine.uncompile(reference)
    assert not hasattr(other.unet, "_diffusers_hook")


def test_saved_pipeline_is_the_plain_class(tmp_path):
    pipe = thg_engine.compile(tiny(), HELD)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is diffusers.StableDiffusionPipeline
    assert torch.equal(call(loaded), call(tiny()))


def test_threads_with_one_unet():
    first = thg_engine.compile(tiny(), HELD)
    second = copy.copy(first)
    third = thg_engine.uncompile(copy.copy(first))
    for pipe in (second, third):
        pipe.scheduler = ddim()
        pipe.tokenizer = copy.deepcopy(pipe.tokenizer)  # whose padding is a state of its own
    expected = [call(pipe, seed=i) for i, pipe in enumerate((first, second, third))]
    found: dict[int, list] = {}

    def work(i, pipe):
        found[i] = [call(pipe, seed=i) for _ in range(3)]

    threads = [
        threading.Thread(target=work, args=pair) for pair in enumerate((first, second, third))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, results in found.items():
        assert all(torch.equal(result, expected[i]) for result in results)
    assert first.thg.stats()["evaluations"] == 4 * first.thg.plan.nfe


@pytest.mark.slow
def test_torch_compile_of_the_unet():
    """Two graphs of the network, one per batch size, whatever the step and the plan."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    pipe = tiny()
    inner = pipe.unet
    thg_engine.compile(pipe, HELD)
    pipe.unet = torch.compile(pipe.unet, backend=backend, dynamic=False)
    thg_engine.compile(pipe, HELD)
    call(pipe, num_inference_steps=4)
    compiled = len(graphs)
    with CountRows(inner) as count:
        found = call(pipe, num_inference_steps=7)
    assert len([size for size in graphs if size > 100]) == 2 and len(graphs) == compiled
    assert pipe.thg.plan.nfe == pipe.thg.stats()["last_nfe"] == 10 and count
    expected = fresh(num_inference_steps=7)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    thg_engine.uncompile(pipe)
    assert not hasattr(inner, "_diffusers_hook") and "forward" not in vars(inner)
