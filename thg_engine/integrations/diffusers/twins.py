"""Calls of one pipeline from several threads at a time.

A pipeline keeps scale, timesteps and counters of a call on itself and on its scheduler, and its
tokenizers keep padding and truncation. So a call that begins while another is in progress runs on a
twin: the same networks, everything else its own.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .plan_scheduler import PlanScheduler


class Twins:
    """Hands out a pipeline and, while it is in use, twins of it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_taken = False
        self._idle: dict[str, Any] = {}
        self._originals: dict[str, Any] = {}

    @contextmanager
    def one(self, pipe: Any) -> Iterator[Any]:
        """``pipe`` itself if nobody else has it."""
        with self._lock:
            is_first, self._is_taken = not self._is_taken, True
            self._note(pipe, is_first)
            mine = pipe
            if not is_first:
                mine = object.__new__(type(pipe))
                vars(mine).update(vars(pipe), **{k: _copied(v) for k, v in self._idle.items()})
        try:
            yield mine
        finally:
            if is_first:
                with self._lock:
                    self._is_taken = False

    def _note(self, pipe: Any, is_first: bool) -> None:
        """Copies to make twins from, taken while nobody changes the originals."""
        names = [n for n in vars(pipe) if n.startswith("tokenizer") or n == "scheduler"]
        for name in names:
            original = vars(pipe)[name]
            if isinstance(original, PlanScheduler):
                continue  # of the call in progress; the copy of what it stands for was taken before
            is_new = original is not self._originals.get(name)
            if is_new or (is_first and name == "scheduler"):
                self._originals[name], self._idle[name] = original, _copied(original)


def _copied(component: Any) -> Any:
    """A copy to run on; the component itself where it cannot be copied."""
    try:
        return copy.deepcopy(component)
    except Exception:
        return component
