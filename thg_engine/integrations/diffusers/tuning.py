"""Changes of the denoiser itself that `compile` makes on request, and their undoing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from ...errors import InvalidArgument

Undo = Callable[[], None]
ATTENTION = ("sdpa", "xformers", "native")
"""torch's fused attention; that of xformers; plain matrix products."""
_BACKENDS = {"sdpa": "native", "xformers": "xformers", "native": "_native_math"}
"""Their names in diffusers' attention dispatch, which transformer models use."""


def check_tuning(denoiser: str | None, attention: str | None) -> None:
    """Refuse what cannot be had; changes nothing."""
    if denoiser not in (None, "compile"):
        raise InvalidArgument("denoiser", denoiser, 'give None or "compile".')
    if attention not in (None, *ATTENTION):
        raise InvalidArgument("attention", attention, f"give None or one of {ATTENTION}.")
    if attention == "xformers" and find_spec("xformers") is None:
        remedy = "xformers is not installed: pip install 'thg-engine[xformers]'."
        raise InvalidArgument("attention", attention, remedy)


def tune(module: torch.nn.Module, denoiser: str | None, attention: str | None) -> Undo:
    """Choose attention and compile the repeated blocks of a denoiser; returns how to undo it."""
    undo: list[Undo] = []
    try:
        if attention is not None:
            undo.append(_attend(module, attention))
        if denoiser is not None:
            undo.append(_compile_blocks(module))
    except BaseException:
        _all(undo)
        raise
    return functools.partial(_all, undo)


def _all(undo: list[Undo]) -> None:
    for each in reversed(undo):
        each()


def _attend(module: Any, attention: str) -> Undo:
    from diffusers.models import attention_processor

    if not hasattr(module, "set_attn_processor"):
        remedy = f"{type(module).__name__} lets nobody choose its attention."
        raise InvalidArgument("attention", attention, remedy)
    before = dict(module.attn_processors)
    processors = {
        "sdpa": attention_processor.AttnProcessor2_0,
        "native": attention_processor.AttnProcessor,
        "xformers": attention_processor.XFormersAttnProcessor,
    }
    if all(type(one) in processors.values() for one in before.values()):
        module.set_attn_processor(processors[attention]())
    else:
        if not hasattr(module, "set_attention_backend"):
            remedy = "its attention processors are of another kind; choose among them yourself."
            raise InvalidArgument("attention", attention, remedy)
        backends = {key: getattr(one, "_attention_backend", None) for key, one in before.items()}
        module.set_attention_backend(_BACKENDS[attention])
        return functools.partial(_restore_backends, before, backends)
    return functools.partial(module.set_attn_processor, before)


def _restore_backends(processors: dict[str, Any], backends: dict[str, Any]) -> None:
    for key, processor in processors.items():
        processor._attention_backend = backends[key]


def _compile_blocks(module: Any) -> Undo:
    """Regional compilation: one artifact for all blocks of a kind, in seconds, not minutes.

    Inductor's own CUDA graphs stay off: they reject values that live across steps.
    """
    names = tuple(getattr(module, "_repeated_blocks", None) or ())
    blocks = [part for part in module.modules() if type(part).__name__ in names]
    if not blocks:
        remedy = f"{type(module).__name__} names no repeated blocks; compile it yourself."
        raise InvalidArgument("denoiser", "compile", remedy)
    fresh = [part for part in blocks if part._compiled_call_impl is None]
    for part in fresh:
        part.compile()

    def undo() -> None:
        for part in fresh:
            part._compiled_call_impl = None

    return undo
