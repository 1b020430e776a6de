"""The plans that ship with the pipelines in the box do what they promise, on prompts of others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import thg_engine
from thg_engine.demo import load_pipeline
from thg_engine.evaluation.prompts import report_prompts
from thg_engine.fitting.shipped import shipped_front
from thg_engine.integrations.diffusers.calibrate_plans import stock_scheduler
from thg_engine.integrations.diffusers.resolve import fingerprint

EXTRA = {"sd": {}, "flow": {"max_sequence_length": 1}}
KIND = {"sd": "vp", "flow": "flow"}
W = 7.5


def latents(pipe: Any, name: str, num_steps: int, noise: torch.Tensor) -> torch.Tensor:
    return pipe(
        report_prompts(len(noise)),
        num_inference_steps=num_steps,
        guidance_scale=W,
        latents=noise.clone(),
        output_type="latent",
        **EXTRA[name],
    ).images


def error(found: torch.Tensor, converged: torch.Tensor) -> float:
    gap = (found - converged).double().flatten(1).norm(dim=1)
    return float((gap / converged.double().flatten(1).norm(dim=1)).mean())


@pytest.mark.parametrize("name", ["sd", "flow"])
def test_fewer_evaluations_than_half_for_the_error_of_dpmpp2m(name: str) -> None:
    pipe = load_pipeline(name)
    own = pipe.scheduler
    noise = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(11))
    stock = {}
    for num_steps in (50, 200):
        pipe.scheduler = stock_scheduler(own, KIND[name], "dpm++2m")
        stock[num_steps] = latents(pipe, name, num_steps, noise)
    pipe.scheduler = own
    thg_engine.compile(pipe, match="dpm++2m@50")
    found = latents(pipe, name, 50, noise)
    assert pipe.thg.stats()["last_nfe"] <= 50  # DPM-Solver++ 2M takes 100
    assert error(found, stock[200]) < 1.1 * error(stock[50], stock[200])
    assert pipe.scheduler is own


@pytest.mark.parametrize("name", ["sd", "flow"])
def test_what_ships(name: str) -> None:
    pipe = load_pipeline(name)
    module = pipe.unet if name == "sd" else pipe.transformer
    front = shipped_front(fingerprint(module))
    assert front is not None
    assert front.guidance_scales == (3.0, 7.5)
    errors = [entry.error_at(W) for entry in front.pareto(W, front.c2)]
    assert errors == sorted(errors, reverse=True) and len(errors) > 5
    for entry in front.plans:
        for fit in entry.fits:
            assert fit.error <= fit.base_error
    assert len(front.to_json()) < 500_000
