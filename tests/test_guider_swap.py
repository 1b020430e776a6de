"""Guiders that are swapped: what is kept, counted, copied, and left alone."""

from __future__ import annotations

import copy
import dataclasses
import inspect

import diffusers
import pytest
import torch
from diffusers import ClassifierFreeGuidance

import thg_engine
from guider_cases import GRID, Network, compile_guider
from pipelines import picture
from thg_engine import CFG, CFGCache, TortoiseHareGuidance
from thg_engine.errors import CalibrationError, InvalidArgument
from thg_engine.integrations.diffusers.guided import swap_guider
from zoo import ZOO, build, call, seeded


def test_what_has_no_guider_is_left_alone() -> None:
    distilled = build(ZOO["hunyuan_image"])
    distilled.guider = None
    assert swap_guider(distilled, GRID).startswith("guider: it is not set, as in a distilled model")
    plain = ZOO["qwen_image"].make()[0]
    assert swap_guider(plain, GRID) == "QwenImagePipeline has no guider"
    mixed = build(ZOO["wan22_modular"])
    mixed.update_components(guider_2=diffusers.AdaptiveProjectedGuidance())
    swap = swap_guider(mixed, GRID)
    assert list(swap.guiders) == ["guider"] and "AdaptiveProjected" in swap.left["guider_2"]
    assert "guider_2 left alone: AdaptiveProjectedGuidance" in "\n".join(swap.report_lines())


def test_a_guider_of_the_users_own() -> None:
    """Without `compile`: the grid is placed by step number unless it follows the pipeline."""
    entry = ZOO["sdxl_modular"]
    pipe = build(entry)
    mine = TortoiseHareGuidance(5.0, guidance=GRID)
    pipe.update_components(guider=mine)
    with Network(pipe, entry) as network:
        first = call(entry, pipe)
    assert len(network.rows) == mine.nfe == mine.plan.nfe == 6
    assert "follow" in mine.plan.notes[0] and mine.plan.rows[0].lambda_t == -3.0
    mine.follow(pipe)
    assert torch.equal(call(entry, pipe), first) and mine.plan.solver == "DDIMScheduler"
    swap = compile_guider(pipe, CFGCache(interval=2, start=0.5))
    call(entry, pipe)
    assert swap.nfe == 7 and pipe.guider is not mine
    thg_engine.uncompile(pipe)
    assert pipe.guider is mine and torch.equal(call(entry, pipe), first)


def test_undo_keeps_a_guider_put_in_since() -> None:
    pipe = build(ZOO["sdxl_modular"])
    swap = swap_guider(pipe, GRID)
    theirs = ClassifierFreeGuidance(2.0)
    pipe.update_components(guider=theirs)
    swap.undo(pipe)
    assert pipe.guider is theirs


def test_options_set_on_the_guider_are_taken_over() -> None:
    entry = ZOO["sdxl_modular"]
    pipe = build(entry)
    pipe.guider.guidance_scale, pipe.guider.guidance_rescale, pipe.guider._stop = 3.0, 0.4, 0.75
    expected = call(entry, pipe)
    swap = swap_guider(pipe, CFG())
    # Stock runs once: then it asks a guider outside its window whether to encode the negative.
    assert torch.equal(call(entry, pipe), expected) and torch.equal(call(entry, pipe), expected)
    assert swap.guidance == CFG() and swap.nfe == 7


def test_one_call_is_one_count() -> None:
    entry = ZOO["wan22_modular"]
    pipe = build(entry)
    swap = swap_guider(pipe, GRID)
    assert swap.plan is None and swap.nfe == 0 and "no call yet" in swap.report_lines()[-1]
    for _ in range(2):
        swap.begin()
        with Network(pipe, entry) as network:
            call(entry, pipe)
        assert swap.nfe == len(network.rows)
    assert swap.stats()["runs"] == 4
    text = "\n".join(swap.report_lines())
    assert "guider, guider_2 replaced" in text and f"NFE {swap.nfe} of 12" in text
    assert "FlowMatchEulerDiscreteScheduler" in text


def test_a_twin_has_guiders_of_its_own() -> None:
    entry = ZOO["sdxl_modular"]
    pipe = build(entry)
    swap = swap_guider(pipe, GRID)
    expected = call(entry, pipe)
    twin = object.__new__(type(pipe))
    vars(twin).update(vars(pipe), scheduler=copy.deepcopy(pipe.scheduler))
    swap.lend(twin)
    assert twin.guider is not pipe.guider and twin.guider.scheduler is twin.scheduler
    before = swap.stats()
    assert torch.equal(call(entry, twin), expected) and swap.stats() == before
    assert twin.guider.nfe == pipe.guider.nfe


@pytest.mark.parametrize("guess_mode", [False, True])
def test_controlnet_runs_no_oftener_than_the_unet(guess_mode: bool) -> None:
    entry = ZOO["sdxl_modular"]
    pipe = build(entry)
    config = {"conditioning_embedding_out_channels": (4, 8), **dict(pipe.unet.config)}
    kept = inspect.signature(diffusers.ControlNetModel.__init__).parameters
    config = {name: value for name, value in config.items() if name in kept}
    network = seeded(lambda: diffusers.ControlNetModel(**config))
    pipe.update_components(controlnet=network)
    given = {"control_image": picture(), "guess_mode": guess_mode}
    both = dataclasses.replace(entry, denoiser="unet,controlnet")
    with Network(pipe, both) as stock:
        expected = call(entry, pipe, **given)
    swap = compile_guider(pipe, "cfg")
    assert torch.equal(call(entry, pipe, **given), expected)
    swap = compile_guider(pipe, GRID)
    with Network(pipe, both) as ours:
        call(entry, pipe, **given)
    saved = 2 if guess_mode else 4
    assert swap.nfe == 6 and len(ours.rows) == len(stock.rows) - saved


@pytest.mark.parametrize("name", ["HeunDiscrete", "PNDM", "UniPCMultistep"])
def test_schedulers(name: str) -> None:
    """Stock's loops count more calls than ``num_inference_steps`` for some of these."""
    kind = f"{name}Scheduler"
    entry = ZOO["sdxl_modular"]
    pipe = build(entry)
    pipe.update_components(scheduler=getattr(diffusers, kind).from_config(pipe.scheduler.config))
    with Network(pipe, entry) as stock:
        expected = call(entry, pipe)
    swap = compile_guider(pipe, "cfg")
    assert torch.equal(call(entry, pipe), expected) and swap.nfe == len(stock.rows)
    swap = compile_guider(pipe, GRID)
    with Network(pipe, entry) as network:
        first = call(entry, pipe)
    assert swap.nfe == len(network.rows) == len(stock.rows) - 2
    assert torch.equal(call(entry, pipe), first) and swap.plan.solver == kind


def test_image_to_image_takes_the_last_noise_levels() -> None:
    entry = ZOO["sdxl_modular"]
    pipe = build(entry)
    image = {"image": picture(), "strength": 0.5, "num_inference_steps": 8}
    expected = call(entry, pipe, **image)
    swap = compile_guider(pipe, "cfg")
    assert torch.equal(call(entry, pipe, **image), expected)
    whole = swap.preview(pipe.scheduler, 8)
    assert [row.lambda_t for row in swap.plan.rows] == [row.lambda_t for row in whole.rows[4:]]
    assert whole.guidance_scale == 5.0 and swap.preview(pipe.scheduler, 3, 2.0).nfe == 6
    with pytest.raises(InvalidArgument, match="num_inference_steps=0"):
        swap.preview(pipe.scheduler, 0)


def test_arguments_of_compile() -> None:
    from curves_fixture import random_calibration

    pipe = build(ZOO["sdxl_modular"])
    guider = pipe.guider
    with pytest.raises(CalibrationError, match="another architecture"):
        compile_guider(pipe, "thg", random_calibration(0))
    with pytest.raises(InvalidArgument, match="guidance='hare'"):
        compile_guider(pipe, "hare")
    assert pipe.guider is guider
    swap = compile_guider(pipe, "thg", nfe=7)
    call(ZOO["sdxl_modular"], pipe)
    assert swap.nfe == 7
    assert "no calibration" in compile_guider(pipe).notes[0]


def test_a_compiled_pipeline() -> None:
    """Counters, report, copies, another guider, and all of it undone."""
    entry = ZOO["wan22_modular"]
    pipe = build(entry)
    kind, guiders, stock = type(pipe), (pipe.guider, pipe.guider_2), call(entry, pipe)
    assert thg_engine.compile(pipe, GRID) is pipe and pipe.thg.plan.num_rows == 50
    assert "no call yet" in pipe.thg.report() and pipe.thg.stats()["runs"] == 0
    first = call(entry, pipe)
    stats = pipe.thg.stats()
    assert stats["runs"] == 1 and stats["last_nfe"] == stats["evaluations"] < 12
    assert stats["last_rows"] == 6 and "guider, guider_2 replaced" in pipe.thg.report()
    twin = copy.copy(pipe)
    assert twin.guider is not pipe.guider and torch.equal(call(entry, twin), first)
    assert pipe.thg.stats()["runs"] == 1
    pipe.guider = diffusers.ClassifierFreeGuidance(guidance_scale=2.0)
    assert not torch.equal(call(entry, pipe), first) and pipe.thg.stats()["last_nfe"] < 12
    assert type(pipe.guider) is thg_engine.TortoiseHareGuidance
    thg_engine.uncompile(pipe)
    assert type(pipe) is kind and pipe.guider_2 is guiders[1] and not hasattr(pipe, "thg")
    pipe.guider = guiders[0]
    assert torch.equal(call(entry, pipe), stock)


def test_a_guider_that_cannot_be_replaced() -> None:
    entry = ZOO["sdxl_modular_projected"]
    pipe = build(entry)
    stock = call(entry, pipe)
    with pytest.warns(UserWarning, match="AdaptiveProjectedGuidance"):
        thg_engine.compile(pipe, GRID)
    assert "not active, guider: AdaptiveProjectedGuidance" in pipe.thg.report()
    assert torch.equal(call(entry, pipe), stock)


def test_a_call_while_another_runs_has_guiders_of_its_own() -> None:
    entry = ZOO["sdxl_modular"]
    pipe = build(entry)
    expected = call(entry, thg_engine.compile(pipe, GRID))
    found = []
    network = pipe.unet.conv_in
    seen = network.register_forward_hook(lambda *_: inner())

    def inner() -> None:
        seen.remove()
        found.append(call(entry, pipe))

    assert torch.equal(call(entry, pipe), expected) and torch.equal(found[0], expected)
    assert pipe.thg.stats()["runs"] == 3
