"""The parts of the second boxed pipeline: a transformer and text encoders as in Stable Diffusion 3.

Stable Diffusion 3 reads a prompt with two CLIP encoders and with T5. Here both CLIP encoders are
small and trained with the transformer, and there is no T5: diffusers then puts
``max_sequence_length`` (256 by default) zero vectors in place of its tokens. As the context has no
positions, these stay equal to each other in every layer, so that n of them weigh in the attention
as one whose logit is larger by log n. Training uses that one token, and draws n anew for each
sample, because n is the caller's choice.

References:
    Esser et al. 2024, arXiv 2403.03206 (Stable Diffusion 3).
    Peebles and Xie 2022, arXiv 2212.09748 (adaptive layer norms that start at zero).
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from training.captions import text_config

TEXT_WIDTHS = (64, 32)
HEADS, HEAD_WIDTH, LAYERS = 3, 32, 6
MAX_ZERO_TOKENS = 256
SHIFT = 1.0
"""Of the sampling grid. Stable Diffusion 3 takes 3 at 1024x1024 pixels, where neighbouring latents
repeat each other and noise hides less; 8x8 latents hardly do."""


def _heads(count: int, *streams: tuple[Tensor, nn.Module, nn.Module | None]) -> Tensor:
    """Projected, split into heads, normed, joined: shape ``(B, count, tokens, width)``."""
    parts = []
    for tokens, project, norm in streams:
        part = project(tokens).unflatten(-1, (count, -1)).transpose(1, 2)
        parts.append(part if norm is None else norm(part))
    return torch.cat(parts, dim=2)


class CountedAttention:
    """Joint attention over image and context tokens, with a bias on the logits of the keys."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        image, context, n = hidden_states, encoder_hidden_states, attn.heads
        query = _heads(
            n, (image, attn.to_q, attn.norm_q), (context, attn.add_q_proj, attn.norm_added_q)
        )
        key = _heads(
            n, (image, attn.to_k, attn.norm_k), (context, attn.add_k_proj, attn.norm_added_k)
        )
        value = _heads(n, (image, attn.to_v, None), (context, attn.add_v_proj, None))
        mixed = scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        mixed = mixed.transpose(1, 2).flatten(2)
        to_image, to_context = mixed.tensor_split([image.shape[1]], dim=1)
        if not attn.context_pre_only:
            to_context = attn.to_add_out(to_context)
        return attn.to_out[0](to_image), to_context


def build_transformer() -> SD3Transformer2DModel:
    """The transformer with fresh weights: every latent pixel is a token, 64 in all."""
    width = HEADS * HEAD_WIDTH
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=LAYERS,
        attention_head_dim=HEAD_WIDTH,
        num_attention_heads=HEADS,
        joint_attention_dim=sum(TEXT_WIDTHS),
        caption_projection_dim=width,
        pooled_projection_dim=sum(TEXT_WIDTHS),
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    modulations = [block.norm1.linear for block in model.transformer_blocks]
    modulations += [block.norm1_context.linear for block in model.transformer_blocks]
    for layer in (*modulations, model.norm_out.linear, model.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


def build_scheduler(shift: float = SHIFT) -> FlowMatchEulerDiscreteScheduler:
    """Euler's method on the straight paths of rectified flow."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)


class FlowModel(nn.Module):
    """Transformer and text encoders as one trainable module."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.transformer = build_transformer()
        first, second = (text_config(tokenizer, width) for width in TEXT_WIDTHS)
        self.text_encoder = CLIPTextModelWithProjection(first)
        self.text_encoder_2 = CLIPTextModelWithProjection(second)

    def count_zero_tokens(self) -> None:
        """Makes ``forward`` take ``zero_tokens``; what is exported computes attention as usual."""
        self.transformer.set_attn_processor(CountedAttention())

    def encode(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Context ``(B, 16, 96)``, the layers before the last, and pooled ends ``(B, 96)``."""
        outputs = [
            encoder(tokens, output_hidden_states=True)
            for encoder in (self.text_encoder, self.text_encoder_2)
        ]
        context = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return context, torch.cat([output.text_embeds for output in outputs], dim=-1)

    def forward(self, noisy: Tensor, sigma: Tensor, tokens: Tensor, zero_tokens: Tensor) -> Tensor:
        """The predicted velocity.

        Args:
            noisy: latents ``(B, 4, 8, 8)`` at noise level ``sigma``.
            sigma: ``(B,)``, in [0, 1].
            tokens: ``(B, 16)``, for both encoders.
            zero_tokens: ``(B,)``, at least 1, whole or not: how many zero vectors stand for T5.
        """
        context, pooled = self.encode(tokens)
        context = torch.cat([context, context.new_zeros(len(context), 1, context.shape[-1])], dim=1)
        keys = noisy[0, 0].numel() + context.shape[1]
        bias = torch.cat([noisy.new_zeros(len(noisy), keys - 1), zero_tokens.log()[:, None]], dim=1)
        velocity: Tensor = self.transformer(
            noisy,
            encoder_hidden_states=context,
            pooled_projections=pooled,
            timestep=1000 * sigma,
            joint_attention_kwargs={"attention_mask": bias[:, None, None]},
            return_dict=False,
        )[0]
        return velocity
