"""Assembles the boxed pipeline and classifier from checkpoints, in float16, as safetensors.

    python -m training.export --out runs --pipeline PIPELINE --classifier CLASSIFIER

Builds the pipeline beside its destination and moves it there in one go; a README.md in the old
folder (the model card) is kept.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from transformers import CLIPTokenizer

from thg_engine.demo.classifier import DemoClassifier
from training import data
from training.common import load_average, parser
from training.tokenizer import build_tokenizer
from training.train_unet import build_model, build_scheduler
from training.train_vae import build_vae

MAX_PIPELINE_BYTES = 8_000_000
MAX_CLASSIFIER_BYTES = 1_000_000


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """``vocab.json`` and ``merges.txt`` beside the configuration: what every version can read."""
    tokenizer.save_pretrained(folder)
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    text = "\n".join(["#version: 0.2", *merges]) + "\n"
    (folder / "merges.txt").write_text(text, encoding="utf-8")


def build_pipeline(runs: Path) -> StableDiffusionPipeline:
    """The pipeline with the averaged weights of ``runs``, rounded to float16."""
    tokenizer = build_tokenizer(data.vocabulary())
    model = build_model(tokenizer)
    load_average(runs / "unet.pt", model)
    latents = torch.load(runs / "latents.pt", weights_only=True, mmap=True)
    vae = build_vae(round(latents["scaling_factor"], 5))
    load_average(runs / "vae.pt", vae)
    pipe = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=model["text_encoder"].eval(),
        tokenizer=tokenizer,
        unet=model["unet"].eval(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipe.to(torch.float16)


def folder_bytes(folder: Path) -> int:
    """Size of all files below ``folder``."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def export_pipeline(runs: Path, target: Path) -> None:
    """Writes the pipeline folder; refuses one above 8,000,000 bytes."""
    fresh = target.with_name(target.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    pipe = build_pipeline(runs)
    pipe.save_pretrained(fresh, safe_serialization=True)
    shutil.rmtree(fresh / "tokenizer")
    save_tokenizer(pipe.tokenizer, fresh / "tokenizer")
    if (target / "README.md").is_file():
        shutil.copy(target / "README.md", fresh / "README.md")
    size = folder_bytes(fresh)
    if size > MAX_PIPELINE_BYTES:
        raise SystemExit(f"{fresh} holds {size} bytes, more than {MAX_PIPELINE_BYTES}")
    for weights in fresh.rglob("*.safetensors"):
        weights.chmod(0o644)
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh.rename(target)
    print(f"{target}: {size} bytes")


def export_classifier(runs: Path, target: Path) -> None:
    """Writes the classifier's averaged weights as one float16 file."""
    model = DemoClassifier()
    load_average(runs / "classifier.pt", model)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    save_file({k: v.contiguous() for k, v in model.half().state_dict().items()}, partial)
    partial.chmod(0o644)
    partial.replace(target)
    size = target.stat().st_size
    if size > MAX_CLASSIFIER_BYTES:
        raise SystemExit(f"{target} holds {size} bytes, more than {MAX_CLASSIFIER_BYTES}")
    print(f"{target}: {size} bytes")


def main() -> None:
    """Reads the command line and exports."""
    cli: argparse.ArgumentParser = parser("Assemble pipeline and classifier from checkpoints.")
    cli.add_argument("--pipeline", type=Path, help="pipeline folder to write")
    cli.add_argument("--classifier", type=Path, help="safetensors file to write")
    args = cli.parse_args()
    if args.classifier:
        export_classifier(args.out, args.classifier)
    if args.pipeline:
        export_pipeline(args.out, args.pipeline)


if __name__ == "__main__":
    main()
