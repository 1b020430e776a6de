"""Video pipelines with a transformer: Wan and its kin, CogVideoX, LTX, HunyuanVideo, Mochi."""

from __future__ import annotations

import functools

import diffusers
import transformers
from PIL import Image

from pipelines import picture, tokenizer
from zoo import (
    both,
    clip,
    clip_vision,
    decoder,
    flow,
    louder,
    noise,
    prompts,
    seeded,
    sized,
    t5,
    words,
    zoo,
)

VIDEO = {"result": "frames", "copies": "num_videos_per_prompt"}
CALLS = {**VIDEO, "pattern": "calls"}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


def video(frames: int = 5, size: int = 16, **kwargs) -> dict:
    """Arguments of one guided call; text is cut to 16 tokens."""
    return both(num_frames=frames, max_sequence_length=16, **sized(size), **kwargs)


def embedded(rows: int = 1, width: int = 16) -> dict:
    """Embeddings of ``rows`` prompts and of their negatives."""
    given = {"prompt_embeds": noise(rows, 8, width, seed=3)}
    return {**given, "negative_prompt_embeds": noise(rows, 8, width, seed=4)}


def unspoken(given: dict) -> dict:
    """``given`` with embeddings in place of prompts."""
    silent = {name: value for name, value in given.items() if not name.endswith("prompt")}
    return {**silent, **embedded()}


# Text that these pipelines clean needs ftfy, so they are given embeddings, which they do not copy.
SILENT = {**CALLS, "batch": embedded(2), "copies": None}


def pair(size: int = 16) -> dict:
    """Two prompts with an image each."""
    return {**prompts(), "image": [picture(0, size), picture(1, size)]}


def umt5_text() -> dict:
    return {"text_encoder": t5(kind="UMT5EncoderModel"), "tokenizer": words()}


def t5_text() -> dict:
    return {"text_encoder": t5(), "tokenizer": words()}


def wan_vae():
    make = functools.partial(
        diffusers.AutoencoderKLWan,
        base_dim=3,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )
    return seeded(make)


def wan_net(kind: str = "WanTransformer3DModel", seed: int = 0, **kwargs):
    """A Wan transformer whose cross-attention is loud."""
    given = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 16,
        "freq_dim": 32,
        "ffn_dim": 32,
        "num_layers": 2,
        "rope_max_seq_len": 32,
    }
    net = seeded(functools.partial(getattr(diffusers, kind), **{**given, **kwargs}), seed)
    louder(net, 12.0, "attn2.to_out", "attn2.add_v")
    return net


def wan_parts(kind: str = "WanTransformer3DModel", **kwargs) -> dict:
    parts = {**umt5_text(), "vae": wan_vae(), "scheduler": flow(shift=3.0)}
    return {**parts, "transformer": wan_net(kind, **kwargs)}


@zoo("WanPipeline", denoiser="transformer", other=sized(32), **CALLS)
def wan():
    return diffusers.WanPipeline(**wan_parts()), video()


@zoo("WanPipeline", denoiser="transformer,transformer_2", other=sized(32), **CALLS)
def wan_two_experts():
    parts = {**wan_parts(), "transformer_2": wan_net(seed=5)}
    given = video(guidance_scale_2=3.0, num_inference_steps=6)
    return diffusers.WanPipeline(**parts, boundary_ratio=0.8), given


@zoo("WanPipeline", denoiser="transformer", other=sized(32), **CALLS)
def wan_expanded_timesteps():
    return diffusers.WanPipeline(**wan_parts(), expand_timesteps=True), video()


@zoo("WanImageToVideoPipeline", denoiser="transformer", other=sized(32), **SILENT)
def wan_image_to_video():
    parts = wan_parts(in_channels=36, image_dim=16, added_kv_proj_dim=24)
    sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    pipe = diffusers.WanImageToVideoPipeline(
        **parts,
        image_encoder=clip_vision(),
        image_processor=transformers.CLIPImageProcessor(**sizes),
    )
    return pipe, unspoken(video(image=picture()))


@zoo("WanImageToVideoPipeline", denoiser="transformer,transformer_2", other=sized(32), **SILENT)
def wan_image_to_video_two_experts():
    parts = {**wan_parts(in_channels=36), "transformer_2": wan_net(seed=5, in_channels=36)}
    pipe = diffusers.WanImageToVideoPipeline(
        **parts, image_encoder=None, image_processor=None, boundary_ratio=0.9
    )
    return pipe, unspoken(video(image=picture(), guidance_scale_2=3.0))


@zoo("WanVideoToVideoPipeline", denoiser="transformer", **SILENT)
def wan_video_to_video():
    parts = wan_parts()
    parts["scheduler"] = diffusers.UniPCMultistepScheduler(**FLOW, flow_shift=3.0)
    pipe = diffusers.WanVideoToVideoPipeline(**parts)
    given = unspoken(video(video=[picture(i) for i in range(5)], strength=0.8))
    given.pop("num_frames")
    return pipe, {**given, "num_inference_steps": 5}


@zoo("WanVACEPipeline", denoiser="transformer", **{**SILENT, "batch": None})
def wan_vace():
    kind = "WanVACETransformer3DModel"
    parts = wan_parts(kind, vace_layers=[0, 1], vace_in_channels=96)
    shown = {"video": [picture(i) for i in range(5)], "mask": [Image.new("L", (16, 16), 255)] * 5}
    return diffusers.WanVACEPipeline(**parts), unspoken(video(**shown))


@zoo("SkyReelsV2Pipeline", denoiser="transformer", other=sized(32), **SILENT)
def skyreels():
    parts = wan_parts("SkyReelsV2Transformer3DModel")
    parts["scheduler"] = diffusers.UniPCMultistepScheduler(**FLOW, flow_shift=8.0)
    return diffusers.SkyReelsV2Pipeline(**parts), unspoken(video())


def cog_parts(**kwargs) -> dict:
    net = functools.partial(
        diffusers.CogVideoXTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=16,
        **{"in_channels": 4, "out_channels": 4, **kwargs},
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=2,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=16,
    )
    vae = functools.partial(
        diffusers.AutoencoderKLCogVideoX,
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8,) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    options = {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    scheduler = diffusers.CogVideoXDDIMScheduler(**options, rescale_betas_zero_snr=True)
    parts = {**t5_text(), "vae": seeded(vae), "scheduler": scheduler}
    return {**parts, "transformer": seeded(net, gain=8.0)}


# CogVideoX makes one video per prompt, whatever it is asked for.
ONE = {"result": "frames", "copies": None}


@zoo("CogVideoXPipeline", denoiser="transformer", **ONE)
def cogvideox():
    return diffusers.CogVideoXPipeline(**cog_parts()), video(frames=9)


@zoo("CogVideoXPipeline", denoiser="transformer", **ONE)
def cogvideox_dynamic():
    parts = cog_parts(use_rotary_positional_embeddings=True)
    parts["scheduler"] = diffusers.CogVideoXDPMScheduler.from_config(parts["scheduler"].config)
    return diffusers.CogVideoXPipeline(**parts), video(frames=9, use_dynamic_cfg=True)


@zoo("CogVideoXImageToVideoPipeline", denoiser="transformer", **{**ONE, "batch": pair()})
def cogvideox_image_to_video():
    parts = cog_parts(in_channels=8, use_rotary_positional_embeddings=True)
    return diffusers.CogVideoXImageToVideoPipeline(**parts), video(frames=9, image=picture())


def hunyuan():
    """A pipeline that has the guidance scale embedded, and may be guided besides."""
    net = functools.partial(
        diffusers.HunyuanVideoTransformer3DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        text_embed_dim=16,
        pooled_projection_dim=16,
        rope_axes_dim=(2, 4, 4),
    )
    vae = functools.partial(
        diffusers.AutoencoderKLHunyuanVideo,
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )
    return diffusers.HunyuanVideoPipeline(
        text_encoder=decoder("LlamaModel", layers=3),
        tokenizer=words(),
        transformer=seeded(net, gain=3.0),
        vae=seeded(vae),
        scheduler=flow(shift=7.0),
        text_encoder_2=clip(max_position_embeddings=77),
        tokenizer_2=tokenizer(),
    )


def hunyuan_call(**kwargs) -> dict:
    """Arguments without the long template that the prompt would be put into."""
    return video(prompt_template={"template": "{}", "crop_start": 0}, **kwargs)


@zoo(
    "HunyuanVideoPipeline",
    denoiser="transformer",
    scale=None,
    guided=False,
    **{**VIDEO, "pattern": "none"},
    other=sized(32),
)
def hunyuan_video():
    return hunyuan(), hunyuan_call(guidance_scale=6.0)


@zoo(
    "HunyuanVideoPipeline", denoiser="transformer", scale="true_cfg_scale", other=sized(32), **CALLS
)
def hunyuan_video_true_cfg():
    return hunyuan(), hunyuan_call(guidance_scale=1.0, true_cfg_scale=5.0)


def ltx_vae():
    make = functools.partial(
        diffusers.AutoencoderKLLTXVideo,
        latent_channels=8,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1,
    )
    return seeded(make)


def ltx_parts() -> dict:
    make = functools.partial(
        diffusers.LTXVideoTransformer3DModel,
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=16,
    )
    net = seeded(make)
    louder(net, 8.0, "attn2.to_out")
    return {**t5_text(), "vae": ltx_vae(), "transformer": net, "scheduler": flow()}


@zoo("LTXPipeline", denoiser="transformer", other=sized(64), **VIDEO)
def ltx():
    return diffusers.LTXPipeline(**ltx_parts()), video(9, 32)


@zoo("LTXPipeline", denoiser="transformer", other=sized(64), **VIDEO)
def ltx_rescaled():
    return diffusers.LTXPipeline(**ltx_parts()), video(9, 32, guidance_rescale=0.5)


@zoo("LTXImageToVideoPipeline", denoiser="transformer", other=sized(64), batch=pair(32), **VIDEO)
def ltx_image_to_video():
    return diffusers.LTXImageToVideoPipeline(**ltx_parts()), video(9, 32, image=picture(size=32))


@zoo("LTXConditionPipeline", denoiser="transformer", other=sized(64), **VIDEO)
def ltx_condition():
    return diffusers.LTXConditionPipeline(**ltx_parts()), video(9, 32, image=picture(size=32))


@zoo("MochiPipeline", denoiser="transformer", other=sized(32), **VIDEO)
def mochi():
    net = functools.partial(
        diffusers.MochiTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=12,
        text_embed_dim=16,
        time_embed_dim=4,
        max_sequence_length=16,
    )
    vae = functools.partial(
        diffusers.AutoencoderKLMochi,
        encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1,) * 5,
    )
    pipe = diffusers.MochiPipeline(
        **t5_text(),
        vae=seeded(vae),
        transformer=seeded(net, gain=3.0),
        scheduler=flow(invert_sigmas=True),
    )
    return pipe, video(frames=7)
