"""Genuine pipelines with guiders: `TortoiseHareGuidance` in the place of diffusers' own."""

from __future__ import annotations

import copy
import dataclasses
import inspect

import diffusers
import pytest
import torch
from diffusers import ClassifierFreeGuidance

import thg_engine
import zoo_images3
import zoo_images4
import zoo_modular
import zoo_videos2
from pipelines import picture
from thg_engine import CFG, THG, CFGCache, TortoiseHareGuidance
from thg_engine.errors import CalibrationError, InvalidArgument
from thg_engine.integrations.diffusers.guided import GuiderSwap, swap_guider
from zoo import ZOO, Zoo, arguments, build, call, seeded

MODULES = (zoo_images3, zoo_images4, zoo_modular, zoo_videos2)
GRID = THG(grid=2)


def entries(*, stock: bool = True) -> list:
    """Entries guided by ``ClassifierFreeGuidance``, or by something else."""
    named = {module.__name__ for module in MODULES}
    guided = [e for e in ZOO.values() if e.guider and e.make.__module__ in named]
    plain = [e for e in guided if "ClassifierFreeGuidance" in (*e.needs, "ClassifierFreeGuidance")]
    others = [e for e in guided if e.needs and "ClassifierFreeGuidance" not in e.needs]
    chosen = [e for e in plain if e not in others] if stock else others
    return [pytest.param(entry, id=entry.name) for entry in chosen]


def made(entry: Zoo):
    if entry.missing:
        pytest.skip(f"diffusers here has no {', '.join(entry.missing)}")
    return build(entry)


class Network:
    """Counts the calls of a pipeline's networks and their rows; raises in call ``fails``."""

    def __init__(self, pipe, entry: Zoo, fails: int = -1) -> None:
        self.rows: list[int] = []
        self.fails = fails
        nets = [getattr(pipe, name) for name in entry.denoiser.split(",")]
        self.handles = [net.register_forward_hook(self._see) for net in nets]

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *exc) -> None:
        for handle in self.handles:
            handle.remove()

    def _see(self, module, inputs, output) -> None:
        if len(self.rows) == self.fails:
            raise KeyboardInterrupt
        self.rows.append(len(output[0]))


class ByHand(ClassifierFreeGuidance):
    """Both branches at every step, of which the unconditional one is used at ``coarse`` alone."""

    coarse: tuple[int, ...] = ()

    def forward(self, pred_cond, pred_uncond=None):
        if self.num_conditions == 2:
            if self._step in self.coarse:
                self.delta = pred_cond - pred_uncond
            pred_uncond = pred_cond - self.delta
        return super().forward(pred_cond, pred_uncond)


def by_hand(pipe, entry: Zoo, coarse: dict[str, tuple[int, ...]]) -> torch.Tensor:
    """The result of one call with `ByHand` in the place of every guider."""
    kept = {name: getattr(pipe, name) for name in entry.guider.split(",")}
    for name, guider in kept.items():
        vars(pipe)[name] = ByHand.from_config(guider.config)
        vars(pipe)[name].coarse = coarse[name]
    try:
        return call(entry, pipe)
    finally:
        vars(pipe).update(kept)


def compile_guider(pipe, *args, **kwargs) -> GuiderSwap:
    """Of a compiled pipeline."""
    return thg_engine.compile(pipe, *args, **kwargs).thg.swap


@pytest.mark.parametrize("entry", entries())
def test_full_guidance_is_stock_bit_for_bit(entry: Zoo) -> None:
    pipe = made(entry)
    with Network(pipe, entry) as stock:
        expected = call(entry, pipe)
    swap = compile_guider(pipe, "cfg")
    assert isinstance(swap, GuiderSwap) and list(swap.guiders) == entry.guider.split(",")
    with Network(pipe, entry) as ours:
        assert torch.equal(call(entry, pipe), expected)
    assert ours.rows == stock.rows and len(stock.rows) == swap.nfe


@pytest.mark.parametrize("entry", entries())
def test_held_guidance(entry: Zoo) -> None:
    """By hand; twice; another negative prompt, a batch, another size, each with its exact cost."""
    pipe = made(entry)
    swap = swap_guider(pipe, GRID)
    with Network(pipe, entry) as network:
        first = call(entry, pipe)
    coarse = {name: _evaluated(guider) for name, guider in swap.guiders.items()}
    assert len(network.rows) == swap.nfe < len(_stock_rows(entry))
    assert torch.equal(call(entry, pipe), first)
    assert swap.nfe == len(network.rows)
    changed = {name: value for name, value in arguments(entry).items() if "negative" in name}
    flipped = {name: _other(value) for name, value in changed.items() if "mask" not in name}
    assert flipped and not torch.equal(call(entry, pipe, **flipped), first)
    for more in (entry.batch, entry.other):
        before = swap.stats()["evaluations"]
        with Network(pipe, entry) as again:
            call(entry, pipe, **more)
        assert len(again.rows) == len(network.rows) == swap.stats()["evaluations"] - before
    assert torch.equal(call(entry, pipe), first)
    swap.undo(pipe)
    assert _distance(first, by_hand(pipe, entry, coarse)) < 2e-5
    assert _distance(first, call(entry, pipe)) > 1e-4


def _evaluated(guider: TortoiseHareGuidance) -> tuple[int, ...]:
    """Steps with both branches; a guider that takes over during the run begins with one."""
    planned = guider.plan.coarse_grid
    first = guider.plan.num_rows - guider.stats()["last_rows"]
    is_late = guider._run._step == guider.plan.num_rows - 1
    return tuple(sorted({*planned, first})) if is_late and first else planned


def _stock_rows(entry: Zoo) -> list[int]:
    pipe = made(entry)
    with Network(pipe, entry) as stock:
        call(entry, pipe)
    return stock.rows


def _other(value):
    """Another negative prompt of the same kind."""
    if isinstance(value, str):
        return "a photo of bad tree"
    if isinstance(value, list):
        return [_other(item) for item in value]
    return value.flip(-1)


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).float().norm() / other.float().norm())


@pytest.mark.parametrize("entry", entries())
def test_guidance_that_is_off_runs_one_branch(entry: Zoo) -> None:
    pipe = made(entry)
    for name in entry.guider.split(","):
        guider = getattr(pipe, name)
        guider.guidance_scale = 0.0 if guider.use_original_formulation else 1.0
    expected = call(entry, pipe)
    swap = swap_guider(pipe, GRID)
    with Network(pipe, entry) as network:
        assert torch.equal(call(entry, pipe), expected)
    assert swap.nfe == len(network.rows) == swap.plan.num_rows


@pytest.mark.parametrize("entry", entries())
def test_interrupted_runs_leave_nothing(entry: Zoo) -> None:
    """Also where the model is interrupted in a step of one branch, and nobody resets anything."""
    pipe = made(entry)
    swap_guider(pipe, GRID)
    expected = call(entry, pipe)
    for fails in (1, 2, 4):
        with Network(pipe, entry, fails), pytest.raises(KeyboardInterrupt):
            call(entry, pipe, seed=7)
        assert torch.equal(call(entry, pipe), expected)


@pytest.mark.parametrize("entry", entries())
def test_undo_gives_the_original_objects_back(entry: Zoo) -> None:
    pipe = made(entry)
    before, config = dict(vars(pipe)), dict(pipe.config)
    swap = swap_guider(pipe, GRID)
    call(entry, pipe)
    assert dict(pipe.config) == config
    swap.undo(pipe)
    assert all(vars(pipe)[name] is before[name] for name in entry.guider.split(","))
    assert dict(pipe.config) == config


@pytest.mark.parametrize("entry", entries(stock=False))
def test_other_guidance_is_left_alone(entry: Zoo) -> None:
    pipe = made(entry)
    guider = pipe.guider
    reason = swap_guider(pipe, GRID)
    assert isinstance(reason, str) and type(guider).__name__ in reason and pipe.guider is guider


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
