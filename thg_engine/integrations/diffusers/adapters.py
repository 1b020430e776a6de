"""How each pipeline family does guidance, as data.

A record says which attribute is the denoiser, how the two branches share a call, and which
arguments carry the batch. Nothing is inferred from shapes: with two prompts a batch of 2 looks
like guidance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

HOOK_NAME = "thg_engine.guidance"
"""Of the guidance hook, in the registry of the denoiser."""
UNET_ARGUMENTS = (
    "sample",
    "timestep",
    "encoder_hidden_states",
    "class_labels",
    "timestep_cond",
    "attention_mask",
    "cross_attention_kwargs",
    "added_cond_kwargs",
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
    "encoder_attention_mask",
    "return_dict",
)
"""Positional order of ``UNet2DConditionModel.forward``."""


@dataclass(frozen=True)
class AdapterRecord:
    """One pipeline family.

    Attributes:
        pipeline: name of the diffusers class that defines ``__call__``.
        denoiser: attribute that holds the network.
        cond_half: which half of the doubled batch is the conditional one, 0 or 1.
        arguments: positional order of the denoiser's ``forward``; the first is the sample.
        batched: arguments whose tensors carry the doubled batch in dim 0, nested or not.
        unbatched: arguments whose tensors may also be shared by both halves (batch 1 or none).
        tensor_free: arguments that must hold no tensor, because their layout is not known.
    """

    pipeline: str
    denoiser: str = "unet"
    cond_half: int = 1
    arguments: tuple[str, ...] = UNET_ARGUMENTS
    batched: tuple[str, ...] = (
        "encoder_hidden_states",
        "class_labels",
        "attention_mask",
        "added_cond_kwargs",
        "encoder_attention_mask",
    )
    unbatched: tuple[str, ...] = ("timestep",)
    tensor_free: tuple[str, ...] = (
        "timestep_cond",
        "cross_attention_kwargs",
        "down_block_additional_residuals",
        "mid_block_additional_residual",
        "down_intrablock_additional_residuals",
    )


RECORDS: dict[str, AdapterRecord] = {
    record.pipeline: record
    for record in (
        AdapterRecord("StableDiffusionPipeline"),
        AdapterRecord("StableDiffusionImg2ImgPipeline"),
        AdapterRecord("StableDiffusionInpaintPipeline"),
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
