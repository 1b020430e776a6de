"""The model card of the second boxed pipeline, filled by ``export`` and by ``evaluate``."""

from __future__ import annotations

import platform
from pathlib import Path
from string import Template
from typing import Any

import diffusers
import torch
import transformers

TEMPLATE = Path(__file__).with_name("flow_card.md")
BEGIN, END = "<!-- measured -->\n", "<!-- end of measured -->\n"


def _parameters(model: torch.nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in model.parameters()):,}"


def flow_card(pipe: diffusers.StableDiffusion3Pipeline, facts: dict[str, Any], size: int) -> str:
    """The card of ``pipe`` in ``size`` bytes; ``facts`` as ``load_average`` returns them."""
    config, extra = pipe.transformer.config, facts["extra"]
    modules = ("transformer", "text_encoder", "text_encoder_2", "vae")
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        {name: _parameters(getattr(pipe, name)) for name in modules},
        layers=config.num_layers,
        heads=config.num_attention_heads,
        width=config.num_attention_heads * config.attention_head_dim,
        text_width=pipe.text_encoder.config.hidden_size,
        text_width_2=pipe.text_encoder_2.config.hidden_size,
        vocabulary=len(pipe.tokenizer),
        scaling_factor=pipe.vae.config.scaling_factor,
        shift_factor=pipe.vae.config.shift_factor,
        shift=pipe.scheduler.config.shift,
        megabytes=f"{size / 1e6:.2f}",
        steps=f"{facts['step']:,}",
        seconds=f"{facts['seconds']:,.0f}",
        loss=f"{extra['loss']:.4f}",
        lr=f"{extra['lr']:g}",
        **{key: extra[key] for key in ("batch_size", "seed", "machine")},
        python=platform.python_version(),
        torch=torch.__version__,
        diffusers=diffusers.__version__,
        transformers=transformers.__version__,
    )


def measured(result: dict[str, Any]) -> str:
    """The card's table of what ``evaluate`` found."""
    heads = ("w", "garment", "colour", "both", "Frechet distance", "seconds")
    lines = [
        f"`{result['scheduler']}` with shift {result['shift']:g}, {result['steps']} steps,",
        f"`max_sequence_length={result['t5_tokens']}`, {result['samples']} samples at each",
        'guidance scale w, "a photo of a COLOUR GARMENT" over all 80 pairs, the same latents at',
        "each w.",
        "Accuracy: the judge, `thg_engine.demo.load_classifier()`, agrees with the prompt. Frechet",
        f"distance: in the judge's 64 features, to {result['samples']} test images with the same",
        f"labels. Seconds: for all samples on {result['machine']}.",
        "",
        f"| {' | '.join(heads)} |",
        "|---" * len(heads) + "|",
    ]
    for row in result["rows"]:
        real = row["w"] == "real"
        accuracies = (row[f"{name}_accuracy"] for name in ("class", "colour", "joint"))
        cells = ["other test images" if real else f"{row['w']:g}"]
        cells += [f"{value:.3f}" for value in accuracies]
        cells += [f"{row['frechet']:.2f}", "-" if real else f"{row['seconds']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    error = (0.9 * 0.1 / result["samples"]) ** 0.5
    lines += ["", f"One sampling seed; the standard error of an accuracy of 0.9 is {error:.3f}."]
    return "\n".join(lines) + "\n"


def check_card(path: Path) -> None:
    """Raises ``SystemExit`` unless ``path`` is a card with a place for the table."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"{path} is no card of training.export --flow: its markers are missing")


def fill_measured(path: Path, result: dict[str, Any]) -> None:
    """Puts the table of ``result`` into the card at ``path``, in place of an earlier one."""
    check_card(path)
    before, rest = path.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    path.write_text(before + BEGIN + measured(result) + END + after, encoding="utf-8")
