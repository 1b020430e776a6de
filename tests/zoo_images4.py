"""Image pipelines with habits of their own: further third branches, variances, priors, blocks."""

from __future__ import annotations

import functools

import diffusers

from pipelines import ddim, mask, picture, tokenizer
from zoo import both, clip, flow, noise, seeded, sized, t5, vae, words, zoo
from zoo_images import TWO, sd_parts, unet, xl_parts
from zoo_images2 import (
    HUNYUAN,
    PLAINLY,
    SHORT,
    UNBINNED,
    hunyuan_parts,
    net,
    pixart_parts,
    sana_parts,
    sd3_parts,
)
from zoo_images3 import qwen_image, true_cfg


def perturbed(cls: str, **options):
    """An entry of the form [uncond, cond, perturbed] with a transformer."""
    return zoo(cls, denoiser="transformer", pattern="three", **options)


@perturbed("StableDiffusion3PAGPipeline", other=sized(24))
def sd3_pag():
    pipe = diffusers.StableDiffusion3PAGPipeline(**sd3_parts(), pag_applied_layers="blocks.1")
    return pipe, both(pag_scale=2.0, **SHORT, **sized(16))


@perturbed("PixArtSigmaPAGPipeline", callbacks=False, other=sized(24))
def pixart_sigma_pag():
    pipe = diffusers.PixArtSigmaPAGPipeline(**pixart_parts(8), pag_applied_layers="blocks.1")
    return pipe, both(pag_scale=2.0, **UNBINNED, **SHORT, **sized(16))


@perturbed("SanaPAGPipeline", other=sized(64))
def sana_pag():
    layers = {"pag_applied_layers": "transformer_blocks.0"}
    pipe = diffusers.SanaPAGPipeline(**sana_parts(), **layers)
    return pipe, both(pag_scale=2.0, **PLAINLY, **sized(32))


EDIT = {"callbacks": False, "batch": TWO, "other": sized(24), "pattern": "three"}


@zoo("StableDiffusionXLInstructPix2PixPipeline", denoiser="unet", **EDIT)
def sdxl_instruct_pix2pix():
    parts = xl_parts(in_channels=8)
    pipe = diffusers.StableDiffusionXLInstructPix2PixPipeline(**parts)
    return pipe, both(image=picture(), image_guidance_scale=1.5, **sized(16))


@zoo("StableDiffusionUpscalePipeline", denoiser="unet", callbacks=False, batch=TWO)
def sd_upscale():
    """Told the noise of its small image by a class label."""
    parts = sd_parts(7, num_class_embeds=1000)
    parts["low_res_scheduler"] = diffusers.DDPMScheduler()
    parts.pop("requires_safety_checker")
    pipe = diffusers.StableDiffusionUpscalePipeline(**parts, max_noise_level=350)
    return pipe, both(image=picture(size=8))


@zoo("HunyuanDiTControlNetPipeline", denoiser="transformer", other=sized(96))
def hunyuan_dit_controlnet():
    control = net("HunyuanDiT2DControlNetModel", seed=4, transformer_num_layers=4, **HUNYUAN)
    pipe = diffusers.HunyuanDiTControlNetPipeline(**hunyuan_parts(4), controlnet=control)
    given = both(control_image=picture(), use_resolution_binning=False, **sized(64))
    return pipe, given


@zoo("CogView3PlusPipeline", denoiser="transformer", other=sized(24))
def cogview3():
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "text_embed_dim": 16,
        "time_embed_dim": 8,
        "condition_dim": 4,
        "pos_embed_max_size": 16,
        "sample_size": 8,
    }
    pipe = diffusers.CogView3PlusPipeline(
        tokenizer=words(),
        text_encoder=t5(),
        vae=vae(),
        transformer=net("CogView3PlusTransformer2DModel", **config),
        scheduler=diffusers.CogVideoXDDIMScheduler(),
    )
    return pipe, both(**SHORT, **sized(16))


SIMPLE = {
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "resnet_time_scale_shift": "scale_shift",
    "encoder_hid_dim": 16,
}


@zoo("IFPipeline", denoiser="unet", callbacks=False, other=sized(12))
def deepfloyd_if():
    """In pixels; the variance is the conditional half's."""
    config = {"in_channels": 3, "out_channels": 6, "cross_attention_norm": "layer_norm"}
    text = {"addition_embed_type": "text", "addition_embed_type_num_heads": 2}
    pipe = diffusers.IFPipeline(
        tokenizer=words(77),
        text_encoder=t5(),
        unet=unet(**SIMPLE, **config, **text),
        scheduler=diffusers.DDPMScheduler(variance_type="learned_range", thresholding=True),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )
    return pipe, both(clean_caption=False, output_type="pt", **sized(8))


def movq():
    make = functools.partial(
        diffusers.VQModel,
        block_out_channels=(32, 32),  # its norms have 32 groups
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        norm_num_groups=4,
        norm_type="spatial",
        num_vq_embeddings=12,
        vq_embed_dim=4,
    )
    return seeded(make)


def image_embeds(rows: int = 1) -> dict:
    """A prior's embeddings, for ``rows`` prompts."""
    names = ("image_embeds", "negative_image_embeds")
    return {name: noise(rows, 16, seed=60 + i) for i, name in enumerate(names)}


@zoo("KandinskyV22Pipeline", denoiser="unet", batch=image_embeds(2), other=sized(24))
def kandinsky22():
    """Led by image embeddings; the variance is the conditional half's."""
    image = {"addition_embed_type": "image", "encoder_hid_dim_type": "image_proj"}
    net = unet(**SIMPLE, **image, out_channels=8)
    pipe = diffusers.KandinskyV22Pipeline(unet=net, scheduler=ddim(), movq=movq())
    given = {"guidance_scale": 5.0, "num_inference_steps": 4, "output_type": "latent"}
    return pipe, {**given, **image_embeds(), **sized(16)}


def cascade(name: str, **config):
    """A network of Stable Cascade with two levels, and what it is made with."""
    blocks = ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock")
    sizes = {
        "conditioning_dim": 16,
        "block_out_channels": (16, 16),
        "num_attention_heads": (2, 2),
        "down_num_layers_per_block": (1, 1),
        "up_num_layers_per_block": (1, 1),
        "block_types_per_layer": (blocks, blocks),
        "clip_text_pooled_in_channels": 16,
        "dropout": (0.0, 0.0),
    }
    make = functools.partial(diffusers.StableCascadeUNet, **{**sizes, **config})
    return {
        name: seeded(make, gain=20.0),
        "tokenizer": tokenizer(),
        "text_encoder": clip(projected=True),
        "scheduler": diffusers.DDPMWuerstchenScheduler(),
    }


PRIOR = {"result": "image_embeddings", "pattern": "concat-reversed"}


@zoo("StableCascadePriorPipeline", denoiser="prior", other=sized(192), **PRIOR)
def stable_cascade_prior():
    channels = {"clip_image_in_channels": 16, "clip_text_in_channels": 16}
    parts = cascade("prior", in_channels=4, out_channels=4, switch_level=(False,), **channels)
    return diffusers.StableCascadePriorPipeline(**parts, resolution_multiple=16.0), both(
        **sized(128), output_type="pt"
    )


@true_cfg("QwenImageImg2ImgPipeline", other=sized(24))
def qwen_image_img2img():
    text, given = qwen_image()
    pipe = diffusers.QwenImageImg2ImgPipeline(**text.components)
    pipe.prompt_template_encode_start_idx = text.prompt_template_encode_start_idx
    return pipe, {**given, "image": picture(), "strength": 0.8, "num_inference_steps": 5}


@true_cfg("QwenImageInpaintPipeline", other=sized(24))
def qwen_image_inpaint():
    text, given = qwen_image()
    pipe = diffusers.QwenImageInpaintPipeline(**text.components)
    pipe.prompt_template_encode_start_idx = text.prompt_template_encode_start_idx
    images = {"image": picture(), "mask_image": mask(), "strength": 0.8}
    return pipe, {**given, **images, "num_inference_steps": 5}


BLOCKS = {"guider": "guider", "scale": None, "pattern": "calls", "callbacks": False}
BLOCKS.update(denoiser="transformer", needs=("QwenImageAutoBlocks", "ClassifierFreeGuidance"))


@zoo("QwenImageModularPipeline", other=sized(24), **BLOCKS)
def qwen_image_modular():
    text, given = qwen_image()
    pipe = diffusers.QwenImageAutoBlocks().init_pipeline()
    guider = diffusers.ClassifierFreeGuidance(guidance_scale=5.0)
    pipe.update_components(**{**text.components, "scheduler": flow()}, guider=guider)
    given.pop("true_cfg_scale")
    return pipe, {**given, "output_type": "pt", "output": "latents"}
