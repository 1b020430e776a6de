"""Further image pipelines with one call per branch, most of them given embeddings."""

from __future__ import annotations

import functools

import diffusers

from pipelines import mask, picture
from zoo import both, decoder, flow, flux_vae, louder, noise, seeded, sized, words, zoo
from zoo_images2 import SHORT, net
from zoo_images3 import (
    FLUX,
    TRUE,
    chroma,
    cogview4,
    flux_parts,
    qwen_embeds,
    qwen_image,
    qwen_parts,
    qwen_vl,
    true_cfg,
)
from zoo_modular import embedded, flux2_net, flux2_vae, krea2_net, layered, masked

FIT = {"max_area": 16**2, "_auto_resize": False}
PARTLY = {"strength": 0.8, "num_inference_steps": 5}


def painted() -> dict:
    """A picture, the part of it to paint anew, and how strongly."""
    return {"image": picture(), "mask_image": mask(), **PARTLY}


@true_cfg("FluxInpaintPipeline", other=sized(24))
def flux_inpaint():
    given = both(**TRUE, **sized(16)) | painted()
    return diffusers.FluxInpaintPipeline(**flux_parts()), given


@true_cfg("FluxKontextInpaintPipeline")
def flux_kontext_inpaint():
    pipe = diffusers.FluxKontextInpaintPipeline(**flux_parts(guidance_embeds=True))
    return pipe, both(**FIT, **TRUE, **sized(16)) | painted()


@true_cfg("FluxControlNetPipeline", other=sized(24))
def flux_controlnet():
    """Its ControlNet is called once per step, for the prompt."""
    config = {**FLUX, "num_single_layers": 1, "pooled_projection_dim": 16}
    control = net("FluxControlNetModel", seed=4, **config)
    pipe = diffusers.FluxControlNetPipeline(**flux_parts(), controlnet=control)
    given = {"control_image": picture(), "controlnet_conditioning_scale": 0.5}
    return pipe, both(**given, **TRUE, **sized(16))


def chroma_as(name: str):
    return getattr(diffusers, name)(**chroma()[0].components)


@zoo("ChromaImg2ImgPipeline", denoiser="transformer", pattern="calls", other=sized(24))
def chroma_img2img():
    given = both(image=picture(), **SHORT, **sized(16)) | PARTLY
    return chroma_as("ChromaImg2ImgPipeline"), given


@zoo("ChromaInpaintPipeline", denoiser="transformer", pattern="calls", other=sized(24))
def chroma_inpaint():
    """It asks for an entry of the configuration that a checkpoint may have."""
    pipe = chroma_as("ChromaInpaintPipeline")
    pipe.transformer.register_to_config(guidance_embeds=False)
    return pipe, both(**SHORT, **sized(16)) | painted()


def qwen_control(extra: int = 0):
    config = {"in_channels": 16, "out_channels": 4, "num_layers": 1, "attention_head_dim": 16}
    heads = {"num_attention_heads": 2, "joint_attention_dim": 16, "axes_dims_rope": (8, 4, 4)}
    return net(
        "QwenImageControlNetModel", seed=4, extra_condition_channels=extra, **config, **heads
    )


def qwen_as(name: str, **parts):
    """A pipeline of Qwen-Image's parts, and the arguments of a call."""
    text, given = qwen_image()
    pipe = getattr(diffusers, name)(**text.components, **parts)
    pipe.prompt_template_encode_start_idx = text.prompt_template_encode_start_idx
    return pipe, given


@true_cfg("QwenImageControlNetPipeline", other=sized(24))
def qwen_image_controlnet():
    pipe, given = qwen_as("QwenImageControlNetPipeline", controlnet=qwen_control())
    return pipe, {**given, "control_image": picture()}


@true_cfg("QwenImageControlNetInpaintPipeline", other=sized(24))
def qwen_image_controlnet_inpaint():
    pipe, given = qwen_as("QwenImageControlNetInpaintPipeline", controlnet=qwen_control(4))
    return pipe, {**given, "control_image": picture(), "control_mask": mask()}


def qwen_edit(name: str):
    """Without its text encoder; every image becomes one of a million pixels."""
    silent = {"text_encoder": None, "tokenizer": None, "processor": None}
    return getattr(diffusers, name)(**qwen_parts(6), **silent)


def edited(**kwargs) -> dict:
    given = {"image": picture(), "true_cfg_scale": 4.0, "num_inference_steps": 4}
    return {**given, **qwen_embeds(), "output_type": "latent", **kwargs}


@true_cfg("QwenImageEditInpaintPipeline", batch=qwen_embeds(2))
def qwen_image_edit_inpaint():
    pipe = qwen_edit("QwenImageEditInpaintPipeline")
    return pipe, edited(**painted(), **sized(512)) | {"true_cfg_scale": 8.0}


@true_cfg("QwenImageEditPlusPipeline", batch=None, other=sized(256))
def qwen_image_edit_plus():
    """Two pictures to edit."""
    pipe = qwen_edit("QwenImageEditPlusPipeline")
    return pipe, edited(image=[picture(), picture(1)], **sized(512))


@zoo("CogView4ControlPipeline", denoiser="transformer", pattern="calls", other=sized(32))
def cogview4_control():
    """Control latents beside the sample."""
    parts = cogview4()[0].components
    config = {**parts["transformer"].config, "in_channels": 8, "out_channels": 4}
    parts["transformer"] = net("CogView4Transformer2DModel", **config)
    pipe = diffusers.CogView4ControlPipeline(**parts)
    return pipe, both(control_image=picture(), **SHORT, **sized(16))


CALLS = {"denoiser": "transformer", "pattern": "calls"}


def unspoken(**kwargs) -> dict:
    """Arguments of a guided call without prompts."""
    return {k: v for k, v in both(**kwargs).items() if not k.endswith("prompt")}


@true_cfg("QwenImageLayeredPipeline", batch=None, copies=None)
def qwen_image_layered():
    """Pictures one upon another, of 640 pixels a side; it has no latents to return."""
    names = words(256, im_start="<|im_start|>", im_end="<|im_end|>")
    parts = {**qwen_parts(6), "text_encoder": qwen_vl(), "tokenizer": names, "processor": None}
    config = {
        **parts["transformer"].config,
        "use_additional_t_cond": True,
        "use_layer3d_rope": True,
    }
    parts["transformer"] = net("QwenImageTransformer2DModel", **config)
    louder(parts["vae"], 8, "weight")
    louder(parts["vae"], 0.1, "decoder.conv_out.weight")  # within the range of pixels
    pipe = diffusers.QwenImageLayeredPipeline(**parts)
    given = both(image=picture(), layers=2, true_cfg_scale=4.0, output_type="pt")
    given.pop("guidance_scale")
    return pipe, given


@zoo("Krea2Pipeline", batch=layered(2), other=sized(24), **CALLS)
def krea2():
    """In the original formulation, c + s (c - u)."""
    parts = {**qwen_parts(1), "transformer": krea2_net()}
    pipe = diffusers.Krea2Pipeline(**parts, text_encoder=None, tokenizer=None)
    return pipe, unspoken(**layered(), **sized(16))


def klein(name: str):
    return getattr(diffusers, name)(
        transformer=flux2_net(),
        vae=flux2_vae(),
        scheduler=flow(),
        text_encoder=None,
        tokenizer=None,
    )


@zoo("Flux2KleinPipeline", batch=embedded(2), other=sized(64), **CALLS)
def flux2_klein():
    return klein("Flux2KleinPipeline"), unspoken(**embedded(), **sized(32))


@zoo("Flux2KleinPipeline", batch=embedded(2), other=sized(64), **CALLS)
def flux2_klein_edit():
    """The picture to edit behind the sample."""
    given = unspoken(image=picture(size=64), **embedded(), **sized(32))
    return klein("Flux2KleinPipeline"), given


@zoo("Flux2KleinInpaintPipeline", batch=embedded(2), **CALLS)
def flux2_klein_inpaint():
    given = unspoken(**embedded(), **sized(64)) | painted()
    images = {"image": picture(size=64), "mask_image": mask().resize((64, 64))}
    return klein("Flux2KleinInpaintPipeline"), {**given, **images}


@zoo("LongCatImagePipeline", callbacks=False, other=sized(24), **CALLS)
def longcat_image():
    """A width of 16 channels is taken for granted."""
    config = {**FLUX, "in_channels": 64, "joint_attention_dim": 16, "pooled_projection_dim": 16}
    pipe = diffusers.LongCatImagePipeline(
        scheduler=flow(),
        vae=flux_vae(16),
        text_encoder=qwen_vl(),
        tokenizer=words(512, im_start="<|im_start|>", im_end="<|im_end|>"),
        text_processor=None,
        transformer=net("LongCatImageTransformer2DModel", gain=20.0, **config),
    )
    pipe.tokenizer_max_length = 32
    return pipe, both(enable_prompt_rewrite=False, **sized(16))


@zoo("OvisImagePipeline", other=sized(24), **CALLS)
def ovis_image():
    config = {**FLUX, "out_channels": 16, "joint_attention_dim": 16}
    pipe = diffusers.OvisImagePipeline(
        scheduler=flow(),
        vae=flux_vae(),
        text_encoder=decoder("Qwen3Model"),
        tokenizer=words(256),
        transformer=net("OvisImageTransformer2DModel", gain=20.0, **config),
    )
    return pipe, both(**SHORT, **sized(16))


@zoo("NucleusMoEImagePipeline", batch=masked(2), other=sized(24), **CALLS)
def nucleus_image():
    config = {
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "joint_attention_dim": 16,
        "axes_dims_rope": (8, 4, 4),
        "moe_enabled": False,
    }
    parts = {**qwen_parts(1), "text_encoder": None, "processor": None}
    parts["transformer"] = net("NucleusMoEImageTransformer2DModel", **config)
    return diffusers.NucleusMoEImagePipeline(**parts), unspoken(**masked(), **sized(16))


def guessed(rows: int = 1, size: int = 16) -> dict:
    """Embeddings, and the tokens that a language model would have drawn for the picture."""
    tokens = noise(rows, (size // 4) ** 2, seed=9).abs().mul(8).long().clamp(max=31)
    return {**embedded(rows), "prior_token_ids": tokens}


@zoo("GlmImagePipeline", batch=guessed(2), other={**sized(32), **guessed(1, 32)}, **CALLS)
def glm_image():
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "text_embed_dim": 16,
        "time_embed_dim": 16,
        "condition_dim": 8,
        "prior_vq_quantizer_codebook_size": 32,
    }
    left_out = {"tokenizer": None, "processor": None, "text_encoder": None}
    pipe = diffusers.GlmImagePipeline(
        **left_out,
        vision_language_encoder=None,
        vae=flux_vae(),
        transformer=net("GlmImageTransformer2DModel", gain=20.0, **config),
        scheduler=flow(base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True),
    )
    return pipe, unspoken(**guessed(), **sized(16))


def deep(rows: int = 1) -> dict:
    """Embeddings of six layers of a text encoder."""
    given = masked(rows)
    for seed, name in enumerate(embedded()):
        given[name] = noise(rows, 6, 8, 16, seed=seed + 3)
    return {**given, **{name: m.bool() for name, m in given.items() if name.endswith("mask")}}


@zoo("BriaFibo2Pipeline", batch=deep(2), other=sized(64), **CALLS)
def bria_fibo2():
    config = {
        "in_channels": 4,
        "dim": 32,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "cap_feat_dim": 16,
        "injection_layer_ids": (1,),
        "perceiver_num_layers": 1,
        "min_num_gist_tokens": 4,
        "max_num_gist_tokens": 8,
        "gist_step": 4,
        "gist_min_text_len": 4,
        "gist_max_text_len": 32,
        "axes_dims": (8, 4, 4),
        "axes_lens": (256, 32, 32),
    }
    pipe = diffusers.BriaFibo2Pipeline(
        transformer=net("BriaFibo2Transformer2DModel", gain=20.0, **config),
        scheduler=flow(use_dynamic_shifting=True),
        vae=flux2_vae(),
        text_encoder=None,
        processor=None,
    )
    return pipe, unspoken(**deep(), **sized(32))


@zoo("JoyImageEditPipeline", batch=None, **CALLS)
def joy_image():
    """The picture to edit is an item of its own; sizes are those of its buckets."""
    config = {
        "in_channels": 4,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "text_dim": 16,
        "num_layers": 2,
        "rope_dim_list": [4, 6, 6],
    }
    network = net("JoyImageEditTransformer3DModel", **config)
    louder(network, 20.0, "attn_proj")
    make = functools.partial(
        diffusers.AutoencoderKLWan,
        base_dim=4,
        z_dim=4,
        dim_mult=[1] * 7,
        num_res_blocks=1,
        temperal_downsample=[False] * 6,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
        scale_factor_spatial=64,
        scale_factor_temporal=1,
    )
    left_out = {"text_encoder": None, "tokenizer": None, "processor": None}
    pipe = diffusers.JoyImageEditPipeline(
        scheduler=flow(), vae=seeded(make), transformer=network, **left_out
    )
    return pipe, unspoken(image=picture(size=64), **masked(), **sized(1024))
