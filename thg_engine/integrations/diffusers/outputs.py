"""What a denoiser answers, as the one tensor that guidance is about, and back.

Most answer with one tensor, in a tuple, in a dataclass or bare. Some answer with a list of one
tensor per sample, some with several tensors that are all guided (picture and sound).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .adapter_types import ArgumentLayout


def sample_of(output: Any, layout: ArgumentLayout) -> Tensor:
    """The guided part of ``output``, batch first.

    A list is stacked; several tensors are flattened and put side by side.
    """
    if isinstance(output, Tensor):
        return output
    if layout.outputs > 1:
        return torch.cat([_stacked(output[k]).flatten(1) for k in range(layout.outputs)], dim=1)
    return _stacked(output[0])


def with_sample(output: Any, sample: Tensor, layout: ArgumentLayout) -> Any:
    """``output`` with ``sample``, whose batch may be another, in the place of its guided part."""
    if isinstance(output, Tensor):
        return sample
    first: tuple[Any, ...] = (sample,)
    if layout.outputs > 1:
        first = _parted(sample, [_stacked(output[k]) for k in range(layout.outputs)])
    given = tuple(
        list(new.unbind()) if isinstance(output[k], list) else new for k, new in enumerate(first)
    )
    if isinstance(output, tuple):
        return (*given, *output[len(given) :])
    names = list(output.keys())
    return type(output)(**{**output, **dict(zip(names, given, strict=False))})


def may_wait(output: Any, layout: ArgumentLayout) -> bool:
    """Whether the guided part can stay on paper: it is one tensor of its own."""
    return isinstance(output, Tensor) or (layout.outputs == 1 and isinstance(output[0], Tensor))


def _stacked(value: Any) -> Tensor:
    return torch.stack(list(value)) if isinstance(value, list) else value


def _parted(sample: Tensor, like: list[Tensor]) -> tuple[Tensor, ...]:
    """The tensors that `sample_of` has put side by side, of the batch of ``sample``."""
    widths = [part[0].numel() for part in like]
    parts = torch.split(sample, widths, dim=1)
    return tuple(
        part.reshape(len(part), *shaped.shape[1:]) for part, shaped in zip(parts, like, strict=True)
    )
