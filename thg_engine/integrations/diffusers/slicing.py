"""The conditional half of a denoiser call that pipelines make with a doubled batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .adapter_types import ArgumentLayout


class CannotSlice(Exception):
    """Why a call cannot run on half of its batch."""


def is_extra(named: Mapping[str, Any], layout: ArgumentLayout) -> bool:
    """Whether the call is one of another kind of guidance, besides that of its row."""
    return any(named.get(argument) for argument in layout.extras)


def is_doubled(named: Mapping[str, Any], layout: ArgumentLayout) -> bool:
    """Whether the call holds both branches, where the layout says that it may not."""
    if not layout.drops:
        return True
    sample = named[layout.sample]
    middle, rest = divmod(len(sample), 2)
    return not rest and all(torch.equal(sample[k], sample[middle + k]) for k in range(middle))


def slice_half(
    named: Mapping[str, Any], layout: ArgumentLayout, cond_half: int, branches: int = 2
) -> dict[str, Any]:
    """The arguments of a call with all branches, conditional one only.

    Raises:
        CannotSlice: an argument has a shape that the layout does not describe.
    """
    full = len(named[layout.sample])
    if full % branches:
        raise CannotSlice(f"{layout.sample} has a batch of {full}, not of {branches} branches")
    if not is_doubled(named, layout):
        raise CannotSlice(f"the halves of {layout.sample} are not the same sample twice")

    def half(argument: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        shape = tuple(value.shape)
        dim = 1 if argument in layout.second else 0
        rows = shape[dim] if len(shape) > dim else 0
        if rows == full or (argument in layout.repeated and rows and rows % full == 0):
            return value.chunk(branches, dim)[cond_half]
        if argument in layout.unbatched and (value.ndim == 0 or shape[0] == 1):
            return value
        raise CannotSlice(f"{argument} has shape {shape}, its batch is not {full}")

    sliced = {}
    for argument, value in named.items():
        if argument in layout.lists:
            sliced[argument] = _part_of_list(argument, value, full, cond_half, branches)
        elif argument in (layout.sample, *layout.batched, *layout.unbatched):
            sliced[argument] = pytree.tree_map(lambda leaf, a=argument: half(a, leaf), value)
        elif argument not in layout.shared and _holds_tensors(value):
            raise CannotSlice(f"{argument} holds tensors of unknown layout")
        else:
            sliced[argument] = value
    return sliced


def _part_of_list(argument: str, value: Any, full: int, cond_half: int, branches: int) -> Any:
    if value is None:
        return None
    if len(value) != full:
        raise CannotSlice(f"{argument} has {len(value)} items, its batch is not {full}")
    rows = full // branches
    return value[cond_half * rows : (cond_half + 1) * rows]


def _holds_tensors(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))
