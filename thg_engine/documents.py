"""Files of calibrations: JSON with a format and a version, nothing in them is executed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .errors import CalibrationError


def read_document(path: str | Path, kind: str) -> Any:
    """What a file holds.

    Raises:
        CalibrationError: it cannot be read or is no JSON; ``kind`` says what it should have been.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CalibrationError(f"cannot read {kind} {str(path)!r}: {error}") from error


def write_document(path: str | Path, text: str) -> None:
    """Write ``text`` in one go: an interrupted write leaves what was there."""
    partial = Path(f"{path}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def fields_of(document: Any, origin: str, known: str, version: int, remedy: str) -> dict[str, Any]:
    """The fields of a document, without format and version.

    Args:
        document: parsed JSON.
        origin: names it in errors.
        known, version: the format and version that it should have.
        remedy: how to make another.
    Raises:
        CalibrationError: another format or version.
    """
    if not isinstance(document, dict) or document.get("format") != known:
        raise CalibrationError(f"{origin!r} is not a {known} file; {remedy}.")
    found = document.get("version")
    if found != version:
        message = f"{origin!r} has version {found!r}, this release reads {version}"
        raise CalibrationError(f"{message}; {remedy}.")
    return {name: value for name, value in document.items() if name not in ("format", "version")}
