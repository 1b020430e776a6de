"""How `bench_step_update` measures: turns, launches, energy, and the machine that stands beside it.

Time. The subjects of one case, copy included, take turns until the time is up, so that a busy
neighbour or a changed clock meets all of them. A turn is `ROWS` steps (fewer where they are slow)
behind a reset, which `torch.utils.benchmark.Timer` keeps out of the time as its set-up.
- CPU: wall time of a turn per step; median and interquartile range are over turns. Two steps run
  ahead of each turn, so what fits into a cache is in it.
- GPU: CUDA events around each step, behind a write of `FLUSH` bytes that empties the L2 cache and
  meanwhile lets the host run ahead; median and interquartile range are over steps. Where the host
  cannot keep up (a scheduler that reads a device value, say), its time is in. ``ms_wall``, from
  `Timer` as on the CPU, is what a step takes without the flush, Python included.

Launches. GPU: kernels, copies and fills that torch.profiler sees, per step. CPU: operators that
compute, per step: every aten or custom operator that reaches a `TorchDispatchMode`, without views,
allocations and reads of one number. torch.compile on a CPU: kernels that Inductor generated.

Energy. NVML's counter of the whole board over at least a second of steps and their resets (one in
`ROWS`); the idle power of the board is in it.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import Timer

from thg_engine.doctor import machine_line

ROWS = 30
"""Steps between two resets; no more than rows that a subject can run."""
MIN_TURNS = 5
FLUSH = 256 * 2**20
"""Bytes; the largest L2 of a GPU today is 128 MB."""


class Subject(Protocol):
    """What is timed."""

    def reset(self) -> None: ...
    def step(self) -> None: ...


class Copy:
    """``copy_`` of half as many bytes as a step moves, each read and written: equal traffic."""

    def __init__(self, num_bytes: int, device: str) -> None:
        self.source = torch.ones(max(1, num_bytes // 8), device=device)
        self.target = torch.empty_like(self.source)
        self.bytes = 2 * self.source.numel() * self.source.itemsize

    def reset(self) -> None:
        """Nothing moves on."""

    def step(self) -> None:
        """One copy."""
        self.target.copy_(self.source)


class Launch(Copy):
    """The smallest kernel there is: its time on a GPU is that of a launch."""

    def __init__(self, device: str) -> None:
        super().__init__(4, device)

    def step(self) -> None:
        """One element, one launch."""
        self.target.add_(1.0)


@dataclass
class Times:
    """Seconds per step of one subject."""

    values: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Columns of a result row."""
        low, median, high = _quartiles(self.values)
        return {
            "ms_median": 1e3 * median,
            "ms_iqr": 1e3 * (high - low),
            "ms_wall": 1e3 * _quartiles(self.wall)[1],
            "rounds": len(self.values),
        }


def _quartiles(values: Sequence[float]) -> list[float]:
    points = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    return torch.tensor(values, dtype=torch.float64).quantile(points).tolist()


def measure(
    subjects: Mapping[str, Subject], device: str, seconds: float
) -> dict[str, dict[str, Any]]:
    """Time the subjects in turns, ``seconds`` for each of them; see the module."""
    timers = {name: _timer(subject) for name, subject in subjects.items()}
    steps, times = {}, {name: Times() for name in subjects}
    for name, timer in timers.items():
        once = timer.timeit(2).median
        steps[name] = int(min(ROWS, max(1, seconds / MIN_TURNS / once)))
    flush = torch.empty(FLUSH, dtype=torch.int8, device=device) if device != "cpu" else None
    begin, turns = time.perf_counter(), 0
    while turns < MIN_TURNS or time.perf_counter() - begin < seconds * len(subjects):
        for name, subject in subjects.items():
            wall = timers[name].timeit(steps[name]).median
            times[name].wall.append(wall)
            if flush is None:
                times[name].values.append(wall)
            else:
                times[name].values += _events(subject, steps[name], flush)
        turns += 1
    return {name: found.summary() for name, found in times.items()}


def _timer(subject: Subject) -> Timer:
    """Set-up, here the reset, runs ahead of every `timeit` and is not timed."""
    threads = torch.get_num_threads()  # Timer takes one unless told
    names = {"subject": subject}
    return Timer("subject.step()", "subject.reset()", globals=names, num_threads=threads)


def _events(subject: Subject, steps: int, flush: torch.Tensor) -> list[float]:
    """Seconds on the GPU of each of ``steps`` steps with a cold L2 cache."""
    subject.reset()
    pairs = []
    for _ in range(steps):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        subject.step()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return [1e-3 * start.elapsed_time(end) for start, end in pairs]


class _Operators(TorchDispatchMode):
    """Counts operators that compute."""

    idle = ("empty", "_local_scalar_dense", "detach", "lift_fresh")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        self.count += not (func.is_view or name.startswith(self.idle))
        return func(*args, **(kwargs or {}))


def count_launches(subject: Subject, device: str, steps: int = 4) -> float:
    """Launches per step; see the module."""
    subject.reset()
    if device == "cpu":
        with _Operators() as operators:
            for _ in range(steps):
                subject.step()
        return operators.count / steps
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            subject.step()
        torch.cuda.synchronize()
    on_device = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not getattr(e, "is_user_annotation", False) for e in on_device) / steps


def joules_per_step(subject: Subject, device: str, seconds: float) -> tuple[float | None, str]:
    """Energy of the board per step, or None and the reason; see the module."""
    if device == "cpu":
        return None, "energy is read from a GPU's counter"
    try:
        import pynvml

        pynvml.nvmlInit()
        # By UUID: NVML does not renumber devices as CUDA_VISIBLE_DEVICES does.
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        before, steps = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle), 0
        begin = time.perf_counter()
        while time.perf_counter() - begin < max(1.0, seconds):
            subject.reset()
            for _ in range(ROWS):
                subject.step()
            torch.cuda.synchronize()
            steps += ROWS
        after = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception as error:  # no package, no driver, no counter: any of them only costs a column
        return None, f"{type(error).__name__}: {error}"
    return 1e-3 * (after - before) / steps, ""


@cache
def machine() -> dict[str, Any]:
    """What stands beside every number: hardware, versions, threads, date, and how busy it was."""
    found: dict[str, Any] = {"threads": torch.get_num_threads()}
    for name in ("torch", "triton", "diffusers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    found["omp_wait_policy"] = os.environ.get("OMP_WAIT_POLICY", "default")
    found["load_average"] = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    found["date"] = datetime.date.today().isoformat()
    details = [
        f"{found['threads']} threads, OMP_WAIT_POLICY {found['omp_wait_policy']}",
        f"triton {found['triton']}",
        f"load average {found['load_average']:.1f}" if found["load_average"] is not None else "",
        found["date"],
    ]
    found["line"] = "; ".join([machine_line(), *filter(None, details)])
    return found
