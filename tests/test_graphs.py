"""Step graphs against eager runs: every rule of capture and every failure that logic can show.

On a fake CUDA (`fake_cuda`) everywhere, and the same on a real device where there is one; failures
are injected into the fake alone.
"""

from __future__ import annotations

import gc
import threading
import warnings

import numpy as np
import pytest
import torch

from fake_cuda import FakeCuda, FakeCudaError, on_fake_cuda
from mixture import vp_points
from thg_engine import CFG, THG, CFGCache, Engine
from thg_engine.errors import InvalidArgument, ThgError
from thg_engine.fingerprint import module_fingerprint
from thg_engine.graphs import WARM_UPS
from thg_engine.lowering import plan_from_solver, plan_from_table
from thg_engine.solvers import SOLVERS
from thg_engine.trace import trace

SHAPE, WIDTH, BATCH = (4, 5, 3), 6, 2
EVENTS = ["capture_begin", "record", "capture_end", "set_stream"]


class Network(torch.nn.Module):
    """A small nonlinear denoiser."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.mix = torch.nn.Linear(WIDTH, SHAPE[0])

    def forward(self, x, timestep, conditioning):
        shift = self.mix(conditioning["text"])[:, :, None, None]
        time = timestep[:, None, None, None] / 1000
        return torch.tanh(0.7 * x + shift) + 0.3 * torch.sin(x * time)


def plan(method=None, steps=8, solver="dpmpp2m", w=4.0):
    return plan_from_solver(SOLVERS[solver], vp_points(steps), method or THG(grid=3), w)


def inputs(seed=0, device="cpu", shape=SHAPE, batch=BATCH):
    generator = torch.Generator().manual_seed(seed)
    make = lambda *sizes: torch.randn(*sizes, generator=generator).to(device)  # noqa: E731
    return make(batch, *shape), {"text": make(batch, WIDTH)}, {"text": make(batch, WIDTH)}


@pytest.fixture(params=["fake", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return request.param


def make_engine(device="fake", network=None, graph=True, cuda=None, **kwargs):
    """An engine on graphs, the network, and the device of its tensors."""
    place = "cuda" if device == "cuda" else "cpu"
    network = (network or Network()).to(place)
    engine = Engine(network, graph=graph, **kwargs)
    if device == "fake":
        on_fake_cuda(engine, cuda or FakeCuda())
    return engine, network, place


def eager(network, args, the_plan, **kwargs):
    return Engine(network, graph=False).sample(*args, the_plan, **kwargs)


def assert_same(found, expected):
    """Bit by bit on the fake; a graph of a real device may not choose other kernels either."""
    assert torch.equal(found, expected), float((found - expected).abs().max())


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


# -- failures --------------------------------------------------------------------------------------


# Every other set_stream puts the old stream back, which nothing could mend.
WHEN = [(event, nth) for event in EVENTS for nth in (1, 2, 3, 9, 17)]
WHEN = [(event, nth) for event, nth in WHEN if event != "set_stream" or nth % 2]


@pytest.mark.parametrize(("event", "nth"), WHEN)
def test_a_capture_that_fails_anywhere_leaves_a_correct_eager_run(event, nth):
    cuda = FakeCuda()
    cuda.fail[event, nth] = FakeCudaError("injected")
    engine, network, _ = make_engine(cuda=cuda)
    args, the_plan = inputs(), plan()
    expected = eager(network, args, the_plan)
    for _ in range(2):
        assert_same(engine.sample(*args, the_plan), expected)
    assert cuda.current_stream() is cuda.default and cuda.capturing is None
    stats = engine.stats()
    if cuda.counts[event] < nth:
        assert stats["captures"] == 2
        return
    assert stats["captures"] == 0 and stats["eager_calls"] == 2 * the_plan.num_rows
    (reason,) = stats["refusals"]
    assert "injected" in reason and stats["refusals"][reason] == 2
    engine.flush()
    assert_same(engine.sample(*args, the_plan), expected)
    assert engine.stats()["captures"] == 2, "a flush forgets the failure"


@pytest.mark.parametrize("event", EVENTS)
def test_an_interrupt_during_capture_reaches_the_user(event):
    cuda = FakeCuda()
    cuda.fail[event, 1] = KeyboardInterrupt()
    engine, network, _ = make_engine(cuda=cuda)
    args, the_plan = inputs(), plan()
    with pytest.raises(KeyboardInterrupt):
        engine.sample(*args, the_plan)
    assert cuda.current_stream() is cuda.default and cuda.capturing is None
    assert_same(engine.sample(*args, the_plan), eager(network, args, the_plan))
    assert engine.stats()["captures"] == 2


@pytest.mark.parametrize("error", [FakeCudaError("injected"), KeyboardInterrupt()])
@pytest.mark.parametrize("nth", [1, 4])
def test_a_replay_that_fails_reaches_the_user_and_the_next_run_is_clean(nth, error):
    cuda = FakeCuda()
    engine, network, _ = make_engine(cuda=cuda)
    args, the_plan = inputs(), plan()
    expected = engine.sample(*args, the_plan)
    cuda.fail["replay", cuda.counts["replay"] + nth] = error
    with pytest.raises(type(error)):
        engine.sample(*args, the_plan)
    assert_same(engine.sample(*args, the_plan), expected)
    assert_same(expected, eager(network, args, the_plan))
    assert not engine.stats()["refusals"], "the graphs were free again"


def test_nothing_is_captured_that_does_not_fit():
    cuda = FakeCuda(free=1 << 20, working_set=1 << 20)
    engine, network, _ = make_engine(cuda=cuda)
    args, the_plan = inputs(), plan()
    assert_same(engine.sample(*args, the_plan), eager(network, args, the_plan))
    (reason,) = engine.stats()["refusals"]
    assert "device memory" in reason and cuda.counts["capture_begin"] == 0


def test_memory_lost_to_a_failed_capture_is_counted():
    cuda = FakeCuda()
    cuda.fail["capture_end", 2] = FakeCudaError("injected")
    lost = 1 << 16

    def leak():
        if cuda.counts["capture_end"] == 2:
            cuda._cached += lost
            cuda.empty_cache = lambda: None

    cuda.on["capture_end"] = leak
    engine, *_ = make_engine(cuda=cuda)
    engine.sample(*inputs(), plan())
    assert engine.stats()["leaked_bytes"] >= lost


def test_a_denoiser_that_asks_the_device_runs_eagerly(device):
    if device == "cuda":
        pytest.skip("a failed capture can leave the context of a real device unusable")

    class Asks(Network):
        def forward(self, x, timestep, conditioning):
            return super().forward(x, timestep, conditioning) * (1.0 + float(timestep[0]) * 1e-4)

    engine, network, place = make_engine(device, Asks())
    args, the_plan = inputs(0, place), plan()
    assert_same(engine.sample(*args, the_plan), eager(network, args, the_plan))
    (reason,) = engine.stats()["refusals"]
    assert "capture failed" in reason and "not permitted" in reason


def test_an_abandoned_run_gives_its_graphs_back():
    engine, *_ = make_engine()
    run = engine.begin(*inputs(), plan())
    engine.step(run)
    assert engine.begin(*inputs(), plan()).lease is None, "in use"
    del run
    gc.collect()
    assert engine.begin(*inputs(), plan()).lease is not None


# -- what a graph takes for granted ----------------------------------------------------------------


def test_new_weights_flush_and_weights_changed_in_place_do_not(device):
    engine, network, place = make_engine(device)
    args, the_plan = inputs(0, place), plan()
    before = engine.sample(*args, the_plan)
    with torch.no_grad():
        network.mix.weight.mul_(1.5)
    found = engine.sample(*args, the_plan)
    assert_same(found, eager(network, args, the_plan))
    assert not torch.equal(found, before) and engine.stats()["captures"] == 2
    network.mix = torch.nn.Linear(WIDTH, SHAPE[0]).to(place)
    assert_same(engine.sample(*args, the_plan), eager(network, args, the_plan))
    assert engine.stats()["captures"] == 4


@pytest.mark.parametrize("change", ["mode", "matmul", "deterministic"])
def test_modes_and_global_settings_flush(change):
    engine, network, _ = make_engine()
    engine.sample(*inputs(), plan())
    try:
        if change == "mode":
            network.eval()
        elif change == "matmul":
            torch.set_float32_matmul_precision("high")
        else:
            torch.use_deterministic_algorithms(True)
        engine.sample(*inputs(), plan())
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.use_deterministic_algorithms(False)
    assert engine.stats()["captures"] == 4


@pytest.mark.parametrize("how", ["attribute", "forward", "class"])
def test_python_of_the_network_is_looked_at(how):
    """FreeU sets attributes, ToMe and others put a forward or a class in place."""

    class Other(torch.nn.Linear):
        def forward(self, x):
            return 0.5 * super().forward(x)

    class Scaled(Network):
        strength = 1.0

        def forward(self, *args):
            return self.strength * super().forward(*args)

    engine, network, _ = make_engine(network=Scaled())
    args = inputs()
    before = engine.sample(*args, plan())
    if how == "attribute":
        network.strength = 0.5
    elif how == "forward":
        forward = network.mix.forward
        network.mix.forward = lambda x: 0.5 * forward(x)
    else:
        network.mix.__class__ = Other
    found = engine.sample(*args, plan())
    assert_same(found, eager(network, args, plan()))
    assert not torch.equal(found, before) and engine.stats()["captures"] == 4


def test_a_network_that_changes_with_every_call_gets_no_graphs():
    class Counts(Network):
        number = 0

        def forward(self, *args):
            self.number += 1
            return super().forward(*args)

    engine, network, _ = make_engine(network=Counts())
    for _ in range(8):
        args = inputs()
        assert_same(engine.sample(*args, plan()), eager(network, args, plan()))
    (reason,) = engine.stats()["refusals"]
    assert reason == "the network has been another one in each of the last calls"
    assert engine.stats()["captures"] <= 8


def test_weights_inside_of_tensor_subclasses_are_looked_at():
    from torch.testing._internal.two_tensor import TwoTensor

    network = Network()
    weight = network.mix.weight.detach()
    network.mix.weight = torch.nn.Parameter(TwoTensor(weight, weight.clone()))
    first = module_fingerprint(network)
    assert module_fingerprint(network) == first
    network.mix.weight = torch.nn.Parameter(TwoTensor(weight.clone(), weight.clone()))
    assert module_fingerprint(network) != first


def test_settings_that_refuse_to_be_read_break_nothing():
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    engine, network, _ = make_engine()
    try:
        conv.fp32_precision = "ieee"
        args = inputs()
        assert_same(engine.sample(*args, plan()), eager(network, args, plan()))
    finally:
        conv.fp32_precision = before


def test_values_that_may_change_unseen_get_no_graphs():
    class Scaled(Network):
        def forward(self, x, timestep, conditioning):
            return float(conditioning["scale"][0]) * super().forward(x, timestep, conditioning)

    engine, network, _ = make_engine(network=Scaled())
    x, cond, uncond = inputs()
    scale = np.ones(1)
    args = (x, {**cond, "scale": scale}, {**uncond, "scale": scale})
    for value in (1.0, 0.5):
        scale[0] = value
        assert_same(engine.sample(*args, plan()), eager(network, args, plan()))
    assert engine.stats()["captures"] == 0 and len(engine.stats()["refusals"]) == 1


def test_autocast_of_one_thread_leaves_the_graphs_of_others():
    engine, *_ = make_engine()
    args = inputs()
    for _ in range(2):
        engine.sample(*args, plan())
        with torch.autocast("cpu", torch.bfloat16):
            engine.sample(*args, plan())
    assert engine.stats()["captures"] == 4


def test_a_function_names_the_network_to_watch():
    network = Network()
    engine = Engine(lambda x, t, c: network(x, t, c), graph=True, watch=network)
    on_fake_cuda(engine, FakeCuda())
    engine.sample(*inputs(), plan())
    network.mix = torch.nn.Linear(WIDTH, SHAPE[0])
    args = inputs(1)
    assert_same(engine.sample(*args, plan()), eager(network, args, plan()))
    assert engine.stats()["captures"] == 4


def test_plain_values_in_the_conditioning_are_part_of_the_signature():
    class Scaled(Network):
        def forward(self, x, timestep, conditioning):
            return conditioning["scale"] * super().forward(x, timestep, conditioning)

    engine, network, _ = make_engine(network=Scaled())
    for scale in (1.0, 0.5):
        x, cond, uncond = inputs()
        args = (x, {**cond, "scale": scale}, {**uncond, "scale": scale})
        assert_same(engine.sample(*args, plan()), eager(network, args, plan()))
    assert engine.stats()["captures"] == 4


def test_channels_last_is_another_shape_and_keeps_its_order(device):
    engine, network, place = make_engine(device)
    x, cond, uncond = inputs(0, place)
    args = (x.contiguous(memory_format=torch.channels_last), cond, uncond)
    assert_same(engine.sample(x, cond, uncond, plan()), eager(network, (x, cond, uncond), plan()))
    assert_same(engine.sample(*args, plan()), eager(network, args, plan()))
    assert engine.stats()["captures"] == 4


def test_shapes_are_bounded_with_one_warning():
    engine, network, _ = make_engine(max_shapes=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for size in (3, 4, 5, 6, 5):
            args = inputs(0, shape=(4, size, 3))
            assert_same(engine.sample(*args, plan()), eager(network, args, plan()))
    mine = [w for w in caught if "graphs of 2 shapes" in str(w.message)]
    assert len(mine) == 1 and engine.stats()["captures"] == 4
    assert engine.stats()["refusals"] == {"there are graphs of 2 other shapes": 3}


def _offload(network):
    network.mix._hf_hook = type("AlignDevicesHook", (), {})()


@pytest.mark.parametrize(
    ("move", "reason"),
    [
        (lambda network: setattr(network, "hf_device_map", {"": 0}), "device map"),
        (_offload, "offloading"),
    ],
)
def test_weights_that_move_get_no_graphs(move, reason):
    engine, network, _ = make_engine()
    move(network)
    args = inputs()
    assert_same(engine.sample(*args, plan()), eager(network, args, plan()))
    (found,) = engine.stats()["refusals"]
    assert reason in found


@pytest.mark.parametrize("switch", ["THG_DISABLE", "THG_DISABLE_GRAPHS"])
def test_kill_switches(monkeypatch, switch):
    engine, network, _ = make_engine()
    engine.sample(*inputs(), plan())
    monkeypatch.setenv(switch, "1")
    args = inputs(1)
    assert_same(engine.sample(*args, plan()), eager(network, args, plan()))
    assert engine.stats()["refusals"] == {f"{switch}=1": 1}
    assert engine.stats()["replays"] == plan().num_rows


def test_where_there_are_no_graphs_nobody_looks_at_the_network(monkeypatch):
    """That takes some milliseconds, in every call."""
    looked = []
    monkeypatch.setattr(
        "thg_engine.engine.module_fingerprint", lambda module: looked.append(module)
    )
    Engine(Network()).sample(*inputs(), plan())
    assert not looked
    make_engine()[0].sample(*inputs(), plan())
    assert looked


def test_there_are_no_graphs_on_a_cpu_nor_in_double_precision(device):
    engine = Engine(Network())
    engine.sample(*inputs(), plan())
    assert engine.stats()["refusals"] == {"there are no graphs on cpu": 1}
    engine, network, place = make_engine(device, register_dtype=torch.float64)
    args = inputs(0, place)
    expected = Engine(network, graph=False, register_dtype=torch.float64).sample(*args, plan())
    assert_same(engine.sample(*args, plan()), expected)
    (reason,) = engine.stats()["refusals"]
    assert "reference backend" in reason


# -- choice, warm-up, threads ----------------------------------------------------------------------


@pytest.mark.parametrize("slower", ["eager", "graphed"])
def test_the_faster_of_both_is_kept(monkeypatch, slower):
    import time

    cuda = FakeCuda()
    engine, network, _ = make_engine(cuda=cuda, graph=None)
    if slower == "graphed":
        cuda.on["replay"] = lambda: time.sleep(0.02)
    else:
        monkeypatch.setattr(network, "forward", _slow(network.forward))
    args, the_plan = inputs(), plan()
    found = engine.sample(*args, the_plan)
    assert_same(found, eager(network, args, the_plan))
    if slower == "eager":
        assert engine.stats()["captures"] == 2 and not engine.stats()["refusals"]
        (ms,) = engine.stats()["ms"]
        assert set(ms) == {"both", "cond"} and all(a > b for a, b in ms.values())
    else:
        (reason,) = engine.stats()["refusals"]
        assert reason.startswith("eager calls are faster here (")
        assert engine.stats()["captures"] == 0 and cuda.resets == 2


def _slow(forward):
    import time

    def slow(*args):
        time.sleep(0.02)
        return forward(*args)

    return slow


def test_capture_ahead_and_only_ahead():
    engine, network, _ = make_engine(captures_late=False)
    args = inputs()
    engine.sample(*args, plan())
    assert engine.stats()["refusals"] == {
        "nothing was captured for this shape (warm_up captures it)": 1
    }
    assert engine.warm_up(*args, plan()) == ""
    assert_same(engine.sample(*args, plan()), eager(network, args, plan()))
    assert engine.stats()["replays"] == plan().num_rows
    with pytest.raises(InvalidArgument, match="cond="):
        engine.warm_up(args[0], {}, args[2], plan())


def test_threads_on_one_engine_give_the_images_of_one():
    engine, network, _ = make_engine()
    the_plan, seeds = plan(steps=12), range(6)
    expected = [eager(network, inputs(seed), the_plan) for seed in seeds]
    engine.warm_up(*inputs(), the_plan)
    found = [None] * len(seeds)

    def work(k):
        found[k] = engine.sample(*inputs(k), the_plan)

    threads = [threading.Thread(target=work, args=(k,)) for k in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)
    stats = engine.stats()
    assert stats["replays"] + stats["eager_calls"] == len(seeds) * the_plan.num_rows


def test_captures_of_two_engines_take_turns():
    """The fake refuses a second capture while one is in progress, as a real device may."""
    cuda, errors = FakeCuda(), []
    cuda.on["record"] = lambda: threading.Event().wait(0.001)
    engines = [make_engine(network=Network(k), cuda=cuda)[0] for k in range(3)]

    def work(engine):
        errors.append(engine.warm_up(*inputs(), plan()))

    threads = [threading.Thread(target=work, args=(engine,)) for engine in engines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == ["", "", ""]


def test_a_flush_during_a_run_waits_for_its_end():
    cuda = FakeCuda()
    engine, network, _ = make_engine(cuda=cuda)
    args, the_plan = inputs(), plan()

    def callback(run):
        if run.row == 2:
            engine.flush()
            assert cuda.resets == 0

    found = engine.sample(*args, the_plan, callback=callback)
    assert_same(found, eager(network, args, the_plan))
    assert cuda.resets == 2


@pytest.mark.parametrize("graph", ["step", 1, 0, "yes"])
def test_graph_is_one_of_four(graph):
    with pytest.raises(InvalidArgument, match="graph="):
        Engine(Network(), graph=graph)


def test_a_released_run_leaves_the_buffers_to_the_next():
    engine, network, _ = make_engine()
    args, other = inputs(0), inputs(1)
    released = engine.begin(*args, plan())
    engine.step(released)
    released.release()
    kept = released.sample.clone()
    run = engine.begin(*other, plan())
    with pytest.raises(ThgError, match="released"):
        engine.step(released)
    while not run.done:
        engine.step(run)
    assert_same(engine.result(run), eager(network, other, plan()))
    assert_same(released.sample, kept)


def test_arguments_that_cannot_be_loaded_give_the_graphs_back(monkeypatch):
    from thg_engine.step_buffers import StepBuffers

    engine, network, _ = make_engine()
    args = inputs()
    engine.sample(*args, plan())

    def fails(self, *args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StepBuffers, "load", fails)
        with pytest.raises(KeyboardInterrupt):
            engine.sample(*args, plan())
    assert_same(engine.sample(*args, plan()), eager(network, args, plan()))
    assert not engine.stats()["refusals"]


def test_a_row_that_is_tried_again_has_the_noise_of_the_first_try():
    from diffusers import EulerAncestralDiscreteScheduler

    cuda = FakeCuda()
    engine, *_ = make_engine(cuda=cuda)
    the_plan = plan_from_table(trace(EulerAncestralDiscreteScheduler(), 5), CFG(), 3.0)
    args = inputs()
    expected = engine.sample(*args, the_plan, generator=torch.Generator().manual_seed(5))
    run = engine.begin(*args, the_plan, generator=torch.Generator().manual_seed(5))
    cuda.fail["replay", cuda.counts["replay"] + 3] = FakeCudaError("injected")
    while not run.done:
        try:
            engine.step(run)
        except FakeCudaError:
            continue
    assert_same(engine.result(run), expected)


def test_a_flush_beside_a_capture_waits_for_it():
    """A wait for the device while another thread captures fails and breaks the capture."""
    cuda, results = FakeCuda(), []
    first, second = (make_engine(network=Network(k), cuda=cuda, graph=None)[0] for k in (0, 1))
    first.warm_up(*inputs(), plan())
    inside = threading.Event()

    def record():
        inside.set()
        threading.Event().wait(0.002)

    cuda.on["record"] = record
    thread = threading.Thread(target=lambda: results.append(second.warm_up(*inputs(), plan())))
    thread.start()
    inside.wait()
    first.flush()
    thread.join()
    assert results[0] == "" or results[0].startswith("eager calls are faster")
    assert cuda.resets >= 2


def test_a_released_run_cannot_be_stepped_on_its_graphs():
    engine, *_ = make_engine()
    run = engine.begin(*inputs(), plan())
    lease = run.lease
    run.release()
    engine.flush()
    with pytest.raises(ThgError, match="released"):
        lease.replay("cond")
