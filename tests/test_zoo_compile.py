"""Compiled pipelines of the zoo: bit-identical under full guidance, exact NFE, THG by hand."""

from __future__ import annotations

import pytest
import torch

import thg_engine
import zoo_all  # noqa: F401  (it fills the registry)
from thg_engine import CFG, THG
from thg_engine.integrations.diffusers.adapters import find_layout
from thg_engine.integrations.diffusers.outputs import sample_of, with_sample
from thg_engine.integrations.diffusers.records import RECORDS
from zoo import ZOO, Zoo, arguments, build, tensor

pytestmark = [
    pytest.mark.filterwarnings("ignore:You have passed", "ignore:.*is deprecated"),
    pytest.mark.filterwarnings("ignore:thg_engine leaves this pipeline"),
]
HELD = THG(grid=2)
SPECIAL = {"sd3_skip_layer"}  # a third call in some steps


def entries(*, known: bool = True, **wanted) -> list:
    """Entries that a record describes, or that none does, with these attributes."""
    return [
        pytest.param(entry, id=name)
        for name, entry in ZOO.items()
        if (entry.cls in RECORDS and name not in SPECIAL) == known
        and all(bool(getattr(entry, key)) == value for key, value in wanted.items())
    ]


def made(entry: Zoo):
    if entry.missing:
        pytest.skip(f"diffusers here has no {', '.join(entry.missing)}")
    return build(entry)


def run(entry: Zoo, pipe, seed: int = 1, **changes) -> torch.Tensor:
    torch.manual_seed(seed)  # some encode a picture with noise of the default generator
    return tensor(pipe(**arguments(entry, seed, **changes)), entry.result)


class Network:
    """Stands in front of a denoiser's ``forward``: counts rows, and may answer in its place."""

    def __init__(self, pipe, entry: Zoo) -> None:
        self.module = getattr(pipe, entry.denoiser)
        self.forward, self.layout = self.module.forward, find_layout(self.module)
        self.rows: list[int] = []

    def __enter__(self) -> Network:
        def forward(*args, **kwargs):
            out = self.forward(*args, **kwargs)
            self.rows.append(len(sample_of(out, self.layout)))
            return out

        forward.__wrapped__ = self.forward
        self.module.forward = forward
        return self

    def __exit__(self, *exc) -> None:
        vars(self.module).pop("forward", None)


class ByHand(Network):
    """THG over the plain pipeline: on rows of one branch the unconditional output is c - delta.

    Computed from the doubled call, whose conditional half is what one branch alone gives up to the
    rounding of another batch size.
    """

    def __init__(self, pipe, entry: Zoo, coarse: set[int], cond_half: int) -> None:
        super().__init__(pipe, entry)
        self.coarse, self.cond_half, self.delta = coarse, cond_half, None

    def __enter__(self) -> ByHand:
        def forward(*args, **kwargs):
            out = self.forward(*args, **kwargs)
            halves = sample_of(out, self.layout).chunk(2)
            cond, uncond = halves[self.cond_half], halves[1 - self.cond_half]
            if len(self.rows) in self.coarse:
                self.delta = cond.float() - uncond.float()
            else:
                made = (cond.float() - self.delta).to(cond.dtype)
                pair = torch.cat([made, cond] if self.cond_half else [cond, made])
                out = with_sample(out, pair, self.layout)
            self.rows.append(2)
            return out

        self.module.forward = forward
        return self


@pytest.mark.parametrize("entry", entries())
def test_full_guidance_is_bit_identical_and_nothing_is_left_behind(entry: Zoo) -> None:
    pipe = made(entry)
    kind, stock = type(pipe), run(entry, pipe)
    again = run(entry, pipe, seed=2)
    thg_engine.compile(pipe, CFG())
    assert torch.equal(run(entry, pipe), stock)
    assert torch.equal(run(entry, pipe, seed=2), again), "two runs in a row"
    stats = pipe.thg.stats()
    assert stats["last_nfe"] == 2 * stats["last_rows"] > 0 and not stats["fallbacks"]
    assert thg_engine.uncompile(pipe) is pipe and type(pipe) is kind
    assert torch.equal(run(entry, pipe), stock)


@pytest.mark.parametrize("entry", entries())
def test_held_guidance_is_what_it_is_by_hand(entry: Zoo) -> None:
    pipe = made(entry)
    with Network(pipe, entry) as network:
        thg_engine.compile(pipe, HELD)
        found = run(entry, pipe)
        plan, stats = pipe.thg.plan, pipe.thg.stats()
        thg_engine.uncompile(pipe)
    full = run(entry, pipe)
    assert not stats["fallbacks"] and stats["refreshes"] == 0
    batch = max(network.rows) // 2
    assert sum(network.rows) == stats["last_nfe"] * batch == plan.nfe * batch
    assert stats["last_nfe"] < 2 * stats["last_rows"]
    half = RECORDS[entry.cls].cond_half
    with ByHand(pipe, entry, set(plan.coarse_grid), half):
        expected = run(entry, pipe)
    scale = expected.float().abs().max()
    assert float((found - expected).abs().max() / scale) < 2e-3
    assert not torch.equal(found, full)


@pytest.mark.parametrize("entry", entries(callbacks=True))
def test_callbacks_and_interrupts(entry: Zoo) -> None:
    pipe = made(entry)
    steps = []

    def callback(pipe, i, t, tensors):
        steps.append(i)
        if i == 1:
            pipe._interrupt = True
        return {}

    expected = run(entry, pipe, callback_on_step_end=callback)
    stock = list(steps)
    steps.clear()
    thg_engine.compile(pipe, CFG())
    assert torch.equal(run(entry, pipe, callback_on_step_end=callback), expected)
    assert steps == stock


@pytest.mark.parametrize("entry", entries(batch=True))
def test_two_prompts(entry: Zoo) -> None:
    pipe = made(entry)
    stock = run(entry, pipe, **entry.batch)
    assert torch.equal(run(entry, thg_engine.compile(pipe, CFG()), **entry.batch), stock)
    held = run(entry, thg_engine.compile(pipe, HELD), **entry.batch)
    assert len(held) == len(stock) and pipe.thg.stats()["last_nfe"] == pipe.thg.plan.nfe


@pytest.mark.parametrize("entry", entries(copies=True))
def test_several_results_per_prompt(entry: Zoo) -> None:
    pipe, copies = made(entry), {entry.copies: 2}
    stock = run(entry, pipe, **copies)
    assert torch.equal(run(entry, thg_engine.compile(pipe, CFG()), **copies), stock)
    run(entry, thg_engine.compile(pipe, HELD), **copies)
    assert pipe.thg.stats()["last_nfe"] == pipe.thg.plan.nfe


@pytest.mark.parametrize("entry", entries(other=True))
def test_another_resolution(entry: Zoo) -> None:
    pipe = made(entry)
    stock = run(entry, pipe, **entry.other)
    thg_engine.compile(pipe, CFG())
    run(entry, pipe)
    assert torch.equal(run(entry, pipe, **entry.other), stock)


@pytest.mark.parametrize("entry", entries(known=False))
def test_what_no_record_describes_runs_as_before_and_says_so(entry: Zoo) -> None:
    pipe = made(entry)
    if entry.name in SPECIAL:
        pytest.skip("a record describes its class: see the test of its own")
    stock = run(entry, pipe)
    thg_engine.compile(pipe)
    assert "not active" in pipe.thg.report() and entry.cls in pipe.thg.report()
    assert torch.equal(run(entry, pipe), stock)
