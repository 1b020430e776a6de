"""The GPU suite: tests, sanitizer, kernels, c2 curves, whole runs, graphs; for ten minutes.

    make gpu                    # an H100 or another CUDA device, into benchmarks/results/
    make gpu SMOKE=1            # tiny models on any machine, into bench-out/

Parts: ``tests``, ``sanitizer``, ``kernels`` (`gpu_checks`); per model ``curve`` (`gpu_curve`),
``runs`` (`gpu_runs`), ``graphs`` (`gpu_graphs`), in one process per model; ``cycles`` and
``cold_start`` (`gpu_graphs`). Each is stored when it is done; run again, the suite skips what is
there and tries again what failed; --again runs all that is asked for anew. What cannot be measured
is None and has a reason. Models have random weights (`gpu_models`), nothing is downloaded. The exit
code is 1 if a part failed or found a fault.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from gpu_checks import gpu_tests, kernels, sanitizer
from gpu_graphs import cold_start
from gpu_models import SPECS
from gpu_report import faults, goals, markdown, print_report
from gpu_store import Store
from gpu_worker import PARTS, label
from measure import machine
from rich.console import Console
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
WORKER_LIMIT = 300
"""Seconds after which the process of one model is stopped."""
FIRST = ("tests", "sanitizer", "kernels")
LAST = ("cycles", "cold_start")


def default_out(device: str, smoke: bool) -> Path:
    """``benchmarks/results/<gpu>-<date>.json``; of a smoke run ``bench-out/gpu-smoke.json``."""
    if smoke:
        return ROOT / "bench-out" / "gpu-smoke.json"
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    return HERE / "results" / f"{name}-{machine()['date']}.json"


def tests_passed(store: Store) -> bool | None:
    """Verdict of part 1; None before it has run."""
    found = store.get("tests")
    return None if found is None or found["failure"] else found["passed"]


def run_worker(store: Store, model: str, parts: Sequence[str], options: argparse.Namespace) -> None:
    """The parts of one model in a process of its own; those that it does not store have failed."""
    tiny = options.smoke or list(parts) == ["cycles"]  # which brings a network of its own
    command = [sys.executable, str(HERE / "gpu_worker.py"), "--model", model]
    command += ["--store", str(store.path), "--device", options.device]
    command += ["--scale", str(options.scale), *["--smoke"] * tiny, "--parts", *parts]
    begin = time.perf_counter()
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=WORKER_LIMIT * max(1.0, options.scale)
        )
        lines = done.stderr.strip().splitlines() or ["no output"]
        failure = f"the process ended with {done.returncode}: {lines[-1][:300]}"
    except subprocess.TimeoutExpired as error:
        failure = f"stopped after {error.timeout:g} s"
    seconds = time.perf_counter() - begin
    for part in parts:
        if store.get(label(model, part)) is None:
            store.put(label(model, part), {"failure": failure, "seconds": seconds})


def run_part(store: Store, part: str, options: argparse.Namespace) -> None:
    """One part that belongs to no model."""
    device, smoke = options.device, options.smoke
    if part == "cycles":
        run_worker(store, "sd15", [part], options)
        return
    work = {
        "tests": gpu_tests,
        "sanitizer": lambda: sanitizer(device),
        "kernels": lambda: kernels(device, smoke, tests_passed(store)),
        "cold_start": lambda: cold_start(device, smoke),
    }[part]
    store.run(part, work)


def jobs(options: argparse.Namespace) -> list[tuple[str, list[str]]]:
    """(model, its parts), or ("", [part]) of a part that is no model's, in the order of the run."""
    found = [("", [part]) for part in FIRST]
    found += [(model, list(PARTS)) for model in options.models]
    found += [("", [part]) for part in LAST]
    asked = [(model, [p for p in parts if p in options.parts]) for model, parts in found]
    return [(model, parts) for model, parts in asked if parts]


def run_suite(store: Store, options: argparse.Namespace, console: Console) -> None:
    """All parts that are asked for and not there yet, each stored as it ends."""
    for model, parts in tqdm(jobs(options), unit="job", disable=not console.is_terminal):
        wanted = [p for p in parts if options.again or not store.done(label(model, p))]
        for part in wanted:
            store.forget(label(model, part))  # of an earlier run
        if wanted and model:
            run_worker(store, model, wanted, options)
        elif wanted:
            run_part(store, wanted[0], options)
        for name in (label(model, part) for part in wanted):
            found = store.get(name) or {}
            line = f"{name}: {found['seconds']:.1f} s {found['failure']}"
            console.print(line, style="dim", highlight=False, markup=False)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--smoke", action="store_true", help="tiny models, on the CPU unless --device says else")
    add("--device", help="default: cuda; with --smoke cpu")
    add("--out", type=Path, metavar="FILE.json", help="the page is written beside it")
    add("--again", action="store_true", help="run what is asked for, stored or not")
    add("--models", nargs="+", choices=SPECS, default=list(SPECS), metavar="MODEL")
    every = [*FIRST, *PARTS, *LAST]
    add("--parts", nargs="+", choices=every, default=every, metavar="PART", help=", ".join(every))
    add("--scale", type=float, default=1.0, help="of the time budgets (default 1)")
    options = parser.parse_args(arguments)
    options.device = options.device or ("cpu" if options.smoke else "cuda")
    if options.device != "cpu" and not torch.cuda.is_available():
        parser.error("no CUDA device is available; SMOKE=1 (--smoke) runs on a CPU")
    if options.device == "cpu" and not options.smoke:
        parser.error("these models are too large for a CPU: give --smoke")
    options.out = options.out or default_out(options.device, options.smoke)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options, console = parse(arguments), Console()
    if not console.is_terminal:
        console = Console(width=140)  # a log has no width to fit into
    store = Store(options.out)
    begin = time.perf_counter()
    store.update(machine=machine(), smoke=options.smoke, device=options.device)
    store.update(method=" ".join((__doc__ or "").split()))
    run_suite(store, options, console)
    store.update(goals=goals(store.read()))
    found = store.read()
    store.path.with_suffix(".md").write_text(markdown(found), encoding="utf-8")
    print_report(found, console)
    console.print(f"{time.perf_counter() - begin:.0f} s; {store.path}", highlight=False)
    return int(bool(faults(found)))


if __name__ == "__main__":
    raise SystemExit(main())
