"""How the GPU suite times whole runs: rounds in turns, with energy, memory and the denoiser's part.

One round runs every subject once, so that a changed clock or a busy neighbour meets all of them;
medians and interquartile ranges are over rounds. Per run:
- ``gpu_s``: between two CUDA events, one ahead of the run and one behind it: idle gaps count. None
  on a CPU.
- ``wall_s``: from the call to the end of all its work.
- ``host_s``: from the call to its return, ahead of the wait for the device. An upper bound on what
  the host has to do, where the launch queue fills up or the loop reads a device value.
- ``denoiser_s``: the calls of the denoiser that Python makes, between events around each of them
  (on a CPU by the clock). A replayed graph makes none.
- ``joules``: NVML's counter of the whole board, idle power included.
- ``peak_bytes``: most memory allocated at once in the process, weights and graphs included.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

MAX_ROUNDS = 20


def first_line(error: BaseException) -> str:
    """An error in one line, as reasons are stored."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


class EnergyMeter:
    """NVML's energy counter of one device, or the reason why there is none."""

    def __init__(self, device: str) -> None:
        self.handle: Any = None
        self.reason = ""
        if device == "cpu":
            self.reason = "energy is read from a GPU's counter"
            return
        try:
            import pynvml

            pynvml.nvmlInit()
            # By UUID: NVML does not renumber devices as CUDA_VISIBLE_DEVICES does.
            uuid = str(torch.cuda.get_device_properties(device).uuid)
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
            self.handle, self._read = handle, pynvml.nvmlDeviceGetTotalEnergyConsumption
        except Exception as error:  # no package, no driver, no counter: it costs a column
            self.reason = first_line(error)

    def joules(self) -> float | None:
        """The counter now; differences count."""
        return None if self.handle is None else 1e-3 * self._read(self.handle)


class Watch:
    """Times the calls of a denoiser: those `around` a callable, or, entered, those of a module.

    Hooks are on the module only while a run is timed that needs them: an engine captures no graph
    of a module with hooks.
    """

    def __init__(self, device: str, module: torch.nn.Module | None = None) -> None:
        self.device, self.module = device, module
        self.marks: list[Any] = []
        self._handles: list[Any] = []

    def mark(self, *_: Any) -> None:
        """Before and after a call; nothing while a graph is captured, which could not hold it."""
        if self.device == "cpu":
            self.marks.append(time.perf_counter())
        elif not torch.cuda.is_current_stream_capturing():
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)

    def __enter__(self) -> Watch:
        self.marks.clear()  # of calls that were not this run's
        if self.module is not None:
            before = self.module.register_forward_pre_hook(self.mark)
            self._handles = [before, self.module.register_forward_hook(self.mark)]
        return self

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call``, watched."""

        def watched(*given: Any) -> Any:
            self.mark()
            result = call(*given)
            self.mark()
            return result

        return watched

    def take(self) -> tuple[float, int]:
        """Seconds and number of the calls since the last time; after a synchronize."""
        pairs = list(zip(self.marks[::2], self.marks[1::2], strict=True))
        self.marks = []
        if self.device == "cpu":
            return sum(end - start for start, end in pairs), len(pairs)
        return 1e-3 * sum(start.elapsed_time(end) for start, end in pairs), len(pairs)


@dataclass
class Subject:
    """Something that is run once per round.

    Attributes:
        run: the work; returns what `check` may look at.
        prepare: brings the model into the state that the run needs; not timed.
        watch: sees the denoiser's calls; None where there is nothing to see.
    """

    run: Callable[[], Any]
    prepare: Callable[[], None] = lambda: None
    watch: Watch | None = None


@dataclass
class Samples:
    """What the rounds of one subject gave."""

    columns: dict[str, list[float]] = field(default_factory=dict)
    calls: int = 0
    peak_bytes: int | None = None

    def add(self, **values: float | None) -> None:
        """One round; None is left out."""
        for name, value in values.items():
            if value is not None:
                self.columns.setdefault(name, []).append(value)

    def median(self, name: str) -> float | None:
        """None if it was never measured."""
        values = self.columns.get(name)
        return median(values) if values else None

    def mean(self, name: str) -> float | None:
        """For energy, whose counter moves in coarse steps: the sum over rounds is what counts."""
        values = self.columns.get(name)
        return sum(values) / len(values) if values else None

    def spread(self, name: str) -> float | None:
        """Interquartile range; None with fewer than three rounds."""
        values = self.columns.get(name, [])
        if len(values) < 3:
            return None
        points = torch.tensor([0.25, 0.75], dtype=torch.float64)
        low, high = torch.tensor(values, dtype=torch.float64).quantile(points).tolist()
        return high - low

    @property
    def seconds(self) -> float:
        """Median of the device's time, of wall time on a CPU."""
        value = self.median("gpu_s")
        value = self.median("wall_s") if value is None else value
        return float("nan") if value is None else value

    @property
    def rounds(self) -> int:
        """Rounds that were timed."""
        return len(self.columns.get("wall_s", []))


def run_once(subject: Subject, device: str, meter: EnergyMeter, samples: Samples) -> Any:
    """One timed run; adds to ``samples`` and returns what the run returned."""
    subject.prepare()
    cuda = device != "cpu"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before, begin = meter.joules(), time.perf_counter()
    with subject.watch or nullcontext():
        if cuda:
            start.record()
        result = subject.run()
        host = time.perf_counter() - begin
        if cuda:
            end.record()
            torch.cuda.synchronize()
        wall, after = time.perf_counter() - begin, meter.joules()
    samples.add(
        wall_s=wall,
        host_s=host,
        gpu_s=1e-3 * start.elapsed_time(end) if cuda else None,
        joules=None if before is None or after is None else after - before,
    )
    if subject.watch is not None:
        seconds, samples.calls = subject.watch.take()
        samples.add(denoiser_s=seconds if samples.calls else None)
    if cuda:
        samples.peak_bytes = max(samples.peak_bytes or 0, torch.cuda.max_memory_allocated())
    return result


def run_rounds(
    subjects: Mapping[str, Subject],
    device: str,
    seconds: float,
    min_rounds: int = 1,
    max_rounds: int = MAX_ROUNDS,
) -> dict[str, Samples]:
    """Rounds until the next one would not fit into ``seconds``, at least ``min_rounds``."""
    meter = EnergyMeter(device)
    found = {name: Samples() for name in subjects}
    begin, longest, rounds = time.perf_counter(), 0.0, 0
    while rounds < min_rounds or (
        rounds < max_rounds and time.perf_counter() - begin + longest < seconds
    ):
        started = time.perf_counter()
        for name, subject in subjects.items():
            run_once(subject, device, meter, found[name])
        longest = max(longest, time.perf_counter() - started)
        rounds += 1
    return found


def repeat(call: Callable[[], Any], times: int) -> Callable[[], None]:
    """``times`` calls in a row."""

    def run() -> None:
        for _ in range(times):
            call()

    return run


def capture(call: Callable[[], Any], stream: Any, pool: Any) -> torch.cuda.CUDAGraph:
    """A graph of ``call``. Graphs that share stream and pool must not run at the same time."""
    before = torch.cuda.current_stream()
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        call()  # what is loaded and chosen at the first call must not be in the graph
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            call()
    finally:
        torch.cuda.set_stream(before)  # a capture that fails leaves the thread on its own
    return graph
