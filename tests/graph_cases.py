"""Engines on step graphs: a small network, its plans and inputs, and what runs must be equal to.

On a fake CUDA (`fake_cuda`) everywhere, and the same on a real device where there is one; failures
are injected into the fake alone.
"""

from __future__ import annotations

import pytest
import torch

from fake_cuda import FakeCuda, on_fake_cuda
from mixture import vp_points
from thg_engine import THG, Engine
from thg_engine.lowering import plan_from_solver
from thg_engine.solvers import SOLVERS

SHAPE, WIDTH, BATCH = (4, 5, 3), 6, 2


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


@pytest.fixture(name="device", params=["fake", pytest.param("cuda", marks=pytest.mark.gpu)])
def device_fixture(request):
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
