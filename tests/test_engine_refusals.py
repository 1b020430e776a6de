"""What the engine refuses, before any denoiser call where it can."""

from __future__ import annotations

import pytest
import torch

from engine_cases import BATCH, SHAPE, WIDTH, Network, inputs, plan_of
from mixture import vp_points
from thg_engine.engine import Engine
from thg_engine.errors import InvalidArgument
from thg_engine.guidance import CFG, GuidanceInterval
from thg_engine.lowering import plan_from_solver, plan_from_timesteps
from thg_engine.solvers import SOLVERS

BAD_INPUTS = [
    ("x_T", {"x_T": "noise"}),
    ("x_T", {"x_T": torch.zeros(BATCH, *SHAPE, dtype=torch.int64)}),
    ("x_T", {"x_T": torch.zeros(BATCH)}),
    ("x_T", {"x_T": torch.zeros(())}),
    ("plan", {"plan": "thg"}),
    ("plan", {"plan": plan_from_timesteps([9, 5], [-1.0, 1.0], CFG(), 3.0, "Foreign")}),
    ("cond", {"cond": None}),
    ("cond", {"cond": {"a": None}}),
    ("cond", {"cond": torch.zeros(BATCH + 1, WIDTH)}),
    ("cond", {"cond": torch.tensor(1.0)}),
    ("uncond", {"uncond": None}),
    ("uncond", {"uncond": torch.zeros(1, WIDTH)}),
    ("uncond", {"uncond": [torch.zeros(BATCH, WIDTH)]}),
    ("uncond", {"uncond": torch.zeros(BATCH, WIDTH + 1)}),
    (
        "uncond",
        {
            "cond": [torch.zeros(BATCH, WIDTH), torch.zeros(BATCH, 1)],
            "uncond": [torch.zeros(BATCH, WIDTH), None],
        },
    ),
    ("generator", {"generator": 3}),
    ("generator", {"generator": [torch.Generator()]}),
]


@pytest.mark.parametrize(("argument", "changes"), BAD_INPUTS)
def test_bad_inputs_are_refused_before_any_denoiser_call(argument, changes):
    x_T, cond, uncond = inputs()
    # The first rows evaluate the conditional branch alone: a late check would come too late.
    plan = plan_of(GuidanceInterval(0.5, 1.0))
    network = Network()
    values = {"x_T": x_T, "cond": cond, "uncond": uncond, "plan": plan, **changes}
    with pytest.raises(InvalidArgument) as caught:
        Engine(network).sample(**values)
    assert caught.value.argument == argument and network.calls == 0


@pytest.mark.parametrize(
    ("argument", "make"),
    [
        ("denoiser", lambda: Engine(3)),
        ("register_dtype", lambda: Engine(Network(), register_dtype=torch.float16)),
        ("register_dtype", lambda: Engine(Network(), register_dtype=torch.int32)),
        ("model_dtype", lambda: Engine(Network(), model_dtype=torch.int32)),
        ("watch", lambda: Engine(Network(), watch="network")),
    ],
)
def test_bad_engines(argument, make):
    with pytest.raises(InvalidArgument) as caught:
        make()
    assert caught.value.argument == argument


def test_a_denoiser_of_another_shape_is_named():
    x_T, cond, uncond = inputs()
    with pytest.raises(InvalidArgument, match="denoiser="):
        Engine(lambda x, t, c: x[:, :1]).sample(x_T, cond, uncond, plan_of())


# -- what the kernels would refuse later -----------------------------------------------------------


@pytest.mark.parametrize("backend", ["cuda", "nonsense", "cpu"])
def test_a_backend_that_cannot_run_is_refused_before_any_call(backend):
    network, (x_T, cond, uncond) = Network(), inputs()
    engine = Engine(network, register_dtype=torch.float64, backend=backend)
    with pytest.raises(InvalidArgument, match="backend="):
        engine.sample(
            x_T, cond, uncond, plan_from_solver(SOLVERS["ddim"], vp_points(3), CFG(), 3.0)
        )
    assert network.calls == 0


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int32])
def test_a_model_dtype_that_no_kernel_has_is_refused(dtype):
    with pytest.raises(InvalidArgument, match=r"model_dtype=.*use one of torch\.float16"):
        Engine(Network(), model_dtype=dtype)


def test_a_denoiser_may_return_its_input_or_something_else():
    plan = plan_from_solver(SOLVERS["ddim"], vp_points(3), CFG(), 3.0)
    x_T, cond, uncond = inputs(dtype=torch.float32)
    found = Engine(lambda x, t, c: x).sample(x_T, cond, uncond, plan)
    assert torch.equal(found, Engine(lambda x, t, c: x.clone()).sample(x_T, cond, uncond, plan))
    with pytest.raises(InvalidArgument, match="must return a tensor"):
        Engine(lambda x, t, c: (x,)).sample(x_T, cond, uncond, plan)
