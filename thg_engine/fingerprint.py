"""What captured graphs take for granted of a network: weights, modes, attributes, settings."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)
CACHES = {
    "cache-dit": r"cache_dit",
    "DeepCache": r"deepcache",
    "TeaCache": r"teacache",
    "FORA": r"(?<![a-z])fora(?![a-z])",
    "ParaAttention": r"para_attn",
}
"""Caches that replace a ``forward``, and what is then in its module or its name."""
MARKS = {"_is_cached": "cache-dit", "enable_teacache": "TeaCache", "enable_fora": "FORA"}
LARGEST = 64  # entries of a container of plain values that is looked into
_cudnn: Any = torch.backends.cudnn
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_SETTINGS: tuple[Callable[[], Any], ...] = (
    torch.get_float32_matmul_precision,
    lambda: torch.backends.cuda.matmul.fp32_precision,
    lambda: _cudnn.conv.fp32_precision,
    lambda: _cudnn.allow_tf32,
    lambda: _cudnn.benchmark,
    lambda: _cudnn.deterministic,
    lambda: _cudnn.enabled,
    lambda: torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
    lambda: torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
    torch.are_deterministic_algorithms_enabled,
    torch.backends.cuda.flash_sdp_enabled,
    torch.backends.cuda.mem_efficient_sdp_enabled,
    torch.backends.cuda.math_sdp_enabled,
    torch.backends.cuda.cudnn_sdp_enabled,
)


def module_fingerprint(module: Any) -> Hashable:
    """What a graph of a network is specialised on, as something to compare.

    Where its weights are (updated in place they keep their place, and their graphs), and of every
    part its class, mode, plain attributes and a ``forward`` of its own; torch's global settings.
    """
    settings = tuple(map(_read, _SETTINGS))
    if not isinstance(module, torch.nn.Module):
        return (id(module), settings)
    weights = tuple(_place(v) for v in [*module.parameters(), *module.buffers()])
    forwards = tuple(vars(part).get("forward") for part in module.modules())
    parts = tuple((type(part), *_attributes(part)) for part in module.modules())
    return (id(module), hash(weights), forwards, hash(parts), settings)


def attributes(value: Any) -> tuple[Hashable, ...]:
    """Plain attributes of an object, e.g. of an attention processor."""
    return tuple(_attributes(value)) if hasattr(value, "__dict__") else ()


def autocast() -> Hashable:
    """What autocast does in this thread."""
    enabled = [kind for kind in ("cuda", "cpu") if torch.is_autocast_enabled(kind)]
    return tuple((kind, torch.get_autocast_dtype(kind)) for kind in enabled)


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
        if (own is None or name) and any(vars(part).get(hooks) for hooks in _HOOKS):
            return f"a forward hook of {name or type(module).__name__} runs on the host"
    found = foreign_cache(module)
    return f"{found} decides on the host" if found else ""


def foreign_cache(module: Any) -> str:
    """The name of a cache, none of diffusers' own, that has been put into a network; or ""."""
    for part in module.modules():
        for mark, name in MARKS.items():
            if getattr(part, mark, False) is True:
                return name
        for forward in _forwards(part):
            where = [getattr(forward, key, None) or "" for key in ("__module__", "__qualname__")]
            for name, pattern in CACHES.items():
                if re.search(pattern, " ".join(where).lower()):
                    return name
    return ""


def _forwards(module: Any) -> Iterator[Any]:
    """The ``forward`` of the class, and what has been put around it."""
    yield type(module).forward
    around = vars(module).get("forward")
    while around is not None:
        yield around
        around = getattr(around, "__wrapped__", None) or getattr(around, "func", None)


def _read(setting: Callable[[], Any]) -> Hashable:
    """A setting of torch; some refuse to be read by their old name once set by the new one."""
    try:
        value: Hashable = setting()
    except (AttributeError, RuntimeError):
        return None
    return value


def _place(value: Tensor) -> Hashable:
    """Where a weight is; of a subclass that wraps tensors, where those are."""
    if hasattr(value, "__tensor_flatten__"):
        names, context = value.__tensor_flatten__()
        return (type(value), str(context), *(_place(getattr(value, name)) for name in names))
    return (value.data_ptr(), value.dtype, tuple(value.shape), value.stride())


def _attributes(value: Any) -> Iterator[Hashable]:
    """(name, value) of what is plain, or a small container of what is plain."""
    for name, attribute in vars(value).items():
        found = _plain(attribute)
        if found is not NotImplemented and name != "_is_hf_initialized":
            yield name, found


def _plain(value: Any) -> Any:
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, (list, tuple, set, frozenset)) and 0 < len(value) <= LARGEST:
        return tuple(v for v in map(_plain, value) if v is not NotImplemented) or NotImplemented
    if isinstance(value, Mapping) and 0 < len(value) <= LARGEST:
        items = [(str(key), _plain(v)) for key, v in value.items()]
        return tuple(item for item in items if item[1] is not NotImplemented) or NotImplemented
    return NotImplemented
