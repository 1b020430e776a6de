"""Image pipelines of later years: Lumina, Z-Image, Flux, Qwen-Image, CogView 4, modular ones."""

from __future__ import annotations

import functools

import diffusers
import torch
import transformers

from pipelines import picture, tokenizer
from zoo import (
    NEGATIVE,
    PROMPT,
    both,
    clip,
    decoder,
    flow,
    flux_vae,
    noise,
    seeded,
    sized,
    t5,
    vae,
    words,
    zoo,
)
from zoo_images import xl_parts
from zoo_images2 import SHORT, net


@zoo("LuminaPipeline", denoiser="transformer", pattern="concat-reversed", other=sized(32))
def lumina():
    config = {
        "sample_size": 8,
        "in_channels": 4,
        "hidden_size": 32,
        "num_layers": 2,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "multiple_of": 16,
        "cross_attention_dim": 16,
    }
    pipe = diffusers.LuminaPipeline(
        transformer=net("LuminaNextDiT2DModel", **config),
        scheduler=flow(),
        vae=vae(),
        text_encoder=decoder("GemmaModel"),
        tokenizer=words(),
    )
    return pipe, both(clean_caption=False, **sized(16))


@zoo("Lumina2Pipeline", denoiser="transformer", pattern="calls", other=sized(32))
def lumina2():
    config = {
        "sample_size": 8,
        "in_channels": 4,
        "hidden_size": 16,
        "num_layers": 2,
        "num_refiner_layers": 1,
        "num_attention_heads": 2,
        "num_kv_heads": 1,
        "multiple_of": 16,
        "axes_dim_rope": (4, 2, 2),
        "cap_feat_dim": 16,
    }
    pipe = diffusers.Lumina2Pipeline(
        transformer=net("Lumina2Transformer2DModel", **config),
        scheduler=flow(),
        vae=flux_vae(),
        text_encoder=decoder("Gemma2Model"),
        tokenizer=words(),
    )
    return pipe, both(system_prompt="a photo", **SHORT, **sized(16))


@zoo("ZImagePipeline", denoiser="transformer", pattern="concat-reversed", other=sized(24))
def z_image():
    config = {
        "in_channels": 16,
        "dim": 32,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 16,
        "axes_dims": [8, 4, 4],
        "axes_lens": [256, 32, 32],
    }
    transformer = net("ZImageTransformer2DModel", gain=20.0, **config)
    for name, weight in transformer.named_parameters():
        if name.endswith("pad_token"):  # left unset by old versions
            weight.data = noise(*weight.shape)
    pipe = diffusers.ZImagePipeline(
        scheduler=flow(),
        vae=flux_vae(16),
        text_encoder=decoder("Qwen3Model"),
        tokenizer=words(),
        transformer=transformer,
    )
    return pipe, both(**SHORT, **sized(16))


FLUX = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "axes_dims_rope": (4, 4, 8),
}


def flux_parts(**kwargs) -> dict:
    config = {**FLUX, "pooled_projection_dim": 16, **kwargs}
    return {
        "transformer": net("FluxTransformer2DModel", **config),
        "scheduler": flow(),
        "vae": flux_vae(),
        "text_encoder": clip(),
        "tokenizer": tokenizer(),
        "text_encoder_2": t5(1, width=32),
        "tokenizer_2": words(),
    }


TRUE = {"true_cfg_scale": 4.0, **SHORT}


def true_cfg(cls: str, **options):
    """An entry whose guidance is ``true_cfg_scale`` in two calls."""
    return zoo(cls, denoiser="transformer", scale="true_cfg_scale", pattern="calls", **options)


@true_cfg("FluxPipeline", other=sized(24))
def flux_true_cfg():
    return diffusers.FluxPipeline(**flux_parts()), both(**TRUE, **sized(16))


@true_cfg("FluxImg2ImgPipeline", other=sized(24))
def flux_img2img_true_cfg():
    given = both(image=picture(), strength=0.8, num_inference_steps=5, **TRUE, **sized(16))
    return diffusers.FluxImg2ImgPipeline(**flux_parts()), given


@true_cfg("FluxKontextPipeline", other={"max_area": 24**2, **sized(24)})
def flux_kontext():
    pipe = diffusers.FluxKontextPipeline(**flux_parts(guidance_embeds=True))
    fit = {"max_area": 16**2, "_auto_resize": False}
    return pipe, both(image=picture(), **fit, **TRUE, **sized(16))


@zoo("FluxPipeline", denoiser="transformer", guided=False, pattern="none", other=sized(24))
def flux_dev():
    given = both(**SHORT, **sized(16))
    given.pop("negative_prompt")
    return diffusers.FluxPipeline(**flux_parts(guidance_embeds=True)), given


@zoo("ChromaPipeline", denoiser="transformer", pattern="calls", other=sized(24))
def chroma():
    hidden = {"approximator_hidden_dim": 32, "approximator_layers": 1}
    config = {**FLUX, **hidden, "approximator_num_channels": 16}
    pipe = diffusers.ChromaPipeline(
        scheduler=flow(),
        vae=flux_vae(),
        text_encoder=t5(1, width=32),
        tokenizer=words(),
        transformer=net("ChromaTransformer2DModel", gain=20.0, **config),
    )
    return pipe, both(**SHORT, **sized(16))


def qwen_vl():
    """The language model of Qwen 2.5 VL with a vision tower that is not used."""
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
    text = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_scaling": rope,
        "pad_token_id": 0,
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config={**vision, "out_hidden_size": 16}
    )
    return seeded(lambda: transformers.Qwen2_5_VLForConditionalGeneration(config))


def qwen_parts(levels: int) -> dict:
    """With an autoencoder that shrinks by 2 per level."""
    config = {
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "axes_dims_rope": (8, 4, 4),
    }
    make = functools.partial(
        diffusers.AutoencoderKLQwenImage,
        base_dim=2,
        z_dim=4,
        dim_mult=[1] * (levels + 1),
        num_res_blocks=0,
        temperal_downsample=[False] * levels,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    transformer = net("QwenImageTransformer2DModel", **config)
    return {"transformer": transformer, "scheduler": flow(), "vae": seeded(make)}


@true_cfg("QwenImagePipeline", other=sized(24))
def qwen_image():
    names = words(256, im_start="<|im_start|>", im_end="<|im_end|>")
    pipe = diffusers.QwenImagePipeline(**qwen_parts(1), text_encoder=qwen_vl(), tokenizer=names)
    # Of a tokenizer of words, up to the prompt: the template's head.
    head = pipe.prompt_template_encode.split("{}")[0]
    pipe.prompt_template_encode_start_idx = len(names(head, add_special_tokens=False).input_ids)
    given = both(true_cfg_scale=4.0, **sized(16))
    return pipe, {k: v for k, v in given.items() if k != "guidance_scale"}


def qwen_embeds(rows: int = 1) -> dict:
    """Embeddings in the place of a text encoder's, for ``rows`` prompts."""
    made = {}
    for i, name in enumerate(("prompt_embeds", "negative_prompt_embeds")):
        made[name] = noise(rows, 6, 16, seed=60 + i)
        made[f"{name}_mask"] = (torch.arange(6) < 6 - i).expand(rows, 6).long()
    return made


@true_cfg("QwenImageEditPipeline", batch=qwen_embeds(2), other=sized(256))
def qwen_image_edit():
    """Without its text encoder; every image becomes one of a million pixels."""
    pipe = diffusers.QwenImageEditPipeline(
        **qwen_parts(6), text_encoder=None, tokenizer=None, processor=None
    )
    given = {"image": picture(), "true_cfg_scale": 4.0, "num_inference_steps": 4}
    return pipe, {**given, **qwen_embeds(), **sized(512), "output_type": "latent"}


@zoo("CogView4Pipeline", denoiser="transformer", pattern="calls", other=sized(32))
def cogview4():
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "text_embed_dim": 16,
        "time_embed_dim": 8,
        "condition_dim": 4,
    }
    pipe = diffusers.CogView4Pipeline(
        tokenizer=words(side="left"),
        text_encoder=decoder("GlmModel"),
        vae=vae(),
        transformer=net("CogView4Transformer2DModel", **config),
        scheduler=flow(base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True),
    )
    return pipe, both(**SHORT, **sized(16))


def modular(guider: str, **options):
    """An entry of Stable Diffusion XL in blocks, guided by the class so named."""
    given = {"guider": "guider", "scale": None, "pattern": "calls", "callbacks": False}
    given.update(denoiser="unet", needs=(guider, "StableDiffusionXLAutoBlocks"), other=sized(24))
    return zoo("StableDiffusionXLModularPipeline", **{**given, **options})


def guided(guider: str, **options):
    pipe = diffusers.StableDiffusionXLAutoBlocks().init_pipeline()
    made = getattr(diffusers, guider)(guidance_scale=5.0, **options)
    pipe.update_components(**xl_parts(), guider=made)
    given = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "num_inference_steps": 4}
    return pipe, {**given, "output_type": "latent", "output": "images", **sized(16)}


@modular("ClassifierFreeGuidance")
def sdxl_modular():
    return guided("ClassifierFreeGuidance")


@modular("ClassifierFreeGuidance", rows=(1,) * 7)
def sdxl_modular_window():
    """Guided from a quarter of the run on."""
    return guided("ClassifierFreeGuidance", start=0.25)


@modular("ClassifierFreeZeroStarGuidance")
def sdxl_modular_zero_star():
    return guided("ClassifierFreeZeroStarGuidance")


@modular("AdaptiveProjectedGuidance")
def sdxl_modular_projected():
    """With momentum: what it returns hangs on the steps before."""
    return guided("AdaptiveProjectedGuidance", adaptive_projected_guidance_momentum=-0.5)


@modular("TangentialClassifierFreeGuidance")
def sdxl_modular_tangential():
    return guided("TangentialClassifierFreeGuidance")


@modular("SmoothedEnergyGuidance", pattern="three-calls", rows=(1,) * 11)
def sdxl_modular_energy():
    """A third branch whose attention is blurred."""
    return guided("SmoothedEnergyGuidance", seg_guidance_layers=[0])
