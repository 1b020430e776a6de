"""What captured graphs take for granted of a network."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch


def module_fingerprint(module: Any) -> Hashable:
    """What a graph of a module is specialised on: where its weights are, and global settings.

    Weights that are updated in place keep their place, and their graphs.
    """
    flags = (
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda"),
    )
    if not isinstance(module, torch.nn.Module):
        return (id(module), flags)
    values = [*module.parameters(), *module.buffers()]
    places = tuple((v.data_ptr(), v.dtype, tuple(v.shape), v.stride()) for v in values)
    modes = tuple(part.training for part in module.modules())
    return (id(module), hash(places), hash(modes), flags)


def why_moving(module: Any) -> str:
    """Why the weights of a module may be elsewhere in the next call; "" if they stay."""
    if not isinstance(module, torch.nn.Module):
        return ""
    if getattr(module, "hf_device_map", None):
        return "a device map spreads the weights over devices"
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        if hook is not None and type(hook).__name__ != "ModelHook":
            return "offloading moves the weights between calls"
        registry = getattr(part, "_diffusers_hook", None)
        if registry is not None and any("offload" in name for name in registry.hooks):
            return "offloading moves the weights between calls"
    return ""
