"""Further video pipelines with one call per branch, most of them given embeddings."""

from __future__ import annotations

import functools

import diffusers
import torch
import transformers
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin

from pipelines import picture
from zoo import both, clip_vision, flow, flux_vae, louder, noise, seeded, sized, t5, words, zoo
from zoo_videos import CALLS, SILENT, embedded, hunyuan, hunyuan_call, unspoken, video, wan_parts

ONE = {**CALLS, "copies": None}
FRAMES = [picture(i) for i in range(5)]


def hunyuan_net(**kwargs):
    """The transformer of HunyuanVideo in another configuration."""
    config = {**hunyuan().transformer.config, **kwargs}
    make = functools.partial(diffusers.HunyuanVideoTransformer3DModel, **config)
    return seeded(make, gain=3.0)


def pooled(rows: int = 1) -> dict:
    """Embeddings of two text encoders with masks, as HunyuanVideo takes them."""
    given = embedded(rows)
    for seed, side in enumerate(("", "negative_")):
        given[f"{side}pooled_prompt_embeds"] = noise(rows, 16, seed=seed + 5)
        given[f"{side}prompt_attention_mask"] = torch.ones(rows, 8)
    return given


def true_cfg(cls: str, **options):
    given = {**CALLS, "denoiser": "transformer", "scale": "true_cfg_scale", "copies": None}
    return zoo(cls, **{**given, **options})


def hunyuan_image(kind: str, channels: int):
    parts = hunyuan().components
    parts["transformer"] = hunyuan_net(image_condition_type=kind, in_channels=channels)
    return diffusers.HunyuanVideoImageToVideoPipeline(**parts, image_processor=None)


def shown(**kwargs) -> dict:
    given = unspoken(video(image=picture(), guidance_scale=1.0, true_cfg_scale=5.0))
    return {**given, **pooled(), **kwargs}


@true_cfg("HunyuanVideoImageToVideoPipeline", batch=None, other=sized(32))
def hunyuan_image_to_video():
    """The picture's latents beside the sample."""
    return hunyuan_image("latent_concat", 9), shown()


@true_cfg("HunyuanVideoImageToVideoPipeline", batch=None, other=sized(32))
def hunyuan_image_to_video_tokens():
    """The picture is the first frame of the sample, which is not stepped."""
    return hunyuan_image("token_replace", 4), shown()


@true_cfg("HunyuanSkyreelsImageToVideoPipeline", batch=None, other=sized(32))
def hunyuan_skyreels():
    parts = hunyuan().components
    parts["transformer"] = hunyuan_net(in_channels=8)
    pipe = diffusers.HunyuanSkyreelsImageToVideoPipeline(**parts)
    return pipe, hunyuan_call(image=picture(), guidance_scale=1.0, true_cfg_scale=5.0)


@zoo("SkyReelsV2ImageToVideoPipeline", denoiser="transformer", other=sized(32), **SILENT)
def skyreels_image():
    kind = {"kind": "SkyReelsV2Transformer3DModel", "image_dim": 16, "added_kv_proj_dim": 24}
    sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    pipe = diffusers.SkyReelsV2ImageToVideoPipeline(
        **wan_parts(in_channels=36, **kind),
        image_encoder=clip_vision(),
        image_processor=transformers.CLIPImageProcessor(**sizes),
    )
    return pipe, unspoken(video(image=picture()))


@zoo("LucyEditPipeline", denoiser="transformer", **{**SILENT, "batch": None})
def lucy_edit():
    pipe = diffusers.LucyEditPipeline(**wan_parts(in_channels=32))
    return pipe, unspoken(video(video=FRAMES))


@zoo("LucyEditPipeline", denoiser="transformer,transformer_2", **{**SILENT, "batch": None})
def lucy_edit_two_experts():
    parts = wan_parts(in_channels=32)
    second = wan_parts(in_channels=32, seed=5)["transformer"]
    pipe = diffusers.LucyEditPipeline(**parts, transformer_2=second, boundary_ratio=0.8)
    return pipe, unspoken(video(video=FRAMES, guidance_scale_2=3.0, num_inference_steps=6))


def spoken(rows: int = 1) -> dict:
    """Embeddings of Kandinsky 5's two encoders, and where each prompt begins."""
    given = {}
    for seed, side in enumerate(("", "negative_")):
        given[f"{side}prompt_embeds_qwen"] = noise(rows, 6, 16, seed=seed + 3)
        given[f"{side}prompt_embeds_clip"] = noise(rows, 16, seed=seed + 5)
        given[f"{side}prompt_cu_seqlens"] = torch.arange(rows + 1, dtype=torch.int32) * 6
    return given


def kandinsky5(name: str, vae, **kwargs):
    config = {
        "in_visual_dim": 4,
        "in_text_dim": 16,
        "in_text_dim2": 16,
        "time_dim": 16,
        "out_visual_dim": 4,
        "model_dim": 32,
        "ff_dim": 32,
        "num_text_blocks": 1,
        "num_visual_blocks": 2,
        "axes_dims": (4, 6, 6),
    }
    make = functools.partial(diffusers.Kandinsky5Transformer3DModel, **{**config, **kwargs})
    network = seeded(make)
    louder(network, 10.0, "out_layer")
    return getattr(diffusers, name)(
        transformer=network,
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        scheduler=flow(),
    )


KANDINSKY = {"denoiser": "transformer", "copies": None, "pattern": "calls"}


def silent(given: dict) -> dict:
    """``given`` with the embeddings of `spoken` in place of prompts."""
    return {k: v for k, v in given.items() if not k.endswith("prompt")} | spoken()


@zoo("Kandinsky5T2VPipeline", result="frames", batch=spoken(2), other=sized(32), **KANDINSKY)
def kandinsky5_video():
    return kandinsky5("Kandinsky5T2VPipeline", hunyuan().vae), silent(video())


@zoo("Kandinsky5I2VPipeline", result="frames", batch=None, other=sized(32), **KANDINSKY)
def kandinsky5_image_to_video():
    """The first frame is not stepped."""
    pipe = kandinsky5("Kandinsky5I2VPipeline", hunyuan().vae, visual_cond=True)
    return pipe, silent(video(25, image=picture()))


@zoo("Kandinsky5T2IPipeline", result="image", batch=spoken(2), slow=True, **KANDINSKY)
def kandinsky5_image():
    """Of a million pixels, as always."""
    pipe = kandinsky5("Kandinsky5T2IPipeline", flux_vae(4, 4))
    return pipe, silent(both(max_sequence_length=16, **sized(1024)))


@zoo("Kandinsky5I2IPipeline", result="image", batch=None, slow=True, **KANDINSKY)
def kandinsky5_image_to_image():
    """The picture's latents beside the sample."""
    pipe = kandinsky5("Kandinsky5I2IPipeline", flux_vae(4, 4), visual_cond=True)
    return pipe, silent(both(image=picture(size=64), max_sequence_length=16, **sized(1024)))


class Harmless(ModelMixin, ConfigMixin):
    """In the place of a safety checker, whose library is not here."""

    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, frames):
        return frames


def cosmos_net(channels: int, gain: float = 10.0):
    make = functools.partial(
        diffusers.CosmosTransformer3DModel,
        in_channels=channels,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        mlp_ratio=2,
        text_embed_dim=16,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        patch_size=(1, 2, 2),
        rope_scale=(2.0, 1.0, 1.0),
        encoder_hidden_states_channels=16,
        concat_padding_mask=False,  # the mask is resized by torchvision
    )
    return seeded(make, gain=gain)


def cosmos_vae():
    make = functools.partial(
        diffusers.AutoencoderKLCosmos,
        latent_channels=4,
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,),
        resolution=64,
        num_layers=2,
        patch_size=4,
        latents_mean=None,
        latents_std=None,
    )
    return seeded(make)


def cosmos_wan_vae():
    make = functools.partial(
        diffusers.AutoencoderKLWan,
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return seeded(make)


def cosmos(name: str, channels: int, vae, scheduler):
    return getattr(diffusers, name)(
        text_encoder=t5(),
        tokenizer=words(),
        transformer=cosmos_net(channels),
        vae=vae,
        scheduler=scheduler,
        safety_checker=Harmless(),
    )


def edm():
    return diffusers.EDMEulerScheduler(
        sigma_min=0.002, sigma_max=80, sigma_data=0.5, final_sigmas_type="sigma_min"
    )


@zoo("CosmosTextToWorldPipeline", denoiser="transformer", other=sized(32), **CALLS)
def cosmos_text():
    """The scheduler is asked twice per step; c + s (c - u) in x0."""
    pipe = cosmos("CosmosTextToWorldPipeline", 4, cosmos_vae(), edm())
    return pipe, video(frames=9)


@zoo("Cosmos2TextToImagePipeline", denoiser="transformer", pattern="calls", other=sized(32))
def cosmos2_text():
    """In x0, with the factors of a preconditioned network: c + s (c - u)."""
    scheduler = flow(use_karras_sigmas=True)
    pipe = cosmos("Cosmos2TextToImagePipeline", 4, cosmos_wan_vae(), scheduler)
    return pipe, both(max_sequence_length=16, **sized(16))


@zoo("Cosmos2VideoToWorldPipeline", denoiser="transformer", batch=None, other=sized(32), **CALLS)
def cosmos2_video():
    scheduler = flow(use_karras_sigmas=True)
    pipe = cosmos("Cosmos2VideoToWorldPipeline", 5, cosmos_wan_vae(), scheduler)
    return pipe, video(image=picture())


@zoo("Cosmos2_5_PredictBasePipeline", denoiser="transformer", batch=None, **ONE)
def cosmos25_predict():
    """From frames; the known ones are put back into both branches' outputs."""
    scheduler = diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction"
    )
    pipe = cosmos("Cosmos2_5_PredictBasePipeline", 5, cosmos_wan_vae(), scheduler)
    return pipe, unspoken(video(9, video=FRAMES, num_latent_conditional_frames=1))
