"""What the state of a denoiser is beyond its weights: adapters and attention processors."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...fingerprint import attributes

ADAPTER_STATE = ("scale", "scaling", "_active_adapter", "_disable_adapters", "merged_adapters")
"""Where IP-Adapters (a list of scales) and LoRA layers keep what a callback may turn."""


def adapter_state(pipe: Any, modules: Sequence[torch.nn.Module]) -> list[Any]:
    """How strongly adapters act, as something to compare; one read of the device with LoRA."""
    weights: list[Tensor] = []
    state: list[Any] = []
    for name in ("_cross_attention_kwargs", "_joint_attention_kwargs", "_attention_kwargs"):
        extra = getattr(pipe, name, None) or {}
        state += [(key, _plain(value)) for key, value in extra.items()]
    for part in itertools.chain.from_iterable(module.modules() for module in modules):
        own = vars(part)
        state += [_plain(own[name]) for name in ADAPTER_STATE if name in own]
        if "scaling" in own:
            named = part.named_parameters()
            added = [weight for name, weight in named if not name.startswith("base_layer")]
            weights += [weight for weight in added if weight.device.type != "meta"]
    if weights:  # of LoRA layers, which may be swapped past the version of the tensors
        state.append(float(torch.nn.utils.get_total_norm(weights)))
        state += [weight.data_ptr() for weight in weights]
    return state


def _plain(value: Any) -> Any:
    """A tensor by identity, anything else as text: a copy that later edits cannot reach."""
    return id(value) if isinstance(value, Tensor) else repr(value)


def processors(modules: Sequence[Any]) -> Hashable:
    """The attention processors and their plain attributes, as something to compare."""
    found = [getattr(module, "attn_processors", None) or {} for module in modules]
    named = itertools.chain.from_iterable(each.items() for each in found)
    return tuple((name, one, hash(attributes(one))) for name, one in named)
