"""Finding the record of a pipeline and the layout of a denoiser."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

from .adapter_types import AdapterRecord, ArgumentLayout
from .layouts import LAYOUTS
from .records import RECORDS

HOOK_NAME = "thg_engine.guidance"
"""Of the guidance hook, in the registry of the denoiser."""


def find_record(pipeline_class: type[Any]) -> AdapterRecord | None:
    """The record of the class whose ``__call__`` the pipeline runs; None if nobody wrote one.

    A user's subclass with its own loop is another pipeline, even under a known name.
    """
    for parent in pipeline_class.__mro__:
        if "__call__" in vars(parent):
            known = parent.__module__.startswith("diffusers.")
            return RECORDS.get(parent.__name__) if known else None
    return None


def find_layout(module: Any) -> ArgumentLayout | None:
    """The layout of the class of ``module``, or of the nearest one it derives from."""
    names = (parent.__name__ for parent in type(module).__mro__)
    return next((LAYOUTS[name] for name in names if name in LAYOUTS), None)


@cache
def argument_names(kind: Any) -> tuple[str, ...]:
    """Positional order of the ``forward`` of a class of modules."""
    return tuple(inspect.signature(kind.forward).parameters)[1:]
