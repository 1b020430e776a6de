"""Small Stable Diffusion pipelines with random weights: genuine classes, milliseconds per step."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import diffusers
import numpy as np
import torch
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WORDS = "a photo of cat dog red blue house tree bad".split()
TOKENS = 16  # room for every prompt of the tests
SD = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}


def ddim(**kwargs):
    return diffusers.DDIMScheduler(
        **{**SD, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, **kwargs}
    )


def tokenizer() -> CLIPTokenizer:
    tokens = [f"{word}</w>" for word in WORDS] + sorted({c for w in WORDS for c in w})
    tokens += [f"{c}</w>" for c in sorted({c for w in WORDS for c in w})]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        vocab, merges = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocab.write_text(json.dumps({token: i for i, token in enumerate(dict.fromkeys(tokens))}))
        merges.write_text("#version: 0.2\n")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS)


def components(seed: int = 0, in_channels: int = 4, dtype=torch.float32) -> dict:
    torch.manual_seed(seed)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=in_channels,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4, 8),
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        sample_size=16,
    )
    words = tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    return {
        "unet": _cast(unet, dtype),
        "vae": _cast(vae, dtype),
        "text_encoder": CLIPTextModel(config).to(dtype).eval(),
        "tokenizer": words,
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def _cast(module, dtype):
    """In eval mode and ``dtype``; diffusers' own ``to`` warns of every cast."""
    torch.nn.Module.to(module, dtype)
    return module.eval()


def tiny(kind: str = "text", scheduler=None, seed: int = 0, in_channels: int = 4, **kwargs):
    """A pipeline of ``kind`` "text", "img2img" or "inpaint"."""
    name = {
        "text": "StableDiffusionPipeline",
        "img2img": "StableDiffusionImg2ImgPipeline",
        "inpaint": "StableDiffusionInpaintPipeline",
    }[kind]
    parts = components(seed, in_channels, **kwargs)
    pipe = getattr(diffusers, name)(**parts, scheduler=scheduler or ddim())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(seed: int = 0, size: int = 16) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def mask(size: int = 16) -> Image.Image:
    pixels = np.zeros((size, size), dtype=np.uint8)
    pixels[4:12, 4:12] = 255
    return Image.fromarray(pixels)


def call(pipe, seed: int = 1, **kwargs):
    """One call with a fixed seed; latents (B, 4, 8, 8)."""
    kind = type(pipe).__name__
    arguments = {"prompt": "a photo of cat", "num_inference_steps": 12, "guidance_scale": 5.0}
    if "Img2Img" in kind or "Inpaint" in kind:
        arguments.update(image=picture(), strength=0.8)
    if "Inpaint" in kind:
        arguments.update(mask_image=mask(), height=16, width=16)
    if kind == "StableDiffusionPipeline":
        arguments.update(height=16, width=16)
    arguments.update(output_type="latent", generator=torch.Generator().manual_seed(seed))
    arguments.update(kwargs)
    return pipe(**arguments).images


class CountRows:
    """Counts the rows that a denoiser evaluates, seen from inside the network."""

    def __init__(self, unet) -> None:
        self.rows: list[int] = []
        self.handle = unet.conv_in.register_forward_hook(self._count)

    def _count(self, module, inputs, output) -> None:
        self.rows.append(output.shape[0])

    def __enter__(self):
        return self

    def __exit__(self, *exc) -> None:
        self.handle.remove()
