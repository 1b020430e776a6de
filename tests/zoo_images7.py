"""Further image pipelines with a transformer: Z-Image, Bria, PRX, Amused; old ones with a UNet."""

from __future__ import annotations

import functools

import diffusers
import torch
import transformers
from PIL import Image

from pipelines import ddim, mask, picture, tokenizer
from zoo import (
    both,
    clip,
    clip_vision,
    decoder,
    flow,
    noise,
    prompts,
    seeded,
    sized,
    t5,
    vae,
    words,
    zoo,
)
from zoo_images import TWO, sd_parts
from zoo_images2 import PLAINLY, SHORT, net, sana_parts
from zoo_images3 import z_image
from zoo_images5 import prior_net
from zoo_images6 import beside, image_processor

LATE = {"strength": 0.8, "num_inference_steps": 5}


@zoo("SanaControlNetPipeline", denoiser="transformer", other=sized(64))
def sana_controlnet():
    parts = sana_parts()
    shape = {k: v for k, v in parts["transformer"].config.items() if k in SANA}
    control = net("SanaControlNetModel", seed=4, **{**shape, "num_layers": 1})
    pipe = diffusers.SanaControlNetPipeline(**parts, controlnet=control)
    given = both(control_image=picture(size=32), **PLAINLY, **sized(32))
    return pipe, given


SANA = (
    *("patch_size", "in_channels", "out_channels", "num_attention_heads", "attention_head_dim"),
    *("num_cross_attention_heads", "cross_attention_head_dim", "cross_attention_dim"),
    "caption_channels",
)
LISTS = {"denoiser": "transformer", "pattern": "concat-reversed"}


def z_image_as(name: str, **parts):
    """Another pipeline of the parts of Z-Image, and its usual call."""
    pipe, given = z_image()
    return getattr(diffusers, name)(**pipe.components, **parts), given


@zoo("ZImageImg2ImgPipeline", **LISTS)
def z_image_img2img():
    pipe, given = z_image_as("ZImageImg2ImgPipeline")
    return pipe, {**given, "image": picture(), **LATE}


@zoo("ZImageInpaintPipeline", **LISTS)
def z_image_inpaint():
    pipe, given = z_image_as("ZImageInpaintPipeline")
    return pipe, {**given, "image": picture(), "mask_image": mask(), **LATE}


def z_control(channels: int = 16):
    config = {
        "control_layers_places": [0, 1],
        "control_refiner_layers_places": [0],
        "control_in_dim": channels,
        "add_control_noise_refiner": "control_layers",
        "dim": 32,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
    }
    return net("ZImageControlNetModel", seed=4, **config)


@zoo("ZImageControlNetPipeline", other=sized(24), **LISTS)
def z_image_controlnet():
    pipe, given = z_image_as("ZImageControlNetPipeline", controlnet=z_control())
    return pipe, {**given, "control_image": picture(1)}


@zoo("ZImageControlNetInpaintPipeline", batch=None, copies=None, **LISTS)
def z_image_controlnet_inpaint():
    pipe, given = z_image_as("ZImageControlNetInpaintPipeline", controlnet=z_control(33))
    images = {"image": picture(), "mask_image": mask(), "control_image": picture(1)}
    return pipe, {**given, **images}


BRIA = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "axes_dims_rope": [0, 4, 4],
}


@zoo("BriaPipeline", denoiser="transformer", other=sized(24))
def bria():
    pipe = diffusers.BriaPipeline(
        transformer=net("BriaTransformer2DModel", gain=20.0, **BRIA),
        scheduler=flow(),
        vae=vae(),
        text_encoder=t5(width=32),
        tokenizer=words(),
    )
    return pipe, both(**SHORT, **sized(16))


@zoo("BriaFiboPipeline", denoiser="transformer", batch=None)
def bria_fibo():
    config = {**BRIA, "in_channels": 4, "text_encoder_dim": 16}
    pipe = diffusers.BriaFiboPipeline(
        transformer=net("BriaFiboTransformer2DModel", gain=20.0, **config),
        scheduler=flow(),
        vae=fibo_vae(),
        text_encoder=decoder("SmolLM3ForCausalLM"),
        tokenizer=words(),
    )
    return pipe, both(**SHORT, **sized(32))


def fibo_vae():
    """The video autoencoder that the pipeline reads its sizes from."""
    make = functools.partial(
        diffusers.AutoencoderKLWan,
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return seeded(make)


@zoo("PRXPipeline", denoiser="transformer", batch=None, copies=None, other=sized(24))
def prx():
    """For one prompt: it tells the time of two rows, however many there are."""
    config = {
        "in_channels": 4,
        "patch_size": 2,
        "context_in_dim": 16,
        "hidden_size": 16,
        "mlp_ratio": 2.0,
        "num_heads": 2,
        "depth": 2,
        "axes_dim": [4, 4],
    }
    pipe = diffusers.PRXPipeline(
        transformer=net("PRXTransformer2DModel", gain=20.0, **config),
        scheduler=flow(),
        text_encoder=decoder("Gemma2Model"),
        tokenizer=words(),
        vae=vae(),
    )
    given = both(use_resolution_binning=False, **sized(16), **spoken())
    return pipe, {**given, "prompt": None}


def spoken() -> dict:
    """Embeddings in the place of a text that a library of its own would clean."""
    given = {}
    for i, name in enumerate(("prompt", "negative_prompt")):
        given[f"{name}_embeds"] = noise(1, 8, 16, seed=3 + i)
        given[f"{name.replace('prompt', 'prompt_attention')}_mask"] = torch.ones(1, 8).bool()
    return given


@zoo("ErnieImagePipeline", denoiser="transformer", other=sized(64))
def ernie_image():
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
    pipe = diffusers.ErnieImagePipeline(
        transformer=net("ErnieImageTransformer2DModel", gain=20.0, **config),
        vae=vae(),
        text_encoder=decoder("Qwen3Model"),
        tokenizer=words(),
        scheduler=flow(),
    )
    return pipe, both(use_pe=False, **sized(32))


def amused(name: str):
    """Its network guesses tokens; what it answers is a bare tensor."""
    config = {
        "hidden_size": 8,
        "cond_embed_dim": 16,
        "micro_cond_encode_dim": 2,
        "micro_cond_embed_dim": 10,
        "encoder_hidden_size": 16,
        "vocab_size": 32,
        "codebook_size": 8,
        "in_channels": 8,
        "block_out_channels": 8,
        "num_res_blocks": 1,
        "block_num_heads": 1,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 8,
        "downsample": True,
        "upsample": True,
    }
    quantised = functools.partial(
        diffusers.VQModel,
        down_block_types=["DownEncoderBlock2D"],
        up_block_types=["UpDecoderBlock2D"],
        block_out_channels=[8],
        layers_per_block=1,
        latent_channels=8,
        num_vq_embeddings=8,
        norm_num_groups=8,
        lookup_from_codebook=True,
        mid_block_add_attention=False,
    )
    return getattr(diffusers, name)(
        vqvae=seeded(quantised),
        tokenizer=tokenizer(),
        text_encoder=clip(projected=True),
        transformer=net("UVit2DModel", gain=20.0, **config),
        scheduler=diffusers.AmusedScheduler(mask_token_id=31),
    )


TOKENS = {"denoiser": "transformer", "callbacks": False}
# Less, and the tokens that are drawn are the same.
STRONG = {"guidance_scale": 15.0, "num_inference_steps": 10, "output_type": "pt"}


@zoo("AmusedPipeline", **TOKENS)
def amused_text():
    return amused("AmusedPipeline"), both(**STRONG, **sized(16))


@zoo("AmusedImg2ImgPipeline", batch=TWO, rows=(2,) * 8, **TOKENS)
def amused_img2img():
    return amused("AmusedImg2ImgPipeline"), both(image=picture(), **STRONG, strength=0.8)


@zoo("AmusedInpaintPipeline", batch=None, **TOKENS)
def amused_inpaint():
    images = {"image": picture(), "mask_image": Image.new("L", (16, 16), 255)}
    return amused("AmusedInpaintPipeline"), both(**STRONG, **images, strength=1.0)


def shap_e_prior():
    config = {"num_embeddings": 4, "additional_embeddings": 0, "embedding_proj_norm_type": "layer"}
    options = {"time_embed_act_fn": "gelu", "embedding_proj_dim": 16, "time_embed_dim": 16}
    last = {"norm_in_type": "layer", "encoder_hid_proj_type": None, "added_emb_type": None}
    return prior_net(**config, **options, **last, clip_embed_dim=32)


def heun():
    return diffusers.HeunDiscreteScheduler(
        beta_schedule="exp", prediction_type="sample", use_karras_sigmas=True, clip_sample=True
    )


SHAPES = {"denoiser": "prior", "callbacks": False, "rows": (2,) * 7}


@zoo("ShapEPipeline", batch={"prompt": prompts()["prompt"]}, **SHAPES)
def shap_e():
    """A solver of two calls per step; the network also learns a variance."""
    pipe = diffusers.ShapEPipeline(
        prior=shap_e_prior(),
        text_encoder=clip(projected=True),
        tokenizer=tokenizer(),
        scheduler=heun(),
        shap_e_renderer=None,
    )
    given = both()
    given.pop("negative_prompt")
    return pipe, given


@zoo("ShapEImg2ImgPipeline", batch=None, **SHAPES)
def shap_e_img2img():
    encoder = transformers.CLIPVisionModel(clip_vision().config)
    pipe = diffusers.ShapEImg2ImgPipeline(
        prior=shap_e_prior(),
        image_encoder=seeded(lambda: encoder),
        image_processor=image_processor(),
        scheduler=heun(),
        shap_e_renderer=None,
    )
    given = {k: v for k, v in both().items() if not k.endswith("prompt")}
    return pipe, {**given, "image": picture()}


@zoo("LDMTextToImagePipeline", denoiser="unet", callbacks=False, copies=None, batch=None)
def ldm():
    """The oldest of them: no latents to return, and the text anew in every step."""
    pipe = diffusers.LDMTextToImagePipeline(
        vqvae=vae(),
        bert=clip(max_position_embeddings=77),
        tokenizer=tokenizer(),
        unet=sd_parts()["unet"],
        scheduler=ddim(),
    )
    given = both(output_type="np", **sized(16))
    given.pop("negative_prompt")
    return pipe, given


@zoo("StableDiffusionDiffEditPipeline", denoiser="unet", callbacks=False, batch=None, rows=(2,) * 4)
def sd_diffedit():
    """Latents of an inversion outside of the mask."""
    pipe = diffusers.StableDiffusionDiffEditPipeline(
        **sd_parts(), inverse_scheduler=diffusers.DDIMInverseScheduler()
    )
    shown = {"mask_image": torch.ones(1, 8, 8), "image_latents": noise(1, 4, 4, 8, 8, seed=6)}
    shown["mask_image"][:, :4] = 0.0
    return pipe, both(**shown, inpaint_strength=0.8, num_inference_steps=5)


def example_encoder():
    kind = beside("PaintByExampleImageEncoder", "PaintByExamplePipeline")
    return seeded(lambda: kind(clip_vision().config, proj_size=16))


@zoo("PaintByExamplePipeline", denoiser="unet", callbacks=False, batch=None)
def paint_by_example():
    parts = {k: v for k, v in sd_parts(9).items() if k not in ("text_encoder", "tokenizer")}
    pipe = diffusers.PaintByExamplePipeline(**parts, image_encoder=example_encoder())
    images = {
        "image": noise(1, 3, 16, 16, seed=1).clamp(-1, 1),
        "example_image": noise(1, 3, 16, 16),
    }
    given = both(**images, mask_image=torch.ones(1, 1, 16, 16), **sized(16))
    return pipe, {k: v for k, v in given.items() if not k.endswith("prompt")}


@zoo("StableDiffusionModelEditingPipeline", denoiser="unet", callbacks=False, other=sized(24))
def sd_model_editing():
    pipe = diffusers.StableDiffusionModelEditingPipeline(**sd_parts(), with_augs=[])
    return pipe, both(**sized(16))


@zoo(
    "StableDiffusionInpaintPipelineLegacy",
    denoiser="unet",
    callbacks=False,
    batch=None,
    rows=(2,) * 4,
)
def sd_inpaint_legacy():
    pipe = diffusers.StableDiffusionInpaintPipelineLegacy(**sd_parts())
    return pipe, both(image=picture(), mask_image=mask(), **LATE)
