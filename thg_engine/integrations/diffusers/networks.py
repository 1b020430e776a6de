"""The networks of a pipeline that a run has to do with."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch

from .adapter_types import AdapterRecord
from .adapters import find_layout

Modules = tuple[torch.nn.Module, ...]


@dataclass(frozen=True)
class Networks:
    """Networks that get the guidance hook.

    Attributes:
        denoisers: the network, and experts that take over from it.
        companions: networks that are called before it in every step.
        is_wrapped: whether ``torch.compile`` is around a denoiser.
    """

    denoisers: Modules = ()
    companions: Modules = ()
    is_wrapped: bool = False

    @classmethod
    def of(cls, pipe: Any, record: AdapterRecord) -> Networks:
        """Those of ``pipe``, without the wrapper that ``torch.compile`` puts around them."""
        found = [getattr(pipe, name, None) for name in (record.denoiser, *record.experts)]
        companions: list[Any] = []
        for name in record.companions:
            companion = getattr(pipe, name, None)
            # Several ControlNets are called one after another by a module of their own.
            companions += getattr(companion, "nets", None) or [companion]
        wrapped = any(hasattr(network, "_orig_mod") for network in found)
        return cls(_modules(found), _modules(companions), wrapped)

    @property
    def hooked(self) -> Modules:
        """All of them."""
        return (*self.denoisers, *self.companions)

    @property
    def module(self) -> torch.nn.Module:
        """The first denoiser: its configuration stands for the model."""
        return self.denoisers[0]

    def why_not(self, pipe: Any, record: AdapterRecord) -> str:
        """Why nothing can be done for a pipeline with these networks, "" where it can."""
        if not self.denoisers:
            return f"this {type(pipe).__name__} has no denoiser in .{record.denoiser}"
        if not record.calls and find_layout(self.module) is None:
            return f"the arguments of its {type(self.module).__name__} are not known"
        call = inspect.signature(type(pipe).__call__).parameters
        if not hasattr(type(pipe), record.scale) and record.scale not in call:
            return f"{type(pipe).__name__} has neither property nor argument {record.scale!r}"
        return ""


def _modules(found: list[Any]) -> Modules:
    bare = [getattr(network, "_orig_mod", network) for network in found]
    return tuple(network for network in bare if isinstance(network, torch.nn.Module))
