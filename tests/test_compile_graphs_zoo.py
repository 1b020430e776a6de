"""Graphs in pipelines of the zoo on a fake CUDA: equal to eager calls in every pattern."""

from __future__ import annotations

import pytest
import torch

import thg_engine
import zoo_all  # noqa: F401  (it fills the registry)
from fake_cuda import FakeCuda, OnFakeCuda
from thg_engine import CFG, THG
from zoo import ZOO, arguments, build, tensor

HELD = THG(grid=2)
CAPTURES = {  # of a first call
    "wan": 1,
    "wan_two_experts": 2,
    "flux_true_cfg": 1,
    "chroma": 1,
    "qwen_image": 2,
    "sd_controlnet": 2,
    "sd_controlnet_multi": 2,
    "sd3_controlnet": 2,
    "instruct_pix2pix": 2,
    "z_image": 2,
    "cogvideox": 2,
}


def run(entry, pipe, seed=1, **changes):
    torch.manual_seed(seed)
    return tensor(pipe(**arguments(entry, seed, **changes)), entry.result)


def graphed(entry, method):
    pipe = thg_engine.compile(build(entry), method, graph=True)
    if torch.cuda.is_available():
        return pipe.to("cuda")
    cache = pipe.thg._graphs
    cache.cuda, acquire = FakeCuda(), cache.acquire
    cache.acquire = lambda signature, fingerprint, device, build: acquire(
        signature, fingerprint, OnFakeCuda(), build
    )
    return pipe


def plain(entry, method):
    pipe = thg_engine.compile(build(entry), method, graph=False)
    return pipe.to("cuda") if torch.cuda.is_available() else pipe


@pytest.mark.parametrize("name", CAPTURES)
@pytest.mark.parametrize("method", [CFG(), HELD], ids=["cfg", "thg"])
def test_graphs_give_what_eager_calls_give(name, method):
    entry = ZOO[name]
    eager, pipe = plain(entry, method), graphed(entry, method)
    for seed in (1, 2):
        assert torch.equal(run(entry, pipe, seed), run(entry, eager, seed))
    stats = pipe.thg.stats()
    graphs, calls = stats["graphs"], 2 * stats["last_rows"]
    if pipe.thg.record.calls:
        calls = stats["evaluations"]
    assert not graphs["refusals"] and graphs["captures"] == CAPTURES[name]
    assert graphs["replays"] + graphs["eager_calls"] == calls
    assert graphs["eager_calls"] <= 4, "the first row of a call shows who steps"


def test_prompts_of_two_lengths_are_two_shapes():
    entry = ZOO["qwen_image"]
    long = {"prompt": "a photo of a small red cat in a green house"}
    eager, pipe = plain(entry, HELD), graphed(entry, HELD)
    assert torch.equal(run(entry, pipe, **long), run(entry, eager, **long))
    assert pipe.thg.stats()["graphs"]["captures"] == 2


def test_an_adapter_turned_in_a_call_ends_its_replays():
    entry = ZOO["wan"]
    pipe = graphed(entry, HELD)

    def turn(pipe, i, t, tensors):
        pipe.transformer.blocks[0].scale = float(i >= 1)
        return {}

    run(entry, pipe)
    before = pipe.thg.stats()["graphs"]["replays"]
    run(entry, pipe, callback_on_step_end=turn)
    assert pipe.thg.stats()["graphs"]["replays"] - before <= 2
    assert pipe.thg.stats()["refreshes"] > 0
