"""Genuine pipelines with guiders: `TortoiseHareGuidance` in the place of diffusers' own."""

from __future__ import annotations

import pytest
import torch
from diffusers import ClassifierFreeGuidance

from guider_cases import GRID, MODULES, Network, compile_guider
from thg_engine import TortoiseHareGuidance
from thg_engine.integrations.diffusers.guided import GuiderSwap, swap_guider
from zoo import ZOO, Zoo, arguments, build, call


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
