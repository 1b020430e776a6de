"""Which graphs there are, who uses them, and why there are none.

Graphs are of one state of the denoiser: when its fingerprint changes, all of them go. A failed
capture leaves a reason and the eager path, which is always correct.
"""

from __future__ import annotations

import gc
import os
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .errors import ThgError, warn
from .graphs import CAPTURE_LOCK, GraphSet, NotCaptured, failure

KILL_SWITCHES = ("THG_DISABLE", "THG_DISABLE_GRAPHS")
MOST_CHANGES = 4  # of the network, in calls in a row
MAX_REASONS = 64  # shapes without graphs whose reason is remembered


@dataclass
class GraphStats:
    """Counters of one owner of graphs.

    Attributes:
        captures: graphs that were captured.
        replays: steps that ran as a replay.
        eager_calls: steps that ran eagerly although graphs were asked for.
        refusals: reason -> runs that went without graphs for it.
        capture_seconds: spent on warm-up, capture and measurement.
        leaked_bytes: of the device, lost to captures that failed.
    """

    captures: int = 0
    replays: int = 0
    eager_calls: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    capture_seconds: float = 0.0
    leaked_bytes: int = 0


@dataclass
class _Entry:
    """What is known of a signature."""

    buffers: Any = None
    graphs: GraphSet | None = None
    reason: str = ""
    is_leased: bool = False
    is_stale: bool = False
    done: Any = None
    """Event behind the last run, which may have been on another stream."""


class Lease:
    """One run's use of the graphs and static buffers of a signature.

    Attributes:
        buffers: what ``build`` made.
    """

    def __init__(self, cache: GraphCache, entry: _Entry, stream: Any) -> None:
        self._cache, self._entry, self._stream = cache, entry, stream
        self.buffers = entry.buffers

    def replay(self, name: str) -> Any:
        """One captured step; its result, good until the next replay."""
        if self._entry.graphs is None:
            raise ThgError("the graphs of this run have been released.")
        result = self._entry.graphs.replay(name)
        self._stream = self._cache.cuda.current_stream(self._entry.graphs.device)
        self._cache.count(replays=1)
        return result

    def release(self) -> None:
        """Let the next run have them; a second time does nothing."""
        self.abandon()
        self._cache._close_dropped()

    def abandon(self) -> None:
        """The same for a finalizer, which may run anywhere: waits for nothing."""
        if self._entry.is_leased and self.buffers is not None:
            self.buffers = None
            self._cache._release(self._entry, self._stream)


class GraphCache:
    """Graph sets of one owner, by signature.

    Args:
        limit: signatures that may hold memory at a time; more of them run eagerly.
        choose: keep graphs only where they are faster than eager calls.
        captures_late: capture when a run asks; otherwise only in `warm_up`.
        cuda: `torch.cuda`, or what stands for it.
    """

    def __init__(
        self,
        limit: int = 4,
        choose: bool = True,
        captures_late: bool = True,
        cuda: Any = torch.cuda,
    ) -> None:
        self.limit, self.choose, self.captures_late, self.cuda = limit, choose, captures_late, cuda
        self.stats = GraphStats()
        self.notes: set[Hashable] = set()
        """Signatures that the owner wants to remember something of."""
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._fingerprint: Hashable = None
        self._changes = 0
        self._dropped: list[GraphSet] = []
        self._lock = threading.RLock()  # a finalizer may release a lease while it is held
        self._warned = False

    def acquire(
        self,
        signature: Hashable,
        fingerprint: Callable[[], Hashable],
        device: torch.device,
        build: Callable[[], Any],
        *,
        warms_up: bool = False,
    ) -> Lease | str:
        """The graphs of a signature for one run, captured if need be, or why there are none.

        Args:
            signature: all that a graph is specialised on: shapes, strides, dtypes, device, values
                of plain arguments.
            fingerprint: gives the state of the denoiser, whose change drops all graphs; asked only
                where there may be graphs, since it looks at every part of the network.
            device: where the run is.
            build: makes the static buffers, with a method ``steps()`` that gives what to capture.
            warms_up: the caller asks for a capture now.
        """
        found = self._find(signature, fingerprint, device, warms_up)
        self._close_dropped()
        if isinstance(found, str):
            return self.refuse(found)
        if found.graphs is None:
            self._make(found, device, build)
            if found.reason:
                self._release(found)
                return self.refuse(found.reason)
        stream = self.cuda.current_stream(device)
        if found.done is not None:
            stream.wait_event(found.done)
        return Lease(self, found, stream)

    def refuse(self, reason: str) -> str:
        """Count a run without graphs; returns the reason."""
        with self._lock:
            self.stats.refusals[reason] += 1
        return reason

    def count(self, **more: int) -> None:
        """Add to counters, from any thread."""
        with self._lock:
            for name, number in more.items():
                setattr(self.stats, name, getattr(self.stats, name) + number)

    def flush(self) -> None:
        """Drop every graph; those in use go when their run ends."""
        with self._lock:
            self._flush()
        self._close_dropped()

    def pool_bytes(self) -> int:
        """Memory of the device that graphs hold."""
        with self._lock:
            sets = [entry.graphs for entry in self._entries.values()]
        return sum(graphs.pool_bytes for graphs in sets if graphs is not None)

    def report(self) -> dict[str, Any]:
        """Counters and, per captured signature, milliseconds (eager, graphed) of each step."""
        with self._lock:
            sets = [e.graphs for e in self._entries.values() if e.graphs is not None]
        return {
            **{name: getattr(self.stats, name) for name in ("captures", "replays", "eager_calls")},
            "refusals": dict(self.stats.refusals),
            "pool_bytes": self.pool_bytes(),
            "capture_seconds": self.stats.capture_seconds,
            "leaked_bytes": self.stats.leaked_bytes,
            "ms": [dict(graphs.ms) for graphs in sets],
        }

    def _find(
        self,
        signature: Hashable,
        fingerprint: Callable[[], Hashable],
        device: torch.device,
        warms_up: bool,
    ) -> _Entry | str:
        """The entry of a signature, leased, or why there is none."""
        switch = next((name for name in KILL_SWITCHES if os.environ.get(name) == "1"), None)
        if switch is not None:
            return f"{switch}=1"
        if device.type != "cuda" or not self.cuda.is_available():
            return f"there are no graphs on {device.type}"
        if self.cuda.is_current_stream_capturing():
            return "the caller is capturing a graph itself"
        state = fingerprint()
        with self._lock:
            self._changes = self._changes + 1 if state != self._fingerprint else 0
            if self._changes:
                self._flush()
                self._fingerprint = state
            if self._changes > MOST_CHANGES:  # a counter among its attributes, say
                return "the network has been another one in each of the last calls"
            entry = self._entries.get(signature)
            if entry is None:
                refusal = self._refusal_of_new(warms_up)
                if refusal:
                    return refusal
                entry = self._entries[signature] = _Entry()
            if entry.reason:
                return entry.reason
            if entry.is_leased:
                return "another run is using the graphs of this shape"
            entry.is_leased = True
            return entry

    def _refusal_of_new(self, warms_up: bool) -> str:
        if not (self.captures_late or warms_up):
            return "nothing was captured for this shape (warm_up captures it)"
        failed = [signature for signature, entry in self._entries.items() if entry.reason]
        if len(self._entries) - len(failed) < self.limit:
            for signature in failed[:-MAX_REASONS]:
                del self._entries[signature]
            return ""
        if not self._warned:
            self._warned = True
            warn(f"there are graphs of {self.limit} shapes; further shapes run without")
        return f"there are graphs of {self.limit} other shapes"

    def _make(self, entry: _Entry, device: torch.device, build: Callable[[], Any]) -> None:
        """Capture the steps of a new entry, or leave the reason in it."""
        start = time.perf_counter()
        before = self.cuda.memory_reserved(device)
        graphs = None
        try:
            # Outside of inference mode: runs of both kinds write to these buffers.
            with CAPTURE_LOCK, torch.inference_mode(False), torch.no_grad():
                buffers = build()
                graphs = GraphSet(device, self.cuda)
                steps = buffers.steps()
                graphs.capture(steps)
                if self.choose:
                    graphs.measure(steps)
            entry.reason = _why_slower(graphs.ms)
            if entry.reason:
                graphs.close()
            else:
                entry.buffers, entry.graphs = buffers, graphs
                self.stats.captures += len(steps)
        except Exception as error:
            entry.reason = str(error) if isinstance(error, NotCaptured) else failure(error)
            if graphs is not None:
                graphs.close()
            self.stats.leaked_bytes += self._leaked(device, before)
        except BaseException:
            if graphs is not None:
                graphs.close()
            self._forget(entry)
            raise
        finally:
            self.stats.capture_seconds += time.perf_counter() - start

    def _leaked(self, device: torch.device, before: int) -> int:
        """What is still reserved after a failure; its pool is never given back."""
        with CAPTURE_LOCK:
            gc.collect()
            self.cuda.empty_cache()
            return max(0, int(self.cuda.memory_reserved(device)) - before)

    def _forget(self, entry: _Entry) -> None:
        """As if nobody had asked for it."""
        with self._lock:
            for signature in [s for s, other in self._entries.items() if other is entry]:
                del self._entries[signature]

    def _release(self, entry: _Entry, stream: Any = None) -> None:
        with self._lock:
            entry.is_leased = False
            if stream is not None:
                entry.done = self.cuda.Event()
                entry.done.record(stream)
            if entry.is_stale:
                self._drop(entry)

    def _flush(self) -> None:
        entries = list(self._entries.values())
        self._entries.clear()
        for entry in entries:
            entry.is_stale = True
            if not entry.is_leased:
                self._drop(entry)

    def _drop(self, entry: _Entry) -> None:
        graphs, entry.graphs, entry.buffers = entry.graphs, None, None
        if graphs is not None:
            self._dropped.append(graphs)

    def _close_dropped(self) -> None:
        """Close what was dropped; not under the lock, since it waits for captures to end."""
        while True:
            with self._lock:
                if not self._dropped:
                    return
                graphs = self._dropped.pop()
            graphs.close()


def _why_slower(ms: Mapping[str, tuple[float, float]]) -> str:
    """Why graphs are not kept; "" where they are at least as fast, or nobody has measured."""
    eager, graphed = (sum(times[k] for times in ms.values()) for k in (0, 1))
    if graphed <= eager:
        return ""
    return f"eager calls are faster here ({eager:.2f} ms against {graphed:.2f} ms)"
