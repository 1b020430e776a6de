"""What a calibration has done so far, so that an interrupted one goes on where it stopped."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor


class Store:
    """Tensors and numbers by key in a folder; without one, nothing is kept.

    Args:
        folder: made when something is first put in; one for each set of settings.
        writes: whether this process does; one of several does for all.
        suffix: of the keys of tensors, which each process has of its own.
    """

    def __init__(self, folder: Path | None = None, writes: bool = True, suffix: str = "") -> None:
        self.folder, self.writes, self.suffix = folder, writes, suffix

    def json(self, key: str) -> Any:
        """What was put under ``key``, or None."""
        path = self._path(f"{key}.json")
        if path is None or not path.is_file():
            return None
        return json.loads(path.read_text(encoding="utf-8"))

    def put_json(self, key: str, value: Any) -> None:
        """Keep ``value``."""
        path = self._path(f"{key}.json")
        if path is not None and self.writes:
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(value), encoding="utf-8")
            os.replace(partial, path)

    def tensors(self, key: str) -> dict[str, Tensor] | None:
        """Tensors under ``key``, or None."""
        path = self._path(f"{key}{self.suffix}.safetensors")
        return load_file(path) if path is not None and path.is_file() else None

    def put_tensors(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Keep ``tensors``."""
        path = self._path(f"{key}{self.suffix}.safetensors")
        if path is not None:
            partial = path.with_suffix(".partial")
            save_file({name: value.contiguous() for name, value in tensors.items()}, partial)
            os.replace(partial, path)

    def _path(self, name: str) -> Path | None:
        if self.folder is None:
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        # Long grids make long names, which some file systems refuse.
        return self.folder / (name if len(name) < 200 else _short(name))


def _short(name: str) -> str:
    import hashlib

    stem, dot, suffix = name.rpartition(".")
    return hashlib.sha256(stem.encode()).hexdigest()[:32] + dot + suffix
