"""Image pipelines with a UNet: Stable Diffusion 1.x, 2.x and XL and what is built on them."""

from __future__ import annotations

import functools

import diffusers

from pipelines import ddim, mask, picture, tokenizer
from zoo import both, clip, seeded, sized, vae, zoo


def unet(seed: int = 0, **kwargs):
    given = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "cross_attention_dim": 16,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    make = functools.partial(diffusers.UNet2DConditionModel, **{**given, **kwargs})
    return seeded(make, seed, gain=20.0)


XL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "use_linear_projection": True,
}


def xl_parts(time_ids: int = 6, **kwargs) -> dict:
    """Two text encoders, of widths 16 and 16; the UNet sees them side by side."""
    widths = {"cross_attention_dim": 32, "projection_class_embeddings_input_dim": 16 + 4 * time_ids}
    return {
        "unet": unet(**{**XL, **widths, **kwargs}),
        "vae": vae(),
        "text_encoder": clip(1),
        "text_encoder_2": clip(2, projected=True),
        "tokenizer": tokenizer(),
        "tokenizer_2": tokenizer(),
        "scheduler": ddim(),
    }


@zoo("StableDiffusionXLPipeline", denoiser="unet", other=sized(24))
def sdxl():
    return diffusers.StableDiffusionXLPipeline(**xl_parts()), both(**sized(16))


@zoo("StableDiffusionXLImg2ImgPipeline", denoiser="unet", other={"image": picture(size=24)})
def sdxl_img2img():
    pipe = diffusers.StableDiffusionXLImg2ImgPipeline(**xl_parts())
    return pipe, both(image=picture(), strength=0.8, num_inference_steps=5)


@zoo("StableDiffusionXLInpaintPipeline", denoiser="unet", other=sized(24))
def sdxl_inpaint():
    pipe = diffusers.StableDiffusionXLInpaintPipeline(**xl_parts())
    return pipe, both(image=picture(), mask_image=mask(), strength=0.8, **sized(16))
