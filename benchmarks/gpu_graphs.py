"""Part 6 of the GPU suite: what graphs cost, and that they neither leak nor wait for the host.

`graphs`: per model, capture time and memory, equality with the eager engine, and a steady loop
under ``torch.cuda.set_sync_debug_mode("error")``, which raises where the host waits for the device.
`cold_start`: a fresh process up to its first image. `cycles`: flush and capture again, 500 times.
On a CPU all of it runs, without graphs; what only graphs have is None.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from gpu_curve import NO_GRAPHS
from gpu_models import Backbone
from gpu_runs import Loop, make_engine, make_plan
from torch import Tensor

from thg_engine import THG, Engine

CYCLES, SETTLED = 500, 50
"""Flushes, and those of them after which memory may no longer grow."""
SLACK = 2 * 2**20
"""Bytes of growth that are none: the allocator's granularity."""
STEADY_ROWS = 8
COLD = Path(__file__).with_name("gpu_worker.py")


@torch.no_grad()
def graphs(backbone: Backbone) -> dict[str, Any]:
    """Capture, memory, equality and host syncs of one model; see the module."""
    cuda = backbone.device != "cpu"
    plan = make_plan(backbone, THG(grid=2), min(backbone.steps, STEADY_ROWS))
    graphed = Loop(backbone, make_engine(backbone, graph=True))
    eager = Loop(backbone, make_engine(backbone, graph=False))
    expected = eager(plan)  # kernels load before the capture is timed
    if cuda:
        torch.cuda.synchronize()
    before = torch.cuda.memory_reserved() if cuda else 0
    begin = time.perf_counter()
    graphed.warm_up(plan)
    warm_up_s = time.perf_counter() - begin
    stats = graphed.engine.stats()
    captured = bool(stats["captures"])
    found = {
        "warm_up_s": warm_up_s,
        "capture_s": stats["capture_seconds"] if captured else None,
        "pool_bytes": stats["pool_bytes"] if captured else None,
        "reserved_bytes": torch.cuda.memory_reserved() - before if cuda else None,
        "reason": "" if captured else "; ".join(stats["refusals"]) or NO_GRAPHS,
    }
    value = graphed(plan)
    distance = (value.double() - expected.double()).norm() / expected.double().norm()
    found["difference"] = float(distance)
    found["host_syncs"], found["sync_reason"] = host_syncs(graphed, plan, cuda)
    found["stats"] = graphed.engine.stats()
    graphed.engine.flush()
    return found


def host_syncs(loop: Loop, plan: Any, cuda: bool) -> tuple[int | None, str]:
    """Waits of the host in the rows behind the first: 0, or 1 and where it raised."""
    run = loop.engine.begin(loop.noise(plan), loop.cond, loop.uncond, plan)
    try:
        loop.engine.step(run)
        try:
            with _syncs_raise(cuda):
                while not run.done:
                    loop.engine.step(run)
        except RuntimeError as error:
            return 1, str(error).splitlines()[0]
    finally:
        run.release()
    return (0, "") if cuda else (None, "host syncs need a CUDA device")


@contextmanager
def _syncs_raise(cuda: bool) -> Iterator[None]:
    if not cuda:
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class SmallNet(torch.nn.Module):
    """A denoiser with what graphs trip over: cuBLAS and cuDNN workspaces, allocations."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(4, 32, 3, padding=1, device=device)
        self.mix = torch.nn.Linear(32, 32, device=device)
        self.last = torch.nn.Conv2d(32, 4, 3, padding=1, device=device)

    def forward(self, x: Tensor, timestep: Tensor, cond: Tensor) -> Tensor:
        """The prediction."""
        hidden = self.first(x) + timestep.view(-1, 1, 1, 1) / 1000
        hidden = self.mix(hidden.movedim(1, -1)).movedim(-1, 1)
        return self.last(torch.tanh(hidden) + cond.view(-1, 1, 1, 1))


def memory(cuda: bool) -> dict[str, int]:
    """Bytes held now: by the process on the host, by torch and by anyone on the device."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    found = {"host": pages * os.sysconf("SC_PAGE_SIZE")}
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        found["reserved"], found["device"] = torch.cuda.memory_reserved(), total - free
    return found


@torch.no_grad()
def cycles(backbone: Backbone, count: int = CYCLES) -> dict[str, Any]:
    """Capture, run, flush, ``count`` times, on a small network; growth behind the first few."""
    cuda = backbone.device != "cpu"
    torch.manual_seed(0)
    net = SmallNet(backbone.device).requires_grad_(False)
    engine = Engine(net, graph=True)
    plan = make_plan(backbone, THG(grid=2), 4)
    x = torch.randn(1, 4, 16, 16).to(backbone.device)
    cond, uncond = (torch.full((1, 1), value, device=backbone.device) for value in (1.0, 0.0))
    first, settled = None, {}
    gc.collect()
    gc.freeze()  # a capture collects garbage: what is here already need not be searched each time
    begin = time.perf_counter()
    for cycle in range(count):
        if cycle == min(SETTLED, count // 2):
            settled = memory(cuda)
        engine.warm_up(x, cond, uncond, plan)
        value = engine.sample(x, cond, uncond, plan)
        first = value if first is None else first
        engine.flush()
    seconds = time.perf_counter() - begin
    gc.unfreeze()
    growth = {name: value - settled[name] for name, value in memory(cuda).items()}
    captures = engine.stats()["captures"]
    return {
        "cycles": count,
        "captures": captures,
        "seconds": seconds,
        "growth_bytes": growth if cuda else {"host": growth["host"]},
        "same_result": bool(torch.equal(value, first)),
        "reason": "" if captures else NO_GRAPHS,
    }


def cold_start(device: str, smoke: bool) -> dict[str, Any]:
    """Seconds from starting Python to the first image of SD 1.5, and of the second image."""
    command = [sys.executable, str(COLD), "--cold", "--device", device, *["--smoke"] * smoke]
    begin = time.time()
    done = subprocess.run(
        [*command, "--begin", repr(begin)], capture_output=True, text=True, timeout=180
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no output"]
        raise RuntimeError(f"exit code {done.returncode}: {lines[-1]}")
    return {name: float(value) for name, value in map(str.split, done.stdout.splitlines()[-4:])}


def report_cold_start(begin: float, device: str, smoke: bool) -> None:
    """What the fresh process does and prints: seconds since ``begin`` (Unix time)."""
    print("imports_s", time.time() - begin)
    backbone = Backbone.make("sd15", device, smoke)
    print("model_s", time.time() - begin)
    loop = Loop(backbone, make_engine(backbone))
    plan = make_plan(backbone, THG(nfe=0.7), backbone.steps)
    loop(plan).cpu()
    end = time.time()
    print("first_image_s", end - begin)
    loop(plan).cpu()
    print("second_image_s", time.time() - end)
