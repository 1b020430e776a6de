"""Compiled pipelines of the zoo: bit-identical under full guidance, exact NFE, THG by hand."""

from __future__ import annotations

import functools

import pytest
import torch

import thg_engine
import zoo_all  # noqa: F401  (it fills the registry)
from by_hand import ByHand, Network
from thg_engine import CFG, THG
from thg_engine.integrations.diffusers.networks import Networks
from thg_engine.integrations.diffusers.records import RECORDS
from zoo import ZOO, Zoo, arguments, build, tensor

pytestmark = [
    pytest.mark.filterwarnings("ignore:You have passed", "ignore:.*is deprecated"),
    pytest.mark.filterwarnings("ignore:.*this pipeline is left"),
]
HELD = THG(grid=2)


def entries(*, known: bool = True, **wanted) -> list:
    """Guided entries that a record describes, or those none does, with these attributes."""
    if known:
        wanted.setdefault("guided", True)
    return [
        pytest.param(entry, id=name)
        for name, entry in ZOO.items()
        if (entry.cls in RECORDS) == known
        and (known or entry.guider is None)
        and all(bool(getattr(entry, key)) == value for key, value in wanted.items())
    ]


def made(entry: Zoo):
    if entry.missing:
        pytest.skip(f"diffusers here has no {', '.join(entry.missing)}")
    return build(entry)


def run(entry: Zoo, pipe, seed: int = 1, **changes) -> torch.Tensor:
    torch.manual_seed(seed)  # some encode a picture with noise of the default generator
    return tensor(pipe(**arguments(entry, seed, **changes)), entry.result)


def check_cost(pipe) -> None:
    """What ran is what was planned: some rows with all branches, the rest with one."""
    stats, others = pipe.thg.stats(), pipe.thg.record.branches - 1
    coarse = len(pipe.thg.plan.coarse_grid) + stats["refreshes"]
    assert coarse < stats["last_rows"]
    assert stats["last_nfe"] - stats["last_extras"] == stats["last_rows"] + others * coarse


@pytest.mark.parametrize("entry", entries())
def test_full_guidance_is_bit_identical_and_nothing_is_left_behind(entry: Zoo) -> None:
    pipe = made(entry)
    kind, stock = type(pipe), run(entry, pipe)
    again = run(entry, pipe, seed=2)
    thg_engine.compile(pipe, CFG())
    assert torch.equal(run(entry, pipe), stock)
    assert torch.equal(run(entry, pipe, seed=2), again), "two runs in a row"
    stats = pipe.thg.stats()
    assert stats["last_nfe"] >= RECORDS[entry.cls].branches * stats["last_rows"] > 0
    assert not stats["fallbacks"]
    assert thg_engine.uncompile(pipe) is pipe and type(pipe) is kind
    assert torch.equal(run(entry, pipe), stock)


def check_by_hand(entry: Zoo, pipe, plan, found: torch.Tensor, **changes) -> None:
    """``found`` is what the plain pipeline gives with deltas held by hand."""
    with ByHand(pipe, entry, set(plan.coarse_grid)):
        expected = run(entry, pipe, **changes)
    scale = expected.float().abs().max()
    assert float((found - expected).abs().max() / scale) < 2e-3


def counted(forward, rows: list[int]):
    """``forward``, which notes the batch of its first argument."""

    @functools.wraps(forward)
    def counting(*args, **kwargs):
        rows.append(len(next(iter((*args, *kwargs.values())))))
        return forward(*args, **kwargs)

    return counting


@pytest.mark.parametrize(
    "entry", [one for one in entries() if RECORDS[one.values[0].cls].companions]
)
def test_companions_run_the_branches_that_the_denoiser_runs(entry: Zoo) -> None:
    """A ControlNet that sees both branches in the plain pipeline sees one where one is run."""
    pipe = made(entry)
    rows: list[int] = []
    for network in Networks.of(pipe, RECORDS[entry.cls]).companions:
        network.forward = counted(network.forward, rows)
    with Network(pipe, entry) as network:
        run(entry, thg_engine.compile(pipe, HELD))
    frames, guesses = max(rows) // max(network.rows), "guess" in entry.name
    each = len(rows) // len(network.rows)
    expected = [1 if guesses else n * frames for n in network.rows for _ in range(each)]
    assert rows == expected and (guesses or len(set(rows)) == 2)


@pytest.mark.parametrize("entry", entries())
def test_held_guidance_is_what_it_is_by_hand(entry: Zoo) -> None:
    pipe = made(entry)
    with Network(pipe, entry) as network:
        thg_engine.compile(pipe, HELD)
        found = run(entry, pipe)
        plan, stats = pipe.thg.plan, pipe.thg.stats()
        thg_engine.uncompile(pipe)
    full = run(entry, pipe)
    assert not stats["fallbacks"]
    assert stats["refreshes"] == ("," in entry.denoiser), "another expert holds nothing yet"
    record = RECORDS[entry.cls]
    batch = max(network.rows) // (1 if record.calls else record.branches)
    nfe = stats["last_nfe"] - stats["last_extras"]
    assert network.extras == stats["last_extras"]
    assert sum(network.rows) == nfe * batch < record.branches * stats["last_rows"] * batch
    if record.branches == 2:
        assert nfe == plan.nfe + stats["refreshes"]
    check_by_hand(entry, pipe, plan, found)
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
    assert len(held) == len(stock)
    check_cost(pipe)
    plan = pipe.thg.plan
    check_by_hand(entry, thg_engine.uncompile(pipe), plan, held, **entry.batch)


@pytest.mark.parametrize("entry", entries(copies=True))
def test_several_results_per_prompt(entry: Zoo) -> None:
    pipe, copies = made(entry), {entry.copies: 2}
    stock = run(entry, pipe, **copies)
    assert torch.equal(run(entry, thg_engine.compile(pipe, CFG()), **copies), stock)
    held = run(entry, thg_engine.compile(pipe, HELD), **copies)
    check_cost(pipe)
    plan = pipe.thg.plan
    check_by_hand(entry, thg_engine.uncompile(pipe), plan, held, **copies)


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
    stock = run(entry, pipe)
    thg_engine.compile(pipe)
    assert "not active" in pipe.thg.report() and entry.cls in pipe.thg.report()
    assert torch.equal(run(entry, pipe), stock)


@pytest.mark.parametrize("entry", entries(guided=False))
def test_without_a_second_branch_nothing_changes(entry: Zoo) -> None:
    """A guidance-distilled model under a record: it may have true guidance in another call."""
    pipe = made(entry)
    stock = run(entry, pipe)
    thg_engine.compile(pipe, HELD)
    assert torch.equal(run(entry, pipe), stock)
    stats = pipe.thg.stats()
    assert stats["last_nfe"] == stats["last_rows"] > 0 and "guidance was off" in pipe.thg.report()
