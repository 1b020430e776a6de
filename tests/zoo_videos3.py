"""Further video pipelines with a UNet, and those of CogVideoX."""

from __future__ import annotations

import functools

import diffusers
import torch
import transformers

from pipelines import ddim, picture, tokenizer
from zoo import both, clip, clip_vision, seeded, sized, vae, zoo
from zoo_images import XL, controlnet, unet
from zoo_videos import cog_parts, video
from zoo_videos2 import VIDEO

ONE = {"result": "frames", "copies": None}
FRAMES = [picture(i) for i in range(4)]
FLAT = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


def motion(channels: int = 4, **kwargs):
    make = functools.partial(
        diffusers.MotionAdapter,
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=4,
        **kwargs,
    )
    return seeded(make, 1)


def animated(name: str, net=None, **parts):
    """An AnimateDiff pipeline."""
    return getattr(diffusers, name)(
        vae=vae(),
        text_encoder=clip(),
        tokenizer=tokenizer(),
        unet=unet(**FLAT) if net is None else net,
        motion_adapter=motion(),
        scheduler=ddim(beta_schedule="linear"),
        **parts,
    )


@zoo("AnimateDiffControlNetPipeline", denoiser="unet", batch=None, **ONE)
def animatediff_controlnet():
    net = unet(**FLAT)
    pipe = animated("AnimateDiffControlNetPipeline", net, controlnet=controlnet(net))
    return pipe, both(num_frames=4, conditioning_frames=FRAMES, **sized(16))


@zoo("AnimateDiffVideoToVideoPipeline", denoiser="unet", batch=None, **ONE)
def animatediff_video():
    pipe = animated("AnimateDiffVideoToVideoPipeline")
    return pipe, both(video=FRAMES, strength=0.8, num_inference_steps=5, **sized(16))


@zoo("AnimateDiffVideoToVideoControlNetPipeline", denoiser="unet", batch=None, **ONE)
def animatediff_video_controlnet():
    net = unet(**FLAT)
    pipe = animated("AnimateDiffVideoToVideoControlNetPipeline", net, controlnet=controlnet(net))
    given = {"video": FRAMES, "conditioning_frames": FRAMES, "strength": 0.8}
    return pipe, both(num_inference_steps=5, **given, **sized(16))


def sparse():
    make = functools.partial(
        diffusers.SparseControlNetModel,
        block_out_channels=(8, 16),
        layers_per_block=1,
        in_channels=4,
        conditioning_channels=3,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        cross_attention_dim=16,
        conditioning_embedding_out_channels=(8, 8),
        concat_conditioning_mask=False,
        norm_num_groups=4,
        attention_head_dim=4,
        motion_num_attention_heads=2,
        use_simplified_condition_embedding=False,
    )
    return seeded(make, 3)


@zoo("AnimateDiffSparseControlNetPipeline", denoiser="unet", batch=None, **ONE)
def animatediff_sparse():
    pipe = animated("AnimateDiffSparseControlNetPipeline", controlnet=sparse())
    given = {"conditioning_frames": FRAMES[:1], "controlnet_frame_indices": [0], "num_frames": 4}
    return pipe, both(**given, **sized(16))


@zoo("PIAPipeline", denoiser="unet", batch=None, **ONE)
def pia():
    """A still picture beside the latents."""
    net = unet(**FLAT)
    parts = {"conv_in_channels": 9}
    pipe = diffusers.PIAPipeline(
        vae=vae(),
        text_encoder=clip(),
        tokenizer=tokenizer(),
        unet=net,
        motion_adapter=motion(**parts),
        scheduler=ddim(beta_schedule="linear"),
    )
    return pipe, both(image=picture(), num_frames=4, **sized(16))


@zoo("AnimateDiffSDXLPipeline", denoiser="unet", **ONE)
def animatediff_sdxl():
    widths = {"cross_attention_dim": 32, "projection_class_embeddings_input_dim": 16 + 4 * 6}
    with torch.random.fork_rng():
        torch.manual_seed(3)  # it makes the video network of the two parts by itself
        pipe = diffusers.AnimateDiffSDXLPipeline(
            vae=vae(),
            text_encoder=clip(1),
            text_encoder_2=clip(2, projected=True),
            tokenizer=tokenizer(),
            tokenizer_2=tokenizer(),
            unet=unet(**{**FLAT, **XL, **widths}),
            motion_adapter=motion(use_motion_mid_block=False),
            scheduler=ddim(beta_schedule="linear"),
        )
    return pipe, both(num_frames=4, **sized(16))


def unet3d(name: str = "UNet3DConditionModel", **kwargs):
    config = {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "sample_size": 8,
        "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
        "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
        "cross_attention_dim": 16,
        "attention_head_dim": 4,
        "norm_num_groups": 2,
    }
    make = functools.partial(getattr(diffusers, name), **{**config, **kwargs})
    return seeded(make, gain=20.0)


def text_to_video(name: str):
    return getattr(diffusers, name)(
        vae=vae(), text_encoder=clip(), tokenizer=tokenizer(), unet=unet3d(), scheduler=ddim()
    )


SYNTH = {"denoiser": "unet", "callbacks": False, **ONE}


@zoo("TextToVideoSDPipeline", **SYNTH)
def text_to_video_sd():
    """Frames are images of the batch in the scheduler's step, not in the network."""
    return text_to_video("TextToVideoSDPipeline"), both(num_frames=4, **sized(16))


@zoo("VideoToVideoSDPipeline", rows=(2,) * 4, **{**SYNTH, "batch": None})
def video_to_video_sd():
    given = {"strength": 0.8, "num_inference_steps": 5, "video": FRAMES}
    return text_to_video("VideoToVideoSDPipeline"), both(**given)


@zoo("I2VGenXLPipeline", denoiser="unet", callbacks=False, batch=None, **VIDEO)
def i2vgen_xl():
    sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    pipe = diffusers.I2VGenXLPipeline(
        vae=vae(),
        text_encoder=clip(),
        tokenizer=tokenizer(),
        image_encoder=clip_vision(),
        feature_extractor=transformers.CLIPImageProcessor(**sizes),
        unet=unet3d("I2VGenXLUNet"),
        scheduler=ddim(),
    )
    return pipe, both(image=picture(), num_frames=4, clip_skip=None, **sized(16))


@zoo("CogVideoXVideoToVideoPipeline", denoiser="transformer", batch=None, **ONE)
def cogvideox_video():
    given = video(video=[picture(i) for i in range(9)], strength=0.8, num_inference_steps=5)
    given.pop("num_frames")
    return diffusers.CogVideoXVideoToVideoPipeline(**cog_parts()), given


@zoo("CogVideoXFunControlPipeline", denoiser="transformer", batch=None, **ONE)
def cogvideox_fun():
    parts = cog_parts(in_channels=8, use_rotary_positional_embeddings=True)
    given = video(control_video=[picture(i) for i in range(9)])
    given.pop("num_frames")
    return diffusers.CogVideoXFunControlPipeline(**parts), given
