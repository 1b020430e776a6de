"""Image pipelines with a transformer and one call per step: SD 3, PixArt, Sana and their like."""

from __future__ import annotations

import functools

import diffusers
import torch
import transformers

from pipelines import ddim, mask, picture, tokenizer
from zoo import (
    both,
    clip,
    decoder,
    flow,
    flux_vae,
    louder,
    noise,
    seeded,
    sized,
    t5,
    vae,
    words,
    zoo,
)
from zoo_images import XL, unet

PLAIN = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
SD3 = {
    "sample_size": 8,
    "patch_size": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "caption_projection_dim": 32,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "pos_embed_max_size": 16,
}


def net(name: str, gain: float = 5.0, seed: int = 0, **config):
    """A transformer of diffusers by name, with attention that shows."""
    return seeded(functools.partial(getattr(diffusers, name), **config), seed, gain)


def sd3_parts(channels: int = 4, **kwargs) -> dict:
    """Two CLIP encoders side by side, as wide as the T5 encoder that follows them."""
    sizes = {**SD3, "in_channels": channels, "out_channels": channels, **kwargs}
    return {
        "transformer": net("SD3Transformer2DModel", num_layers=3, **sizes),
        "scheduler": flow(),
        "vae": flux_vae(channels),
        "text_encoder": clip(1, projected=True),
        "tokenizer": tokenizer(),
        "text_encoder_2": clip(2, projected=True),
        "tokenizer_2": tokenizer(),
        "text_encoder_3": t5(3, width=32),
        "tokenizer_3": words(),
    }


SHORT = {"max_sequence_length": 16}


@zoo("StableDiffusion3Pipeline", denoiser="transformer", other=sized(24))
def sd3():
    return diffusers.StableDiffusion3Pipeline(**sd3_parts()), both(**SHORT, **sized(16))


@zoo("StableDiffusion3Pipeline", denoiser="transformer", other=sized(24))
def sd35():
    """Stable Diffusion 3.5: normalised queries and keys, two attentions in the first block."""
    parts = sd3_parts(qk_norm="rms_norm", dual_attention_layers=(0,))
    return diffusers.StableDiffusion3Pipeline(**parts), both(**SHORT, **sized(16))


SKIPPING = {"pattern": "skip-layer", "rows": (2, 2, 1, 2, 1, 2, 2)}


@zoo("StableDiffusion3Pipeline", denoiser="transformer", other=sized(24), **SKIPPING)
def sd3_skip_layer():
    """A third branch without block 1, in steps 1 and 2 alone."""
    skip = {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 0.6}
    given = both(**SHORT, **skip, **sized(16), num_inference_steps=5)
    return diffusers.StableDiffusion3Pipeline(**sd3_parts()), given


@zoo("StableDiffusion3Img2ImgPipeline", denoiser="transformer", other=sized(24))
def sd3_img2img():
    given = both(image=picture(), strength=0.8, num_inference_steps=5, **SHORT, **sized(16))
    return diffusers.StableDiffusion3Img2ImgPipeline(**sd3_parts()), given


@zoo("StableDiffusion3InpaintPipeline", denoiser="transformer", other=sized(24))
def sd3_inpaint():
    images = {"image": picture(), "mask_image": mask(), "strength": 0.8}
    given = both(**images, num_inference_steps=5, **SHORT, **sized(16))
    return diffusers.StableDiffusion3InpaintPipeline(**sd3_parts(16)), given


@zoo("StableDiffusion3ControlNetPipeline", denoiser="transformer", other=sized(24))
def sd3_controlnet():
    shape = {**SD3, "in_channels": 4, "out_channels": 4, "num_layers": 1}
    control = net("SD3ControlNetModel", seed=4, **shape)
    pipe = diffusers.StableDiffusion3ControlNetPipeline(**sd3_parts(), controlnet=control)
    given = both(control_image=picture(), controlnet_conditioning_scale=0.5)
    return pipe, {**given, **SHORT, **sized(16)}


def pixart_parts(sample: int) -> dict:
    """With a sample of 128 the network is told resolution and aspect ratio."""
    config = {
        "sample_size": sample,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 3,
        "cross_attention_dim": 24,
        "caption_channels": 16,
        "in_channels": 4,
        "out_channels": 8,
    }
    return {
        "transformer": net("PixArtTransformer2DModel", norm_type="ada_norm_single", **config),
        "vae": vae(),
        "text_encoder": t5(),
        "tokenizer": words(),
        "scheduler": diffusers.DPMSolverMultistepScheduler(),
    }


UNBINNED = {"use_resolution_binning": False, "clean_caption": False}


@zoo("PixArtAlphaPipeline", denoiser="transformer", callbacks=False, other=sized(24))
def pixart_alpha():
    given = both(**UNBINNED, **SHORT, **sized(16))
    return diffusers.PixArtAlphaPipeline(**pixart_parts(128)), given


@zoo("PixArtSigmaPipeline", denoiser="transformer", callbacks=False, other=sized(24))
def pixart_sigma():
    given = both(**UNBINNED, **SHORT, **sized(16))
    return diffusers.PixArtSigmaPipeline(**pixart_parts(8)), given


def dc_vae():
    levels = {
        "block_types": ("ResBlock", "EfficientViTBlock"),
        "block_out_channels": (8, 8),
        "qkv_multiscales": ((), (5,)),
        "layers_per_block": (1, 1),
    }
    sides = {f"{side}_{k}": v for side in ("encoder", "decoder") for k, v in levels.items()}
    blocks = {"upsample_block_type": "interpolate", "downsample_block_type": "conv"}
    make = functools.partial(
        diffusers.AutoencoderDC, latent_channels=4, attention_head_dim=2, **sides, **blocks
    )
    return seeded(make)


def sana_parts(**kwargs) -> dict:
    config = {
        "patch_size": 1,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 4,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 4,
        "cross_attention_dim": 8,
        "caption_channels": 16,
    }
    return {
        "transformer": net("SanaTransformer2DModel", **config, **kwargs),
        "vae": dc_vae(),
        "text_encoder": decoder("Gemma2Model"),
        "tokenizer": words(),
        "scheduler": diffusers.DPMSolverMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction"
        ),
    }


PLAINLY = {**UNBINNED, **SHORT, "complex_human_instruction": None}


@zoo("SanaPipeline", denoiser="transformer", other=sized(64))
def sana():
    return diffusers.SanaPipeline(**sana_parts()), both(**PLAINLY, **sized(32))


@zoo("SanaSprintPipeline", denoiser="transformer", guided=False, pattern="none", batch=None)
def sana_sprint():
    parts = sana_parts(guidance_embeds=True, qk_norm="rms_norm_across_heads")
    parts["scheduler"] = diffusers.SCMScheduler()
    given = both(**PLAINLY, **sized(32), intermediate_timesteps=None)
    given.pop("negative_prompt")
    return diffusers.SanaSprintPipeline(**parts), given


def bert(seed: int = 0):
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=80,
    )
    return seeded(lambda: transformers.BertModel(config), seed)


HUNYUAN = {
    "sample_size": 8,
    "patch_size": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 3,
    "hidden_size": 24,
    "in_channels": 4,
    "cross_attention_dim": 16,
    "cross_attention_dim_t5": 16,
    "pooled_projection_dim": 16,
}


def hunyuan_parts(layers: int = 2) -> dict:
    return {
        "transformer": net("HunyuanDiT2DModel", num_layers=layers, **HUNYUAN),
        "vae": vae(levels=4),  # the pipeline takes a factor of 8 for granted
        "text_encoder": bert(),
        "tokenizer": words(77),
        "text_encoder_2": t5(1, kind="MT5EncoderModel"),
        "tokenizer_2": words(256),
        "scheduler": ddim(),
        **PLAIN,
    }


@zoo("HunyuanDiTPipeline", denoiser="transformer", other=sized(96))
def hunyuan_dit():
    given = both(use_resolution_binning=False, guidance_rescale=0.5, **sized(64))
    return diffusers.HunyuanDiTPipeline(**hunyuan_parts()), given


class Positioned(transformers.PreTrainedTokenizerFast):
    """Gives positions too, as ChatGLM's own tokenizer does."""

    def __call__(self, *args, **kwargs):
        out = super().__call__(*args, **kwargs)
        out["position_ids"] = (out["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        return out


def chat_glm():
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel

    sizes = {"padded_vocab_size": 64, "hidden_size": 16, "ffn_hidden_size": 32, "seq_length": 32}
    heads = {"num_attention_heads": 2, "kv_channels": 8, "num_layers": 2}
    model = ChatGLMModel(ChatGLMConfig(**sizes, **heads, original_rope=True)).eval()
    for i, weight in enumerate(model.parameters()):
        weight.data = noise(*weight.shape, seed=i) if weight.dim() > 1 else torch.ones_like(weight)
    return model


@zoo("KolorsPipeline", denoiser="unet", other=sized(24))
def kolors():
    sizes = {"projection_class_embeddings_input_dim": 16 + 4 * 6}
    text = {"encoder_hid_dim": 16, "encoder_hid_dim_type": "text_proj"}
    pipe = diffusers.KolorsPipeline(
        unet=unet(**XL, **sizes, **text),
        vae=vae(),
        text_encoder=chat_glm(),
        tokenizer=words(side="left", kind=Positioned),
        scheduler=ddim(),
    )
    return pipe, both(**SHORT, **sized(16))


@zoo("AuraFlowPipeline", denoiser="transformer", other=sized(24))
def aura_flow():
    config = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "num_mmdit_layers": 1,
        "num_single_dit_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "joint_attention_dim": 32,
        "caption_projection_dim": 32,
        "pos_embed_max_size": 256,
    }
    transformer = net("AuraFlowTransformer2DModel", **config)
    louder(transformer, 10.0, "norm1")  # its gates are small
    pipe = diffusers.AuraFlowPipeline(
        transformer=transformer,
        vae=vae(),
        text_encoder=t5(1, width=32, kind="UMT5EncoderModel"),
        tokenizer=words(),
        scheduler=flow(),
    )
    return pipe, both(**SHORT, **sized(16))


@zoo("HiDreamImagePipeline", denoiser="transformer", other={"height": 8, "width": 32})
def hidream():
    config = {
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "caption_channels": [32, 16],
        "text_emb_dim": 32,
        "axes_dims_rope": (4, 2, 2),
        "max_resolution": (16, 16),
        "llama_layers": (0, 1),
    }
    parts = sd3_parts()
    parts.update(transformer=net("HiDreamImageTransformer2DModel", **config))
    llama = decoder("LlamaForCausalLM", attn_implementation="eager")
    pipe = diffusers.HiDreamImagePipeline(**parts, text_encoder_4=llama, tokenizer_4=words())
    pipe.default_sample_size = 8  # the pipeline fits every size to this area
    return pipe, both(**SHORT, **sized(16))


LABELS = {"class_labels": [3, 5]}


REVERSED = {"pattern": "concat-reversed", "callbacks": False, "copies": None}


@zoo("DiTPipeline", denoiser="transformer", batch=LABELS, **REVERSED)
def dit():
    """Class-conditional; it has no latents to return."""
    config = {
        "sample_size": 8,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "in_channels": 4,
        "out_channels": 8,
    }
    transformer = net("DiTTransformer2DModel", **config)
    pipe = diffusers.DiTPipeline(transformer=transformer, vae=vae(), scheduler=ddim())
    given = {"class_labels": [3], "guidance_scale": 5.0, "num_inference_steps": 4}
    return pipe, {**given, "output_type": "np"}
