"""Which arguments of each class of denoisers carry the batch, read from their ``forward``."""

from __future__ import annotations

from .adapter_types import ArgumentLayout

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
