"""A CUDA of Python callables: streams, pools, and graphs that record operators and replay them.

Stands for `torch.cuda` where graphs are tested without a GPU. It keeps what makes graphs hard:

- What is captured does not run, and what it makes is garbage until the first replay.
- A replay runs the recorded operators on the recorded tensors and numbers: a number that the host
  has changed since is not seen.
- Reading a value on the host, random numbers and a second capture break a capture, as there.
- Memory is counted, stays reserved until it is emptied, and a failed capture loses its pool.

``fail`` names events ("capture_begin", "record", "capture_end", "replay", ...) and what they raise
at which occurrence.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS_ON_HOST = {"aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::is_nonzero"}
RANDOM = {"aten::randn", "aten::rand", "aten::normal_", "aten::uniform_", "aten::bernoulli_"}


class FakeCudaError(RuntimeError):
    """What the driver would say."""


@dataclass
class FakeStream:
    """A stream; work on it is done at once."""

    name: str
    waits: list[str] = field(default_factory=list)

    def wait_stream(self, other: FakeStream) -> None:
        self.waits.append(other.name)

    def wait_event(self, event: FakeEvent) -> None:
        self.waits.append(f"event on {event.stream.name}")

    def synchronize(self) -> None:
        pass


class FakeEvent:
    """Marks a place in a stream."""

    def record(self, stream: FakeStream) -> None:
        self.stream = stream


class _Recorder(TorchDispatchMode):
    """Records operators in place of running them."""

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self.cuda = cuda
        self.operators: list[tuple[Any, Any, Any, Any]] = []
        self.made: list[torch.Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._schema.name
        self.cuda.happens("record")
        if name in READS_ON_HOST:
            raise FakeCudaError("operation not permitted when stream is capturing")
        if name in RANDOM:
            raise FakeCudaError("random numbers are not captured here")
        if func._schema.is_mutable:
            self.operators.append((func, args, kwargs, None))
            returns = [a for a in args if isinstance(a, torch.Tensor)][:1]
            return returns[0] if func._schema.returns else None
        result = func(*args, **kwargs)
        if not _is_view(result, (args, kwargs)):
            self.operators.append((func, args, kwargs, result))
            self.made += [v for v in tree_leaves(result) if isinstance(v, torch.Tensor)]
        return result


def _is_view(result: Any, arguments: Any) -> bool:
    places = {
        value.untyped_storage().data_ptr()
        for value in tree_leaves(arguments)
        if isinstance(value, torch.Tensor)
    }
    made = [value for value in tree_leaves(result) if isinstance(value, torch.Tensor)]
    return bool(made) and all(value.untyped_storage().data_ptr() in places for value in made)


class FakeGraph:
    """A graph of recorded operators."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.pool, self.stream = cuda, None, None
        self._recorder: _Recorder | None = None
        self._operators: list[tuple[Any, Any, Any, Any]] | None = None
        cuda.graphs.append(self)

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        cuda = self.cuda
        cuda.happens("capture_begin")
        if cuda.capturing:
            raise FakeCudaError("another capture is in progress")
        if capture_error_mode != "thread_local":
            raise FakeCudaError("a capture of mode global breaks the captures of other threads")
        if cuda.current_stream() is cuda.default:
            raise FakeCudaError("the default stream cannot be captured")
        self.pool, self.stream = pool, cuda.current_stream()
        cuda.capturing = self
        self._recorder = _Recorder(cuda)
        self._recorder.__enter__()

    def capture_end(self) -> None:
        recorder, self._recorder = self._recorder, None
        if recorder is None:
            raise FakeCudaError("capture_end without capture_begin")
        recorder.__exit__(None, None, None)
        self.cuda.capturing = None
        self.cuda.happens("capture_end")
        self._operators = recorder.operators
        for value in recorder.made:
            if value.is_floating_point():
                value.fill_(torch.nan)
        self.cuda.reserve(self.pool, sum(v.nbytes for v in recorder.made))

    def replay(self) -> None:
        self.cuda.happens("replay")
        if self._operators is None:
            raise FakeCudaError("replay of a graph that was not captured, or was reset")
        with torch.no_grad():
            for func, args, kwargs, result in self._operators:
                found = func(*args, **kwargs)
                if result is not None:
                    pairs = zip(tree_leaves(result), tree_leaves(found), strict=True)
                    for old, new in pairs:
                        if isinstance(old, torch.Tensor):
                            old.copy_(new)

    def reset(self) -> None:
        self.cuda.happens("reset")
        self._operators = None
        self.cuda.resets += 1


class FakeCuda:
    """What `thg_engine.graphs` uses of `torch.cuda`.

    Args:
        free: bytes of the device.
        working_set: bytes that a step needs, noticed when it first runs on a stream.
    """

    def __init__(self, free: int = 1 << 30, working_set: int = 1 << 20) -> None:
        self.free, self.working_set = free, working_set
        self.default = FakeStream("default")
        self.graphs: list[FakeGraph] = []
        self.streams: list[FakeStream] = []
        self.capturing: FakeGraph | None = None
        self.resets = self.pools = 0
        self.counts: Counter[str] = Counter()
        self.fail: dict[tuple[str, int], BaseException] = {}
        self.on: dict[str, Callable[[], None]] = {}
        self._reserved: dict[Any, int] = {}
        self._cached = 0
        self._local = threading.local()

    # -- events ----------------------------------------------------------------------------------

    def happens(self, event: str) -> None:
        """Count an event; raise what was asked for at this occurrence."""
        self.counts[event] += 1
        if event in self.on:
            self.on[event]()
        error = self.fail.get((event, self.counts[event]))
        if error is not None:
            raise error

    def reserve(self, pool: Any, num_bytes: int) -> None:
        self._reserved[pool] = self._reserved.get(pool, 0) + num_bytes

    # -- torch.cuda ------------------------------------------------------------------------------

    def is_available(self) -> bool:
        return True

    def is_current_stream_capturing(self) -> bool:
        return self.capturing is not None and self.capturing.stream is self.current_stream()

    def Stream(self, device: Any = None) -> FakeStream:  # noqa: N802
        self.streams.append(FakeStream(f"stream {len(self.streams)}"))
        return self.streams[-1]

    def Event(self) -> FakeEvent:  # noqa: N802
        return FakeEvent()

    def CUDAGraph(self) -> FakeGraph:  # noqa: N802
        return FakeGraph(self)

    def graph_pool_handle(self) -> tuple[int, int]:
        self.pools += 1
        return (0, self.pools)

    def current_stream(self, device: Any = None) -> FakeStream:
        return getattr(self._local, "stream", self.default)

    def set_stream(self, stream: FakeStream) -> None:
        self.happens("set_stream")
        self._local.stream = stream

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before = self.current_stream()
        self._local.stream = stream
        self._cached += self.working_set
        try:
            yield
        finally:
            self._local.stream = before

    @contextmanager
    def device(self, device: Any) -> Iterator[None]:
        yield

    def synchronize(self, device: Any = None) -> None:
        self.happens("synchronize")
        if self.capturing is not None:  # in whichever thread
            raise FakeCudaError("synchronize while capturing")

    def empty_cache(self) -> None:
        if self.capturing is not None:
            raise FakeCudaError("empty_cache while capturing")
        self._cached = 0
        held = {graph.pool for graph in self.graphs if graph._operators is not None}
        self._reserved = {pool: n for pool, n in self._reserved.items() if pool in held}

    def memory_reserved(self, device: Any = None) -> int:
        return self._cached + sum(self._reserved.values())

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return self.free - self.memory_reserved(), self.free


class OnFakeCuda:
    """Makes tensors of the CPU pass for those of a device: `GraphCache` asks ``device.type``."""

    type = "cuda"

    def __str__(self) -> str:
        return "cuda:fake"


def on_fake_cuda(engine: Any, cuda: FakeCuda) -> Any:
    """An engine whose graphs run on ``cuda``, over tensors of the CPU."""
    cache = engine._graphs
    cache.cuda = cuda
    acquire = cache.acquire
    cache.acquire = lambda signature, fingerprint, device, build, **kwargs: acquire(
        signature, fingerprint, OnFakeCuda(), build, **kwargs
    )
    return engine
