"""CUDA graphs of one sampling step, captured once per signature and replayed for every step.

A graph replays the kernels it has recorded, on the addresses it has recorded. So whatever differs
from step to step is a value in a static buffer: rows, cursor and timestep are on the device anyway,
and the same two graphs serve every schedule, scale and solver of a shape.

What is kept here:
- The graphs of one signature share a stream and a pool of their own and are dropped together, since
  cuBLAS keeps one workspace per stream, which the first graph to go would take along.
- The thread's stream is restored however a capture ends.
- Nothing is captured that does not fit: the memory that a step needs is measured first.

Names as in `torch.cuda`, which the `cuda` arguments stand for; tests pass another.
"""

from __future__ import annotations

import gc
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from statistics import median
from typing import Any
from weakref import WeakKeyDictionary

import torch

from .errors import ThgError

Step = Callable[[], Any]
"""One step on static buffers: reads and writes nothing else, asks the device nothing."""

WARM_UPS = 2  # kernels load, autotuners choose and lazy buffers appear on the first call
TRIALS = 5  # calls per measurement of eager against graphed, fewer of
TRIAL_SECONDS = 1.0  # steps that take long
HEADROOM = 1.2  # of the memory that a capture must find free

CAPTURE_LOCK = threading.RLock()
"""Held while anything is captured, and by whoever waits for the device: a wait while another thread
captures fails, and breaks that capture."""
_streams: WeakKeyDictionary[Any, dict[str, list[Any]]] = WeakKeyDictionary()
"""Streams of closed sets. torch hands out 32 of them in turns: the 33rd would not be our own."""


class NotCaptured(ThgError):
    """Why a set of graphs could not be made; the message is the reason."""


class GraphSet:
    """The graphs of one signature on a stream and a pool of their own.

    Args:
        device: where they run.
        cuda: `torch.cuda`, or what stands for it.

    Attributes:
        pool_bytes: memory of the device that they hold.
        ms: per graph the time of a step, (eager, graphed); empty where it was not measured.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self.device, self.cuda = device, cuda
        with CAPTURE_LOCK:
            self._free = _streams.setdefault(cuda, {}).setdefault(str(device), [])
            self.stream = self._free.pop() if self._free else cuda.Stream(device)
        self.pool = cuda.graph_pool_handle()
        self.pool_bytes = 0
        self.ms: dict[str, tuple[float, float]] = {}
        self._graphs: dict[str, Any] = {}
        self._results: dict[str, Any] = {}

    def capture(self, steps: Mapping[str, Step]) -> None:
        """Capture every step under its name, the largest given first, so that the rest fit in.

        Raises:
            NotCaptured: the reason; the set is closed.
        """
        try:
            with self.cuda.device(self.device), CAPTURE_LOCK, _no_cached_casts():
                self._warm_up(steps)
                before = self.cuda.memory_reserved(self.device)
                try:
                    for name, step in steps.items():
                        self._graphs[name], self._results[name] = self._captured(step)
                finally:
                    self.pool_bytes = self.cuda.memory_reserved(self.device) - before
        except BaseException as error:
            if not isinstance(error, NotCaptured):
                self.stream = None  # a broken capture may stick to it
            self.close()
            if not isinstance(error, Exception):
                raise
            if isinstance(error, NotCaptured):
                raise
            raise NotCaptured(failure(error)) from None

    def replay(self, name: str) -> Any:
        """Run a captured step on the current stream; its result, good until the next replay."""
        self._graphs[name].replay()
        return self._results[name]

    def measure(self, steps: Mapping[str, Step]) -> None:
        """Time every step both ways, in turns."""
        with CAPTURE_LOCK:
            for name, step in steps.items():
                times: tuple[list[float], list[float]] = ([], [])
                for _ in range(TRIALS):
                    times[0].append(self._timed(step))
                    times[1].append(self._timed(self._graphs[name].replay))
                    if sum(map(sum, times)) > 1e3 * TRIAL_SECONDS:
                        break
                self.ms[name] = median(times[0]), median(times[1])

    def close(self) -> None:
        """Drop graphs, stream and pool; waits for what is still running, captures included."""
        with CAPTURE_LOCK:
            self.cuda.synchronize(self.device)
            for graph in self._graphs.values():
                graph.reset()
            self._graphs.clear()
            self._results.clear()
            if self.stream is not None:
                self._free.append(self.stream)
            self.stream = self.pool = None

    def _warm_up(self, steps: Mapping[str, Step]) -> None:
        """Run each step where it will be captured; refuse where its memory is not to be had."""
        before = self.cuda.memory_reserved(self.device)
        self.stream.wait_stream(self.cuda.current_stream(self.device))
        with self.cuda.stream(self.stream):
            for step in steps.values():
                for _ in range(WARM_UPS):
                    step()
        self.stream.synchronize()
        if _has_own_graphs(self.device):
            raise NotCaptured(
                'torch.compile(mode="reduce-overhead") captures graphs of its own; compile without'
            )
        # Blocks belong to the stream that first used them: this growth is what a step needs.
        needed = self.cuda.memory_reserved(self.device) - before
        gc.collect()
        self.cuda.synchronize(self.device)
        self.cuda.empty_cache()
        free = self.cuda.mem_get_info(self.device)[0]
        if free < HEADROOM * needed:
            raise NotCaptured(
                f"a capture needs about {_size(needed)} of device memory, {_size(free)} are free"
            )

    def _captured(self, step: Step) -> tuple[Any, Any]:
        """A graph of ``step`` and its result; the thread is on its old stream afterwards."""
        graph = self.cuda.CUDAGraph()
        before = self.cuda.current_stream(self.device)
        collects = gc.isenabled()
        try:
            gc.disable()  # a finalizer that waits for the device would break the capture
            self.cuda.set_stream(self.stream)
            with _inductor_lock():
                graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                try:
                    result = step()
                except BaseException:
                    with suppress(Exception):  # ends a capture that is broken, and says so again
                        graph.capture_end()
                    raise
                graph.capture_end()
        finally:
            self.cuda.set_stream(before)
            if collects:
                gc.enable()
        return graph, result

    def _timed(self, step: Step) -> float:
        """Milliseconds of one call, from launch to completion."""
        self.cuda.synchronize(self.device)
        start = time.perf_counter()
        step()
        self.cuda.synchronize(self.device)
        return 1e3 * (time.perf_counter() - start)


@contextmanager
def _no_cached_casts() -> Iterator[None]:
    """Autocast's casts of weights live no longer than its context, shorter than a graph."""
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(cached)


def _has_own_graphs(device: Any) -> bool:
    """Whether Inductor has captured on the device: its lock would be taken twice."""
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    if trees is None or not isinstance(device, torch.device):
        return False
    index = torch.cuda.current_device() if device.index is None else device.index
    return trees.get_manager(index, create_if_none_exists=False) is not None


def _inductor_lock() -> AbstractContextManager[Any]:
    """Inductor's captures wait for ours."""
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    lock: AbstractContextManager[Any] = getattr(trees, "graph_capture_lock", None) or nullcontext()
    return lock


def failure(error: Exception) -> str:
    """The reason in one line; lets go of the tensors in the frames of the failed call."""
    traceback.clear_frames(error.__traceback__)
    first = (str(error).strip().splitlines() or [""])[0]
    return f"the capture failed with {type(error).__name__}: {first}"


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
