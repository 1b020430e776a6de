"""Further image pipelines with the UNet of Stable Diffusion: depth, upscaling, unCLIP, unions."""

from __future__ import annotations

import functools

import diffusers
import torch

from pipelines import mask, picture, tokenizer
from zoo import both, clip, clip_vision, noise, prompts, seeded, sized, vae, zoo
from zoo_images import PLAIN, TWO, controlnet, sd_parts, xl_parts
from zoo_images2 import SD3, SHORT, kolors, net, sd3_parts

SILENT = {"callbacks": False, "other": sized(24)}


def depths(rows: int = 1) -> torch.Tensor:
    return noise(rows, 8, 8, seed=7)


@zoo("StableDiffusionDepth2ImgPipeline", denoiser="unet", batch={**TWO, "depth_map": depths(2)})
def sd_depth2img():
    """Without the network that sees depths: the call is given them."""
    parts = {k: v for k, v in sd_parts(5).items() if k not in PLAIN}
    parts.update(depth_estimator=None, feature_extractor=None)
    given = both(image=picture(), depth_map=depths(), strength=0.8, num_inference_steps=5)
    return diffusers.StableDiffusionDepth2ImgPipeline(**parts), given


@zoo(
    "StableDiffusionLatentUpscalePipeline",
    denoiser="unet",
    callbacks=False,
    batch=TWO,
    copies=None,
    other={"image": picture(size=32)},
)
def sd_latent_upscale():
    """Told the noise by a vector beside the time, in the units of the noise's deviation."""
    config = {"out_channels": 5, "timestep_post_act": "silu", "time_embedding_dim": 64}
    parts = {
        k: v for k, v in sd_parts(8, **config, time_cond_proj_dim=144).items() if k not in PLAIN
    }
    parts["scheduler"] = diffusers.EulerDiscreteScheduler(prediction_type="sample")
    given = both(image=picture(size=16), num_inference_steps=4)
    return diffusers.StableDiffusionLatentUpscalePipeline(**parts), given


PICTURES = {"image": torch.cat([noise(1, 3, 16, 16, seed=i) for i in (5, 6)])}


@zoo("StableDiffusionImageVariationPipeline", denoiser="unet", batch=PICTURES, **SILENT)
def sd_image_variation():
    parts = {k: v for k, v in sd_parts().items() if k not in ("text_encoder", "tokenizer")}
    pipe = diffusers.StableDiffusionImageVariationPipeline(**parts, image_encoder=clip_vision())
    given = both(image=PICTURES["image"][:1], **sized(16))
    given.pop("prompt")
    given.pop("negative_prompt")
    return pipe, given


@zoo("StableDiffusionLDM3DPipeline", denoiser="unet", other=sized(24), result="rgb")
def sd_ldm3d():
    """Its picture has a depth beside the colours, and it has no latents to return."""
    parts = {**sd_parts(), "vae": vae(in_channels=6, out_channels=6)}
    pipe = diffusers.StableDiffusionLDM3DPipeline(**parts, image_encoder=None)
    return pipe, both(output_type="np", **sized(16))


@zoo("StableDiffusionControlNetXSPipeline", denoiser="unet", other=sized(24))
def sd_controlnet_xs():
    parts = sd_parts(layers_per_block=2)
    pipe = diffusers.StableDiffusionControlNetXSPipeline(**parts, controlnet=side(parts["unet"]))
    return pipe, both(image=picture(), controlnet_conditioning_scale=0.7, **sized(16))


def side(net):
    """The small network of ControlNet-XS that runs inside of ``net``."""
    shape = {"conditioning_embedding_out_channels": (4, 8), "num_attention_heads": 2}
    make = functools.partial(diffusers.ControlNetXSAdapter.from_unet, net, size_ratio=1.0, **shape)
    return seeded(make, 3)


@zoo("StableDiffusionXLControlNetXSPipeline", denoiser="unet", other=sized(24))
def sdxl_controlnet_xs():
    parts = xl_parts(layers_per_block=2)
    pipe = diffusers.StableDiffusionXLControlNetXSPipeline(
        **parts, controlnet=side(parts["unet"]), add_watermarker=False
    )
    return pipe, both(image=picture(), controlnet_conditioning_scale=0.7, **sized(16))


@zoo("StableDiffusionXLControlNetInpaintPipeline", denoiser="unet", other=sized(24))
def sdxl_controlnet_inpaint():
    parts = xl_parts()
    pipe = diffusers.StableDiffusionXLControlNetInpaintPipeline(
        **parts, controlnet=controlnet(parts["unet"]), add_watermarker=False
    )
    images = {"image": picture(), "control_image": picture(1), "mask_image": mask()}
    return pipe, both(**images, strength=0.8, num_inference_steps=5, **sized(16))


def union(net):
    """A ControlNet of six kinds of conditions for ``net``."""
    shape = {"conditioning_embedding_out_channels": (4, 8), "num_attention_heads": 2}
    config = {k: v for k, v in net.config.items() if not k.startswith("_")}
    make = diffusers.ControlNetUnionModel
    known = {k: config[k] for k in config if k in XL_OF_CONTROL}
    made = functools.partial(
        make,
        **known,
        **shape,
        num_control_type=6,
        num_proj_channel=8,
        num_trans_channel=8,
        num_trans_head=2,
    )
    return seeded(made, 3)


XL_OF_CONTROL = (
    *("in_channels", "down_block_types", "block_out_channels", "layers_per_block"),
    *("cross_attention_dim", "attention_head_dim", "norm_num_groups", "addition_embed_type"),
    *("addition_time_embed_dim", "use_linear_projection"),
    "projection_class_embeddings_input_dim",
)


def united(name: str, **images):
    """A pipeline with a union of ControlNets, and its call."""
    parts = xl_parts()
    pipe = getattr(diffusers, name)(**parts, controlnet=union(parts["unet"]), add_watermarker=False)
    given = {"control_mode": [1], "controlnet_conditioning_scale": 0.7}
    return pipe, both(control_image=[picture(1)], **given, **images, **sized(16))


@zoo("StableDiffusionXLControlNetUnionPipeline", denoiser="unet", other=sized(24))
def sdxl_controlnet_union():
    return united("StableDiffusionXLControlNetUnionPipeline")


@zoo("StableDiffusionXLControlNetUnionImg2ImgPipeline", denoiser="unet", other=sized(24))
def sdxl_controlnet_union_img2img():
    given = {"image": picture(), "strength": 0.8, "num_inference_steps": 5}
    return united("StableDiffusionXLControlNetUnionImg2ImgPipeline", **given)


@zoo("StableDiffusionXLControlNetUnionInpaintPipeline", denoiser="unet", other=sized(24))
def sdxl_controlnet_union_inpaint():
    given = {"image": picture(), "mask_image": mask(), "strength": 0.8, "num_inference_steps": 5}
    return united("StableDiffusionXLControlNetUnionInpaintPipeline", **given)


@zoo("StableDiffusion3ControlNetInpaintingPipeline", denoiser="transformer", other=sized(24))
def sd3_controlnet_inpaint():
    shape = {**SD3, "in_channels": 4, "out_channels": 4, "num_layers": 1}
    control = net("SD3ControlNetModel", seed=4, extra_conditioning_channels=1, **shape)
    pipe = diffusers.StableDiffusion3ControlNetInpaintingPipeline(**sd3_parts(), controlnet=control)
    images = {"control_image": picture(), "control_mask": mask()}
    return pipe, both(**images, controlnet_conditioning_scale=0.5, **SHORT, **sized(16))


def normalizer(width: int = 16):
    from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer

    return seeded(functools.partial(StableUnCLIPImageNormalizer, embedding_dim=width))


def unclip_parts() -> dict:
    """A UNet that is told an image's embedding and how noisy that is, as a class."""
    labels = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 32}
    parts = {k: v for k, v in sd_parts(**labels).items() if k not in PLAIN}
    noising = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    return {**parts, "image_normalizer": normalizer(), "image_noising_scheduler": noising}


@zoo(
    "StableUnCLIPImg2ImgPipeline",
    denoiser="unet",
    batch={**prompts(), "image_embeds": noise(2, 16, seed=8)},
    **SILENT,
)
def sd_unclip_img2img():
    pipe = diffusers.StableUnCLIPImg2ImgPipeline(
        **unclip_parts(), feature_extractor=None, image_encoder=clip_vision()
    )
    return pipe, both(image_embeds=noise(1, 16, seed=8), **sized(16))


def prior_net(**kwargs):
    """A transformer from text to the embedding of an image."""
    config = {"num_attention_heads": 2, "attention_head_dim": 8, "embedding_dim": 16}
    return net("PriorTransformer", num_layers=2, **config, **kwargs)


@zoo("StableUnCLIPPipeline", denoiser="unet", **SILENT)
def sd_unclip():
    """A prior with guidance of its own runs first, and is left alone."""
    prior_parts = {
        "prior": prior_net(num_embeddings=16),
        "prior_text_encoder": clip(3, projected=True),
        "prior_tokenizer": tokenizer(),
        "prior_scheduler": diffusers.UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample"
        ),
    }
    pipe = diffusers.StableUnCLIPPipeline(**unclip_parts(), **prior_parts)
    return pipe, both(prior_num_inference_steps=2, **sized(16))


@zoo("KolorsImg2ImgPipeline", denoiser="unet", batch=TWO, other=None)
def kolors_img2img():
    parts = kolors()[0].components
    given = both(**SHORT, image=picture(), strength=0.8, num_inference_steps=5)
    return diffusers.KolorsImg2ImgPipeline(**parts), given
