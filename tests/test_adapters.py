"""Registered pipelines: found by class, checked, and run like those that are known."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline

import thg_engine
from pipelines import call, tiny
from thg_engine import CFG, THG
from thg_engine.adapters import AdapterRecord, ArgumentLayout, register, unregister
from thg_engine.errors import InvalidArgument
from thg_engine.integrations.diffusers.adapters import find_layout, find_record


class OwnLoop(StableDiffusionPipeline):
    """The inherited loop behind a ``__call__`` of its own: unknown unless it is registered."""

    def __call__(self, *args, **kwargs):
        return StableDiffusionPipeline.__call__(self, *args, **kwargs)


class Derived(OwnLoop):
    """Keeps the registered ``__call__``."""


@pytest.fixture(autouse=True)
def registered():
    yield
    unregister(OwnLoop)


def own() -> OwnLoop:
    return OwnLoop(**tiny().components, requires_safety_checker=False)


def test_a_registered_pipeline_is_compiled():
    with pytest.warns(UserWarning, match="no adapter record describes OwnLoop"):
        thg_engine.compile(own())
    assert register(OwnLoop) == AdapterRecord("OwnLoop")
    pipe = own()
    stock = call(pipe)
    assert torch.equal(call(thg_engine.compile(pipe, CFG())), stock)
    expected = call(thg_engine.compile(tiny(), THG(grid=3)))
    assert torch.equal(call(thg_engine.compile(pipe, THG(grid=3))), expected)
    assert find_record(Derived) is find_record(OwnLoop) is not None
    unregister(OwnLoop)
    assert find_record(OwnLoop) is find_record(Derived) is None


def test_a_record_of_its_own_for_a_class_that_is_known():
    class Mine(StableDiffusionPipeline):
        """Inherits the loop that is known; its record is another."""

    assert find_record(Mine).denoiser == "unet"
    register(Mine, denoiser="network")
    assert find_record(Mine).denoiser == "network"
    assert find_record(StableDiffusionPipeline).denoiser == "unet"


def test_layouts_are_found_by_class():
    class Network(torch.nn.Module):
        """Not of diffusers."""

        def forward(self, x, words):
            return x

    class Wider(Network):
        """Derives from one that is registered."""

    layout = ArgumentLayout("x", ("words",))
    register(OwnLoop, layouts={Network: layout})
    assert find_layout(Wider()) is layout and find_layout(torch.nn.Linear(1, 1)) is None


@pytest.mark.parametrize(
    ("name", "pipeline", "fields"),
    [
        ("pipeline", "OwnLoop", {}),
        ("pipeline", object, {}),
        ("unet", OwnLoop, {"unet": "unet"}),
        ("branches", OwnLoop, {"branches": 1}),
        ("cond_half", OwnLoop, {"cond_half": 2}),
        ("cond_half", OwnLoop, {"cond_half": -1}),
        ("layouts", OwnLoop, {"layouts": {"UNet": ArgumentLayout("x", ())}}),
        ("layouts", OwnLoop, {"layouts": {torch.nn.Linear: "x"}}),
        ("layouts", OwnLoop, {"layouts": [ArgumentLayout("input", ())]}),
        ("layouts", OwnLoop, {"layouts": {torch.nn.Linear: ArgumentLayout("x", ())}}),
        ("batched", OwnLoop, {"layouts": {torch.nn.Linear: ArgumentLayout("input", "x")}}),
        ("denoiser", OwnLoop, {"denoiser": 3}),
        ("cond_half", OwnLoop, {"cond_half": "first"}),
        ("scale", OwnLoop, {"scale": 4.0}),
        ("experts", OwnLoop, {"experts": "unet_2"}),
        ("experts", OwnLoop, {"experts": ("unet_2",)}),
        ("companions", OwnLoop, {"companions": (3,)}),
        ("calls", OwnLoop, {"calls": True, "cond_half": 0}),
        ("calls", OwnLoop, {"calls": True, "companions": ("controlnet",)}),
    ],
)
def test_what_makes_no_sense_is_refused(name, pipeline, fields):
    with pytest.raises(InvalidArgument, match=f"^{name}="):
        register(pipeline, **fields)
    assert find_record(OwnLoop) is None


def test_a_wrong_layout_ends_in_full_guidance_and_says_why():
    register(OwnLoop, denoiser="unet")
    pipe = own()
    stock = call(pipe)
    thg_engine.compile(pipe, THG(grid=3))
    forward = pipe.unet.forward
    pipe.unet.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    found = find_layout(pipe.unet)
    wrong = ArgumentLayout("sample", (), ("timestep",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("thg_engine.integrations.diffusers.controller.find_layout", lambda _: wrong)
        assert torch.equal(call(pipe), stock)
    assert found is not wrong and pipe.thg.stats()["last_nfe"] == 2 * pipe.thg.stats()["last_rows"]
    assert "encoder_hidden_states holds tensors of unknown layout" in pipe.thg.report()


def test_a_scale_that_the_pipeline_does_not_have_is_said():
    register(OwnLoop, scale="strength_of_guidance")
    with pytest.warns(UserWarning, match="neither property nor argument 'strength_of_guidance'"):
        pipe = thg_engine.compile(own())
    assert "not active" in pipe.thg.report()
