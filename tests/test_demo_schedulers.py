"""Every scheduler of diffusers swapped into the pipeline in the box."""

from __future__ import annotations

import functools

import pytest
import torch

import thg_engine
from pipelines import make
from test_compile import FOR_SD
from test_compile_fused import FEW_ULPS, NEED_TORCHSDE, OWN_STEP, ULPS, distance
from thg_engine import THG
from thg_engine.demo import load_pipeline

pytestmark = [
    pytest.mark.filterwarnings("ignore:Should have t:UserWarning"),  # torchsde
    pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning"),
]
STEPS = 6


@functools.cache
def boxed():
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe) -> torch.Tensor:
    given = {"num_inference_steps": STEPS, "guidance_scale": 5.0, "output_type": "latent"}
    return pipe("a red dress", generator=torch.Generator().manual_seed(0), **given).images


@pytest.mark.parametrize("name", sorted(set(FOR_SD)))
def test_every_scheduler_in_the_box(name: str) -> None:
    """Stock under full guidance, bit for bit; linear ones fused, the rest with their own step."""
    if name in NEED_TORCHSDE:
        pytest.importorskip("torchsde", reason=f"{name} needs torchsde")
    pipe, own = boxed(), boxed().scheduler
    try:
        pipe.scheduler = make(name, num_train_timesteps=own.config.num_train_timesteps)
        stock = call(pipe)
        assert torch.equal(call(thg_engine.compile(pipe, "cfg")), stock)
        stepped = call(thg_engine.compile(pipe, THG(grid=2), fused=False))
        fused = call(thg_engine.compile(pipe, THG(grid=2)))
        stats = pipe.thg.stats()
        assert stats["last_nfe"] == pipe.thg.plan.nfe < 2 * stats["last_rows"]
        assert stats["fused_steps"] == (0 if name in OWN_STEP else stats["last_rows"])
        # The network answers differences of an ulp with larger ones than the tiny one does.
        assert distance(fused, stepped) <= 8 * ULPS.get(name, FEW_ULPS)
    finally:
        thg_engine.uncompile(pipe).scheduler = own
