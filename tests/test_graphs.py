"""Step graphs against eager runs: the same values, one capture for all, pools and streams."""

from __future__ import annotations

import gc

import pytest
import torch

from fake_cuda import FakeCuda, FakeCudaError
from graph_cases import (
    Network,
    assert_same,
    device_fixture,  # noqa: F401  (a fixture)
    eager,
    inputs,
    make_engine,
    plan,
)
from thg_engine import CFG, THG, CFGCache, Engine
from thg_engine.graphs import WARM_UPS
from thg_engine.lowering import plan_from_table
from thg_engine.trace import trace

# -- equality and reuse ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", [CFG(), THG(grid=3), THG(grid=2, boost=1.2), CFGCache(3, 0.2)])
@pytest.mark.parametrize("solver", ["ddim", "dpmpp2m", "lms2"])
def test_graphs_give_what_eager_runs_give(device, solver, method):
    engine, network, place = make_engine(device)
    the_plan = plan(method, solver=solver)
    for seed in (0, 1):
        args = inputs(seed, place)
        assert_same(engine.sample(*args, the_plan), eager(network, args, the_plan))
    stats = engine.stats()
    assert stats["captures"] == 2 and stats["replays"] == 2 * the_plan.num_rows
    assert stats["eager_calls"] == 0 and not stats["refusals"]


def test_two_graphs_serve_every_schedule_scale_and_solver(device):
    engine, network, place = make_engine(device)
    plans = [
        plan(steps=8),
        plan(steps=31, w=9.0),
        plan(CFG(), solver="ddim"),
        plan(THG(grid=(0, 1, 5), cutoff=6), solver="lms2", w=2.0),
        plan_from_table(trace(_unipc(), 9), THG(grid=2), 5.0),
    ]
    for k, the_plan in enumerate([*plans, plans[0]]):
        args = inputs(k, place)
        assert_same(engine.sample(*args, the_plan), eager(network, args, the_plan))
    assert engine.stats()["captures"] == 2


def _unipc():
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(beta_schedule="scaled_linear")


def test_noise_of_stochastic_solvers_is_drawn_outside(device):
    from diffusers import EulerAncestralDiscreteScheduler

    engine, network, place = make_engine(device)
    the_plan = plan_from_table(trace(EulerAncestralDiscreteScheduler(), 7), THG(grid=2), 3.0)
    args = inputs(3, place)
    found, expected = (
        one.sample(*args, the_plan, generator=torch.Generator(place).manual_seed(5))
        for one in (engine, Engine(network, graph=False))
    )
    assert_same(found, expected)
    assert engine.stats()["replays"] == 7


def test_batch_one_and_unconditional_free_plans(device):
    """A plan that never evaluates the unconditional branch captures one graph."""
    engine, network, place = make_engine(device)
    args = inputs(0, place, batch=1)
    never = plan(THG(grid=[0], cutoff=0))
    assert not any(row.evaluates_both for row in never.rows)
    found = engine.sample(args[0], args[1], None, never)
    assert_same(found, eager(network, (args[0], args[1], None), never))
    assert engine.stats()["captures"] == 1


def test_a_run_of_ones_own_and_results_that_last(device):
    engine, network, place = make_engine(device)
    the_plan, first, second = plan(), inputs(0, place), inputs(1, place)
    run = engine.begin(*first, the_plan)
    while not run.done:
        engine.step(run)
    kept = engine.result(run)
    expected = kept.clone()
    engine.sample(*second, the_plan)
    assert_same(kept, expected)
    assert_same(kept.to(first[0].dtype), eager(network, first, the_plan))


def test_a_callback_that_edits_the_sample(device):
    engine, network, place = make_engine(device)

    def callback(run):
        if run.row == 3:
            run.sample.mul_(1.1)

    args, the_plan = inputs(0, place), plan()
    found = engine.sample(*args, the_plan, callback=callback)
    assert_same(found, eager(network, args, the_plan, callback=callback))
    assert not torch.equal(found, eager(network, args, the_plan))
    assert engine.stats()["replays"] == the_plan.num_rows


@pytest.mark.parametrize("first", ["inference", "no_grad", "grad"])
def test_callers_in_any_grad_mode_share_the_graphs(device, first):
    modes = {
        "inference": torch.inference_mode,
        "no_grad": torch.no_grad,
        "grad": torch.enable_grad,
    }
    engine, network, place = make_engine(device)
    args, the_plan = inputs(0, place), plan()
    expected = eager(network, args, the_plan)
    for name in (first, *modes):
        with modes[name]():
            found = engine.sample(*args, the_plan)
        assert_same(found.clone(), expected)
    assert engine.stats()["captures"] == 2


def test_the_whole_run_in_one_graph(device):
    engine, network, place = make_engine(device, graph="trajectory")
    the_plan = plan()
    for seed in (0, 1):
        args = inputs(seed, place)
        assert_same(engine.sample(*args, the_plan), eager(network, args, the_plan))
    assert (engine.stats()["captures"], engine.stats()["replays"]) == (1, 2)
    rows = []
    found = engine.sample(*args, the_plan, callback=lambda run: rows.append(run.row))
    assert_same(found, eager(network, args, the_plan))
    assert rows == list(range(1, the_plan.num_rows + 1)), "a callback takes graphs of single steps"


def test_a_whole_run_with_noise_of_its_own_in_every_row(device):
    from diffusers import EulerAncestralDiscreteScheduler

    engine, network, place = make_engine(device, graph="trajectory")
    the_plan = plan_from_table(trace(EulerAncestralDiscreteScheduler(), 6), CFG(), 3.0)
    args = inputs(3, place)
    found, expected = (
        one.sample(*args, the_plan, generator=torch.Generator(place).manual_seed(5))
        for one in (engine, Engine(network, graph=False))
    )
    assert_same(found, expected)


# -- where graphs live -----------------------------------------------------------------------------


def test_a_set_has_a_stream_and_a_pool_of_its_own_and_goes_as_a_whole():
    cuda = FakeCuda()
    engine, network, _ = make_engine(cuda=cuda)
    engine.sample(*inputs(), plan())
    engine.sample(*inputs(shape=(4, 7, 3)), plan())
    assert len({graph.pool for graph in cuda.graphs}) == 2
    assert len({id(graph.stream) for graph in cuda.graphs}) == 2
    assert cuda.default not in [graph.stream for graph in cuda.graphs]
    assert engine.stats()["pool_bytes"] > 0
    engine.flush()
    assert cuda.resets == len(cuda.graphs) == 4 and engine.stats()["pool_bytes"] == 0
    cuda.empty_cache()
    assert cuda.memory_reserved() == 0
    args = inputs(5)
    assert_same(engine.sample(*args, plan()), eager(network, args, plan()))
    assert len({graph.pool for graph in cuda.graphs}) == 3, "a new pool"


def test_streams_are_used_again_and_those_of_broken_captures_are_not():
    """torch has 32 of them and then hands them out a second time, to live graphs too."""
    cuda = FakeCuda()
    engine, *_ = make_engine(cuda=cuda)
    for _ in range(40):
        assert engine.warm_up(*inputs(), plan()) == ""
        engine.flush()
    assert len(cuda.streams) == 1
    cuda.fail["capture_end", cuda.counts["capture_end"] + 1] = FakeCudaError("injected")
    assert "injected" in engine.warm_up(*inputs(), plan())
    engine.flush()
    assert engine.warm_up(*inputs(), plan()) == "" and len(cuda.streams) == 2


def test_a_run_on_another_stream_waits_for_the_last_one():
    cuda = FakeCuda()
    engine, *_ = make_engine(cuda=cuda)
    engine.sample(*inputs(), plan())
    other = cuda.Stream()
    with cuda.stream(other):
        engine.sample(*inputs(), plan())
    assert other.waits == ["event on default"]


def test_the_larger_graph_is_captured_first():
    order = []

    class Watch(Network):
        def forward(self, x, timestep, conditioning):
            order.append(len(x))
            return super().forward(x, timestep, conditioning)

    engine, *_ = make_engine(network=Watch())
    assert engine.warm_up(*inputs(), plan()) == ""
    assert order == [4] * WARM_UPS + [2] * WARM_UPS + [4, 2]


def test_many_flushes_leave_no_memory_behind():
    cuda = FakeCuda()
    engine, *_ = make_engine(cuda=cuda)
    for _ in range(50):
        assert engine.warm_up(*inputs(), plan()) == ""
        engine.flush()
    gc.collect()
    cuda.empty_cache()
    assert cuda.memory_reserved() == 0 and engine.stats()["leaked_bytes"] == 0


def test_static_buffers_are_no_inference_tensors():
    engine, *_ = make_engine()
    with torch.inference_mode():
        run = engine.begin(*inputs(), plan())
        state = run.state
        for value in (state.registers, state.cursor, state.model_input, state.timestep):
            assert not value.is_inference()
    run.release()
