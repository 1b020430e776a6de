"""Graphs in compiled pipelines on a fake CUDA: equal to eager calls, whatever happens."""

from __future__ import annotations

import threading

import pytest
import torch

import thg_engine
from fake_cuda import FakeCuda, FakeCudaError
from graphed_pipelines import (
    HELD,
    eager,
    graph_stats,
    graphed,
    on_fake,
    place,  # noqa: F401  (a fixture)
    tiny,
)
from pipelines import METHODS, call, make

ROWS = 8


SOLVERS = ["DDIMScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler"]
NOISY = ["EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "LCMScheduler"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SOLVERS)
def test_graphs_give_what_eager_calls_give(name, method):
    """Every row but the first, which decides who steps, is a replay."""
    pipe = graphed(METHODS[method], scheduler=make(name))
    for seed in (0, 1):
        expected = eager(METHODS[method], scheduler=make(name), seed=seed)
        assert torch.equal(call(pipe, seed=seed), expected)
    stats, rows = graph_stats(pipe), pipe.thg.stats()["last_rows"]
    assert stats["captures"] == 2 and not stats["refusals"]
    assert stats["replays"] in (2 * (rows - 1), 2 * rows)
    assert "graphs: 2 captured" in pipe.thg.report()


@pytest.mark.fake_only
@pytest.mark.parametrize("fused", [None, False])
def test_the_denoiser_runs_only_to_be_captured(fused):
    """Two warm-ups and a capture of each size, then the first row of every call at most."""
    pipe, runs = graphed(fused=fused), []
    forward = pipe.unet.conv_in.forward
    pipe.unet.conv_in.forward = lambda x: (runs.append(len(x)), forward(x))[1]
    call(pipe)
    assert runs == ([2] if fused is None else []) + [2] * 2 + [1] * 2 + [2, 1]
    runs.clear()
    call(pipe, seed=1)
    assert runs == ([2] if fused is None else [])


@pytest.mark.parametrize("name", NOISY)
def test_noise_is_drawn_as_often_and_in_the_same_order(name):
    expected = eager(scheduler=make(name))
    assert torch.equal(call(graphed(scheduler=make(name))), expected)


@pytest.mark.parametrize("kind", ["img2img", "inpaint", "inpaint9"])
def test_other_pipelines(kind):
    """Inpainting blends the latents after every step: each row is taken back and run again."""
    pipe = graphed(kind=kind)
    for seed in (0, 1):
        assert torch.equal(call(pipe, seed=seed), eager(kind=kind, seed=seed))
    assert graph_stats(pipe)["replays"] > 0


def test_another_schedule_scale_solver_and_prompt_need_no_capture():
    pipe = graphed()
    call(pipe)
    for k, kwargs in enumerate(
        ({"num_inference_steps": 13}, {"guidance_scale": 3.0}, {"prompt": "a red tree"})
    ):
        assert torch.equal(call(pipe, seed=k, **kwargs), eager(seed=k, **kwargs))
    pipe.scheduler = make("DPMSolverMultistepScheduler")
    expected = eager(scheduler=make("DPMSolverMultistepScheduler"))
    assert torch.equal(call(pipe), expected)
    assert graph_stats(pipe)["captures"] == 2


def test_another_size_and_batch_are_other_shapes():
    pipe = graphed()
    for kwargs in ({}, {"height": 24, "width": 16}, {"prompt": ["a cat", "a dog"]}, {}):
        assert torch.equal(call(pipe, **kwargs), eager(**kwargs))
    assert graph_stats(pipe)["captures"] == 6


def callback_of(what):
    def callback(pipe, i, t, tensors):
        if i != 3:
            return {}
        if what == "scale":
            pipe._guidance_scale = 2.0
        elif what == "rescale":
            pipe._guidance_rescale = 0.7
        elif what == "off":
            pipe._guidance_scale = 1.0
            return {"prompt_embeds": tensors["prompt_embeds"][-1:]}
        elif what == "in place":
            tensors["latents"].mul_(1.1)
        elif what == "replaced":
            return {"latents": 1.1 * tensors["latents"]}
        elif what == "embeds":
            return {"prompt_embeds": 0.5 * tensors["prompt_embeds"]}
        elif what == "interrupt":
            pipe._interrupt = True
        return {}

    names = ["latents", "prompt_embeds"]
    return {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": names}


@pytest.mark.parametrize(
    "what", ["scale", "rescale", "off", "in place", "replaced", "embeds", "interrupt"]
)
@pytest.mark.parametrize("name", ["DDIMScheduler", "UniPCMultistepScheduler"])
def test_what_a_callback_does_in_the_middle(what, name):
    pipe = graphed(scheduler=make(name))
    plain = call(pipe)
    expected = eager(scheduler=make(name), **callback_of(what))
    assert torch.equal(call(pipe, **callback_of(what)), expected)
    assert torch.equal(call(pipe), plain), "nothing is left behind"


def test_an_exception_in_the_middle_leaves_nothing_behind():
    pipe = graphed()
    plain = call(pipe)

    def callback(pipe, i, t, tensors):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call(pipe, callback_on_step_end=callback)
    assert torch.equal(call(pipe), plain)
    assert not graph_stats(pipe)["refusals"]


@pytest.mark.fake_only
@pytest.mark.parametrize("nth", [1, 2, 40, 400])
@pytest.mark.parametrize("event", ["capture_begin", "record", "capture_end"])
def test_a_capture_that_fails_leaves_correct_eager_calls(event, nth):
    cuda = FakeCuda()
    cuda.fail[event, nth] = FakeCudaError("injected")
    pipe = graphed(cuda=cuda)
    assert torch.equal(call(pipe), eager())
    assert torch.equal(call(pipe, seed=1), eager(seed=1))
    if cuda.counts[event] >= nth:
        assert "injected" in pipe.thg.report()
        # Where denoiser and row cannot be captured together, the denoiser alone may be.
        assert graph_stats(pipe)["captures"] in (0, 2)


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "KDPM2DiscreteScheduler"])
def test_schedulers_that_call_twice_per_step(name):
    pipe = graphed(scheduler=make(name))
    assert torch.equal(call(pipe), eager(scheduler=make(name)))
    assert graph_stats(pipe)["replays"] == pipe.thg.stats()["last_rows"] - 1


def test_inference_mode_and_no_grad_give_the_same():
    pipe = graphed()
    expected = eager()
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(call(pipe).clone(), expected)
    assert graph_stats(pipe)["captures"] == 2


@pytest.mark.fake_only
def test_a_timestep_on_the_host_moves_to_the_device():
    """A capture would freeze its value."""
    from thg_engine.integrations.diffusers.graphed import DenoiserBuffers
    from thg_engine.integrations.diffusers.layouts import LAYOUTS
    from thg_engine.integrations.diffusers.records import RECORDS

    sample = torch.empty(2, 4, 8, 8, device="meta")
    named = {"sample": sample, "timestep": torch.tensor(7), "return_dict": False}
    how = RECORDS["StableDiffusionPipeline"], LAYOUTS["UNet2DConditionModel"]
    buffers = DenoiserBuffers(lambda **kwargs: None, named, *how)
    assert {v.device.type for v in buffers.named.values() if v is not False} == {"meta"}
    assert set(buffers.steps()) == {"both", "cond"}


def test_rows_that_are_taken_back_each_time_are_not_run_ahead_again():
    """Inpainting blends the latents after each step: from the second call on the denoiser alone."""
    pipe = graphed(kind="inpaint")
    for seed in (0, 1, 2):
        assert torch.equal(call(pipe, seed=seed), eager(kind="inpaint", seed=seed))
    rows = pipe.thg.stats()["last_rows"]
    assert graph_stats(pipe)["captures"] == 4 and graph_stats(pipe)["replays"] >= 3 * (rows - 1)


def test_a_scheduler_that_is_swapped_while_calls_overlap():
    pipe = thg_engine.compile(tiny(), HELD)
    names = ["DDIMScheduler", "UniPCMultistepScheduler"]
    expected = [call(thg_engine.compile(tiny(scheduler=make(n)), HELD)) for n in names]
    inner = []

    def callback(pipe, i, t, tensors):
        if i == 2:
            inner.append(call(pipe))
            pipe.scheduler = make(names[1])
            inner.append(call(pipe))
            pipe._interrupt = True
        return {}

    call(pipe, callback_on_step_end=callback)
    for one, other in zip(inner, expected, strict=True):
        assert torch.equal(one, other)


def test_scheduler_with_a_step_of_its_own_runs_the_denoiser_from_graphs():
    """PNDM keeps the outputs it is given: they must not be overwritten by the next replay."""
    for name in ("PNDMScheduler", "DPMSolverSinglestepScheduler"):
        pipe = graphed(fused=False, scheduler=make(name))
        expected = eager(fused=False, scheduler=make(name))
        assert torch.equal(call(pipe), expected)
        assert graph_stats(pipe)["replays"] == pipe.thg.stats()["last_rows"]


def test_full_guidance_on_graphs_is_bit_identical():
    pipe = tiny()
    stock = call(pipe)
    on_fake(thg_engine.compile(pipe, "cfg", graph=True))
    assert torch.equal(call(pipe), stock) and torch.equal(call(pipe), stock)
    assert graph_stats(pipe)["replays"] > 0


def test_guidance_rescale_from_the_beginning():
    pipe = graphed()
    for _ in range(2):
        assert torch.equal(call(pipe, guidance_rescale=0.7), eager(guidance_rescale=0.7))
    assert graph_stats(pipe)["replays"] > 0


def test_threads_on_one_pipeline_give_the_images_of_one():
    pipe, seeds = graphed(), range(5)
    expected = [eager(seed=seed) for seed in seeds]
    found = [None] * len(seeds)

    def work(k):
        found[k] = call(pipe, seed=k)

    threads = [threading.Thread(target=work, args=(k,)) for k in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert pipe.thg.stats()["runs"] == len(seeds)


@pytest.mark.parametrize("name", ["DDIMScheduler", "PNDMScheduler", "UniPCMultistepScheduler"])
def test_threads_without_graphs_share_no_scheduler_state(name):
    pipe = thg_engine.compile(tiny(scheduler=make(name)), HELD)
    steps = [5, 8, 6, 11]
    expected = [call(pipe, num_inference_steps=n) for n in steps]
    scheduler, found = pipe.scheduler, [None] * len(steps)

    def work(k):
        found[k] = call(pipe, num_inference_steps=steps[k])

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(steps))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert pipe.scheduler is scheduler
