"""One process of the GPU suite: the parts of one model, so that memory is clean and a crash is its.

python benchmarks/gpu_worker.py --model sd15 --store FILE.json --parts curve runs graphs
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_curve import curve
from gpu_graphs import cycles, graphs, report_cold_start
from gpu_models import SPECS, Backbone
from gpu_runs import end_to_end
from gpu_store import Store

PARTS = ("curve", "runs", "graphs")


def work(backbone: Backbone, part: str, scale: float) -> Callable[[], dict[str, Any]]:
    """What a part runs; ``scale`` stretches its time budget."""
    seconds = [0.0 if backbone.smoke else scale * value for value in backbone.spec.seconds]
    return {
        "curve": partial(curve, backbone, seconds[0]),
        "runs": partial(end_to_end, backbone, seconds[1]),
        "graphs": partial(graphs, backbone),
        "cycles": partial(cycles, backbone),
    }[part]


def label(model: str, part: str) -> str:
    """The name of a part in the store."""
    return f"{model}/{part}" if part in PARTS else part


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--model", choices=SPECS)
    add("--parts", nargs="+", choices=(*PARTS, "cycles"), default=PARTS)
    add("--store", type=Path, metavar="FILE.json")
    add("--device", default="cuda")
    add("--smoke", action="store_true", help="the tiny model")
    add("--scale", type=float, default=1.0, help="of the time budgets")
    add("--cold", action="store_true", help="print the seconds of a cold start, no more")
    add("--begin", type=float, help="Unix time at which this process was started")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.cold:
        with torch.no_grad():
            report_cold_start(options.begin, options.device, options.smoke)
        return 0
    backbone = Backbone.make(options.model, options.device, options.smoke)
    store = Store(options.store)
    failures = 0
    for part in options.parts:
        result = store.run(label(options.model, part), work(backbone, part, options.scale))
        failures += bool(result["failure"])
        gc.collect()
        if options.device != "cpu":
            torch.cuda.empty_cache()  # of graphs and shapes that the next part does not have
    return int(failures > 0)


if __name__ == "__main__":
    raise SystemExit(main())
