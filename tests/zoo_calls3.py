"""Pipelines that read pictures and text together, make sound, or came late; some in one call."""

from __future__ import annotations

import functools

import diffusers
import torch
import transformers

from pipelines import picture
from zoo import CHAT, both, flow, louder, noise, seeded, sized, t5, words, zoo
from zoo_calls import CALLS, unspoken
from zoo_images2 import net
from zoo_images3 import FLUX, true_cfg
from zoo_modular import embedded
from zoo_videos import umt5_text, video, wan_vae
from zoo_videos import unspoken as unsaid
from zoo_videos4 import LTX2, PLAIN, ltx2, ltx2_embeds

MARKS = {
    "im_start": "<|im_start|>",
    "im_end": "<|im_end|>",
    "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
    "image_pad": "<|image_pad|>",
}


class Reader(transformers.ProcessorMixin):
    """A processor of text alone."""

    def __init__(self, tokenizer=None, chat_template=CHAT) -> None:
        super().__init__(tokenizer, chat_template=chat_template)

    def __call__(self, images=None, text=None, **kwargs):
        return super().__call__(text=[text] if isinstance(text, str) else text, **kwargs)


def qwen21_vae():
    make = functools.partial(
        diffusers.AutoencoderKLQwenImage21,
        base_dim=4,
        decoder_base_dim=4,
        z_dim=8,
        dim_mult=[1] * 5,
        num_res_blocks=1,
        latents_mean=[0.0] * 8,
        latents_std=[1.0] * 8,
    )
    return seeded(make)


def qwen21():
    config = {
        "in_channels": 8,
        "out_channels": 8,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "context_in_dim": 16,
        "axes_dims_rope": (4, 6, 6),
    }
    return diffusers.QwenImage21Pipeline(
        scheduler=flow(),
        vae=qwen21_vae(),
        text_encoder=None,
        processor=Reader(words(64, **MARKS)),
        transformer=net("QwenImage21Transformer2DModel", gain=20.0, **config),
    )


@true_cfg("QwenImage21Pipeline", batch=embedded(2), other=sized(96))
def qwen_image21():
    """Keys and values of the prompt are kept from the first step on, for each branch."""
    given = unspoken(true_cfg_scale=4.0, use_kv_cache=True, **embedded(), **sized(64))
    given.pop("guidance_scale")
    return qwen21(), given


@true_cfg("QwenImage21Pipeline", batch=embedded(2), other=sized(96))
def qwen_image21_uncached():
    given = unspoken(true_cfg_scale=4.0, use_kv_cache=False, **embedded(), **sized(64))
    given.pop("guidance_scale")
    return qwen21(), given


def sighted(tokenizer):
    """Qwen 2.5 VL with a vision tower that is used."""
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
    text = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_scaling": rope,
        "pad_token_id": 0,
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    marks = {
        "image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        "vision_start_token_id": tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        "vision_end_token_id": tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    }
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config={**vision, "out_hidden_size": 16}, **marks
    )
    model = seeded(lambda: transformers.Qwen2_5_VLForConditionalGeneration(config))
    louder(model, 50.0, "embed_tokens")
    return model


class Viewer:
    """The part of a processor of pictures and text that reads pictures."""

    def __init__(self) -> None:
        sizes = {"size": {"shortest_edge": 28**2, "longest_edge": 56**2}}
        self.image_processor = transformers.Qwen2VLImageProcessorPil(**sizes)


@zoo("LongCatImageEditPipeline", callbacks=False, batch=None, **CALLS)
def longcat_image_edit():
    """Every picture becomes one of a million pixels."""
    config = {**FLUX, "in_channels": 64, "joint_attention_dim": 16, "pooled_projection_dim": 16}
    tokenizer = words(512, **MARKS)
    make = functools.partial(
        diffusers.AutoencoderKL,
        block_out_channels=(4,) * 6,
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 6,
        up_block_types=("UpDecoderBlock2D",) * 6,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
    )
    pipe = diffusers.LongCatImageEditPipeline(
        scheduler=flow(),
        vae=seeded(make),
        text_encoder=sighted(tokenizer),
        tokenizer=tokenizer,
        text_processor=Viewer(),
        transformer=net("LongCatImageTransformer2DModel", gain=20.0, **config),
    )
    pipe.tokenizer_max_length = 32
    return pipe, both(image=picture(size=64))


@zoo("LongCatAudioDiTPipeline", result="audios", copies=None, **CALLS)
def longcat_audio():
    """Its length follows from what is asked for, not from a size."""
    config = {
        "dit_dim": 32,
        "dit_depth": 2,
        "dit_heads": 2,
        "dit_text_dim": 16,
        "latent_dim": 8,
    }
    make = functools.partial(
        diffusers.LongCatAudioDiTVae,
        channels=4,
        c_mults=[1, 2],
        strides=[2, 2],
        latent_dim=8,
        encoder_latent_dim=16,
        downsampling_ratio=4,
        sample_rate=100,
    )
    pipe = diffusers.LongCatAudioDiTPipeline(
        vae=seeded(make),
        text_encoder=t5(kind="UMT5EncoderModel"),
        tokenizer=words(),
        transformer=net("LongCatAudioDiTTransformer", gain=10.0, **config),
        scheduler=flow(shift=1.0, invert_sigmas=True),
    )
    return pipe, both(audio_duration_s=1.0)


@zoo("AnyFlowPipeline", denoiser="transformer", result="frames", copies=None, batch=embedded(2))
def anyflow():
    """The network is told where its step goes to, besides where it is."""
    make = functools.partial(
        diffusers.AnyFlowTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=12,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    network = seeded(make)
    louder(network, 12.0, "attn2.to_out")
    scheduler = diffusers.FlowMapEulerDiscreteScheduler()
    pipe = diffusers.AnyFlowPipeline(
        **umt5_text(), transformer=network, vae=wan_vae(), scheduler=scheduler
    )
    return pipe, unsaid(video())


def ltx2_call(**kwargs) -> dict:
    """Arguments of LTX-2 with embeddings, guided by text alone."""
    silent = {"prompt": None, "negative_prompt": None}
    return {**video(9, 32), **PLAIN, **ltx2_embeds(), **silent, **kwargs}


@zoo("LTX2InContextPipeline", denoiser="transformer", **LTX2)
def ltx2_in_context():
    """Tokens of a reference behind those of the sample."""
    from diffusers.pipelines.ltx2.pipeline_ltx2_ic_lora import LTX2ReferenceCondition

    seen = LTX2ReferenceCondition(frames=[picture(i, 32) for i in range(9)], strength=1.0)
    return ltx2("LTX2InContextPipeline"), ltx2_call(reference_conditions=[seen])


@zoo("LTX2HDRPipeline", denoiser="transformer", **LTX2)
def ltx2_hdr():
    """Guided in the picture alone; its sound is not stepped."""
    from diffusers.pipelines.ltx2.pipeline_ltx2_hdr_lora import LTX2HDRReferenceCondition

    seen = LTX2HDRReferenceCondition(frames=[picture(i, 32) for i in range(9)], strength=1.0)
    given = ltx2_call(reference_conditions=[seen])
    return ltx2("LTX2HDRPipeline"), {k: v for k, v in given.items() if not k.startswith("audio")}


def worded(rows: int = 1) -> dict:
    """Embeddings of ``rows`` prompts and of their negatives, with masks."""
    given = {}
    for seed, side in enumerate(("", "negative_")):
        given[f"{side}prompt_embeds"] = noise(rows, 8, 16, seed=seed + 3)
        given[f"{side}encoder_attention_mask"] = torch.ones(rows, 8).long()
    return given


@zoo(
    "StableAudio3Pipeline",
    denoiser="transformer",
    result="audios",
    batch=worded(2),
    copies="num_waveforms_per_prompt",
    other={"duration": 2.0},
)
def stable_audio3():
    """The base model, which is guided; its length follows from what is asked for."""
    from diffusers.pipelines.stable_audio_3 import StableAudio3DurationEmbedder

    config = {
        "io_channels": 8,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
        "cond_token_dim": 16,
        "global_cond_dim": 16,
        "local_add_cond_dim": 9,
        "timestep_features_dim": 16,
        "num_memory_tokens": 4,
    }
    make = functools.partial(
        diffusers.AutoencoderSAME,
        patch_size=4,
        encoder_channels=8,
        encoder_c_mults=(2,),
        encoder_strides=(2,),
        encoder_transformer_depths=(1,),
        latent_dim=8,
        dim_heads=8,
        sampling_rate=100,
    )
    pipe = diffusers.StableAudio3Pipeline(
        vae=seeded(make),
        text_encoder=None,
        tokenizer=None,
        duration_embedder=seeded(lambda: StableAudio3DurationEmbedder(16, 16)),
        transformer=net("StableAudio3DiTModel", **config),
        scheduler=flow(),
    )
    return pipe, unspoken(duration=1.0, **worded())
