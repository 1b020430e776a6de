"""Measures a boxed pipeline over guidance scales and draws a contact sheet.

    python -m training.evaluate --pipeline PIPELINE --classifier CLASSIFIER
    python -m training.evaluate --name flow --pipeline FLOW --steps 28 --card

Prompts are "a photo of a COLOUR GARMENT", each of the 80 pairs equally often; the same latents
serve every guidance scale. Class, colour and joint accuracy are the classifier's verdict; the
Frechet distance is taken in its 64 features, against as many test images with the same labels.

References:
    Heusel et al. 2017, arXiv 1706.08500 (Frechet distance between feature Gaussians).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from PIL import Image
from torchmetrics.image.fid import FrechetInceptionDistance
from tqdm import tqdm

from thg_engine.demo.classifier import CLASSES, COLOURS, NUM_FEATURES, DemoClassifier
from thg_engine.demo.classifier import load_classifier as load_judge
from thg_engine.demo.pipeline_loader import FOLDERS, load_pipeline
from training import data
from training.card import check_card, fill_measured
from training.common import machine, parser


class Features(torch.nn.Module):
    """The classifier's feature space in the form that torchmetrics asks for."""

    num_features = NUM_FEATURES

    def __init__(self, judge: DemoClassifier) -> None:
        super().__init__()
        self.judge = judge

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features of images in [0, 1], shape ``(B, 64)``."""
        return self.judge.features(images)


def targets(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Class and colour of each sample: all 80 pairs in turn."""
    pairs = torch.arange(count) * 37 % (len(CLASSES) * len(COLOURS))
    return pairs % len(CLASSES), pairs // len(CLASSES)


def real_images(
    garments: data.Garments, classes: torch.Tensor, colours: torch.Tensor, seed: int
) -> torch.Tensor:
    """Test images with the given labels, in [0, 1], drawn without replacement."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.empty_like(classes)
    for label in classes.unique():
        wanted = classes == label
        pool = (garments.classes == label).nonzero()[:, 0]
        order = torch.randperm(len(pool), generator=generator)
        index[wanted] = pool[order[: int(wanted.sum())]]
    return data.colourise(garments.grey[index], colours, generator)


@torch.no_grad()
def generate(
    pipe: DiffusionPipeline, prompts: list[str], args: argparse.Namespace, scale: float
) -> torch.Tensor:
    """Images in [0, 1], shape ``(len(prompts), 3, 32, 32)``; latents depend on the seed alone."""
    generator = torch.Generator().manual_seed(args.seed)
    latents = torch.randn(len(prompts), 4, 8, 8, generator=generator)
    flow = isinstance(pipe, StableDiffusion3Pipeline)
    extra = {"max_sequence_length": args.t5_tokens} if flow else {}
    parts = []
    batches = torch.arange(len(prompts)).split(args.batch_size)
    for batch in tqdm(batches, desc=f"w = {scale:g}", mininterval=5):
        images = pipe(
            [prompts[i] for i in batch],
            num_inference_steps=args.steps,
            guidance_scale=scale,
            latents=latents[batch],
            output_type="pt",
            **extra,
        ).images
        parts.append(images.float())
    return torch.cat(parts)


@torch.no_grad()
def measure(
    images: torch.Tensor,
    real: torch.Tensor,
    labels: tuple[torch.Tensor, torch.Tensor],
    judge: DemoClassifier,
) -> dict[str, float]:
    """Accuracies of ``images`` and their Frechet distance to ``real``."""
    class_logits, colour_logits = judge(images)
    class_right = class_logits.argmax(1) == labels[0]
    colour_right = colour_logits.argmax(1) == labels[1]
    distance = FrechetInceptionDistance(feature=Features(judge), normalize=True)
    distance.update(real, real=True)
    distance.update(images, real=False)
    return {
        "class_accuracy": class_right.float().mean().item(),
        "colour_accuracy": colour_right.float().mean().item(),
        "joint_accuracy": (class_right & colour_right).float().mean().item(),
        "frechet": distance.compute().item(),
    }


def contact_sheet(images: torch.Tensor, columns: int, zoom: int = 2) -> Image.Image:
    """Images in [0, 1] on a grid of ``columns``, each enlarged ``zoom`` times."""
    rows = len(images) // columns
    grid = images[: rows * columns].unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2)
    pixels = (grid.reshape(rows * 32, columns * 32, 3) * 255).round().byte().numpy()
    picture = Image.fromarray(pixels)
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)


def draw(pipe: DiffusionPipeline, args: argparse.Namespace) -> None:
    """Saves the sheet: a row for each garment; all colours at w = 1, then the same at w = 5."""
    prompts = [data.prompt(garment, colour) for garment in CLASSES for colour in COLOURS]
    halves = [generate(pipe, prompts, args, scale).unflatten(0, (10, 8)) for scale in (1.0, 5.0)]
    contact_sheet(torch.cat(halves, 1).flatten(0, 1), 16).save(args.sheet)


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """All measurements as a plain dictionary."""
    judge = load_judge(args.classifier) if args.classifier else load_judge()
    pipe = load_pipeline(args.name, path=args.pipeline)
    if args.shift is not None:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, shift=args.shift)
    if args.sheet:
        draw(pipe, args)
    labels = targets(args.samples)
    pairs = zip(*(label.tolist() for label in labels), strict=True)
    prompts = [data.prompt(CLASSES[i], COLOURS[j]) for i, j in pairs]
    test = data.load(args.data, "t10k")
    real, other = (real_images(test, *labels, seed) for seed in (0, 1))
    rows = [{"w": "real", "seconds": 0.0, **measure(other, real, labels, judge)}]
    for scale in args.scales:
        begin = time.perf_counter()
        images = generate(pipe, prompts, args, scale)
        seconds = time.perf_counter() - begin
        rows.append({"w": scale, "seconds": seconds, **measure(images, real, labels, judge)})
        print(json.dumps(rows[-1]))
    return {
        "samples": args.samples,
        "steps": args.steps,
        "scheduler": type(pipe.scheduler).__name__,
        "shift": pipe.scheduler.config.get("shift"),
        "t5_tokens": args.t5_tokens if args.name == "flow" else None,
        "seed": args.seed,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "machine": machine(args.threads),
        "rows": rows,
    }


def command_line() -> argparse.ArgumentParser:
    """The flags."""
    cli = parser("Measure accuracy and Frechet distance over guidance scales.")
    cli.add_argument("--name", choices=[*FOLDERS], default="sd", help="which of the pipelines")
    cli.add_argument("--pipeline", type=Path, help="pipeline folder; default: the package's")
    cli.add_argument("--classifier", type=Path, help="weights; default: the package's")
    cli.add_argument("--scales", type=float, nargs="*", default=[1, 2, 3, 5, 7.5], help="w")
    cli.add_argument("--samples", type=int, default=512, help="images at each scale")
    cli.add_argument("--steps", type=int, default=50, help="steps of the pipeline's scheduler")
    cli.add_argument("--t5-tokens", type=int, default=1, help="flow: zero vectors in T5's place")
    cli.add_argument("--shift", type=float, help="flow: of the scheduler; default: as exported")
    cli.add_argument("--batch-size", type=int, default=64, help="images at once")
    cli.add_argument("--sheet", type=Path, help="PNG contact sheet to write")
    cli.add_argument("--json", type=Path, help="file to write; default: OUT/evaluation.json")
    cli.add_argument("--card", action="store_true", help="flow: the table goes into the model card")
    return cli


def main() -> None:
    """Reads the command line, measures, writes JSON."""
    args = command_line().parse_args()
    torch.set_num_threads(args.threads)
    card = (args.pipeline or FOLDERS[args.name]) / "README.md"
    if args.card:
        check_card(card)
    result = evaluate(args)
    target = args.json or args.out / "evaluation.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {target}")
    if args.card:
        fill_measured(card, result)


if __name__ == "__main__":
    main()
