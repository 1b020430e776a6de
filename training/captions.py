"""What both denoisers train on, latents with captions, and the text encoder that reads these."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTextConfig, CLIPTokenizer

from training import data
from training.tokenizer import MAX_TOKENS


class CaptionedLatents:
    """Random batches of latents and caption tokens out of the ``latents.pt`` of ``train_vae``."""

    def __init__(self, path: Path, tokenizer: CLIPTokenizer) -> None:
        self.data: dict[str, Any] = torch.load(path, weights_only=True)
        self.tokenizer = tokenizer
        self._tokens: dict[str, torch.Tensor] = {}

    def tokens(self, captions: list[str]) -> torch.Tensor:
        """Token ids, shape ``(B, MAX_TOKENS)``; each caption is tokenised once."""
        for text in set(captions) - self._tokens.keys():
            ids = self.tokenizer(text, padding="max_length", truncation=True).input_ids
            self._tokens[text] = torch.tensor(ids)
        return torch.stack([self._tokens[text] for text in captions])

    def draw(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents, shape ``(count, 4, 8, 8)``, and the tokens of captions drawn for them."""
        index = torch.randint(len(self.data["latents"]), (count,), generator=generator)
        classes, colours, tones = (self.data[key][index] for key in ("classes", "colours", "tones"))
        tokens = self.tokens(data.random_captions(classes, colours, tones, generator))
        return self.data["latents"][index], tokens


def strata(count: int, generator: torch.Generator) -> torch.Tensor:
    """Ascending numbers in [0, 1), one drawn from each of ``count`` equal intervals."""
    return (torch.arange(count) + torch.rand(count, generator=generator)) / count


def text_config(tokenizer: CLIPTokenizer, width: int) -> CLIPTextConfig:
    """A text encoder of two layers for this tokenizer; projections are as wide as its layers."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
