"""The JSON file of the GPU suite: every part is in it as soon as it is done."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_timing import first_line


def plain(value: Any) -> Any:
    """JSON's values: keys are strings, and what is not finite is None."""
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class Store:
    """Parts by name in one file, which is read anew each time: other processes write it too.

    A part is ``{"failure", "seconds", ...}``; one with a failure runs again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Any]:
        """Everything; ``{"parts": {}}`` before there is anything."""
        if not self.path.exists():
            return {"parts": {}}
        return dict(json.loads(self.path.read_text(encoding="utf-8")))

    def update(self, **entries: Any) -> None:
        """Set entries beside the parts."""
        self._write({**self.read(), **entries})

    def put(self, part: str, result: dict[str, Any]) -> None:
        """Keep the result of ``part``."""
        found = self.read()
        found["parts"][part] = result
        self._write(found)

    def forget(self, part: str) -> None:
        """Drop the result of ``part``, if there is one."""
        found = self.read()
        found["parts"].pop(part, None)
        self._write(found)

    def get(self, part: str) -> dict[str, Any] | None:
        """The result of ``part``, None if there is none."""
        result: dict[str, Any] | None = self.read()["parts"].get(part)
        return result

    def done(self, part: str) -> bool:
        """Whether ``part`` need not run again."""
        result = self.get(part)
        return result is not None and not result.get("failure")

    def run(self, part: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Run ``work`` and keep its result, or why it failed."""
        begin = time.perf_counter()
        try:
            result = {"failure": "", **work()}
        except Exception as error:  # one part must not take the others along
            result = {"failure": first_line(error)}
        result["seconds"] = time.perf_counter() - begin
        self.put(part, result)
        return result

    def _write(self, found: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_suffix(".part")
        fresh.write_text(json.dumps(plain(found), indent=1) + "\n", encoding="utf-8")
        fresh.replace(self.path)  # a run that is stopped here leaves the old file whole
