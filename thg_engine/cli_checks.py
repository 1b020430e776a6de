"""What several commands check before they begin."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import InvalidArgument


def writable(folder: Path) -> None:
    """Make ``folder``; found out before minutes of work, not after."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError as error:
        raise InvalidArgument("--out", str(folder), f"cannot be made ({error}).") from error
    if not writable:
        raise InvalidArgument("--out", str(folder), "is not writable; give another folder.")
