"""Video pipelines of other kinds: AnimateDiff, SVD, Latte, Allegro, a guider's; Kandinsky 2.2."""

from __future__ import annotations

import functools

import diffusers
import torch
import transformers

from pipelines import SD, ddim, picture, tokenizer
from zoo import both, clip, decoder, flow, louder, noise, seeded, sized, t5, vae, words, zoo

VIDEO = {"result": "frames", "copies": "num_videos_per_prompt"}


@zoo("AnimateDiffPipeline", denoiser="unet", other=sized(24), result="frames", copies=None)
def animatediff():
    blocks = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    net = functools.partial(
        diffusers.UNet2DConditionModel,
        **blocks,
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
    )
    motion = functools.partial(
        diffusers.MotionAdapter,
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=4,
    )
    pipe = diffusers.AnimateDiffPipeline(
        vae=vae(),
        text_encoder=clip(),
        tokenizer=tokenizer(),
        unet=seeded(net, gain=20.0),
        motion_adapter=seeded(motion, 1),
        scheduler=ddim(beta_schedule="linear"),
    )
    return pipe, both(num_frames=4, **sized(16))


def sight():
    """A vision encoder of the one picture size that the pipeline resizes to."""
    config = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=224,
        patch_size=112,
        projection_dim=16,
    )
    return seeded(lambda: transformers.CLIPVisionModelWithProjection(config))


def svd_scheduler():
    return diffusers.EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        use_karras_sigmas=True,
        timestep_spacing="leading",
        timestep_type="continuous",
        sigma_min=0.002,
        sigma_max=700.0,
    )


@zoo(
    "StableVideoDiffusionPipeline",
    denoiser="unet",
    scale="max_guidance_scale",
    other=sized(32),
    batch={"image": [picture(), picture(1)]},
    **VIDEO,
)
def stable_video():
    """A guidance scale for every frame."""
    net = functools.partial(
        diffusers.UNetSpatioTemporalConditionModel,
        block_out_channels=(32, 32),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=16,
        num_attention_heads=2,
        projection_class_embeddings_input_dim=24,
        addition_time_embed_dim=8,
    )
    autoencoder = functools.partial(
        diffusers.AutoencoderKLTemporalDecoder,
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
    )
    pipe = diffusers.StableVideoDiffusionPipeline(
        vae=seeded(autoencoder),
        image_encoder=sight(),
        unet=seeded(net, gain=20.0),
        scheduler=svd_scheduler(),
        feature_extractor=transformers.CLIPImageProcessor(),
    )
    given = {"min_guidance_scale": 1.5, "max_guidance_scale": 4.0, "num_inference_steps": 5}
    return pipe, {
        **given,
        "image": picture(),
        "num_frames": 3,
        "output_type": "latent",
        **sized(16),
    }


@zoo("LattePipeline", denoiser="transformer", other=sized(32), result="frames")
def latte():
    """Learned variance: the network puts out twice the channels."""
    net = functools.partial(
        diffusers.LatteTransformer3DModel,
        sample_size=8,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=16,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        video_length=2,
    )
    net = seeded(net)
    louder(net, 10.0, "attn2.to_out")
    pipe = diffusers.LattePipeline(
        text_encoder=t5(),
        tokenizer=words(120),
        vae=vae(),
        transformer=net,
        scheduler=ddim(beta_schedule="linear"),
    )
    return pipe, both(video_length=2, clean_caption=False, **sized(16))


@zoo("AllegroPipeline", denoiser="transformer", result="frames", copies=None, other=sized(32))
def allegro():
    net = functools.partial(
        diffusers.AllegroTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        cross_attention_dim=24,
        sample_width=8,
        sample_height=8,
        sample_frames=8,
        caption_channels=16,
    )
    autoencoder = functools.partial(
        diffusers.AutoencoderKLAllegro,
        down_block_types=("AllegroDownBlock3D",) * 4,
        up_block_types=("AllegroUpBlock3D",) * 4,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    net = seeded(net)
    louder(net, 10.0, "attn2.to_out")
    pipe = diffusers.AllegroPipeline(
        text_encoder=t5(),
        tokenizer=words(),
        vae=seeded(autoencoder),
        transformer=net,
        scheduler=diffusers.EulerAncestralDiscreteScheduler(**SD),
    )
    options = {"clean_caption": False, "max_sequence_length": 16}
    return pipe, both(num_frames=8, **options, **sized(16))


def _qwen():
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    return decoder("Qwen2_5_VLTextModel", layers=3, rope_scaling=rope)


def glyphs(rows: int = 1) -> dict:
    """Embeddings of prompts and of the text to be shown, and of their negatives."""
    given = {}
    for seed, side in enumerate(("", "negative_")):
        given[f"{side}prompt_embeds"] = noise(rows, 8, 16, seed=seed)
        given[f"{side}prompt_embeds_mask"] = torch.ones(rows, 8)
        given[f"{side}prompt_embeds_2"] = noise(rows, 4, 8, seed=seed + 2)
        given[f"{side}prompt_embeds_mask_2"] = torch.ones(rows, 4)
    return given


@zoo(
    "HunyuanVideo15Pipeline",
    denoiser="transformer",
    scale=None,
    guider="guider",
    callbacks=False,
    batch=glyphs(2),
    other=sized(32),
    **{**VIDEO, "copies": None},
    pattern="calls",
)
def hunyuan_video15():
    net = functools.partial(
        diffusers.HunyuanVideo15Transformer3DModel,
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_refiner_layers=1,
        text_embed_dim=16,
        text_embed_2_dim=8,
        image_embed_dim=12,
        rope_axes_dim=(2, 2, 4),
        target_size=16,
        task_type="t2v",
    )
    autoencoder = functools.partial(
        diffusers.AutoencoderKLHunyuanVideo15,
        latent_channels=4,
        block_out_channels=(16,) * 4,
        layers_per_block=1,
        spatial_compression_ratio=8,
    )
    pipe = diffusers.HunyuanVideo15Pipeline(
        text_encoder=_qwen(),
        tokenizer=words(),
        transformer=seeded(net, gain=3.0),
        vae=seeded(autoencoder),
        scheduler=flow(shift=7.0),
        text_encoder_2=t5(width=8),
        tokenizer_2=transformers.ByT5Tokenizer(),
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=5.0),
    )
    pipe.vision_num_semantic_tokens = 4
    given = {"num_inference_steps": 4, "num_frames": 5, "output_type": "latent", **sized(16)}
    return pipe, {**glyphs(), **given}
