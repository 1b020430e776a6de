"""Further image pipelines with one call per branch: Flux, Chroma, Qwen-Image, CogView 4."""

from __future__ import annotations

import diffusers

from pipelines import mask, picture
from zoo import both, sized, zoo
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
    true_cfg,
)

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
