"""Part 4 of the GPU suite, the c2 curve: time of the denoiser over the batch, per way to run it.

c2 is the time of a batch of 2 over that of a batch of 1: what leaving out the unconditional branch
can save at most. Ways: eager; compiled, regional torch.compile; graphed, a CUDA graph of the eager
call; both together. All points take turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from gpu_models import Backbone
from gpu_timing import Samples, Subject, capture, first_line, repeat, run_rounds

MODES = ("eager", "compiled", "graphed", "compiled+graphed")
BATCHES = (1, 2, 4, 8)
SLOW = 0.2
"""Seconds of a batch of 2 from which launches no longer matter and large batches run eager only."""
SAMPLE = 0.1
"""Seconds of calls that make one sample; short calls are repeated."""
NO_GRAPHS = "CUDA graphs need a CUDA device"

Point = tuple[str, int]


def seconds_of(call: Callable[[], Any], device: str) -> float:
    """Wall time of one call to its end."""
    begin = time.perf_counter()
    call()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


class Calls:
    """The denoiser, ready to be called at given batches in given modes."""

    def __init__(self, backbone: Backbone, sample: float = SAMPLE) -> None:
        self.backbone, self.sample = backbone, 0.0 if backbone.smoke else sample
        self.subjects: dict[Point, Subject] = {}
        self.times: dict[Point, int] = {}
        self.reasons: dict[Point, str] = {}
        self.slow = False
        cuda = backbone.device != "cpu"
        self._place = (torch.cuda.Stream(), torch.cuda.graph_pool_handle()) if cuda else None

    def add(self, mode: str, batches: Iterable[int]) -> None:
        """Warm up or capture; what fails has its reason in ``reasons``."""
        graphed = mode.endswith("graphed")
        # The first shape that is compiled is static, so the pair of c2 comes first; of graphs the
        # largest does, whose pool the others then fit into.
        first = () if graphed else (2, 1)
        rest = [batch for batch in batches if batch not in first]
        for batch in (*first, *sorted(rest, reverse=graphed)):
            try:
                self._add(mode, batch, graphed)
            except Exception as error:  # compilers and captures raise anything; it costs a point
                self.reasons[mode, batch] = first_line(error)

    def _add(self, mode: str, batch: int, graphed: bool) -> None:
        backbone, point = self.backbone, (mode, batch)
        if graphed and self._place is None:
            self.reasons[point] = NO_GRAPHS
            return
        if self.slow and batch > 2 and mode != "eager":
            self.reasons[point] = f"a batch of 2 takes more than {SLOW:g} s: eager only"
            return
        prepare = partial(backbone.set_compiled, mode.startswith("compiled"))
        prepare()
        call: Callable[[], Any] = partial(backbone, *backbone.call_inputs(batch))
        if graphed:
            call = capture(call, *self._place).replay
        once = seconds_of(call, backbone.device)  # loads, compiles, allocates
        if not self.slow:
            once = seconds_of(call, backbone.device)
        if point == ("eager", 2):
            self.slow = once > SLOW
        self.times[point] = max(1, min(20, int(self.sample / once)))
        self.subjects[point] = Subject(repeat(call, self.times[point]), prepare)

    def milliseconds(self, point: Point, samples: Samples) -> float:
        """Median time of one call."""
        return 1e3 * samples.seconds / self.times[point]


@torch.no_grad()
def curve(backbone: Backbone, seconds: float) -> dict[str, Any]:
    """Every mode at every batch, in turns for ``seconds``, with c2 per mode."""
    calls = Calls(backbone)
    for mode in MODES:
        calls.add(mode, BATCHES)
    found = run_rounds(calls.subjects, backbone.device, seconds, min_rounds=1 if calls.slow else 3)
    points = []
    for mode in MODES:
        for batch in BATCHES:
            point = (mode, batch)
            row: dict[str, Any] = {"mode": mode, "batch": batch, "ms": None, "iqr_ms": None}
            row["reason"] = calls.reasons.get(point, "")
            if point in found:
                spread = found[point].spread("gpu_s" if backbone.device != "cpu" else "wall_s")
                row["ms"] = calls.milliseconds(point, found[point])
                row["iqr_ms"] = None if spread is None else 1e3 * spread / calls.times[point]
                row["rounds"] = found[point].rounds
            points.append(row)
    return {"points": points, "c2": {mode: c2_of(points, mode) for mode in MODES}}


def c2_of(points: Iterable[dict[str, Any]], mode: str) -> float | None:
    """Time of a batch of 2 over that of a batch of 1; None where one of them is missing."""
    ms = {point["batch"]: point["ms"] for point in points if point["mode"] == mode}
    return ms[2] / ms[1] if ms.get(1) and ms.get(2) else None


def ideal_speedup(c2: float, h: float) -> float:
    """c2 / (h c2 + 1 - h): what a loop gains that evaluates both branches in a share h of rows."""
    return c2 / (h * c2 + 1 - h)
