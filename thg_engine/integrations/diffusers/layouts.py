"""Which arguments of each class of denoisers carry the batch, read from their ``forward``."""

from __future__ import annotations

from dataclasses import replace

from .adapter_types import ArgumentLayout

_TEXT = ("encoder_hidden_states", "encoder_attention_mask")
_UNET_RESIDUALS = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
)
_CONTROLNET = ArgumentLayout(
    "sample",
    ("encoder_hidden_states", "controlnet_cond", "class_labels", "added_cond_kwargs"),
    ("timestep", "timestep_cond", "attention_mask", "cross_attention_kwargs"),
    ("conditioning_scale",),
)
_UNET = ArgumentLayout(
    "sample",
    (*_TEXT, "class_labels", "attention_mask", "added_cond_kwargs", *_UNET_RESIDUALS),
    ("timestep", "timestep_cond", "cross_attention_kwargs"),
    residuals=_UNET_RESIDUALS,
)
LAYOUTS: dict[str, ArgumentLayout] = {
    "UNet2DConditionModel": _UNET,
    "ControlNetModel": _CONTROLNET,
    "ControlNetUnionModel": replace(
        _CONTROLNET,
        batched=(*_CONTROLNET.batched, "control_type"),
        shared=("conditioning_scale", "control_type_idx"),
    ),
    "SD3ControlNetModel": ArgumentLayout(
        "hidden_states",
        ("controlnet_cond", "encoder_hidden_states", "pooled_projections"),
        ("timestep", "joint_attention_kwargs"),
        ("conditioning_scale",),
    ),
    "HunyuanDiT2DControlNetModel": ArgumentLayout(
        "hidden_states",
        (
            *("controlnet_cond", "encoder_hidden_states", "text_embedding_mask", "style"),
            *("encoder_hidden_states_t5", "text_embedding_mask_t5", "image_meta_size"),
        ),
        shared=("image_rotary_emb", "conditioning_scale"),
    ),
    "SanaControlNetModel": ArgumentLayout(
        "hidden_states", (*_TEXT, "controlnet_cond", "attention_mask")
    ),
    "UNetControlNetXSModel": ArgumentLayout(
        "sample",
        ("encoder_hidden_states", "controlnet_cond", "class_labels", "added_cond_kwargs"),
        ("timestep", "timestep_cond", "attention_mask", "cross_attention_kwargs"),
    ),
    "UNet3DConditionModel": ArgumentLayout(
        "sample",
        ("encoder_hidden_states", "class_labels", "attention_mask", *_UNET_RESIDUALS[:2]),
        ("timestep", "timestep_cond", "cross_attention_kwargs"),
    ),
    "I2VGenXLUNet": ArgumentLayout(
        "sample",
        ("encoder_hidden_states", "fps", "image_latents", "image_embeddings"),
        ("timestep", "timestep_cond", "cross_attention_kwargs"),
    ),
    "Kandinsky3UNet": ArgumentLayout("sample", _TEXT),
    "StableCascadeUNet": ArgumentLayout(
        "sample",
        ("timestep_ratio", "clip_text_pooled", "clip_text", "clip_img", "effnet", "pixels"),
        ("sca", "crp"),
        moving=("timestep_ratio",),
    ),
    "WuerstchenPrior": ArgumentLayout("x", ("r", "c"), (), moving=("r",)),
    "WuerstchenDiffNeXt": ArgumentLayout("x", ("r", "effnet", "clip"), (), moving=("r",)),
    "PriorTransformer": ArgumentLayout(
        "hidden_states", ("proj_embedding", "encoder_hidden_states", "attention_mask")
    ),
    "UVit2DModel": ArgumentLayout(
        "input_ids",
        ("encoder_hidden_states", "pooled_text_emb", "micro_conds"),
        ("cross_attention_kwargs",),
    ),
    "UNetMotionModel": ArgumentLayout(
        "sample",
        ("encoder_hidden_states", "attention_mask", "added_cond_kwargs", *_UNET_RESIDUALS[:2]),
        ("timestep", "timestep_cond", "cross_attention_kwargs"),
        repeated=("encoder_hidden_states", "added_cond_kwargs", *_UNET_RESIDUALS[:2]),
        residuals=_UNET_RESIDUALS[:2],
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
        residuals=("block_controlnet_hidden_states",),
        extras=("skip_layers",),
    ),
    "PixArtTransformer2DModel": ArgumentLayout(
        "hidden_states", (*_TEXT, "added_cond_kwargs", "attention_mask")
    ),
    "SanaTransformer2DModel": ArgumentLayout(
        "hidden_states",
        (*_TEXT, "guidance", "controlnet_block_samples"),
        residuals=("controlnet_block_samples",),
    ),
    "HunyuanDiT2DModel": ArgumentLayout(
        "hidden_states",
        (
            *("encoder_hidden_states", "text_embedding_mask", "encoder_hidden_states_t5"),
            *("text_embedding_mask_t5", "image_meta_size", "style", "controlnet_block_samples"),
        ),
        shared=("image_rotary_emb",),
        residuals=("controlnet_block_samples",),
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
    "StableAudio3DiTModel": ArgumentLayout(
        "hidden_states", (*_TEXT, "global_hidden_states", "local_add_cond")
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
    "AnyFlowTransformer3DModel": ArgumentLayout(
        "hidden_states",
        ("encoder_hidden_states", "encoder_hidden_states_image"),
        ("timestep", "r_timestep"),
    ),
    "LatteTransformer3DModel": ArgumentLayout("hidden_states", _TEXT),
    "AllegroTransformer3DModel": ArgumentLayout(
        "hidden_states", (*_TEXT, "attention_mask"), ("timestep",), ("image_rotary_emb",)
    ),
    "CogView3PlusTransformer2DModel": ArgumentLayout(
        "hidden_states", ("encoder_hidden_states", "original_size", "target_size", "crop_coords")
    ),
    "HiDreamImageTransformer2DModel": ArgumentLayout(
        "hidden_states",
        (
            *("encoder_hidden_states_t5", "encoder_hidden_states_llama3", "pooled_embeds"),
            *("img_ids", "img_sizes", "hidden_states_masks"),
        ),
        ("timesteps", "attention_kwargs"),
        second=("encoder_hidden_states_llama3",),
    ),
    "ZImageTransformer2DModel": ArgumentLayout(
        "x",
        ("controlnet_block_samples",),
        ("t",),
        lists=("x", "cap_feats", "siglip_feats", "image_noise_mask"),
        drops=True,
        residuals=("controlnet_block_samples",),
    ),
    "ZImageControlNetModel": ArgumentLayout(
        "x", (), ("t",), lists=("x", "cap_feats", "control_context"), drops=True
    ),
    "SparseControlNetModel": ArgumentLayout(
        "sample",
        ("encoder_hidden_states", "attention_mask"),
        (
            *("timestep", "timestep_cond", "cross_attention_kwargs"),
            *("controlnet_cond", "conditioning_mask"),
        ),
        repeated=("encoder_hidden_states",),
    ),
    "BriaTransformer2DModel": ArgumentLayout(
        "hidden_states",
        ("encoder_hidden_states", "pooled_projections", "guidance", "attention_kwargs"),
        shared=("img_ids", "txt_ids"),  # of a batch, the network reads the first
    ),
    "BriaFiboTransformer2DModel": ArgumentLayout(
        "hidden_states",
        (
            *("encoder_hidden_states", "text_encoder_layers", "pooled_projections"),
            *("guidance", "joint_attention_kwargs"),
        ),
        shared=("img_ids", "txt_ids"),
    ),
    "EasyAnimateTransformer3DModel": ArgumentLayout(
        "hidden_states",
        (
            *("encoder_hidden_states", "encoder_hidden_states_t5"),
            *("inpaint_latents", "control_latents"),
        ),
        ("timestep", "timestep_cond"),
    ),
    "ErnieImageTransformer2DModel": ArgumentLayout("hidden_states", ("text_bth", "text_lens")),
    "PRXTransformer2DModel": ArgumentLayout(
        "hidden_states", ("encoder_hidden_states", "attention_mask")
    ),
    "SanaVideoTransformer3DModel": ArgumentLayout(
        "hidden_states", (*_TEXT, "guidance", "attention_mask", "controlnet_block_samples")
    ),
    "Transformer2DModel": ArgumentLayout(
        "hidden_states",
        (*_TEXT, "class_labels", "attention_mask", "added_cond_kwargs"),
        ("timestep", "cross_attention_kwargs"),
    ),
    "AceStepTransformer1DModel": ArgumentLayout(
        "hidden_states",
        ("timestep", "timestep_r", "encoder_hidden_states", "context_latents"),
        (),
        drops=True,
    ),
    "LTX2VideoTransformer3DModel": ArgumentLayout(
        "hidden_states",
        (
            *("audio_hidden_states", "audio_encoder_hidden_states", "audio_encoder_attention_mask"),
            *(*_TEXT, "video_self_attention_mask", "video_keyframes_mask"),
        ),
        (
            *("timestep", "audio_timestep", "sigma", "audio_sigma"),
            *("video_coords", "audio_coords", "perturbation_mask"),
        ),
        outputs=2,
        moving=("audio_hidden_states",),
        extras=("isolate_modalities", "spatio_temporal_guidance_blocks"),
    ),
}
