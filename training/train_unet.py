"""Trains the UNet and the text encoder of the boxed pipeline, jointly, on captioned latents.

    python -m training.train_unet --out runs

Needs ``latents.pt`` of ``train_vae``. The loss is the plain mean square error of the predicted
noise under SD 1.5's noise schedule; 12 % of the captions are empty, for classifier-free guidance.
"""

from __future__ import annotations

import argparse
from typing import cast

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import nn
from torch.nn.functional import mse_loss
from transformers import CLIPTextModel, CLIPTokenizer

from training import data
from training.captions import CaptionedLatents, strata, text_config
from training.common import Run, descend, fit, parser, start
from training.tokenizer import build_tokenizer

TEXT_WIDTH = 64
CHANNELS = (64, 104)


def build_unet() -> UNet2DConditionModel:
    """The UNet with fresh weights; cross-attention at 4x4, where colour and garment are decided."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=CHANNELS,
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The text encoder with fresh weights, for this tokenizer."""
    return CLIPTextModel(text_config(tokenizer, TEXT_WIDTH))


def build_scheduler() -> DDIMScheduler:
    """DDIM exactly as Stable Diffusion 1.5 sets it."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
        timestep_spacing="leading",
    )


def build_model(tokenizer: CLIPTokenizer) -> nn.ModuleDict:
    """``unet`` and ``text_encoder`` as one trainable module."""
    return nn.ModuleDict({"unet": build_unet(), "text_encoder": build_text_encoder(tokenizer)})


class Captioned(CaptionedLatents):
    """Random batches of noisy latents, timesteps, noise and caption tokens."""

    def __init__(self, args: argparse.Namespace, tokenizer: CLIPTokenizer) -> None:
        super().__init__(args.out / "latents.pt", tokenizer)
        self.scheduler = build_scheduler()
        self.batch_size: int = args.batch_size

    def batch(self, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        """Noisy latents, timesteps, noise, tokens; timesteps are stratified over the batch."""
        latents, tokens = self.draw(self.batch_size, generator)
        timesteps = (1000 * strata(self.batch_size, generator)).long().clamp(max=999)
        noise = torch.randn(latents.shape, generator=generator)
        return self.scheduler.add_noise(latents, noise, timesteps), timesteps, noise, tokens


def _step(run: Run, source: Captioned) -> float:
    """One optimiser step; returns its loss."""
    noisy, timesteps, noise, tokens = source.batch(run.generator)
    model = cast(nn.ModuleDict, run.model)
    context = model["text_encoder"](tokens).last_hidden_state
    return descend(run, mse_loss(model["unet"](noisy, timesteps, context).sample, noise))


def train(args: argparse.Namespace) -> None:
    """Trains, leaves ``unet.pt`` (weights, averages, all that resuming needs) in ``args.out``."""
    tokenizer = build_tokenizer(data.vocabulary())
    source = Captioned(args, tokenizer)
    run = start(args, "unet", build_model(tokenizer), lr=args.lr, total=args.steps, decay=0.999)
    fit(run, args, lambda: _step(run, source))


def main() -> None:
    """Reads the command line and trains."""
    cli = parser("Train the UNet and the text encoder on captioned latents.")
    cli.add_argument("--steps", type=int, default=4200, help="optimiser steps")
    cli.add_argument("--batch-size", type=int, default=64, help="latents per step")
    cli.add_argument("--lr", type=float, default=1.5e-3, help="peak learning rate")
    args = cli.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    train(args)


if __name__ == "__main__":
    main()
