"""JSON files of this package: each says its format and version, and nothing in it is executed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import CalibrationError


def read_document(path: str | Path) -> Any:
    """What a file holds; `CalibrationError` where it cannot be read or is no JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CalibrationError(f"cannot read calibration {str(path)!r}: {error}") from error


def fields_of(
    document: Any,
    origin: str,
    known: str,
    version: int,
    remedy: str = "make one with `thg-engine calibrate`",
) -> dict[str, Any]:
    """The fields of a document of the format ``known``, without format and version.

    Raises:
        CalibrationError: another format or version; ``origin`` names the document.
    """
    if not isinstance(document, dict) or document.get("format") != known:
        raise CalibrationError(f"{origin!r} is not a {known} file; {remedy}.")
    found = document.get("version")
    if found != version:
        message = f"{origin!r} has version {found!r}, this release reads {version}"
        raise CalibrationError(f"{message}; {remedy}.")
    return {name: value for name, value in document.items() if name not in ("format", "version")}
