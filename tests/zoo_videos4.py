"""Video pipelines of later years: LTX-2 (with sound), EasyAnimate, Sana; AudioLDM and MusicLDM."""

from __future__ import annotations

import functools

import diffusers
import torch
import transformers

from pipelines import ddim, picture
from zoo import both, decoder, flow, louder, noise, seeded, sized, vae, words, zoo
from zoo_images import unet
from zoo_images2 import PLAINLY
from zoo_videos import ltx_vae, video, wan_vae
from zoo_videos2 import VIDEO
from zoo_videos_audio import AUDIO, clap, roberta_words, vocoder

LTX2 = {"result": "frames", "batch": None, "copies": None}


def ltx2_net():
    make = functools.partial(
        diffusers.LTX2VideoTransformer3DModel,
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=2,
        caption_channels=16,
        rope_double_precision=False,
        rope_type="split",
    )
    net = seeded(make)
    louder(net, 8.0, "attn2.to_out", "audio_attn2.to_out")
    return net


def ltx2_connectors():
    from diffusers.pipelines.ltx2 import LTX2TextConnectors

    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1}
    sides = {f"{side}_connector_{k}": v for side in ("video", "audio") for k, v in sizes.items()}
    make = functools.partial(
        LTX2TextConnectors,
        caption_channels=16,
        text_proj_in_factor=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_learnable_registers=None,
        connector_rope_base_seq_len=32,
        rope_double_precision=False,
        rope_type="split",
        **sides,
    )
    return seeded(make)


def ltx2_embeds() -> dict:
    given = {}
    for i, name in enumerate(("prompt", "negative_prompt")):
        given[f"{name}_embeds"] = noise(1, 8, 16, seed=3 + i)
        given[f"{name}_attention_mask"] = torch.ones(1, 8).long()
    return given


def sound_vae():
    make = functools.partial(
        diffusers.AutoencoderKLLTX2Audio,
        base_channels=4,
        output_channels=2,
        ch_mult=(1,),
        num_res_blocks=1,
        attn_resolutions=None,
        in_channels=2,
        resolution=32,
        latent_channels=2,
        mid_block_add_attention=False,
        mel_bins=8,
    )
    return seeded(make)


def ltx2(name: str):
    """Without text encoder, given embeddings, and without anything that decodes."""
    return getattr(diffusers, name)(
        scheduler=flow(),
        vae=ltx_vae(),
        audio_vae=sound_vae(),
        text_encoder=None,
        tokenizer=None,
        connectors=ltx2_connectors(),
        transformer=ltx2_net(),
        vocoder=None,
    )


PLAIN = {
    "stg_scale": 0.0,
    "modality_scale": 1.0,
    "audio_stg_scale": 0.0,
    "audio_modality_scale": 1.0,
    "frame_rate": 25.0,
}


@zoo("LTX2Pipeline", denoiser="transformer", **LTX2)
def ltx2_text():
    """Two outputs in a call, picture and sound, each with a scale of its own."""
    given = {**video(9, 32), **PLAIN, **ltx2_embeds(), "prompt": None, "negative_prompt": None}
    return ltx2("LTX2Pipeline"), given


@zoo("LTX2ImageToVideoPipeline", denoiser="transformer", **LTX2)
def ltx2_image():
    given = {**video(9, 32, image=picture(size=32)), **PLAIN, **ltx2_embeds(), "image_crf": 0}
    return ltx2("LTX2ImageToVideoPipeline"), {**given, "prompt": None, "negative_prompt": None}


def easy_net(channels: int):
    make = functools.partial(
        diffusers.EasyAnimateTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=channels,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=16,
        num_layers=1,
        mmdit_layers=1,
        sample_width=16,
        sample_height=16,
        patch_size=2,
    )
    return seeded(make, gain=8.0)


def easy_vae():
    make = functools.partial(
        diffusers.AutoencoderKLMagvit,
        in_channels=3,
        out_channels=3,
        down_block_types=("SpatialDownBlock3D",) + ("SpatialTemporalDownBlock3D",) * 3,
        up_block_types=("SpatialUpBlock3D",) + ("SpatialTemporalUpBlock3D",) * 3,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        spatial_group_norm=False,
    )
    return seeded(make)


def easy(name: str, channels: int = 4):
    return getattr(diffusers, name)(
        vae=easy_vae(),
        text_encoder=None,
        tokenizer=None,
        transformer=easy_net(channels),
        scheduler=flow(),
    )


def read(rows: int = 1) -> dict:
    """Embeddings of prompts and of their negatives."""
    given = {"prompt": None, "negative_prompt": None}
    for i, name in enumerate(("prompt", "negative_prompt")):
        given[f"{name}_embeds"] = noise(rows, 8, 16, seed=3 + i)
        given[f"{name}_attention_mask"] = torch.ones(rows, 8).long()
    return given


EASY = {"denoiser": "transformer", "result": "frames", "batch": read(2), "copies": None}


@zoo("EasyAnimatePipeline", **EASY)
def easy_animate():
    return easy("EasyAnimatePipeline"), {**both(num_frames=5, **sized(16)), **read()}


@zoo("EasyAnimateInpaintPipeline", **{**EASY, "batch": None})
def easy_animate_inpaint():
    given = {**both(num_frames=5, **sized(16)), **read()}
    seen = noise(1, 3, 5, 16, 16, seed=5).clamp(0, 1)
    masks = 255 * torch.ones(1, 1, 5, 16, 16)
    return easy("EasyAnimateInpaintPipeline", 9), {**given, "video": seen, "mask_video": masks}


def sana_video_parts() -> dict:
    make = functools.partial(
        diffusers.SanaVideoTransformer3DModel,
        in_channels=16,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=16,
        mlp_ratio=2.5,
        sample_size=8,
        patch_size=(1, 2, 2),
    )
    return {
        "transformer": seeded(make, gain=20.0),
        "vae": wan_vae(),
        "text_encoder": decoder("Gemma2Model"),
        "tokenizer": words(),
        "scheduler": diffusers.DPMSolverMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction"
        ),
    }


SANA = {"denoiser": "transformer", "other": sized(64), **VIDEO}


@zoo("SanaVideoPipeline", **SANA)
def sana_video():
    given = both(frames=9, **PLAINLY, **sized(32))
    return diffusers.SanaVideoPipeline(**sana_video_parts()), given


@zoo("SanaImageToVideoPipeline", **{**SANA, "batch": None, "copies": None})
def sana_image_to_video():
    given = both(image=picture(size=32), frames=9, **PLAINLY, **sized(32))
    parts = {**sana_video_parts(), "scheduler": flow()}
    return diffusers.SanaImageToVideoPipeline(**parts), given


def ldm_unet():
    label = {"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 16}
    return unet(cross_attention_dim=(8, 16), class_embeddings_concat=True, **label)


@zoo("AudioLDMPipeline", denoiser="unet", other={"audio_length_in_s": 0.016}, **AUDIO)
def audioldm():
    """Led by a class embedding alone."""
    pipe = diffusers.AudioLDMPipeline(
        vae=vae(in_channels=1, out_channels=1),
        text_encoder=clap_text(),
        tokenizer=roberta_words(),
        unet=ldm_unet(),
        scheduler=ddim(),
        vocoder=vocoder(),
    )
    return pipe, both(audio_length_in_s=0.008, output_type="np")


def clap_text():
    config = clap().config.text_config
    config.projection_dim = 16
    return seeded(lambda: transformers.ClapTextModelWithProjection(config))


def heard(rows: int = 1) -> dict:
    names = ("prompt_embeds", "negative_prompt_embeds")
    return {name: noise(rows, 16, seed=3 + i) for i, name in enumerate(names)}


@zoo("MusicLDMPipeline", denoiser="unet", **{**AUDIO, "batch": heard(2)})
def musicldm():
    """Given embeddings: its text encoder answers in another form by now."""
    pipe = diffusers.MusicLDMPipeline(
        vae=vae(in_channels=1, out_channels=1),
        text_encoder=clap(),
        tokenizer=roberta_words(),
        feature_extractor=transformers.ClapFeatureExtractor(hop_length=7900),
        unet=ldm_unet(),
        scheduler=ddim(),
        vocoder=vocoder(),
    )
    given = both(audio_length_in_s=0.008, output_type="np", **heard())
    return pipe, {k: v for k, v in given.items() if not k.endswith("prompt")}


@zoo("LTX2Pipeline", denoiser="transformer", **LTX2)
def ltx2_perturbed():
    """As released: two calls more in every step, blocks left out and modalities kept apart."""
    pipe, given = ltx2_text()
    extra = {"stg_scale": 1.0, "modality_scale": 3.0, "spatio_temporal_guidance_blocks": [1]}
    return pipe, {**given, **extra}


@zoo("LTX2ConditionPipeline", denoiser="transformer", **LTX2)
def ltx2_condition():
    from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition

    pipe, given = ltx2("LTX2ConditionPipeline"), ltx2_text()[1]
    seen = LTX2VideoCondition(frames=picture(size=32), index=0, strength=1.0, crf=0)
    return pipe, {**given, "conditions": [seen]}
