"""Assembles the boxed pipelines and classifier from checkpoints, in float16, as safetensors.

    python -m training.export --out runs --pipeline PIPELINE --classifier CLASSIFIER
    python -m training.export --out runs --flow FLOW

Builds a pipeline beside its destination and moves it there in one go. A README.md in the old folder
(the model card) of the first pipeline is kept; that of the second is written anew.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)
from safetensors.torch import save_file
from transformers import CLIPTokenizer

from thg_engine.demo.classifier import DemoClassifier
from thg_engine.demo.pipeline_loader import FOLDERS
from training import data, flow_model
from training.card import flow_card
from training.common import load_average, parser
from training.tokenizer import build_tokenizer
from training.train_unet import build_model, build_scheduler
from training.train_vae import build_vae

MAX_PIPELINE_BYTES = 8_000_000
MAX_FLOW_BYTES = 6_000_000
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


def build_flow(runs: Path) -> tuple[StableDiffusion3Pipeline, dict[str, Any]]:
    """The second pipeline, rounded to float16, and what its checkpoint says of the training.

    Its autoencoder is that of ``vae.pt`` or, where there is none, of the first pipeline in the box.
    """
    tokenizer = build_tokenizer(data.vocabulary())
    model = flow_model.FlowModel(tokenizer)
    facts = load_average(runs / "flow.pt", model)
    vae = build_vae(facts["extra"]["scaling_factor"], facts["extra"]["shift_factor"])
    if (runs / "vae.pt").is_file():
        load_average(runs / "vae.pt", vae)
    else:
        vae.load_state_dict(AutoencoderKL.from_pretrained(FOLDERS["sd"] / "vae").state_dict())
    pipe = StableDiffusion3Pipeline(
        transformer=model.transformer.eval(),
        scheduler=flow_model.build_scheduler(),
        vae=vae.eval(),
        text_encoder=model.text_encoder.eval(),
        tokenizer=tokenizer,
        text_encoder_2=model.text_encoder_2.eval(),
        tokenizer_2=build_tokenizer(data.vocabulary()),
        text_encoder_3=None,
        tokenizer_3=None,
    )
    return pipe.to(torch.float16), facts


def folder_bytes(folder: Path) -> int:
    """Size of all files below ``folder``."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def write(pipe: DiffusionPipeline, target: Path) -> Path:
    """Saves ``pipe`` beside ``target``; returns that folder, which ``replace`` moves into place."""
    fresh = target.with_name(target.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    pipe.save_pretrained(fresh, safe_serialization=True)
    for name, part in pipe.components.items():
        if isinstance(part, CLIPTokenizer):
            shutil.rmtree(fresh / name)
            save_tokenizer(part, fresh / name)
    for weights in fresh.rglob("*.safetensors"):
        weights.chmod(0o644)
    return fresh


def replace(target: Path, fresh: Path, limit: int) -> None:
    """Moves ``fresh`` to ``target``; refuses a folder of more than ``limit`` bytes."""
    size = folder_bytes(fresh)
    if size > limit:
        raise SystemExit(f"{fresh} holds {size} bytes, more than {limit}")
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)
    print(f"{target}: {size} bytes")


def export_pipeline(runs: Path, target: Path) -> None:
    """Writes the first pipeline's folder; refuses one above 8,000,000 bytes."""
    fresh = write(build_pipeline(runs), target)
    if (target / "README.md").is_file():
        shutil.copy(target / "README.md", fresh / "README.md")
    replace(target, fresh, MAX_PIPELINE_BYTES)


def export_flow(runs: Path, target: Path) -> None:
    """Writes the second pipeline's folder with its card; refuses one above 6,000,000 bytes."""
    pipe, facts = build_flow(runs)
    fresh = write(pipe, target)
    card = flow_card(pipe, facts, folder_bytes(fresh))
    (fresh / "README.md").write_text(card, encoding="utf-8")
    replace(target, fresh, MAX_FLOW_BYTES)


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
    cli: argparse.ArgumentParser = parser("Assemble pipelines and classifier from checkpoints.")
    cli.add_argument("--pipeline", type=Path, help="pipeline folder to write")
    cli.add_argument("--flow", type=Path, help="folder of the second pipeline to write")
    cli.add_argument("--classifier", type=Path, help="safetensors file to write")
    args = cli.parse_args()
    if args.classifier:
        export_classifier(args.out, args.classifier)
    if args.pipeline:
        export_pipeline(args.out, args.pipeline)
    if args.flow:
        export_flow(args.out, args.flow)


if __name__ == "__main__":
    main()
