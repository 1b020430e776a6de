"""Graphs in compiled pipelines whose denoiser is changed: adapters, hooks, attention, compile."""

from __future__ import annotations

import pytest
import torch

import thg_engine
from fake_cuda import FakeCuda
from graphed_pipelines import (
    HELD,
    eager,
    graph_stats,
    graphed,
    on_fake,
    place,  # noqa: F401  (a fixture)
    tiny,
)
from pipelines import call
from thg_engine.errors import InvalidArgument


def test_adapters_processors_and_weights_are_looked_at():
    from diffusers.models.attention_processor import AttnProcessor

    pipe = graphed()
    call(pipe)
    pipe.unet.set_attn_processor(AttnProcessor())
    twin = thg_engine.compile(tiny(), HELD, graph=False)
    twin.unet.set_attn_processor(AttnProcessor())
    assert torch.equal(call(pipe), call(twin))
    assert graph_stats(pipe)["captures"] == 4
    with torch.no_grad():
        pipe.unet.conv_out.weight.mul_(1.5)
        twin.unet.conv_out.weight.mul_(1.5)
    assert torch.equal(call(pipe), call(twin))
    assert graph_stats(pipe)["captures"] == 4
    for each in (pipe, twin):
        each.unet.conv_in.scaling = {"default": 0.5}  # as a LoRA layer keeps it
    call(pipe)
    assert graph_stats(pipe)["captures"] == 6


def test_an_adapter_turned_in_the_middle_ends_the_replays():
    def callback(pipe, i, t, tensors):
        if i == 3:
            pipe.unet.conv_in.scaling = {"default": 0.5}
        return {}

    pipe = graphed()
    call(pipe)
    before = graph_stats(pipe)["replays"]
    expected = eager(callback_on_step_end=callback)
    assert torch.equal(call(pipe, callback_on_step_end=callback), expected)
    assert graph_stats(pipe)["replays"] == before + 3


def test_scale_of_an_ip_adapter_is_looked_at():
    """Its processors are modules that keep the scale as a number, which a capture bakes in."""

    class Scaled(torch.nn.Module):
        def __init__(self, inner, scale):
            super().__init__()
            self.inner, self.scale = inner, [scale]

        def __call__(self, *args, **kwargs):
            return self.scale[0] * self.inner(*args, **kwargs)

    def put(pipe, scale):
        processors = {k: Scaled(p, scale) for k, p in pipe.unet.attn_processors.items()}
        pipe.unet.set_attn_processor(processors)

    pipe, twin = graphed(), thg_engine.compile(tiny(), HELD, graph=False)
    for each in (pipe, twin):
        put(each, 1.0)
    before = call(pipe)
    for each in (pipe, twin):
        for part in each.unet.modules():
            if isinstance(part, Scaled):
                part.scale[0] = 0.5
    found = call(pipe)
    assert torch.equal(found, call(twin)) and not torch.equal(found, before)
    assert graph_stats(pipe)["captures"] == 4


def test_freeu_after_a_capture():
    """It is nothing but attributes of the up blocks."""
    pipe, twin = graphed(), thg_engine.compile(tiny(), HELD, graph=False)
    before = call(pipe)
    for each in (pipe, twin):
        each.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6)
    found = call(pipe)
    assert torch.equal(found, call(twin)) and graph_stats(pipe)["captures"] == 4
    for each in (pipe, twin):
        each.disable_freeu()
    assert torch.equal(call(pipe), before)


def test_attention_arguments_are_captured_once_per_value():
    pipe = graphed()
    for scale in (0.5, 0.5, 1.0, 1.0, 0.5):
        kwargs = {"cross_attention_kwargs": {"tint": scale}}
        assert torch.equal(call(pipe, **kwargs), eager(**kwargs))
    assert graph_stats(pipe)["captures"] == 4


@pytest.mark.fake_only
def test_a_denoiser_that_the_user_has_compiled_gets_no_graphs():
    pipe = tiny()
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    on_fake(thg_engine.compile(pipe, HELD, graph=True))
    call(pipe)
    assert "torch.compile is around the denoiser" in pipe.thg.report()
    assert graph_stats(pipe)["captures"] == 0


def test_hooks_and_offloading_get_no_graphs():
    pipe = graphed()
    handle = pipe.unet.mid_block.register_forward_hook(lambda *args: None)
    assert torch.equal(call(pipe), eager())
    assert "a forward hook of mid_block runs on the host" in pipe.thg.report()
    handle.remove()
    assert torch.equal(call(pipe), eager())
    assert graph_stats(pipe)["captures"] == 2
    pipe.unet.mid_block._hf_hook = object()
    call(pipe)
    assert any("offloading" in reason for reason in graph_stats(pipe)["refusals"])


@pytest.mark.fake_only
@pytest.mark.parametrize("switch", ["THG_DISABLE", "THG_DISABLE_GRAPHS"])
def test_kill_switches(monkeypatch, switch):
    pipe = graphed()
    stock = call(tiny())
    monkeypatch.setenv(switch, "1")
    found = call(pipe)
    assert torch.equal(found, stock if switch == "THG_DISABLE" else eager())
    assert graph_stats(pipe)["captures"] == 0
    monkeypatch.delenv(switch)
    assert torch.equal(call(pipe), eager())
    assert graph_stats(pipe)["captures"] == 2


@pytest.mark.fake_only
def test_uncompile_drops_the_graphs():
    cuda = FakeCuda()
    pipe = graphed(cuda=cuda)
    call(pipe)
    thg_engine.uncompile(pipe)
    assert cuda.resets == 2
    assert torch.equal(call(pipe), call(tiny()))


@pytest.mark.fake_only
def test_on_a_cpu_the_report_says_why_there_are_none():
    pipe = thg_engine.compile(tiny(), HELD)
    assert "graphs: none; nothing has run" in pipe.thg.report()
    call(pipe)
    assert "graphs: none; there are no graphs on cpu" in pipe.thg.report()
    assert "graphs: off, as asked for" in thg_engine.compile(pipe, graph=False).thg.report()


# -- changes of the denoiser -----------------------------------------------------------------------


@pytest.mark.fake_only
@pytest.mark.parametrize("attention", ["sdpa", "native"])
def test_attention_is_chosen_and_put_back(attention):
    pipe = tiny()
    before = dict(pipe.unet.attn_processors)
    expected = call(thg_engine.compile(pipe, HELD))
    found = call(thg_engine.compile(pipe, HELD, attention=attention))
    assert f"attention: {attention}" in pipe.thg.report()
    kinds = {type(one).__name__ for one in pipe.unet.attn_processors.values()}
    assert kinds == {{"sdpa": "AttnProcessor2_0", "native": "AttnProcessor"}[attention]}
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    thg_engine.uncompile(pipe)
    assert pipe.unet.attn_processors == before


@pytest.mark.fake_only
def test_compiled_blocks_are_put_back(monkeypatch):
    pipe, compiled = tiny(), []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    thg_engine.compile(pipe, HELD, denoiser="compile")
    assert {type(block).__name__ for block in compiled} == {"BasicTransformerBlock"}
    assert "denoiser: repeated blocks compiled" in pipe.thg.report()
    for block in compiled:
        block._compiled_call_impl = lambda *args, **kwargs: None
    thg_engine.uncompile(pipe)
    assert all(block._compiled_call_impl is None for block in compiled)
    assert torch.equal(call(pipe), call(tiny()))


@pytest.mark.fake_only
@pytest.mark.parametrize(
    ("argument", "value"),
    [("graph", "step"), ("graph", 1), ("denoiser", "eager"), ("attention", "flash")],
)
def test_bad_arguments_change_nothing(argument, value):
    pipe = tiny()
    kind = type(pipe)
    with pytest.raises(InvalidArgument, match=f"{argument}="):
        thg_engine.compile(pipe, HELD, **{argument: value})
    assert type(pipe) is kind and not hasattr(pipe, "thg")


@pytest.mark.fake_only
def test_attention_of_a_library_that_is_missing(monkeypatch):
    from thg_engine.integrations.diffusers import tuning

    monkeypatch.setattr(tuning, "find_spec", lambda name: None)
    with pytest.raises(InvalidArgument, match=r"pip install 'thg-engine\[xformers\]'"):
        thg_engine.compile(tiny(), HELD, attention="xformers")
