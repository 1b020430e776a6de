"""The conditional half of a denoiser call that pipelines make with a doubled batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from .adapter_types import ArgumentLayout


class CannotSlice(Exception):
    """Why a call cannot run on half of its batch."""


def slice_half(
    named: Mapping[str, Any], layout: ArgumentLayout, cond_half: int, branches: int = 2
) -> dict[str, Any]:
    """The arguments of a call with all branches, conditional one only.

    Raises:
        CannotSlice: an argument has a shape that the layout does not describe.
    """
    full = named[layout.sample].shape[0]
    if full % branches:
        raise CannotSlice(f"{layout.sample} has a batch of {full}, not of {branches} branches")

    def half(argument: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        shape = tuple(value.shape)
        rows = shape[0] if shape else 0
        if rows == full or (argument in layout.repeated and rows and rows % full == 0):
            return value.chunk(branches)[cond_half]
        if argument in layout.unbatched and (value.ndim == 0 or shape[0] == 1):
            return value
        raise CannotSlice(f"{argument} has shape {shape}, its batch is not {full}")

    sliced = {}
    for argument, value in named.items():
        if argument in (layout.sample, *layout.batched, *layout.unbatched):
            sliced[argument] = pytree.tree_map(lambda leaf, a=argument: half(a, leaf), value)
        elif argument not in layout.shared and _holds_tensors(value):
            raise CannotSlice(f"{argument} holds tensors of unknown layout")
        else:
            sliced[argument] = value
    return sliced


def _holds_tensors(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))
