"""Loads the pipeline in the box: a small trained ``StableDiffusionPipeline``, from disk alone."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

PIPELINE_DIR = Path(__file__).parent / "pipeline"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences loading bars, notes and warnings of diffusers and transformers, then restores."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    levels = [library.get_verbosity() for library in libraries]
    bars = [library.is_progress_bar_enabled() for library in libraries]
    try:
        for library in libraries:
            library.set_verbosity_error()
            library.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for library, level, bar in zip(libraries, levels, bars, strict=True):
            library.set_verbosity(level)
            if bar:
                library.enable_progress_bar()


def load_pipeline(
    torch_dtype: torch.dtype = torch.float32, path: Path | str = PIPELINE_DIR
) -> StableDiffusionPipeline:
    """The boxed pipeline on the CPU, offline, ready to call.

    Args:
        torch_dtype: dtype of the weights (stored in float16); float32 is the one to use on a CPU.
        path: a pipeline folder; by default the one in the package.
    Returns:
        A genuine ``diffusers.StableDiffusionPipeline`` without safety checker, for images of 32x32
        pixels, with its progress bar off. Each call returns new objects.
    Raises:
        FileNotFoundError: ``path`` holds no pipeline.
    """
    if not (Path(path) / "model_index.json").is_file():
        raise FileNotFoundError(f"no diffusers pipeline at {path}: model_index.json is missing")
    with _quiet():
        from diffusers import StableDiffusionPipeline

        pipe = StableDiffusionPipeline.from_pretrained(
            str(path),
            torch_dtype=torch_dtype,
            local_files_only=True,
            safety_checker=None,
            requires_safety_checker=False,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe
