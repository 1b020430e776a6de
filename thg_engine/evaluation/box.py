"""What is measured: a pipeline with its denoiser, its noise, its decoder and a counter of rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .solvers import FLOW, NOISE

_TABLES = ("forward", "_diffusers_hook", "_hf_hook", "_old_forward")
"""Instance attributes by which libraries put themselves around a module."""


@dataclass
class Box:
    """A guided pipeline under measurement.

    Attributes:
        name: for reports and file names.
        pipe: a ``StableDiffusionPipeline`` or a ``StableDiffusion3Pipeline``.
        options: what every call gets besides prompts, noise, steps and scale.
    """

    name: str
    pipe: Any
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def family(self) -> str:
        """Whether the network predicts noise or the velocity of a flow."""
        return FLOW if hasattr(self.pipe, "transformer") else NOISE

    @property
    def denoiser(self) -> Any:
        """The network that costs the time."""
        return self.pipe.transformer if self.family == FLOW else self.pipe.unet

    def noise(self, count: int, seed: int) -> Tensor:
        """Initial noise of ``count`` images, which depends on the seed alone."""
        config = self.denoiser.config
        generator = torch.Generator().manual_seed(seed)
        shape = (count, config.in_channels, config.sample_size, config.sample_size)
        return torch.randn(shape, generator=generator)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images ``(B, 3, H, W)`` in [0, 1], as the pipeline makes them of its latents."""
        config = self.pipe.vae.config
        scaled = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
        parts = [self.pipe.vae.decode(part, return_dict=False)[0] for part in scaled.split(64)]
        images: Tensor = self.pipe.image_processor.postprocess(torch.cat(parts), output_type="pt")
        return images

    @contextmanager
    def counted(self) -> Iterator[list[int]]:
        """Counts rows where the network begins, whatever a method says of itself."""
        first = self.denoiser.pos_embed.proj if self.family == FLOW else self.denoiser.conv_in
        rows = [0]

        def count(_module: Any, _inputs: Any, output: Tensor) -> None:
            rows[0] += output.shape[0]

        handle = first.register_forward_hook(count)
        try:
            yield rows
        finally:
            handle.remove()

    @contextmanager
    def as_before(self) -> Iterator[None]:
        """Scheduler, class, modules and hooks of the pipeline are as before when the block ends."""
        from .. import uncompile

        scheduler = self.pipe.scheduler
        parts = list(self.denoiser.modules())
        kept = [{key: vars(part)[key] for key in _TABLES if key in vars(part)} for part in parts]
        try:
            yield
        finally:
            uncompile(self.pipe)
            self.pipe.scheduler = scheduler
            for part, before in zip(parts, kept, strict=True):
                for key in _TABLES:
                    vars(part).pop(key, None)
                vars(part).update(before)


def load_box(name: str) -> Box:
    """A pipeline of the package.

    Raises:
        MissingWeights: it is not there.
    """
    from ..demo import load_pipeline

    if name == "flow":
        return Box("flow", load_pipeline("flow"), {"max_sequence_length": 1})
    return Box("sd", load_pipeline("sd"))
