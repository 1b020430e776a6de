"""Loading a pipeline by name or folder, with errors that a user of the command line can read."""

from __future__ import annotations

from typing import Any

import torch

from ...errors import InvalidArgument


def load(model: str, dtype: torch.dtype | None = None) -> Any:
    """A diffusers pipeline on the best device there is.

    Args:
        model: a folder in diffusers' format, or a model name on the Hugging Face hub.
        dtype: of the weights; float16 on CUDA and float32 on the CPU if None.
    Raises:
        InvalidArgument: nothing can be loaded from there.
    """
    from diffusers import DiffusionPipeline

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype is None:
        dtype = torch.float16 if device == "cuda" else torch.float32
    try:
        pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=dtype)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        remedy = f"give a pipeline folder or a hub name that can be reached ({reason})."
        raise InvalidArgument("MODEL", model, remedy) from error
    return pipe.to(device)
