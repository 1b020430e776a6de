"""What the engine refuses before it evaluates anything."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .errors import InvalidArgument
from .step_buffers import Conditioning


def check_inputs(x_T: Tensor, cond: Conditioning, uncond: Conditioning, both: bool = True) -> None:
    """Refuse noise or conditioning that do not fit each other; ``uncond`` counts where ``both``."""
    _check_sample(x_T)
    _check_conditioning("cond", cond, x_T.shape[0])
    if not both:
        return
    _check_conditioning("uncond", uncond, x_T.shape[0])
    leaves, structure = pytree.tree_flatten(cond)
    others, found = pytree.tree_flatten(uncond)
    if structure != found:
        raise InvalidArgument("uncond", found, "give the same nesting of tensors as in cond.")
    for leaf, other in zip(leaves, others, strict=True):
        shapes = [tuple(v.shape) if isinstance(v, Tensor) else None for v in (leaf, other)]
        if shapes[0] != shapes[1]:
            remedy = f"cond has shape {shapes[0]} in this place (None: no tensor); give the same."
            raise InvalidArgument("uncond", shapes[1], remedy)


def check_generator(generator: torch.Generator | None, device: torch.device) -> None:
    """Refuse a generator that cannot draw noise on ``device``."""
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise InvalidArgument("generator", generator, "give one torch.Generator.")
    if generator.device.type != device.type:
        remedy = f"noise is drawn where x_T is: give a generator on {device}."
        raise InvalidArgument("generator", generator.device, remedy)


def _check_sample(x_T: Tensor) -> None:
    if not isinstance(x_T, Tensor) or not x_T.is_floating_point():
        kind = x_T.dtype if isinstance(x_T, Tensor) else type(x_T)
        raise InvalidArgument("x_T", kind, "give a floating-point tensor of shape (B, ...).")
    if x_T.ndim < 2:
        raise InvalidArgument("x_T", tuple(x_T.shape), "give a batch dimension first: (B, ...).")


def _check_conditioning(argument: str, conditioning: Conditioning, batch: int) -> None:
    tensors = [leaf for leaf in pytree.tree_leaves(conditioning) if isinstance(leaf, Tensor)]
    if not tensors:
        remedy = "give at least one tensor, batch first; this plan evaluates that branch."
        raise InvalidArgument(argument, conditioning, remedy)
    for tensor in tensors:
        if tensor.ndim == 0 or tensor.shape[0] != batch:
            remedy = f"dim 0 of every tensor must be the batch of x_T, {batch}."
            raise InvalidArgument(argument, tuple(tensor.shape), remedy)
