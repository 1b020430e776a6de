"""One sampling step, from model output to next model input: the fused step beside its baselines.

    python benchmarks/bench_step_update.py --json FILE     # table, FILE, a plot beside it
    python -m pytest benchmarks/bench_step_update.py --benchmark-only

Providers (`step_cases`): ``diffusers``, the code that pipelines run today, in their dtype;
``torch`` and ``compile``, the same row in plain float32 torch; ``triton``, ``cuda``, ``cpu``:
`step_update`.

``gbps`` counts *useful* bytes, those that the row has to move (`StepTable.bytes_per_element`), for
every provider: passes over memory that a provider adds lower its figure. ``copy_gbps`` is torch's
``copy_`` of as many bytes in the same turns. In a held case the bytes are those of the held row and
diffusers runs the classifier-free guidance which that row replaces.

A speed-up is stated only if every fused provider passes a check against float64 on the very case
and the kernel tests pass; otherwise the exit code is 1. How time, launches and energy are measured:
`measure`. Rows of JSON: provider, case, size, shape, elements, dtype, device, branches, nfe (both
of what the provider's step needs from the denoiser), bytes, ms_median, ms_iqr, ms_wall, rounds,
launches, gbps, copy_gbps, joules (None without a GPU's counter), speedup (None where refused).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

# The bound of the kernel tests, `step_rows`, is the bound here.
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "kernels"))

import pytest
import step_rows
import torch
from measure import ROWS, Copy, Launch, count_launches, joules_per_step, machine, measure
from rich.console import Console
from step_cases import (
    BEGIN,
    CASES,
    DTYPES,
    FUSED,
    PROVIDERS,
    SIZES,
    Case,
    FusedStep,
    Inputs,
    Provider,
    TorchStep,
    make,
    why_absent,
)
from step_report import add_speedups, goals, markdown, plot, print_report, summarise

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

ROOT = Path(__file__).resolve().parents[1]
KERNEL_TESTS = [
    str(path)
    for pattern in ("test_step_update*.py", "test_step_state.py", "test_native.py")
    for path in sorted((ROOT / "tests" / "kernels").glob(pattern))
]
PIECE = 1 << 18
"""Elements, at either end and in the middle of a latent, that are held to the elementwise bound."""


@dataclass
class Report:
    """What a run has found so far."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_dtype(device: str) -> str:
    return "fp32" if device == "cpu" else "fp16"


def prepare(provider: str, case: Case, inputs: Inputs) -> tuple[Provider | None, str]:
    """A provider that is ready to be timed, or None and why it is not."""
    try:
        subject = make(provider, case, inputs)
        subject.step()
        subject.reset()
        return subject, ""
    except Exception as error:  # compilers and kernels raise anything; it costs this row alone
        first = (str(error).strip().splitlines() or [""])[0]
        return None, f"{provider}, {case.name}, {case.size}: {type(error).__name__}: {first}"


def check(provider: str, case: Case, inputs: Inputs) -> str:
    """What is wrong with a fused provider on this very case; "" if nothing is.

    From the same registers, each of two rows is run by the provider, by torch in float32 and by the
    reference in float64. Each element of at most three pieces of `PIECE` elements, which is all of
    an image's latent, is held to the bound of `step_rows`: a few units in its own last place. Of
    a larger latent all elements are held to that of the largest one: twice torch's own error and
    one unit in its last place.
    """
    try:
        steps = (
            FusedStep(case, inputs, "reference", torch.float64),
            TorchStep(case, inputs),
            FusedStep(case, inputs, provider),
        )
        for row in (BEGIN, BEGIN + 1):
            for step in steps:
                step.reset(row)
            before = [piece.copy() for piece in _pieces(steps[-1], case)]
            for step in steps:
                step.step()
            fault = _largest_fault(*steps) or _fault_in_pieces(before, _pieces(steps[-1], case))
            if fault:
                return f"{provider}, {case.name}, {case.size}, row {row}: {fault}"
    except Exception as error:  # whatever a broken kernel raises
        return f"{provider}, {case.name}, {case.size}: {type(error).__name__}: {error}"
    return ""


def _largest_fault(wide: FusedStep, plain: TorchStep, fused: FusedStep) -> str:
    """Of all elements, by the size of the largest one; "" if there is none."""
    registers = (wide.state.registers, torch.stack(plain.registers), fused.state.registers)
    inputs_next = (wide.model_input, plain.model_input, fused.model_input)
    for what, values in (("registers", registers), ("model input", inputs_next)):
        exact, torchs, found = values
        ulp = torch.finfo(found.dtype).eps * float(exact.abs().max())
        error, bound = _error(found, exact), 2.0 * _error(torchs, exact) + ulp
        if not error <= bound:  # NaN is not
            return f"{what} off by {error:.3g}, more than {bound:.3g}"
    return ""


def _pieces(step: FusedStep, case: Case) -> list[step_rows.Call]:
    """The next call of ``step`` on parts of the latent: views, which show what the step writes."""
    call = step_rows.Call.of(step.state, step.output, step.outputs)
    ends = {min(PIECE, case.elements), case.elements // 2 + PIECE // 2, case.elements}
    pieces = []
    for end in sorted(end for end in ends if end <= case.elements):
        part = slice(max(0, end - PIECE), end)
        registers = call.registers.flatten(2)[..., part]
        output, model_input = call.model_output.flatten(1), call.model_input.flatten(1)
        values = {"model_output": output[:, part], "model_input": model_input[:, part]}
        pieces.append(replace(call, registers=registers, **values))
    return pieces


def _fault_in_pieces(before: Sequence[step_rows.Call], after: Sequence[step_rows.Call]) -> str:
    """Of any element, by its own size; "" if there is none."""
    try:
        for old, new in zip(before, after, strict=True):
            step_rows.check(old, new)
    except AssertionError as error:
        return str(error)
    return ""


def _error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return float((value.double() - exact.double()).abs().max())


def run_kernel_tests() -> str:
    """Why the tests of the kernel do not pass; "" if they do."""
    command = [sys.executable, "-m", "pytest", "-q", *KERNEL_TESTS]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    except subprocess.TimeoutExpired:
        return "the kernel tests take longer than 30 minutes"
    if done.returncode == 0:
        return ""
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["no output"]
    return f"the kernel tests exit with {done.returncode}: {lines[-1]}"


def time_case(case: Case, providers: Sequence[str], seconds: float, report: Report) -> None:
    """Check, then time all providers of one case; adds to ``report``."""
    inputs = Inputs.of(case)
    subjects: dict[str, Provider] = {}
    for provider in providers:
        failure = check(provider, case, inputs) if provider in FUSED else ""
        report.failures += [failure] if failure else []
        subject, reason = prepare(provider, case, inputs)
        if subject is None:
            report.left_out.append(reason)
        else:
            subjects[provider] = subject
    copy = Copy(case.bytes, case.device)
    times = measure({"copy": copy, **subjects}, case.device, seconds)
    copy_gbps = copy.bytes / times["copy"]["ms_median"] / 1e6
    for provider, subject in subjects.items():
        joules, reason = joules_per_step(subject, case.device, seconds)
        if reason and case.device != "cpu":
            report.left_out.append(f"joules of {provider}, {case.name}: {reason}")
        row = {"provider": provider, **describe(case, subject), **times[provider]}
        row["gbps"] = case.bytes / row["ms_median"] / 1e6
        report.rows.append({**row, "copy_gbps": copy_gbps, "joules": joules})


def describe(case: Case, subject: Provider) -> dict[str, Any]:
    """Columns of a row that are not times."""
    hidden = subject.launches if case.device == "cpu" else None
    return {
        "case": case.name,
        "size": case.size,
        "shape": case.shape,
        "elements": case.elements,
        "dtype": case.dtype,
        "device": case.device,
        "branches": subject.branches,
        "nfe": 2 if subject.branches == "both" else 1,
        "bytes": case.bytes,
        "launches": hidden or count_launches(subject, case.device),
    }


@torch.no_grad()
def run(options: argparse.Namespace, console: Console) -> tuple[dict[str, Any], int]:
    """Every case asked for; the result as it is stored, and the exit code."""
    report, found = Report(), dict(machine())
    if not options.skip_tests:
        failure = run_kernel_tests()
        report.failures += [failure] if failure else []
    providers = []
    for provider in options.providers:
        reason = why_absent(provider, options.device)
        report.left_out += [f"{provider}: {reason}"] if reason else []
        providers += [] if reason else [provider]
    if options.device != "cpu":
        launch = measure({"launch": Launch(options.device)}, options.device, options.seconds)
        found["launch_ms"] = launch["launch"]["ms_median"]
    for dtype in options.dtype:
        for size in options.sizes:
            for name in options.cases:
                console.print(f"{name} {size} {dtype} ...", style="dim", highlight=False)
                case = Case(name, size, dtype, options.device)
                time_case(case, providers, options.seconds, report)
    refusal = "; ".join(report.failures)
    if options.skip_tests and not refusal:
        refusal = "the kernel tests were skipped (--skip-tests)"
    add_speedups(report.rows, refusal)
    result = {
        "machine": found,
        "method": " ".join((__doc__ or "").split()),
        "refusal": refusal,
        "left_out": report.left_out,
        "summary": summarise(report.rows),
        "goals": goals(report.rows, found),
        "rows": report.rows,
    }
    return result, int(bool(report.failures))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=summary)
    add = parser.add_argument
    add("--json", type=Path, metavar="FILE", help="write machine and rows")
    add("--plot", type=Path, metavar="FILE.png", help="default: beside the JSON")
    add("--markdown", type=Path, metavar="FILE.md", help="write the summary as a page")
    add("--device", default=default_device(), help="cpu, cuda, cuda:1 (default: %(default)s)")
    add("--dtype", nargs="+", choices=DTYPES, help="default: fp32 on a CPU, fp16 on a GPU")
    add("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    add("--sizes", nargs="+", choices=SIZES, help="default: all but tiny")
    add("--providers", nargs="+", choices=PROVIDERS, help="default: all that are there")
    add("--seconds", type=float, help="per measurement (default 1; with --quick 0.05)")
    add("--quick", action="store_true", help="SD 1.5 only, short, without torch.compile")
    add("--skip-tests", action="store_true", help="no kernel tests, hence no speed-up")
    options = parser.parse_args(arguments)
    quick = options.quick
    options.dtype = options.dtype or [default_dtype(options.device)]
    options.sizes = options.sizes or (["sd15"] if quick else [s for s in SIZES if s != "tiny"])
    default = [p for p in PROVIDERS if not (quick and p == "compile")]
    options.providers = options.providers or default
    options.seconds = options.seconds or (0.05 if quick else 1.0)
    if options.plot is None and options.json is not None:
        options.plot = options.json.with_suffix(".png")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options, console = parse(arguments), Console()
    if not console.is_terminal:
        console = Console(width=120)  # a log has no width to fit into
    if ":" in options.device:
        torch.cuda.set_device(options.device)  # events and synchronize mean the current one
    result, code = run(options, console)
    print_report(result, console)
    for path, write in (
        (options.json, lambda path: path.write_text(json.dumps(result, indent=1) + "\n")),
        (options.plot, lambda path: plot(result, path)),
        (options.markdown, lambda path: path.write_text(markdown(result))),
    ):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path)
    return code


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_step(benchmark: BenchmarkFixture, provider: str, name: str) -> None:
    """A round is `measure.ROWS` steps at SD 1.5 size; its reset is pedantic's set-up, not timed."""
    device = default_device()
    if reason := why_absent(provider, device):
        pytest.skip(reason)
    case = Case(name, "sd15", default_dtype(device), device)
    with torch.no_grad():
        inputs = Inputs.of(case)
        if provider in FUSED:
            assert not check(provider, case, inputs)
        subject, reason = prepare(provider, case, inputs)
        if subject is None:
            pytest.skip(reason)

        def steps() -> None:
            for _ in range(ROWS):
                subject.step()
            if device != "cpu":
                torch.cuda.synchronize()

        benchmark.extra_info.update(
            machine=machine()["line"], elements=case.elements, bytes=case.bytes, steps=ROWS
        )
        benchmark.pedantic(steps, setup=subject.reset, rounds=20, warmup_rounds=2)


if __name__ == "__main__":
    raise SystemExit(main())
