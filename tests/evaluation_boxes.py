"""Tiny pipelines for the tests of the evaluation."""

from __future__ import annotations

import functools

import diffusers
import torch

from thg_engine.demo import load_pipeline
from thg_engine.evaluation.box import Box
from training import data
from training.flow_model import FlowModel, build_scheduler
from training.tokenizer import build_tokenizer


@functools.cache
def sd_box() -> Box:
    """The trained pipeline of the package."""
    return Box("sd", load_pipeline())


@functools.cache
def flow_box() -> Box:
    """Stable Diffusion 3's pipeline with a random, smooth transformer."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(data.vocabulary())
    model = FlowModel(tokenizer).eval().requires_grad_(False)
    for parameter in model.transformer.parameters():
        if not parameter.any():  # it starts at zero, and would answer nothing else
            torch.nn.init.normal_(parameter, std=0.05)
    vae = load_pipeline().vae
    vae.register_to_config(shift_factor=0.0)
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=model.transformer,
        scheduler=build_scheduler(),
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=model.text_encoder_2,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipe.set_progress_bar_config(disable=True)
    return Box("flow", pipe, {"max_sequence_length": 1})
