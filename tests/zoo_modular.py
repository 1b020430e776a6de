"""Pipelines that leave guidance to a guider: modular ones, and the standard ones of that kind.

Text encoders are left out of the blocks: the calls bring embeddings.
"""

from __future__ import annotations

import functools

import diffusers
import torch
import transformers

from zoo import clip, flow, noise, seeded, sized, t5, words, zoo
from zoo_images2 import net, sd3_parts
from zoo_images3 import qwen_vl, z_image
from zoo_videos import ltx_parts, wan_net, wan_vae
from zoo_videos2 import glyphs, hunyuan_video15

GUIDED = {"guider": "guider", "scale": None, "pattern": "calls", "callbacks": False}
BLOCKS = {**GUIDED, "denoiser": "transformer", "copies": None}
SHORT_RUN = {"num_inference_steps": 4, "output": "latents"}


def cfg(**options):
    return diffusers.ClassifierFreeGuidance(**{"guidance_scale": 5.0, **options})


def blocks(name: str, *left_out: str, **parts):
    """A pipeline of the blocks so named, without its text encoder and decoder."""
    made = getattr(diffusers, name)()
    for block in ("text_encoder", "decode", *left_out):
        made.sub_blocks.pop(block)
    pipe = made.init_pipeline()
    wanted = {spec.name for spec in made.expected_components}
    pipe.update_components(**{name: part for name, part in parts.items() if name in wanted})
    return pipe


def embedded(rows: int = 1, length: int = 8, width: int = 16) -> dict:
    """Embeddings of ``rows`` prompts and their negatives."""
    given = {"prompt_embeds": noise(rows, length, width, seed=3)}
    return {**given, "negative_prompt_embeds": noise(rows, length, width, seed=4)}


def masked(rows: int = 1, name: str = "prompt_embeds_mask") -> dict:
    """Embeddings with masks of the same length."""
    masks = {f"{side}{name}": torch.ones(rows, 8, dtype=torch.long) for side in ("", "negative_")}
    return {**embedded(rows), **masks}


@zoo("WanModularPipeline", batch=embedded(2), other=sized(32), **BLOCKS)
def wan_modular():
    parts = {"transformer": wan_net(), "vae": wan_vae(), "scheduler": flow(shift=3.0)}
    pipe = blocks("WanBlocks", **parts, guider=cfg())
    return pipe, {**embedded(), **SHORT_RUN, "num_frames": 5, **sized(16)}


@zoo(
    "WanModularPipeline",
    batch=embedded(2),
    other=sized(32),
    **{**BLOCKS, "denoiser": "transformer,transformer_2", "guider": "guider,guider_2"},
)
def wan22_modular():
    """Two networks with a guider each; the second takes over during the run."""
    parts = {"transformer": wan_net(), "transformer_2": wan_net(seed=5), "vae": wan_vae()}
    guiders = {"guider": cfg(), "guider_2": cfg(guidance_scale=3.0)}
    pipe = blocks("Wan22Blocks", **parts, **guiders, scheduler=flow())
    pipe.update_components(boundary_ratio=0.6)
    given = {**embedded(), **SHORT_RUN, "num_inference_steps": 6, "num_frames": 5}
    return pipe, {**given, **sized(16)}


def pooled(rows: int = 1) -> dict:
    given = embedded(rows, 12, 32)
    for seed, side in enumerate(("", "negative_")):
        given[f"{side}pooled_prompt_embeds"] = noise(rows, 32, seed=seed + 7)
    return given


@zoo("StableDiffusion3ModularPipeline", batch=pooled(2), other=sized(24), **BLOCKS)
def sd3_modular():
    pipe = blocks("StableDiffusion3AutoBlocks", **sd3_parts(), guider=cfg())
    return pipe, {**pooled(), **SHORT_RUN, **sized(16)}


def listed(rows: int = 1) -> dict:
    """Lists of one matrix per prompt."""
    return {name: list(value) for name, value in embedded(rows).items()}


@zoo("ZImageModularPipeline", batch=listed(2), other=sized(32), **BLOCKS)
def z_image_modular():
    pipe = blocks("ZImageAutoBlocks", **z_image()[0].components, guider=cfg())
    return pipe, {**listed(), **SHORT_RUN, **sized(16)}


MASK = "prompt_attention_mask"


@zoo("LTXModularPipeline", batch=masked(2, MASK), other=sized(64), **BLOCKS)
def ltx_modular():
    pipe = blocks("LTXAutoBlocks", **ltx_parts(), guider=cfg())
    return pipe, {**masked(1, MASK), **SHORT_RUN, "num_frames": 9, **sized(32)}


@zoo("HunyuanVideo15ModularPipeline", batch=glyphs(2), other=sized(32), **BLOCKS)
def hunyuan_video15_modular():
    parts = hunyuan_video15()[0].components
    pipe = blocks("HunyuanVideo15AutoBlocks", **{**parts, "guider": cfg()})
    return pipe, {**glyphs(), **SHORT_RUN, "num_frames": 5, **sized(16)}


def flux2_net():
    config = {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "timestep_guidance_channels": 16,
        "axes_dims_rope": (4, 4, 4, 4),
        "guidance_embeds": False,
    }
    return net("Flux2Transformer2DModel", gain=20.0, **config)


def flux2_vae():
    make = functools.partial(
        diffusers.AutoencoderKLFlux2,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
    )
    return seeded(make)


@zoo("Flux2KleinModularPipeline", batch=embedded(2), other=sized(64), **BLOCKS)
def flux2_klein_modular():
    parts = {"transformer": flux2_net(), "vae": flux2_vae(), "scheduler": flow()}
    pipe = blocks("Flux2KleinBaseAutoBlocks", **parts, guider=cfg())
    return pipe, {**embedded(), **SHORT_RUN, **sized(32)}


def layered(rows: int = 1) -> dict:
    """Embeddings of two layers of a text encoder."""
    given = masked(rows)
    for seed, name in enumerate(embedded()):
        given[name] = noise(rows, 8, 2, 16, seed=seed + 3)
    return {**given, **{name: m.bool() for name, m in given.items() if name.endswith("mask")}}


def krea2_net():
    config = {
        "in_channels": 16,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 32,
        "timestep_embed_dim": 16,
        "text_hidden_dim": 16,
        "num_text_layers": 2,
        "text_num_attention_heads": 2,
        "text_num_key_value_heads": 2,
        "text_intermediate_size": 32,
        "num_layerwise_text_blocks": 1,
        "num_refiner_text_blocks": 1,
        "axes_dims_rope": (4, 6, 6),
    }
    return net("Krea2Transformer2DModel", **config)


@zoo("Krea2ModularPipeline", batch=layered(2), other=sized(24), **BLOCKS)
def krea2_modular():
    """In the original formulation, c + s (c - u)."""
    parts = {"transformer": krea2_net(), "scheduler": flow()}
    guider = cfg(guidance_scale=4.0, use_original_formulation=True)
    pipe = blocks("Krea2AutoBlocks", **parts, guider=guider)
    return pipe, {**layered(), **SHORT_RUN, **sized(16)}


@zoo("ErnieImageModularPipeline", batch=listed(2), other=sized(64), **BLOCKS)
def ernie_image_modular():
    config = {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_layers": 2,
        "ffn_hidden_size": 32,
        "in_channels": 16,
        "out_channels": 16,
        "text_in_dim": 16,
        "rope_axes_dim": (4, 6, 6),
    }
    parts = {"transformer": net("ErnieImageTransformer2DModel", **config), "scheduler": flow()}
    pipe = blocks("ErnieImageAutoBlocks", "prompt_enhancer", **parts, guider=cfg())
    return pipe, {**listed(), **SHORT_RUN, **sized(32)}


@zoo(
    "HunyuanImagePipeline",
    batch=glyphs(2),
    other=sized(32),
    **{**GUIDED, "denoiser": "transformer", "copies": None},
)
def hunyuan_image():
    network = net(
        "HunyuanImageTransformer2DModel",
        gain=20.0,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=16,
        text_embed_2_dim=8,
        rope_axes_dim=(8, 8),
    )
    encoder = functools.partial(
        diffusers.AutoencoderKLHunyuanImage,
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32),
        layers_per_block=1,
        spatial_compression_ratio=2,
        sample_size=16,
    )
    pipe = diffusers.HunyuanImagePipeline(
        scheduler=flow(),
        vae=seeded(encoder),
        text_encoder=qwen_vl(),
        tokenizer=words(),
        text_encoder_2=t5(width=8),
        tokenizer_2=transformers.ByT5Tokenizer(),
        transformer=network,
        guider=cfg(),
    )
    return pipe, {**glyphs(), "num_inference_steps": 4, "output_type": "latent", **sized(16)}


@zoo(
    "MotifVideoPipeline",
    batch=masked(2, MASK),
    other=sized(32),
    **{**GUIDED, "denoiser": "transformer", "copies": None, "result": "frames"},
)
def motif_video():
    network = net(
        "MotifVideoTransformer3DModel",
        gain=20.0,
        in_channels=33,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_single_layers=1,
        text_embed_dim=16,
        rope_axes_dim=(4, 4, 4),
    )
    pipe = diffusers.MotifVideoPipeline(
        scheduler=flow(),
        vae=wan_vae(),
        text_encoder=clip(),
        tokenizer=words(),
        transformer=network,
        guider=cfg(),
    )
    given = {"num_inference_steps": 4, "num_frames": 5, "output_type": "latent", **sized(16)}
    return pipe, {**masked(1, MASK), **given}
