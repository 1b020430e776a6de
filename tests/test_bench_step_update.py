"""The step benchmark: what it writes, that its providers do the same work, and what it refuses."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from thg_kernels.step_update import BranchRows, StepState, step_update

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
bench = importlib.import_module("bench_step_update")
measure = importlib.import_module("measure")
report = importlib.import_module("step_report")
step_cases = importlib.import_module("step_cases")

QUICK = ["--quick", "--device", "cpu", "--sizes", "tiny", "--seconds", "0.01"]
NUMBERS = ("ms_median", "ms_wall", "launches", "gbps", "copy_gbps", "bytes", "elements", "rounds")
FASTEST = "cpu"
RUN_KERNEL_TESTS = bench.run_kernel_tests


@pytest.fixture
def backend(monkeypatch):
    """Puts a function in the place of the C++ backend; the kernel tests count as passed."""

    def install(replacement):
        def step(state, output, outputs, *, backend):
            if backend != FASTEST:
                step_update(state, output, outputs, backend=backend)
            else:
                replacement(state, output, outputs)

        monkeypatch.setattr(step_cases, "step_update", step)
        monkeypatch.setattr(bench, "why_absent", lambda provider, device: "")
        monkeypatch.setattr(bench, "run_kernel_tests", lambda: "")

    return install


def sound(state, output, outputs):
    step_update(state, output, outputs, backend="reference")


def off(state, output, outputs):
    sound(state, output, outputs)
    state.registers += 1e-3


def poisoned(state, output, outputs):
    sound(state, output, outputs)
    state.model_input.flatten()[-1] = math.nan


def truncated(state, output, outputs):
    """Towards zero, where rounding to nearest is asked for: one unit in the last place at most."""
    sound(state, output, outputs)
    line = state.table.lines[state.positions[0]]
    exact = line[step_cases.Column.INPUT_SCALE] * state.samples()
    for half in state.model_input:
        above = half.float().abs() > exact[0].abs()
        half.view(torch.int16).sub_(above.to(torch.int16))


def off_where_small(state, output, outputs):
    """By a few units in the last place, at the element whose terms are the smallest."""
    sizes = state.samples().abs().flatten() + 10 * output.abs().sum(0).flatten()
    sound(state, output, outputs)
    state.samples().flatten()[sizes.argmin()] += 5e-7


def broken(state, output, outputs):
    raise RuntimeError("no such symbol")


def run(path, *arguments):
    """(exit code, stored result) of a quick run in this process."""
    wanted = ["--cases", "ddim/cfg", "--providers", "diffusers", "torch", FASTEST]
    code = bench.main([*QUICK, *wanted, "--json", str(path), *arguments])
    return code, json.loads(path.read_text())


def test_script_writes_rows_plot_and_page(tmp_path):
    path, page = tmp_path / "rows.json", tmp_path / "page.md"
    command = [sys.executable, "benchmarks/bench_step_update.py", *QUICK, "--skip-tests"]
    command += ["--cases", "ddim/cfg", "dpmpp_2m/thg-held", "--providers", "diffusers", "torch"]
    command += [FASTEST, "--json", str(path), "--markdown", str(page)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(path.read_text())
    absent = {reason.partition(":")[0] for reason in result["left_out"]}
    expected = {"diffusers", "torch"} | ({FASTEST} - absent)
    for case in ("ddim/cfg", "dpmpp_2m/thg-held"):
        assert {r["provider"] for r in result["rows"] if r["case"] == case} == expected
    for row in result["rows"]:
        assert all(math.isfinite(row[name]) and row[name] > 0 for name in NUMBERS), row
        assert row["ms_iqr"] >= 0 and row["joules"] is None and row["speedup"] is None
        assert (row["dtype"], row["device"], row["elements"]) == ("fp32", "cpu", 256)
        assert row["gbps"] == pytest.approx(row["bytes"] / row["ms_median"] / 1e6)
        alone = row["case"].endswith("held") and row["provider"] != "diffusers"
        assert (row["branches"], row["nfe"]) == (("cond", 1) if alone else ("both", 2))
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "--skip-tests" in result["refusal"] and "--skip-tests" in page.read_text()
    assert "torch" in result["machine"]["line"] and str(ROOT) not in path.read_text()


def test_speedups_are_stated_where_everything_passes(tmp_path, backend, capsys):
    backend(sound)
    code, result = run(tmp_path / "rows.json")
    assert code == 0 and result["refusal"] == ""
    rows = {row["provider"]: row for row in result["rows"]}
    base = rows["diffusers"]["ms_median"]
    for row in rows.values():
        assert row["speedup"] == pytest.approx(base / row["ms_median"])
    assert "speed-up" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (off, "registers off by"),
        (off_where_small, "registers: 1 wrong"),
        (poisoned, "model input off by nan"),
        (truncated, "model_input: "),
        (broken, "no such symbol"),
    ],
)
def test_a_wrong_backend_gets_no_speedup(tmp_path, backend, capsys, fault, message):
    backend(fault)
    dtype = "fp16" if fault is truncated else "fp32"
    code, result = run(tmp_path / "rows.json", "--dtype", dtype)
    assert code == 1 and message in result["refusal"]
    timed = ["diffusers", "torch"] + [FASTEST] * (fault is not broken)
    assert [row["provider"] for row in result["rows"]] == timed
    assert all(row["ms_median"] > 0 and row["speedup"] is None for row in result["rows"])
    assert "no speed-up is stated" in capsys.readouterr().out


def test_a_half_precision_backend_that_rounds_passes(tmp_path, backend):
    """What `truncated` differs from."""
    backend(sound)
    code, result = run(tmp_path / "rows.json", "--dtype", "fp16")
    assert code == 0 and result["refusal"] == ""


@pytest.mark.parametrize("elements", [1, 7, 8, 9, 16, 20, 24, 31])
def test_pieces_stand_at_both_ends_and_in_the_middle(monkeypatch, elements):
    monkeypatch.setattr(bench, "PIECE", 8)
    monkeypatch.setitem(step_cases.SIZES, "tiny", (1, elements))
    case = step_cases.Case("ddim/cfg", "tiny")
    inputs = step_cases.Inputs.of(case)
    inputs.registers.copy_(torch.arange(elements))
    pieces = bench._pieces(step_cases.FusedStep(case, inputs, "reference"), case)
    seen = [sorted(set(piece.registers.flatten().tolist())) for piece in pieces]
    assert {0, elements - 1} <= {int(value) for piece in seen for value in piece}
    middle = [elements // 2] if elements > 8 else []
    assert all(any(value in piece for piece in seen) for value in middle)
    for piece in pieces:
        size = piece.registers.shape[-1]
        assert size == piece.model_output.shape[-1] == piece.model_input.shape[-1] <= 8
    if elements <= 24:
        assert len(set().union(*seen)) == elements, "all of it"


def test_every_test_of_the_kernels_counts():
    """Those of resources (of compiled code) and of the build apart: they say nothing of results."""
    names = {Path(path).name for path in bench.KERNEL_TESTS}
    there = {path.name for path in (ROOT / "tests" / "kernels").glob("test_*.py")}
    assert there - names == {"test_triton_aot.py", "test_csrc.py"}


def test_red_kernel_tests_are_a_refusal(tmp_path, backend, monkeypatch):
    backend(sound)
    red = tmp_path / "test_red.py"
    red.write_text("def test_red():\n    assert False\n")
    monkeypatch.setattr(bench, "KERNEL_TESTS", [str(red)])
    monkeypatch.setattr(bench, "run_kernel_tests", RUN_KERNEL_TESTS)
    code, result = run(tmp_path / "rows.json")
    assert code == 1 and "1 failed" in result["refusal"]
    assert all(row["speedup"] is None for row in result["rows"])


@pytest.mark.parametrize("scheduler", step_cases.SCHEDULERS)
def test_diffusers_does_the_same_work(scheduler):
    """From row 0 on, its samples and next inputs are those of the table in float64."""
    case = step_cases.Case(f"{scheduler}/cfg", "tiny")
    inputs = step_cases.Inputs.of(case)
    real = step_cases.DiffusersStep(case, inputs)
    x, both = inputs.registers[0], BranchRows.both(1)
    state = StepState(case.table, x.double(), inputs=both, register_dtype=torch.float64)
    for _ in range(2):
        for _ in range(5):
            real.step()
        repeated = real.latents
        real.reset()
    for _ in range(5):
        real.step()
    assert torch.equal(real.latents, repeated)  # a reset brings back all of its state
    for _ in range(step_cases.BEGIN + 5):
        step_update(state, inputs.output, both, backend="reference")
    for found, exact in ((real.latents, state.samples()), (real.model_input, state.model_input)):
        assert float((found - exact).norm() / exact.norm()) < 1e-5


@pytest.mark.parametrize("name", step_cases.CASES)
def test_torch_does_the_same_work(name):
    """The reference with float32 registers passes the check that judges by torch's own error."""
    case = step_cases.Case(name, "tiny")
    inputs = step_cases.Inputs.of(case)
    assert bench.check("reference", case, inputs) == ""
    plain = step_cases.TorchStep(case, inputs)
    wide = step_cases.FusedStep(case, inputs, "reference", torch.float64)
    for _ in range(measure.ROWS):
        plain.step()
        wide.step()
    exact = wide.model_input
    assert plain.model_input.shape == exact.shape
    assert float((plain.model_input - exact).norm() / exact.norm()) < 1e-5


def test_launches_are_operators_that_compute():
    case = step_cases.Case("ddim/cfg", "tiny")
    inputs = step_cases.Inputs.of(case)
    # c - u, w delta, c + ., b e, a x, their sum, the doubled input; chunk is a view.
    assert measure.count_launches(step_cases.TorchStep(case, inputs), "cpu") == 7
    assert measure.count_launches(measure.Copy(case.bytes, "cpu"), "cpu") == 1


def test_bytes_are_those_of_the_row():
    # CFG: x read and written, two outputs, two inputs. Held: one branch less, one delta more.
    cfg, held = (step_cases.Case(f"ddim/{kind}", "tiny", "fp16") for kind in ("cfg", "thg-held"))
    assert cfg.bytes == 256 * (2 * 4 + 4 * 2)
    assert held.bytes == 256 * (3 * 4 + 2 * 2)


def test_goals_follow_the_machine():
    row = {"provider": "cuda", "dtype": "fp16", "size": "video-2m", "case": "ddim/cfg"}
    rows = [{**row, "gbps": 85.0, "copy_gbps": 100.0, "ms_median": 1.0, "speedup": 2.0}]
    rows.append({**rows[0], "size": "sd15", "ms_median": 0.0055})
    ordinary = report.goals(rows, {"line": "some GPU", "launch_ms": 0.005})
    assert [goal["reached"] for goal in ordinary] == [True, True]
    assert [goal["value"] for goal in ordinary] == pytest.approx([85.0, 0.5])
    hopper = report.goals(rows, {"line": "NVIDIA H100", "launch_ms": 0.004})
    assert [goal["reached"] for goal in hopper] == [False, False]
    (host,) = report.goals([{**rows[1], "provider": "cpu"}], {"line": "some CPU"})
    assert (host["value"], host["reached"]) == (pytest.approx(2.0), False)


@pytest.mark.parametrize("provider", ["triton", "cuda"])
def test_gpu_providers_are_not_timed_on_a_cpu(provider):
    assert "does not run on cpu" in step_cases.why_absent(provider, "cpu")


class Steps:
    """A subject that counts."""

    def __init__(self):
        self.resets = self.steps = 0

    def reset(self):
        self.resets += 1

    def step(self):
        self.steps += 1


def test_gpu_times_are_those_between_the_events_of_a_step(monkeypatch):
    subject = Steps()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.steps = subject.steps

        def elapsed_time(self, end):
            return 2.0 * (end.steps - self.steps)  # ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    times = measure._events(subject, 3, torch.ones(4, dtype=torch.int8))
    assert times == pytest.approx([2e-3] * 3)
    assert (subject.resets, subject.steps) == (1, 3)


def test_energy_is_that_of_the_board_per_step(monkeypatch):
    subject, clock = Steps(), itertools.count()
    properties = SimpleNamespace(uuid="1234")
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: 100 + 5 * subject.steps,  # mJ
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: 0.4 * next(clock))
    assert measure.joules_per_step(subject, "cuda", 0.1) == (pytest.approx(5e-3), "")
    assert subject.steps == subject.resets * measure.ROWS > 0


def test_missing_energy_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    joules, reason = measure.joules_per_step(Steps(), "cuda", 0.1)
    assert joules is None and "pynvml" in reason
