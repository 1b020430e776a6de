"""What several commands check and set up before they begin."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

from .errors import InvalidArgument, ThgError

BARRIER = timedelta(days=7)
"""How long one process may wait for another; the default of minutes is for training steps."""


def writable(folder: Path) -> None:
    """Make ``folder``; found out before minutes of work, not after."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        allowed = os.access(folder, os.W_OK)
    except OSError as error:
        raise InvalidArgument("--out", str(folder), f"cannot be made ({error}).") from error
    if not allowed:
        raise InvalidArgument("--out", str(folder), "is not writable; give another folder.")


def writable_file(path: Path) -> None:
    """Refuse a file that cannot be written, and make its folder."""
    writable(path.parent)
    if path.is_dir():
        raise InvalidArgument("--out", str(path), "is a folder; give the name of a file in it.")


def processes() -> Any:
    """This process among those that a launcher started, an `accelerate.PartialState`.

    Raises:
        ThgError: the launcher's processes do not know of each other: each would do all the work.
    """
    import torch
    from accelerate import PartialState

    # Without cpu=True, accelerate takes the processes of a machine without GPU for strangers.
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=BARRIER)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != state.num_processes:
        raise ThgError(
            f"the launcher started {started} processes, accelerate sees {state.num_processes}; "
            "run `accelerate config`, or one process."
        )
    return state
