"""Records of pipelines and layouts of denoisers: finding them, and adding one's own."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

from ...errors import InvalidArgument
from .adapter_types import AdapterRecord, ArgumentLayout
from .layouts import LAYOUTS
from .records import RECORDS

HOOK_NAME = "thg_engine.guidance"
"""Of the guidance hook, in the registry of the denoiser."""


_REGISTERED: dict[type[Any], AdapterRecord] = {}
_REGISTERED_LAYOUTS: dict[type[Any], ArgumentLayout] = {}


def register(
    pipeline: type[Any],
    *,
    layouts: Mapping[type[Any], ArgumentLayout] | None = None,
    **fields: Any,
) -> AdapterRecord:
    """Tell `compile` how a pipeline of your own does guidance.

    Args:
        pipeline: its class; subclasses that keep its ``__call__`` are described as well. One that
            is known already gets the new record. Pipelines that are compiled keep the old one.
        layouts: class of a denoiser or companion -> which of its arguments carry the batch; not
            needed for classes that diffusers pipelines use, nor with ``calls=True``.
        fields: of `AdapterRecord`: ``denoiser``, ``cond_half``, ``scale``, ``calls``, ...
    Returns:
        The record.
    Raises:
        InvalidArgument: no pipeline class, an unknown field, a part of the batch that is not there,
            a layout of something else.
    """
    mro = pipeline.__mro__ if isinstance(pipeline, type) else ()
    if not any("__call__" in vars(parent) for parent in mro):
        remedy = "give the class of the pipeline, which defines __call__."
        raise InvalidArgument("pipeline", getattr(pipeline, "__name__", pipeline), remedy)
    known = [field.name for field in dataclasses.fields(AdapterRecord)][1:]
    for name in fields.keys() - known:
        raise InvalidArgument(name, fields[name], f"a record has {', '.join(known)}.")
    record = AdapterRecord(pipeline.__name__, **fields)
    _check_record(record)
    _check_layouts(layouts or {})
    _REGISTERED_LAYOUTS.update(layouts or {})
    _REGISTERED[pipeline] = record
    return record


def _check_record(record: AdapterRecord) -> None:
    """Refuse values of the wrong kind, and fields that do not go together."""
    for field in dataclasses.fields(AdapterRecord):
        value, usual = getattr(record, field.name), field.default
        is_names = isinstance(usual, tuple)
        kind = (
            float if isinstance(usual, float) else str if field.name == "pipeline" else type(usual)
        )
        right = isinstance(value, (int, float) if kind is float else kind)
        if not right or (is_names and not all(isinstance(name, str) for name in value)):
            remedy = "give a tuple of names." if is_names else f"give a {kind.__name__}."
            raise InvalidArgument(field.name, value, remedy)
    if record.branches < 2:
        raise InvalidArgument("branches", record.branches, "guidance has two or more.")
    if not 0 <= record.cond_half < record.branches:
        remedy = f"count the {record.branches} branches from 0."
        raise InvalidArgument("cond_half", record.cond_half, remedy)
    if record.experts and not record.calls:
        remedy = "experts are known with calls=True only; leave it out."
        raise InvalidArgument("experts", record.experts, remedy)
    if record.calls and (record.branches > 2 or record.companions or record.cond_half != 1):
        remedy = "cond_half, branches and companions are of one call; leave them out."
        raise InvalidArgument("calls", record.calls, remedy)


def _check_layouts(layouts: Any) -> None:
    """Refuse what is no layout, and layouts whose names are no tuples of names."""
    if not isinstance(layouts, Mapping):
        remedy = "map classes of networks to an ArgumentLayout each."
        raise InvalidArgument("layouts", type(layouts).__name__, remedy)
    for kind, layout in layouts.items():
        if not (isinstance(kind, type) and isinstance(layout, ArgumentLayout)):
            remedy = "map classes of networks to an ArgumentLayout each."
            raise InvalidArgument("layouts", f"{kind!r}: {layout!r}", remedy)
        names = [layout.sample]
        for field in dataclasses.fields(layout)[1:]:
            value = getattr(layout, field.name)
            if value is field.default:
                continue
            if isinstance(field.default, tuple) or field.name == "batched":
                if not isinstance(value, tuple):
                    raise InvalidArgument(field.name, value, "give a tuple of names.")
                names += value
        for name in names:
            if name not in argument_names(kind):
                remedy = f"{kind.__name__}.forward has {', '.join(argument_names(kind))}."
                raise InvalidArgument("layouts", name, remedy)


def unregister(pipeline: type[Any]) -> None:
    """Forget what `register` was told of a pipeline; layouts stay."""
    _REGISTERED.pop(pipeline, None)


def find_record(pipeline_class: type[Any]) -> AdapterRecord | None:
    """The record of the class whose ``__call__`` the pipeline runs; None if nobody wrote one.

    A user's subclass with its own loop is another pipeline, even under a known name.
    """
    for parent in pipeline_class.__mro__:
        if parent in _REGISTERED:
            return _REGISTERED[parent]
        if "__call__" in vars(parent):
            known = parent.__module__.startswith("diffusers.")
            return RECORDS.get(parent.__name__) if known else None
    return None


def find_layout(module: Any) -> ArgumentLayout | None:
    """The layout of the class of ``module``, or of the nearest one it derives from."""
    for parent in type(module).__mro__:
        found = _REGISTERED_LAYOUTS.get(parent) or LAYOUTS.get(parent.__name__)
        if found is not None:
            return found
    return None


@cache
def argument_names(kind: Any) -> tuple[str, ...]:
    """Positional order of the ``forward`` of a class of modules."""
    return tuple(inspect.signature(kind.forward).parameters)[1:]
