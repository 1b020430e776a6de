"""Prompts and noise that something is fitted on, and the processes that share them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...calibration import check_scale
from ...errors import InvalidArgument
from ...fitting.reference import Batch
from .captured import Captured, noise

MAX_SEED = 2**40
"""Seeds of samples are made from it, and torch takes 63 bits."""


@dataclass(frozen=True)
class Noises:
    """Noises per prompt, their seed, and how many samples make a batch."""

    samples: int
    seed: int
    batch_size: int

    def __post_init__(self) -> None:
        check_counts(batch_size=self.batch_size, samples=self.samples)
        if not (isinstance(self.seed, int) and 0 <= self.seed < MAX_SEED):
            raise InvalidArgument("seed", self.seed, f"give a whole number below {MAX_SEED}.")


def check_given(prompts: Sequence[str], least: int, guidance_scales: Sequence[float]) -> None:
    """Refuse what nothing can be fitted on; ``least`` is how many prompts it takes."""
    if isinstance(prompts, str) or not all(isinstance(p, str) for p in prompts):
        raise InvalidArgument("prompts", prompts, "give a list of captions.")
    if len(prompts) < least:
        remedy = f"give at least {least} captions; 24 or more are better."
        raise InvalidArgument("prompts", len(prompts), remedy)
    if not guidance_scales or len(set(guidance_scales)) < len(guidance_scales):
        remedy = "give at least one scale, each once."
        raise InvalidArgument("guidance_scales", tuple(guidance_scales), remedy)
    for scale in guidance_scales:
        check_scale(scale)


def check_counts(**counts: object) -> None:
    """Refuse what is no whole number of at least 1."""
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InvalidArgument(name, value, "give a whole number of at least 1.")


def batches_of(
    captured: Captured,
    prompts: Sequence[str],
    kept: Sequence[int],
    negative_prompt: str,
    guidance_scale: float,
    noises: Noises,
    call: Mapping[str, Any],
) -> list[Batch]:
    """This process's batches of noise and conditioning, of the prompts with indices ``kept``."""
    jobs = [(i, k) for k in range(noises.samples) for i in kept]
    size = noises.batch_size
    found = []
    for chunk in share([jobs[at : at + size] for at in range(0, len(jobs), size)], size):
        captions = [prompts[i] for i, _ in chunk]
        shape, cond, uncond = captured.conditioning(
            captions, negative_prompt, guidance_scale, **call
        )
        # A seed for each sample: results do not depend on how the prompts are batched.
        seeds = [noises.seed * 1_000_003 + i * noises.samples + k for i, k in chunk]
        x = torch.cat([noise(shape, 1, each, captured.module) for each in seeds])
        found.append(Batch(x, cond, uncond, tuple(i for i, _ in chunk)))
    return found


def rank() -> tuple[int, int]:
    """(rank, processes) of this process."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def share(chunks: Sequence[Any], batch_size: int) -> list[Any]:
    """This process's share, at least one: a process without any could not take part."""
    index, size = rank()
    if len(chunks) < size:
        remedy = f"that makes {len(chunks)} batches for {size} processes; make it smaller."
        raise InvalidArgument("batch_size", batch_size, remedy)
    return list(chunks[index::size])


def gather(rows: Tensor) -> Tensor:
    """Rows of all processes, in the order of their ranks."""
    if rank()[1] == 1:
        return rows
    from accelerate.utils import gather_object

    return torch.cat(gather_object([rows.cpu()]))
