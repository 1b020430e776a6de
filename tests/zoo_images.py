"""Image pipelines with a UNet: Stable Diffusion 1.x, 2.x and XL and what is built on them."""

from __future__ import annotations

import functools

import diffusers
import torch

import pipelines
from pipelines import ddim, mask, picture, tokenizer
from zoo import both, clip, noise, prompts, seeded, sized, vae, zoo

TWO = {**prompts(), "image": [picture(), picture(1)]}
PLAIN = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


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


@zoo("StableDiffusionXLImg2ImgPipeline", denoiser="unet", other={"image": picture(size=24)})
def sdxl_refiner():
    parts = xl_parts(5, cross_attention_dim=16)
    parts.update(text_encoder=None, tokenizer=None)
    pipe = diffusers.StableDiffusionXLImg2ImgPipeline(**parts, requires_aesthetics_score=True)
    return pipe, both(image=picture(), strength=0.8, num_inference_steps=5)


def controlnet(net):
    """A ControlNet for ``net`` whose condition is twice as wide as the latents."""
    shape = {"conditioning_embedding_out_channels": (4, 8)}
    make = functools.partial(diffusers.ControlNetModel.from_unet, net, **shape)
    return seeded(make, 3)


@zoo("StableDiffusionXLControlNetPipeline", denoiser="unet", other=sized(24))
def sdxl_controlnet():
    parts = xl_parts()
    pipe = diffusers.StableDiffusionXLControlNetPipeline(
        **parts, controlnet=controlnet(parts["unet"]), add_watermarker=False
    )
    return pipe, both(image=picture(), controlnet_conditioning_scale=0.7, **sized(16))


@zoo("StableDiffusionXLControlNetImg2ImgPipeline", denoiser="unet", other=sized(24))
def sdxl_controlnet_img2img():
    parts = xl_parts()
    pipe = diffusers.StableDiffusionXLControlNetImg2ImgPipeline(
        **parts, controlnet=controlnet(parts["unet"]), add_watermarker=False
    )
    images = {"image": picture(), "control_image": picture(1)}
    return pipe, both(**images, strength=0.8, num_inference_steps=5, **sized(16))


FLIPPED = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


def adapter(kind: str):
    sizes = {"channels": [8, 16], "num_res_blocks": 1, "downscale_factor": 2}
    return seeded(functools.partial(diffusers.T2IAdapter, adapter_type=kind, **sizes), 4)


@zoo(
    "StableDiffusionXLAdapterPipeline", denoiser="unet", callbacks=False, batch=TWO, other=sized(24)
)
def sdxl_t2i_adapter():
    parts = xl_parts(**FLIPPED)
    pipe = diffusers.StableDiffusionXLAdapterPipeline(**parts, adapter=adapter("full_adapter"))
    return pipe, both(image=picture(), adapter_conditioning_scale=0.6, **sized(16))


def sd_parts(channels: int = 4, **kwargs) -> dict:
    return {
        "unet": unet(in_channels=channels, **kwargs),
        "vae": vae(),
        "text_encoder": clip(),
        "tokenizer": tokenizer(),
        "scheduler": ddim(),
        **PLAIN,
    }


@zoo("StableDiffusionPipeline", denoiser="unet", other=sized(24))
def sd():
    return pipelines.tiny(), both(**sized(16))


@zoo("StableDiffusionPipeline", denoiser="unet", other=sized(24))
def sd2_v_prediction():
    parts = sd_parts(attention_head_dim=(2, 4), use_linear_projection=True)
    parts["scheduler"] = ddim(prediction_type="v_prediction")
    return diffusers.StableDiffusionPipeline(**parts), both(guidance_rescale=0.7, **sized(16))


@zoo(
    "StableDiffusionImg2ImgPipeline", denoiser="unet", batch=TWO, other={"image": picture(size=24)}
)
def sd_img2img():
    return pipelines.tiny("img2img"), both(image=picture(), strength=0.8, num_inference_steps=5)


@zoo("StableDiffusionInpaintPipeline", denoiser="unet", other=sized(24))
def sd_inpaint():
    given = both(image=picture(), mask_image=mask(), strength=0.8, **sized(16))
    return pipelines.tiny("inpaint9"), given


@zoo("StableDiffusionControlNetPipeline", denoiser="unet", other=sized(24))
def sd_controlnet():
    parts = sd_parts()
    net = controlnet(parts["unet"])
    pipe = diffusers.StableDiffusionControlNetPipeline(**parts, controlnet=net)
    return pipe, both(image=picture(), controlnet_conditioning_scale=0.7, **sized(16))


@zoo("StableDiffusionControlNetPipeline", denoiser="unet", other=sized(24))
def sd_controlnet_guess():
    """Guess mode: the ControlNet sees the conditional half alone."""
    pipe, given = sd_controlnet()
    return pipe, {**given, "guess_mode": True}


@zoo("StableDiffusionControlNetPipeline", denoiser="unet", other=None, batch=None)
def sd_controlnet_multi():
    """Two ControlNets, one of them for the first half of the run alone."""
    parts = sd_parts()
    nets = [controlnet(parts["unet"]), controlnet(parts["unet"])]
    pipe = diffusers.StableDiffusionControlNetPipeline(**parts, controlnet=nets)
    ends = {"control_guidance_end": [1.0, 0.5]}
    return pipe, both(image=[picture(), picture(1)], **ends, **sized(16))


@zoo("StableDiffusionControlNetInpaintPipeline", denoiser="unet", other=sized(24))
def sd_controlnet_inpaint():
    parts = sd_parts()
    net = controlnet(parts["unet"])
    pipe = diffusers.StableDiffusionControlNetInpaintPipeline(**parts, controlnet=net)
    images = {"image": picture(), "control_image": picture(1), "mask_image": mask()}
    return pipe, both(**images, strength=0.8, **sized(16))


@zoo(
    "StableDiffusionControlNetImg2ImgPipeline",
    denoiser="unet",
    batch={**TWO, "control_image": TWO["image"]},
    other=sized(24),
)
def sd_controlnet_img2img():
    parts = sd_parts()
    net = controlnet(parts["unet"])
    pipe = diffusers.StableDiffusionControlNetImg2ImgPipeline(**parts, controlnet=net)
    images = {"image": picture(), "control_image": picture(1)}
    return pipe, both(**images, strength=0.8, num_inference_steps=5, **sized(16))


@zoo("StableDiffusionAdapterPipeline", denoiser="unet", callbacks=False, batch=TWO, other=sized(24))
def sd_t2i_adapter():
    parts = sd_parts(**FLIPPED)
    pipe = diffusers.StableDiffusionAdapterPipeline(**parts, adapter=adapter("full_adapter"))
    return pipe, both(image=picture(), adapter_conditioning_scale=0.6, **sized(16))


def ip_adapter(net, tokens: int = 4) -> dict:
    """Random weights of an IP-Adapter for ``net`` in the layout of its files."""
    width, layers = net.config.cross_attention_dim, {}
    shapes = {"proj": (tokens * width, 16), "norm": (width,)}
    crossed = [name for name in net.attn_processors if name.endswith("attn2.processor")]
    for i, name in enumerate(crossed):
        out = net.get_submodule(name.removesuffix(".processor")).to_k.out_features
        for j, side in enumerate(("to_k_ip", "to_v_ip")):
            layers[f"{2 * i + 1}.{side}.weight"] = 0.3 * noise(out, width, seed=10 * i + j)
    projection = {f"{name}.weight": noise(*shape, seed=91) for name, shape in shapes.items()}
    projection.update({f"{n}.bias": noise(shape[0], seed=92) for n, shape in shapes.items()})
    return {"image_proj": projection, "ip_adapter": layers}


def image_embeds() -> list[torch.Tensor]:
    """Of one image, after those of no image, as guided pipelines want them."""
    return [torch.cat([torch.zeros(1, 1, 16), noise(1, 1, 16, seed=93)])]


@zoo("StableDiffusionPipeline", denoiser="unet", batch=None, other=sized(24))
def sd_ip_adapter():
    pipe = diffusers.StableDiffusionPipeline(**sd_parts())
    pipe.unet._load_ip_adapter_weights([ip_adapter(pipe.unet)])
    return pipe, both(ip_adapter_image_embeds=image_embeds(), **sized(16))


@zoo("StableDiffusionXLPipeline", denoiser="unet", batch=None, other=sized(24))
def sdxl_ip_adapter():
    pipe = diffusers.StableDiffusionXLPipeline(**xl_parts())
    pipe.unet._load_ip_adapter_weights([ip_adapter(pipe.unet)])
    return pipe, both(ip_adapter_image_embeds=image_embeds(), **sized(16))


@zoo("StableDiffusionGLIGENPipeline", denoiser="unet", callbacks=False, other=sized(24))
def sd_gligen():
    parts = sd_parts(attention_type="gated")
    for name, weight in parts["unet"].named_parameters():
        if "fuser.alpha" in name:
            weight.data.fill_(0.5)
    pipe = diffusers.StableDiffusionGLIGENPipeline(**parts)
    boxes = {"gligen_phrases": ["red house"], "gligen_boxes": [[0.1, 0.2, 0.6, 0.8]]}
    return pipe, both(**boxes, gligen_scheduled_sampling_beta=0.5, **sized(16))


@zoo("StableDiffusionInstructPix2PixPipeline", denoiser="unet", batch=TWO, pattern="three")
def instruct_pix2pix():
    pipe = diffusers.StableDiffusionInstructPix2PixPipeline(**sd_parts(8))
    return pipe, both(image=picture(), image_guidance_scale=1.5)


@zoo("StableDiffusionPAGPipeline", denoiser="unet", pattern="three", other=sized(24))
def sd_pag():
    return diffusers.StableDiffusionPAGPipeline(**sd_parts()), both(pag_scale=2.0, **sized(16))


@zoo("StableDiffusionXLPAGPipeline", denoiser="unet", pattern="three", other=sized(24))
def sdxl_pag():
    return diffusers.StableDiffusionXLPAGPipeline(**xl_parts()), both(pag_scale=2.0, **sized(16))


@zoo("LatentConsistencyModelPipeline", denoiser="unet", guided=False, pattern="none")
def lcm():
    parts = sd_parts(time_cond_proj_dim=8)
    parts["scheduler"] = diffusers.LCMScheduler(**pipelines.SD)
    given = both(**sized(16))
    given.pop("negative_prompt")
    return diffusers.LatentConsistencyModelPipeline(**parts), given
