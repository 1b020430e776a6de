"""How each pipeline family does guidance, as data.

A record says which attribute is the denoiser and how the two branches share a call; a layout says,
per class of denoiser, which arguments carry the batch. Nothing is inferred from shapes: with two
prompts a batch of 2 looks like guidance.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any

HOOK_NAME = "thg_engine.guidance"
"""Of the guidance hook, in the registry of the denoiser."""


@dataclass(frozen=True)
class ArgumentLayout:
    """Arguments of one class of denoisers.

    Attributes:
        sample: name of the first argument, whose batch holds both branches.
        batched: arguments whose tensors carry the doubled batch in dim 0, nested or not.
        unbatched: arguments whose tensors may also be shared by both halves (batch 1 or none).
        shared: arguments whose tensors never carry the batch.
        repeated: batched arguments that may have several rows for one of the sample, its frames.
    """

    sample: str
    batched: tuple[str, ...]
    unbatched: tuple[str, ...] = ("timestep",)
    shared: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()


_TEXT = ("encoder_hidden_states", "encoder_attention_mask")
_UNET_RESIDUALS = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
)
_UNET = ArgumentLayout(
    "sample",
    (*_TEXT, "class_labels", "attention_mask", "added_cond_kwargs", *_UNET_RESIDUALS),
    ("timestep", "timestep_cond", "cross_attention_kwargs"),
)
LAYOUTS: dict[str, ArgumentLayout] = {
    "UNet2DConditionModel": _UNET,
    "UNetMotionModel": ArgumentLayout(
        "sample",
        ("encoder_hidden_states", "attention_mask", "added_cond_kwargs", *_UNET_RESIDUALS[:2]),
        ("timestep", "timestep_cond", "cross_attention_kwargs"),
        repeated=("encoder_hidden_states", "added_cond_kwargs"),
    ),
    "UNetSpatioTemporalConditionModel": ArgumentLayout(
        "sample", ("encoder_hidden_states", "added_time_ids")
    ),
    "AudioLDM2UNet2DConditionModel": ArgumentLayout(
        "sample", (*_TEXT, "encoder_hidden_states_1", "encoder_attention_mask_1", "class_labels")
    ),
    "SD3Transformer2DModel": ArgumentLayout(
        "hidden_states",
        ("encoder_hidden_states", "pooled_projections", "block_controlnet_hidden_states"),
        ("timestep", "joint_attention_kwargs"),
    ),
    "PixArtTransformer2DModel": ArgumentLayout(
        "hidden_states", (*_TEXT, "added_cond_kwargs", "attention_mask")
    ),
    "SanaTransformer2DModel": ArgumentLayout(
        "hidden_states", (*_TEXT, "guidance", "controlnet_block_samples"), ("timestep",)
    ),
    "HunyuanDiT2DModel": ArgumentLayout(
        "hidden_states",
        (
            *("encoder_hidden_states", "text_embedding_mask", "encoder_hidden_states_t5"),
            *("text_embedding_mask_t5", "image_meta_size", "style", "controlnet_block_samples"),
        ),
        shared=("image_rotary_emb",),
    ),
    "AuraFlowTransformer2DModel": ArgumentLayout("hidden_states", ("encoder_hidden_states",)),
    "DiTTransformer2DModel": ArgumentLayout("hidden_states", ("class_labels",)),
    "LuminaNextDiT2DModel": ArgumentLayout(
        "hidden_states",
        ("encoder_hidden_states", "encoder_mask"),
        ("timestep", "cross_attention_kwargs"),
        ("image_rotary_emb",),
    ),
    "StableAudioDiTModel": ArgumentLayout(
        "hidden_states",
        ("encoder_hidden_states", "global_hidden_states", "encoder_attention_mask"),
        shared=("rotary_embedding",),
    ),
    "CogVideoXTransformer3DModel": ArgumentLayout(
        "hidden_states",
        ("encoder_hidden_states",),
        ("timestep", "ofs"),
        ("image_rotary_emb",),
    ),
    "MochiTransformer3DModel": ArgumentLayout("hidden_states", _TEXT),
    "LTXVideoTransformer3DModel": ArgumentLayout(
        "hidden_states", _TEXT, ("timestep", "video_coords"), ("rope_interpolation_scale",)
    ),
    "LatteTransformer3DModel": ArgumentLayout("hidden_states", _TEXT),
    "AllegroTransformer3DModel": ArgumentLayout(
        "hidden_states", (*_TEXT, "attention_mask"), ("timestep",), ("image_rotary_emb",)
    ),
}


@dataclass(frozen=True)
class AdapterRecord:
    """One pipeline family, whose denoiser is called once per step with both branches.

    Attributes:
        pipeline: name of the diffusers class that defines ``__call__``.
        denoiser: attribute that holds the network.
        cond_half: which half of the doubled batch is the conditional one, 0 or 1.
        scale: argument of the call that holds w, where the pipeline keeps no property of it.
    """

    pipeline: str
    denoiser: str = "unet"
    cond_half: int = 1
    scale: str = "guidance_scale"


_UNETS = (
    *("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"),
    *("StableDiffusionInpaintPipeline", "StableDiffusionControlNetPipeline"),
    *("StableDiffusionControlNetImg2ImgPipeline", "StableDiffusionControlNetInpaintPipeline"),
    *("StableDiffusionAdapterPipeline", "StableDiffusionGLIGENPipeline"),
    *("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"),
    *("StableDiffusionXLInpaintPipeline", "StableDiffusionXLControlNetPipeline"),
    *("StableDiffusionXLControlNetImg2ImgPipeline", "StableDiffusionXLAdapterPipeline"),
    *("KolorsPipeline", "AnimateDiffPipeline", "KandinskyV22Pipeline", "AudioLDM2Pipeline"),
)
_TRANSFORMERS = (
    *("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline"),
    *("StableDiffusion3InpaintPipeline", "StableDiffusion3ControlNetPipeline"),
    *("PixArtAlphaPipeline", "PixArtSigmaPipeline", "SanaPipeline", "HunyuanDiTPipeline"),
    *("AuraFlowPipeline", "StableAudioPipeline", "CogVideoXPipeline"),
    *("CogVideoXImageToVideoPipeline", "MochiPipeline", "LTXPipeline"),
    *("LTXImageToVideoPipeline", "LTXConditionPipeline", "LattePipeline", "AllegroPipeline"),
)
RECORDS: dict[str, AdapterRecord] = {
    record.pipeline: record
    for record in (
        *(AdapterRecord(name) for name in _UNETS),
        *(AdapterRecord(name, "transformer") for name in _TRANSFORMERS),
        AdapterRecord("StableVideoDiffusionPipeline", scale="max_guidance_scale"),
        AdapterRecord("DiTPipeline", "transformer", cond_half=0),
        AdapterRecord("LuminaPipeline", "transformer", cond_half=0),
    )
}


def find_record(pipeline_class: type[Any]) -> AdapterRecord | None:
    """The record of the class whose ``__call__`` the pipeline runs; None if nobody wrote one.

    A user's subclass with its own loop is another pipeline, even under a known name.
    """
    for parent in pipeline_class.__mro__:
        if "__call__" in vars(parent):
            known = parent.__module__.startswith("diffusers.")
            return RECORDS.get(parent.__name__) if known else None
    return None


def find_layout(module: Any) -> ArgumentLayout | None:
    """The layout of the class of ``module``, or of the nearest one it derives from."""
    names = (parent.__name__ for parent in type(module).__mro__)
    return next((LAYOUTS[name] for name in names if name in LAYOUTS), None)


@cache
def argument_names(kind: Any) -> tuple[str, ...]:
    """Positional order of the ``forward`` of a class of modules."""
    return tuple(inspect.signature(kind.forward).parameters)[1:]
