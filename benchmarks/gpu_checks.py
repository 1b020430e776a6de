"""Parts 1 to 3 of the GPU suite: the tests on a GPU, compute-sanitizer, and the kernel table.

Each is a program of its own in a process of its own; what it prints is read, what it lacks is said.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SKIPPED = "the kernel tests were skipped (--skip-tests)"
TOOLS = ("memcheck", "racecheck")
SANITIZED = "tests/kernels/test_step_update.py"
HUGE = "two_to_the_31"
"""Part of the name of a test that takes minutes under the sanitizer and would find nothing more."""
CASES = tuple(f"{s}/{kind}" for s in ("dpmpp_2m", "flow_euler") for kind in ("cfg", "thg-held"))
LIMITS = {"tests": 150, "sanitizer": 60, "kernels": 120}
"""Seconds after which a program is stopped."""


def run(
    command: Sequence[str], limit: float, env: Mapping[str, str] | None = None
) -> tuple[int | None, str]:
    """Exit code and output; None where it was stopped after ``limit`` seconds."""
    try:
        done = subprocess.run(
            command,
            **{"cwd": ROOT, "capture_output": True, "text": True, "timeout": limit},
            env={**os.environ, **(env or {})},
        )
    except subprocess.TimeoutExpired:
        return None, f"stopped after {limit:g} s"
    return done.returncode, done.stdout + done.stderr


def last_line(output: str) -> str:
    lines = output.strip().splitlines()
    return lines[-1][:300] if lines else "no output"


def gpu_tests() -> dict[str, Any]:
    """``pytest -m gpu``: how many passed, failed, were skipped; ``passed`` is the verdict."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "tests.xml")
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", f"--junitxml={report}"]
        code, output = run(command, LIMITS["tests"])
        if not report.exists():
            raise RuntimeError(f"pytest exits with {code}: {last_line(output)}")
        found = read_junit(report)
    return {**found, "exit_code": code, "passed": code == 0 and found["ran"] > 0}


def read_junit(path: Path) -> dict[str, Any]:
    """Counts, names of what failed, and the commonest reason of what was skipped."""
    cases = list(ElementTree.parse(path).iter("testcase"))
    failed = [case.get("name") for case in cases if {"failure", "error"} & {c.tag for c in case}]
    reasons = [skip.get("message", "") for case in cases for skip in case.iter("skipped")]
    commonest = max(reasons, key=reasons.count) if reasons else ""
    ran = len(cases) - len(reasons)
    counts = {"tests": len(cases), "ran": ran, "skipped": len(reasons)}
    return {**counts, "failed": failed, "skip_reason": commonest}


def sanitizer(device: str) -> dict[str, Any]:
    """compute-sanitizer's memcheck and racecheck on the tests of the kernel."""
    reason = ""
    if device == "cpu":
        reason = "needs a CUDA device"
    elif shutil.which("compute-sanitizer") is None:
        reason = "compute-sanitizer is not on PATH (it comes with the CUDA toolkit)"
    if reason:
        return {"tools": {tool: {"clean": None, "reason": reason} for tool in TOOLS}}
    return {"tools": {tool: sanitize(tool) for tool in TOOLS}}


def sanitize(tool: str) -> dict[str, Any]:
    """One tool; ``clean`` is None where it came to no verdict."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "77"]
    command += ["--target-processes", "all", sys.executable, "-m", "pytest", "-q", "-x", SANITIZED]
    command += ["-m", "gpu", "-k", f"not {HUGE}", "-p", "no:cacheprovider"]
    # With torch's caching an access behind a tensor still lies within the cached block.
    code, output = run(command, LIMITS["sanitizer"], {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    summary = [line for line in output.splitlines() if "SUMMARY" in line]
    what = (summary or [last_line(output)])[-1].strip("= ")
    if code in (0, 77):
        return {"clean": code == 0, "reason": "" if code == 0 else what, "summary": what}
    return {"clean": None, "reason": f"no verdict, exit code {code}: {what}"}


def kernels(device: str, smoke: bool, tests_passed: bool | None) -> dict[str, Any]:
    """`bench_step_update`; its speed-ups stand if part 1 passed, whose tests include its own."""
    from step_report import add_speedups, goals, summarise

    program = str(Path(__file__).with_name("bench_step_update.py"))
    size = ["--quick", "--sizes", "tiny", "--seconds", "0.01"]
    if not smoke:
        # Energy takes a second per row: half of the cases, the two sizes that goals speak of.
        size = ["--sizes", "sd15", "video-2m", "--seconds", "0.05", "--cases", *CASES]
        size += ["--providers", "diffusers", "triton", "cuda"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "step_update.json")
        command = [sys.executable, program, "--device", device, "--skip-tests", *size]
        code, output = run([*command, "--json", str(path)], LIMITS["kernels"])
        if not path.exists():
            raise RuntimeError(f"exit code {code}: {last_line(output)}")
        found = json.loads(path.read_text(encoding="utf-8"))
    refusal = found["refusal"]
    if refusal == SKIPPED:
        refusal = "" if tests_passed else "the tests on the GPU have not passed"
    add_speedups(found["rows"], refusal)
    return {
        **{"refusal": refusal, "left_out": found["left_out"], "rows": found["rows"]},
        "launch_ms": found["machine"].get("launch_ms"),
        "summary": summarise(found["rows"]),
        "goals": goals(found["rows"], found["machine"]),
    }
