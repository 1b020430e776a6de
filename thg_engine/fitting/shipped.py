"""Fitted plans that ship with the package, read from ``thg_engine/data``."""

from __future__ import annotations

import functools
import json

from ..published import DATA
from .front import PlanFront


@functools.cache
def shipped_fronts() -> tuple[PlanFront, ...]:
    """Every front in the package."""
    files = sorted(entry.name for entry in DATA.iterdir() if entry.name.startswith("plans-"))
    return tuple(
        PlanFront.from_document(json.loads((DATA / name).read_text(encoding="utf-8")), name)
        for name in files
    )


def shipped_front(fingerprint: str) -> PlanFront | None:
    """The shipped front of the architecture with this fingerprint, if there is one."""
    return next((f for f in shipped_fronts() if f.fingerprint == fingerprint), None)
