"""What a step graph takes for granted, and what happens when it changes."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from fake_cuda import FakeCuda, on_fake_cuda
from graph_cases import (
    SHAPE,
    WIDTH,
    Network,
    assert_same,
    device_fixture,  # noqa: F401  (a fixture)
    eager,
    inputs,
    make_engine,
    plan,
)
from thg_engine import Engine
from thg_engine.fingerprint import module_fingerprint


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
