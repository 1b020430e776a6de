"""A guidance method in a guider's configuration file: JSON, never pickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from ...curves import FORMAT, VERSION, Calibration
from ...errors import InvalidArgument
from ...fitting.reuse import FittedReuse
from ...grid import MappedGrid
from ...guidance import GUIDANCE_NAMES, THG, Guidance
from ...plan import SamplingPlan
from .resolve import PlannedRows

METHOD, PLAN, OTHER = "method", "plan", "class"


def encode(guidance: Guidance | SamplingPlan | str) -> str | dict[str, Any]:
    """What `decode` makes the same method of; of a method of yours its class alone."""
    if isinstance(guidance, str):
        return guidance
    plan = guidance.plan if isinstance(guidance, PlannedRows) else guidance
    if isinstance(plan, SamplingPlan):
        return {PLAN: json.loads(plan.to_json())}
    for name, kind in GUIDANCE_NAMES.items():
        if type(guidance) is kind:
            options: dict[str, Any] = asdict(guidance)  # type: ignore[call-overload]
            if isinstance(guidance, THG) and guidance.calibration is not None:
                options["calibration"] |= {"format": FORMAT, "version": VERSION}
            if isinstance(guidance, THG) and isinstance(guidance.reuse, FittedReuse):
                options["reuse"] = guidance.reuse.document()
            given = json.loads(json.dumps(options))
            return {METHOD: name, **{k: v for k, v in given.items() if v is not None}}
    return {OTHER: f"{type(guidance).__module__}.{type(guidance).__qualname__}"}


def decode(value: Any) -> Any:
    """A method, plan or name from what `encode` gave; anything else as it is.

    Raises:
        InvalidArgument: an unknown or damaged description, or one of a method of yours.
    """
    if not isinstance(value, Mapping):
        return value
    if PLAN in value:
        return SamplingPlan.from_json(json.dumps(value[PLAN]))
    name = value.get(METHOD)
    if name not in GUIDANCE_NAMES:
        remedy = "give the method itself: from_config(config, guidance=...)."
        raise InvalidArgument("guidance", value.get(OTHER, dict(value)), remedy)
    kind: Any = GUIDANCE_NAMES[name]
    known = {field.name for field in fields(kind)}
    options = {key: item for key, item in value.items() if key in known}
    if isinstance(options.get("calibration"), Mapping):
        document = dict(options["calibration"])
        options["calibration"] = Calibration.from_document(document, "guider config")
    if isinstance(options.get("reuse"), Mapping):
        options["reuse"] = FittedReuse.from_document(dict(options["reuse"]), "guider config")
    if isinstance(options.get("grid"), Mapping):
        grid = options["grid"]
        options["grid"] = MappedGrid(
            tuple(grid["indices"]), tuple(grid["lambdas"]), grid.get("cutoff")
        )
    found: Guidance = kind(**options)
    return found
