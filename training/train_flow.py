"""Trains the second boxed pipeline's transformer and text encoders, jointly, on captioned latents.

    python -m training.train_flow --out runs

Rectified flow: latents and noise are mixed to (1 - sigma) x_0 + sigma noise and the model predicts
the velocity noise - x_0; the loss is its plain mean square error. Noise levels are logit-normal,
one in eight is uniform. 12 % of the captions are empty, for classifier-free guidance.

Needs ``latents.pt`` of ``train_vae``; where there is none, the autoencoder in the box encodes the
training images first.

References:
    Liu, Gong and Liu 2022, arXiv 2209.03003 (rectified flow).
    Esser et al. 2024, arXiv 2403.03206 (logit-normal noise levels).
"""

from __future__ import annotations

import argparse
from typing import cast

import torch
from diffusers import AutoencoderKL
from torch.nn.functional import mse_loss
from transformers import CLIPTokenizer

from thg_engine.demo.pipeline_loader import FOLDERS
from training import data
from training.captions import CaptionedLatents, strata
from training.common import Run, descend, fit, machine, parser, start
from training.flow_model import MAX_ZERO_TOKENS, FlowModel
from training.tokenizer import build_tokenizer
from training.train_vae import encode

UNIFORM_EVERY = 8
COLOURS_PER_GARMENT = 2


def noise_levels(count: int, generator: torch.Generator) -> torch.Tensor:
    """sigma in (0, 1), shape ``(count,)``: logit-normal, stratified over the batch.

    Every eighth is uniform instead: sampling starts at sigma = 1, where a logit-normal draw hardly
    ever is. The levels are those of an unshifted grid, so that the shift can be chosen afterwards.
    """
    levels = strata(count, generator).clamp(1e-4, 1 - 1e-4)
    logit_normal = torch.special.ndtri(levels).sigmoid()
    logit_normal[::UNIFORM_EVERY] = levels[::UNIFORM_EVERY]
    return logit_normal


class FlowLatents(CaptionedLatents):
    """Random batches of noisy latents, noise levels, velocities, tokens and zero token counts.

    Latents are centred; ``shift_factor`` is what the pipeline's autoencoder has to add back.
    """

    def __init__(self, args: argparse.Namespace, tokenizer: CLIPTokenizer) -> None:
        super().__init__(args.out / "latents.pt", tokenizer)
        mean = self.data["latents"].mean()
        self.scaling_factor = round(self.data["scaling_factor"], 5)
        self.shift_factor = round(mean.item() / self.scaling_factor, 5)
        self.data["latents"] = self.data["latents"] - mean
        self.batch_size: int = args.batch_size

    def batch(self, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        """Noisy latents, sigma, velocity, tokens and how many zero vectors follow the tokens."""
        latents, tokens = self.draw(self.batch_size, generator)
        sigma = noise_levels(self.batch_size, generator)
        noise = torch.randn(latents.shape, generator=generator)
        noisy = latents.lerp(noise, sigma[:, None, None, None])
        zero_tokens = MAX_ZERO_TOKENS ** torch.rand(self.batch_size, generator=generator)
        return noisy, sigma, noise - latents, tokens, zero_tokens


def _step(run: Run, source: FlowLatents) -> float:
    """One optimiser step; returns its loss."""
    noisy, sigma, velocity, tokens, zero_tokens = source.batch(run.generator)
    return descend(run, mse_loss(run.model(noisy, sigma, tokens, zero_tokens), velocity))


def ensure_latents(args: argparse.Namespace) -> None:
    """Encodes the training images with the autoencoder in the box if there are no latents yet."""
    path = args.out / "latents.pt"
    if path.is_file():
        return
    vae = cast(AutoencoderKL, AutoencoderKL.from_pretrained(FOLDERS["sd"] / "vae"))
    args.out.mkdir(parents=True, exist_ok=True)
    garments = data.load(args.data, "train")
    torch.save(encode(vae.float().eval(), garments, args.seed, COLOURS_PER_GARMENT), path)


def train(args: argparse.Namespace) -> None:
    """Trains, leaves ``flow.pt`` (weights, averages, all that resuming needs) in ``args.out``."""
    ensure_latents(args)
    tokenizer = build_tokenizer(data.vocabulary())
    source = FlowLatents(args, tokenizer)
    model = FlowModel(tokenizer)
    model.count_zero_tokens()
    run = start(args, "flow", model, lr=args.lr, total=args.steps, decay=0.999)
    run.extra |= {
        "scaling_factor": source.scaling_factor,
        "shift_factor": source.shift_factor,
        "lr": args.lr,
        "seed": args.seed,
        "machine": machine(args.threads),
    }
    fit(run, args, lambda: _step(run, source))


def command_line() -> argparse.ArgumentParser:
    """The flags."""
    cli = parser("Train the flow-matching transformer and its text encoders on captioned latents.")
    cli.add_argument("--steps", type=int, default=6000, help="optimiser steps")
    cli.add_argument("--batch-size", type=int, default=64, help="latents per step")
    cli.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    return cli


def main() -> None:
    """Reads the command line and trains."""
    args = command_line().parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    train(args)


if __name__ == "__main__":
    main()
