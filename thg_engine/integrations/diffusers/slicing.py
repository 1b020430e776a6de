"""The conditional half of a denoiser call that pipelines make with a doubled batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from .adapters import AdapterRecord


class CannotSlice(Exception):
    """Why a call cannot run on half of its batch."""


def slice_half(named: Mapping[str, Any], record: AdapterRecord) -> dict[str, Any]:
    """The arguments of a doubled call, conditional half only.

    Raises:
        CannotSlice: an argument has a layout that the record does not describe.
    """
    sample_name = record.arguments[0]
    sample = named[sample_name]
    full = sample.shape[0]
    if full % 2:
        raise CannotSlice(f"{sample_name} has an odd batch of {full}")

    def half(argument: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        shape = tuple(value.shape)
        if value.ndim and shape[0] == full:
            return value.chunk(2)[record.cond_half]
        if argument in record.unbatched and (value.ndim == 0 or shape[0] == 1):
            return value
        raise CannotSlice(f"{argument} has shape {shape}, its batch is not {full}")

    sliced = {}
    for argument, value in named.items():
        if argument in (sample_name, *record.batched, *record.unbatched):
            sliced[argument] = pytree.tree_map(lambda leaf, a=argument: half(a, leaf), value)
        elif any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)):
            raise CannotSlice(f"{argument} holds tensors of unknown layout")
        else:
            sliced[argument] = value
    return sliced
