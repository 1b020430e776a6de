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


class Twins:
    """Hands out a pipeline and, while it is in use, twins of it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._active = 0
        self._idle: dict[str, Any] = {}
        self._tokenizers: tuple[Any, ...] = ()

    @contextmanager
    def one(self, pipe: Any) -> Iterator[Any]:
        """``pipe`` itself if nobody else has it."""
        with self._lock:
            self._active += 1
            if self._active == 1:
                self._note(pipe)
                mine = pipe
            else:
                mine = object.__new__(type(pipe))
                vars(mine).update(vars(pipe), **{k: _copied(v) for k, v in self._idle.items()})
        try:
            yield mine
        finally:
            with self._lock:
                self._active -= 1

    def _note(self, pipe: Any) -> None:
        """Copies to make twins from, taken while nobody changes the originals."""
        names = [name for name in vars(pipe) if name.startswith("tokenizer")]
        tokenizers = tuple(vars(pipe)[name] for name in names)
        if [id(one) for one in tokenizers] != [id(one) for one in self._tokenizers]:
            self._tokenizers = tokenizers
            self._idle = {name: _copied(vars(pipe)[name]) for name in names}
        self._idle["scheduler"] = _copied(pipe.scheduler)


def _copied(component: Any) -> Any:
    """A copy to run on; the component itself where it cannot be copied."""
    try:
        return copy.deepcopy(component)
    except Exception:
        return component
