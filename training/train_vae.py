"""Trains the autoencoder of the boxed pipeline (3x32x32 <-> 4x8x8) on colourised garments.

    python -m training.train_vae --out runs

The loss is |error| + 2 error^2 per value plus a light Kullback-Leibler term. At the end the whole
training split is encoded, every garment in ``--colours-per-garment`` random colours, into
``latents.pt``; ``scaling_factor`` is one over the standard deviation of those latents.
"""

from __future__ import annotations

import argparse
import time
from typing import Any, cast

import torch
from diffusers import AutoencoderKL
from tqdm import tqdm

from training import data
from training.common import Run, descend, load_average, parser, start

KL_WEIGHT = 2e-4


def build_vae(scaling_factor: float = 1.0, shift_factor: float | None = None) -> AutoencoderKL:
    """The autoencoder with fresh weights."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
    )


def _step(run: Run, garments: data.Garments, batch_size: int) -> float:
    """One optimiser step; returns the mean absolute error of the reconstruction."""
    generator = run.generator
    index = torch.randint(len(garments), (batch_size,), generator=generator)
    colours = data.random_colours(batch_size, generator)
    images = data.colourise(garments.grey[index], colours, generator) * 2 - 1
    vae = cast(AutoencoderKL, run.model)
    posterior = vae.encode(images).latent_dist
    error = vae.decode(posterior.sample(generator)).sample - images
    divergence = posterior.kl().mean() / posterior.mean[0].numel()
    loss = error.abs().mean() + 2 * error.square().mean() + KL_WEIGHT * divergence
    descend(run, loss)
    return float(error.abs().mean())


@torch.no_grad()
def encode(vae: AutoencoderKL, garments: data.Garments, seed: int, copies: int) -> dict[str, Any]:
    """Latents (float32, unit standard deviation) of all garments, each in ``copies`` colours."""
    generator = torch.Generator().manual_seed(seed + 1)
    index = torch.arange(len(garments)).repeat(copies)
    colours = data.random_colours(len(index), generator)
    parts = []
    for batch in tqdm(torch.arange(len(index)).split(200), desc="encode", mininterval=5):
        images = data.colourise(garments.grey[index[batch]], colours[batch], generator) * 2 - 1
        parts.append(vae.encode(images).latent_dist.sample(generator))
    latents = torch.cat(parts)
    scaling_factor = 1 / latents.std().item()
    return {
        "latents": latents * scaling_factor,
        "scaling_factor": scaling_factor,
        "classes": garments.classes[index],
        "colours": colours,
        "tones": garments.tones[index],
    }


def train(args: argparse.Namespace) -> None:
    """Trains, then encodes the training split with the averaged weights."""
    garments = data.load(args.data, "train")
    run = start(args, "vae", build_vae(), lr=args.lr, total=args.steps, decay=0.998)
    bar = tqdm(initial=run.step, total=args.steps, desc="vae", mininterval=5)
    while run.step < args.steps:
        begin = time.perf_counter()
        error = _step(run, garments, args.batch_size)
        run.average.update(run.model, run.step)
        run.step += 1
        run.seconds += time.perf_counter() - begin
        bar.update()
        bar.set_postfix(error=f"{error:.4f}", refresh=False)
        if run.step % args.save_every == 0 or run.step == args.steps:
            run.save()
    bar.close()
    vae = build_vae().eval()
    load_average(run.path, vae)
    encoded = encode(vae, garments, args.seed, args.colours_per_garment)
    torch.save(encoded, args.out / "latents.pt")
    print(f"{run.step} steps, {run.seconds:.0f} s, scaling factor {encoded['scaling_factor']:.5f}")
    print("channel means", encoded["latents"].mean((0, 2, 3)).tolist())
    print("channel deviations", encoded["latents"].std((0, 2, 3)).tolist())


def main() -> None:
    """Reads the command line and trains."""
    cli = parser("Train the autoencoder and encode the training images.")
    cli.add_argument("--steps", type=int, default=2000, help="optimiser steps")
    cli.add_argument("--batch-size", type=int, default=32, help="images per step")
    cli.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    cli.add_argument("--colours-per-garment", type=int, default=2, help="latents per garment")
    args = cli.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    train(args)


if __name__ == "__main__":
    main()
