"""Loads the pipelines in the box, small and trained, from disk alone.

``"sd"`` is a ``StableDiffusionPipeline``, ``"flow"`` a ``StableDiffusion3Pipeline``.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch

from ..errors import InvalidArgument, MissingWeights

if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline

PIPELINE_DIR = Path(__file__).parent / "pipeline"
FLOW_DIR = Path(__file__).parent / "flow"
FOLDERS = {"sd": PIPELINE_DIR, "flow": FLOW_DIR}
_CLASSES = {"sd": "StableDiffusionPipeline", "flow": "StableDiffusion3Pipeline"}
_LEFT_OUT: dict[str, dict[str, Any]] = {
    "sd": {"safety_checker": None, "requires_safety_checker": False},
    "flow": {"text_encoder_3": None, "tokenizer_3": None},
}
_REMEDIES = {
    "sd": "install thg-engine again, or export one: python -m training.export --pipeline FOLDER",
    "flow": "train and export it from a checkout: python -m training.train_flow, then "
    "python -m training.export --flow thg_engine/demo/flow (training/README.md)",
}


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


@overload
def load_pipeline(
    name: Literal["sd"] = "sd", torch_dtype: torch.dtype = ..., path: Path | str | None = None
) -> StableDiffusionPipeline: ...


@overload
def load_pipeline(
    name: Literal["flow"], torch_dtype: torch.dtype = ..., path: Path | str | None = None
) -> StableDiffusion3Pipeline: ...


def load_pipeline(
    name: str = "sd", torch_dtype: torch.dtype = torch.float32, path: Path | str | None = None
) -> StableDiffusionPipeline | StableDiffusion3Pipeline:
    """A boxed pipeline on the CPU, offline, ready to call.

    Args:
        name: ``"sd"``, a UNet that predicts noise, or ``"flow"``, a transformer that predicts the
            velocity of a rectified flow. Of ``"flow"``, T5 is left out; ``max_sequence_length=1``
            in a call spares the zero vectors that stand for it, and with them most of the time.
        torch_dtype: dtype of the weights (stored in float16); float32 is the one to use on a CPU.
        path: a pipeline folder of that kind; by default the one in the package.
    Returns:
        A genuine ``diffusers.StableDiffusionPipeline`` without safety checker or a genuine
        ``diffusers.StableDiffusion3Pipeline``, for images of 32x32 pixels, with its progress bar
        off. Each call returns new objects.
    Raises:
        InvalidArgument: there is no pipeline of this name.
        MissingWeights: the folder holds no pipeline; a ``FileNotFoundError``.
    """
    if name not in FOLDERS:
        raise InvalidArgument("name", name, f"use one of {', '.join(map(repr, FOLDERS))}.")
    folder = FOLDERS[name] if path is None else Path(path)
    if not (folder / "model_index.json").is_file():
        missing = f"no diffusers pipeline at {folder}: model_index.json is missing"
        raise MissingWeights(f"{missing}; {_REMEDIES[name]}")
    with _quiet():
        import diffusers

        loader = getattr(diffusers, _CLASSES[name])
        pipe: StableDiffusionPipeline | StableDiffusion3Pipeline = loader.from_pretrained(
            str(folder), torch_dtype=torch_dtype, local_files_only=True, **_LEFT_OUT[name]
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe
