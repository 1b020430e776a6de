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
SCALE = {"sd": 7.5, "flow": 5.0}


def latents(pipe: Any, name: str, num_steps: int, noise: torch.Tensor) -> torch.Tensor:
    return pipe(
        report_prompts(len(noise)),
        num_inference_steps=num_steps,
        guidance_scale=SCALE[name],
        latents=noise.clone(),
        output_type="latent",
        **EXTRA[name],
    ).images


def error(found: torch.Tensor, converged: torch.Tensor) -> float:
    gap = (found - converged).double().flatten(1).norm(dim=1)
    return float((gap / converged.double().flatten(1).norm(dim=1)).mean())


@pytest.mark.parametrize(("name", "budget", "share"), [("sd", 32, 0.5), ("flow", 40, 0.8)])
def test_fewer_evaluations_than_dpmpp2m_and_less_error(
    name: str, budget: int, share: float
) -> None:
    """Against 100 evaluations, on prompts and noise that nothing was fitted to."""
    pipe = load_pipeline(name)
    own = pipe.scheduler
    noise = torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(11))
    stock = {}
    for num_steps in (50, 200):
        pipe.scheduler = stock_scheduler(own, KIND[name], "dpm++2m")
        stock[num_steps] = latents(pipe, name, num_steps, noise)
    pipe.scheduler = own
    front = shipped_front(fingerprint(pipe.unet if name == "sd" else pipe.transformer))
    thg_engine.compile(pipe, calibration=front, nfe=budget)
    found = latents(pipe, name, 50, noise)
    assert pipe.thg.stats()["last_nfe"] <= budget
    assert error(found, stock[200]) < share * error(stock[50], stock[200])
    assert pipe.scheduler is own


@pytest.mark.parametrize("name", ["sd", "flow"])
def test_targets_need_no_calibration_in_the_box(name: str) -> None:
    pipe = thg_engine.compile(load_pipeline(name), match="dpm++2m@50")
    assert "plan for match='dpm++2m@50'" in pipe.thg.report()
    assert "  dpm++2m@50: error " in pipe.thg.report()
    assert pipe.thg.plan.nfe <= 50  # DPM-Solver++ 2M takes 100
    assert thg_engine.compile(pipe, speedup=2.0).thg.plan.nfe < 100


@pytest.mark.parametrize("name", ["sd", "flow"])
def test_what_ships(name: str) -> None:
    pipe = load_pipeline(name)
    module = pipe.unet if name == "sd" else pipe.transformer
    front = shipped_front(fingerprint(module))
    assert front is not None
    assert front.guidance_scales == (2.0, 3.0, 5.0, 7.5)
    errors = [e.error_at(SCALE[name]) for e in front.pareto(SCALE[name], front.c2)]
    assert errors == sorted(errors, reverse=True) and len(errors) > 5
    for entry in front.plans:
        for fit in entry.fits:
            assert fit.error <= fit.base_error
    assert len(front.to_json()) < 500_000
