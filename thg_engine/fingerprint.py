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


def why_not_captured(module: Any, own: str | None = None) -> str:
    """Why a graph of a module would not do what a call does; "" where it would.

    Args:
        module: the network; what is no module is not looked into.
        own: name of the hook that replays the graphs, on the module itself; its ``forward`` is what
            is captured, so hooks of the module itself run all the same.
    """
    if not isinstance(module, torch.nn.Module):
        return ""
    if getattr(module, "hf_device_map", None):
        return "a device map spreads the weights over devices"
    for name, part in module.named_modules():
        hook = getattr(part, "_hf_hook", None)
        registry = getattr(part, "_diffusers_hook", None)
        others = [] if registry is None else [key for key in registry.hooks if key != own]
        if hook is not None or any("offload" in key for key in others):
            return "offloading moves the weights between calls"
        if others:
            return f"hooks of diffusers decide on the host ({', '.join(sorted(set(others)))})"
        if (own is None or name) and (part._forward_hooks or part._forward_pre_hooks):
            return f"a forward hook of {name or type(module).__name__} runs on the host"
    return ""
