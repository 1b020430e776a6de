"""The GPU suite: published models, figures that are what they say, a store that resumes."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch

from thg_engine import CFG

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
checks = importlib.import_module("gpu_checks")
curve = importlib.import_module("gpu_curve")
graphs = importlib.import_module("gpu_graphs")
models = importlib.import_module("gpu_models")
report = importlib.import_module("gpu_report")
runs = importlib.import_module("gpu_runs")
store_module = importlib.import_module("gpu_store")
suite = importlib.import_module("gpu_suite")
timing = importlib.import_module("gpu_timing")

# Parameters of the published checkpoints.
PARAMETERS = {
    "sd15": 859_520_964,
    "sdxl": 2_567_463_684,
    "sd35": 8_056_627_520,
    "wan": 1_418_996_800,
}


@pytest.mark.parametrize("name", models.SPECS)
def test_architectures_are_the_published_ones(name):
    spec = models.SPECS[name]
    with torch.device("meta"):
        model = getattr(diffusers, spec.model)(**spec.full.config)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    assert model.config.in_channels == spec.full.latent[0]
    assert any(type(part).__name__ == spec.blocks for part in model.modules())


@pytest.fixture(params=models.SPECS)
def backbone(request):
    return models.Backbone.make(request.param, "cpu", smoke=True)


@torch.no_grad()
def test_engine_makes_the_latents_of_the_genuine_pipeline(backbone):
    expected = backbone.run_pipeline(backbone.pipeline(), 6)
    loop = runs.Loop(backbone, runs.make_engine(backbone, graph=False))
    found = loop(runs.make_plan(backbone, CFG(), 6))
    assert float((found - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("name", models.SPECS)
@torch.no_grad()
def test_published_dtypes(name):
    """Weights are cast but for those that diffusers keeps wide; rounding is all that differs."""
    narrow = models.Backbone.make(name, "cpu", smoke=True, dtype=torch.bfloat16)
    wide = getattr(narrow.model, "_keep_in_fp32_modules", None) or []
    for key, value in narrow.model.named_parameters():
        kept = any(part in wide for part in key.split("."))
        assert value.dtype == (torch.float32 if kept else torch.bfloat16)
    assert narrow.model.dtype == torch.bfloat16  # what the pipelines feed it in
    expected = narrow.run_pipeline(narrow.pipeline(), 6).double()
    loop = runs.Loop(narrow, runs.make_engine(narrow, graph=False))
    found = loop(runs.make_plan(narrow, CFG(), 6)).double()
    assert float((found - expected).norm() / expected.norm()) < runs.AGREE


@torch.no_grad()
def test_compiled_blocks_are_switched(backbone):
    inputs = backbone.call_inputs(1)
    expected = backbone(*inputs)
    blocks = list(backbone._blocks())
    for on in (True, False, True):
        backbone.set_compiled(on)
        assert all((block._compiled_call_impl is not None) is on for block in blocks)
    assert torch.allclose(backbone(*inputs), expected, atol=1e-5)


@torch.no_grad()
def test_faster_cache_applies_where_no_reason_says_otherwise(backbone):
    """And the model is afterwards as it was."""
    way = runs.faster_cache(backbone)
    inputs = backbone.call_inputs(2)
    expected = backbone(*inputs)
    if way.reason:
        with pytest.raises((RuntimeError, ValueError, TypeError, IndexError)):
            way.run(False)
    else:
        found = way.run(False)
        other = backbone.run_pipeline(backbone.pipeline(), backbone.steps)
        assert 0 < float((found - other).norm() / other.norm()) < 0.1  # it leaves calls out
    assert torch.equal(backbone(*inputs), expected)


@pytest.mark.parametrize(
    ("c2", "h", "gain"), [(2.0, 1.0, 1.0), (1.0, 0.4, 1.0), (2.0, 0.4, 2 / 1.4), (1.8, 0.0, 1.8)]
)
def test_ideal_speedup(c2, h, gain):
    assert curve.ideal_speedup(c2, h) == pytest.approx(gain)


def test_c2_needs_both_batches():
    points = [{"mode": "eager", "batch": b, "ms": ms} for b, ms in ((1, 4.0), (2, 7.0))]
    assert curve.c2_of(points, "eager") == 1.75
    assert curve.c2_of([{**points[0], "ms": None}, points[1]], "eager") is None
    assert curve.c2_of(points, "graphed") is None


def test_rounds_take_turns_within_their_time(monkeypatch):
    clock, order = SimpleNamespace(now=0.0), []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)

    def subject(name, seconds):
        def run():
            order.append(name)
            clock.now += seconds

        return timing.Subject(run, lambda: order.append(f"prepare {name}"))

    subjects = {"a": subject("a", 1.0), "b": subject("b", 2.0)}
    found = timing.run_rounds(subjects, "cpu", seconds=10.0)
    assert order == ["prepare a", "a", "prepare b", "b"] * 3  # a fourth would end at 12 s
    assert (found["a"].median("wall_s"), found["b"].median("wall_s")) == (1.0, 2.0)
    assert (found["a"].rounds, found["a"].median("joules"), found["a"].peak_bytes) == (
        3,
        None,
        None,
    )
    assert timing.run_rounds(subjects, "cpu", seconds=0.0)["a"].rounds == 1


def test_gpu_times_lie_between_events(monkeypatch):
    clock = SimpleNamespace(gpu=0.0)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = clock.gpu

        def elapsed_time(self, end):
            return end.time - self.time  # ms

    cuda = torch.cuda
    monkeypatch.setattr(cuda, "Event", Event)
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(cuda, name, lambda: None)
    monkeypatch.setattr(cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(cuda, "max_memory_allocated", lambda: 4096)

    def work(ms):
        clock.gpu += ms

    watch = timing.Watch("cuda")

    def run():
        work(10.0)
        watch.around(work)(30.0)

    meter, samples = SimpleNamespace(joules=lambda: 2 * clock.gpu), timing.Samples()
    timing.run_once(timing.Subject(run, watch=watch), "cuda", meter, samples)
    assert samples.median("gpu_s") == pytest.approx(0.04)
    assert samples.median("denoiser_s") == pytest.approx(0.03)
    assert (samples.calls, samples.mean("joules"), samples.peak_bytes) == (1, 80.0, 4096)


class Capture:
    """Stands for `torch.cuda.graph`: as there, an exception leaves the thread on its stream."""

    def __init__(self, graph, **_):
        pass

    def __enter__(self):
        torch.cuda.set_stream("capture")

    def __exit__(self, kind, *_):
        if kind is None:
            torch.cuda.set_stream("default")


def test_a_failed_capture_leaves_the_thread_on_its_stream(monkeypatch):
    current = SimpleNamespace(stream="default")
    fakes = {
        "current_stream": lambda: current.stream,
        "set_stream": lambda stream: setattr(current, "stream", stream),
        "stream": lambda stream: contextlib.nullcontext(),
        "synchronize": lambda: None,
        "CUDAGraph": lambda: "graph",
        "graph": Capture,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    seen = []

    def call():
        seen.append(current.stream)
        if broken and len(seen) % 2 == 0:
            raise RuntimeError("not permitted when stream is capturing")

    for broken in (False, True):
        own = SimpleNamespace(wait_stream=lambda stream: None)
        with pytest.raises(RuntimeError) if broken else contextlib.nullcontext():
            assert timing.capture(call, own, None) == "graph"
        assert current.stream == "default"
    assert seen == ["default", "capture"] * 2


def test_watch_leaves_no_hooks_behind():
    module = torch.nn.Linear(2, 2)
    watch = timing.Watch("cpu", module)
    with watch:
        module(torch.ones(2))
        module(torch.ones(2))
    seconds, calls = watch.take()
    assert calls == 2 and seconds > 0
    assert not module._forward_hooks and not module._forward_pre_hooks


def way(name, **columns):
    base = {"way": name, "mode": "graphed", "reason": "", "rows": 50, "both": 20, "nfe": 70}
    return {**base, "graphs": {}, "difference": 0.01, "seconds": 2.0, **columns}


def all_ways(**columns):
    seconds = {runs.STOCK: 5.0, runs.STOCK_COMPILED: 4.2, runs.ENGINE: 4.0, runs.ENGINE_THG: 2.9}
    rows = [way(name, seconds=value, **columns) for name, value in seconds.items()]
    return [*rows, way(runs.ENGINE_COMPILED, seconds=2.0, **columns)]


def test_speed_ups_are_ratios_of_the_same_rounds():
    found = runs.compare(all_ways(), {"graphed": {1: 40.0, 2: 80.0}})
    assert (found["h"], found["c2"], found["refusal"]) == (0.4, 2.0, "")
    assert found["ideal"] == pytest.approx(2 / 1.4)
    assert found["of_ideal"] == pytest.approx(4.0 / 2.9 / (2 / 1.4))
    assert found["thg_over_stock"] == pytest.approx(5.0 / 2.9)
    assert found["compiled_over_stock_compiled"] == pytest.approx(2.1)


@pytest.mark.parametrize("difference", [0.2, math.nan, None])
def test_no_speed_up_of_another_result(difference):
    found = runs.compare(all_ways(difference=difference), {"graphed": {1: 40.0, 2: 80.0}})
    assert "away from diffusers" in found["refusal"]
    assert found["measured"] is found["thg_over_stock"] is found["of_ideal"] is None


def test_a_graph_hides_its_calls_and_bursts_stand_in():
    samples = timing.Samples()
    samples.add(wall_s=3.0, gpu_s=2.9, host_s=0.05, denoiser_s=1.0)
    subject = runs.Way("engine THG", None, rows=50, both=20, mode="graphed")
    row = runs._row(subject, samples, {1: 40.0, 2: 80.0})
    assert row["denoiser_share"] == pytest.approx((20 * 0.08 + 30 * 0.04) / 2.9)
    assert row["host_ms_per_step"] == pytest.approx(1.0)
    subject.mode = "eager"
    assert runs._row(subject, samples, {})["denoiser_share"] == pytest.approx(1.0 / 2.9)


def result(device="cuda", **parts):
    machine = {"line": "a machine"}
    return {"parts": parts, "device": device, "smoke": device == "cpu", "machine": machine}


def gpu_result():
    found = runs.compare(all_ways(), {"graphed": {1: 40.0, 2: 80.0}})
    for row in (rows := all_ways(denoiser_share=0.985)):
        row.update(dict.fromkeys(runs.FIGURES, None) | row)
    done = {"failure": "", "seconds": 1.0}
    parts = {
        "sdxl/runs": {**done, "rows": rows, "steps": 50, "full_steps": 50, **found},
        "sd35/runs": {"failure": "RuntimeError: out of memory", "seconds": 2.0},
        "sd15/graphs": {**done, "capture_s": 1.5, "host_syncs": 0, "reason": ""},
        "cycles": {**done, "cycles": 500, "growth_bytes": {"device": 0}, "reason": ""},
        "sanitizer": {
            **done,
            "tools": {"memcheck": {"clean": True, "reason": "", "summary": "ok"}},
        },
    }
    parts["sanitizer"]["tools"]["racecheck"] = {"clean": None, "reason": "not on PATH"}
    return result(**parts)


def test_goals_are_judged_by_their_numbers():
    found = gpu_result()
    lines = {line["goal"]: line for line in report.goals(found)}
    share = lines["SDXL, 1024 px: time outside the denoiser, engine THG"]
    assert share["value"] == pytest.approx(1.5)
    assert share["verdict"] == "missed by 0.5 % of the loop"
    assert lines["SD 1.5, 512 px: capture"]["verdict"] == "reached"
    compiled = "engine THG + compile over diffusers + torch.compile"
    assert lines[f"SDXL, 1024 px: {compiled}"]["verdict"] == "reached"
    verdict = lines[f"SD 3.5 Large, 1024 px: {compiled}"]["verdict"]
    assert verdict == "not measured: RuntimeError: out of memory"
    assert lines["compute-sanitizer memcheck: faults"]["verdict"] == "reached"
    assert lines["compute-sanitizer racecheck: faults"]["verdict"] == "not measured: not on PATH"
    assert lines["failed tests on the GPU"]["verdict"] == "not measured: has not run"


def test_figures_of_a_cpu_decide_no_goal():
    found = {**gpu_result(), "device": "cpu"}
    assert {line["verdict"] for line in report.goals(found)} == {report.NEEDS_GPU}
    assert all(line["value"] is None for line in report.goals(found))


def test_page_and_faults():
    found = gpu_result()
    found["goals"] = report.goals(found)
    assert report.faults(found) == ["sd35/runs: RuntimeError: out of memory"]
    page = report.markdown(found)
    assert "| sdxl | engine THG | graphed | 50 | 70 |" in page
    assert "missed by 0.5 % of the loop" in page
    found["parts"]["cycles"]["same_result"] = False
    found["parts"]["sanitizer"]["tools"]["memcheck"] = {"clean": False, "reason": "1 error"}
    assert len(report.faults(found)) == 3


def test_junit_is_read(tmp_path):
    path = tmp_path / "tests.xml"
    skip = '<testcase name="s"><skipped message="needs a CUDA device"/></testcase>'
    bad = '<testcase name="b"><failure/></testcase><testcase name="e"><error/></testcase>'
    path.write_text(
        f'<testsuites><testsuite><testcase name="a"/>{bad}{skip}</testsuite></testsuites>'
    )
    found = checks.read_junit(path)
    assert (found["tests"], found["ran"], found["skipped"]) == (4, 3, 1)
    assert found["failed"] == ["b", "e"]
    assert found["skip_reason"] == "needs a CUDA device"


@pytest.mark.parametrize(
    ("code", "output", "clean"),
    [
        (0, "1 passed\n========= ERROR SUMMARY: 0 errors", True),
        (77, "========= ERROR SUMMARY: 2 errors", False),
        (None, "stopped after 75 s", None),
        (1, "Device not supported", None),
    ],
)
def test_sanitizer_verdicts(monkeypatch, code, output, clean):
    monkeypatch.setattr(checks, "run", lambda *_: (code, output))
    found = checks.sanitize("memcheck")
    assert found["clean"] is clean
    assert clean or found["reason"]


def test_store_keeps_what_is_done(tmp_path):
    store = store_module.Store(tmp_path / "new" / "r.json")
    assert store.get("a") is None and not store.done("a")
    store.run("a", lambda: {"value": math.inf, 1: (2, 3)})
    assert store.done("a")
    assert {k: store.get("a")[k] for k in ("value", "1")} == {"value": None, "1": [2, 3]}
    store.run("b", lambda: 1 / 0)
    assert store.get("b")["failure"] == "ZeroDivisionError: division by zero"
    assert not store.done("b")
    store.update(smoke=True)
    assert set(store.read()) == {"parts", "smoke"}
    assert [path.name for path in store.path.parent.iterdir()] == ["r.json"]


def test_a_second_invocation_skips_what_is_done(tmp_path, monkeypatch):
    ran = []

    def work(name):
        def run(*_):
            ran.append(name)
            if name == "tests" and ran.count("tests") == 1:
                raise RuntimeError("broken")
            counts = {"ran": 0, "failed": [], "skipped": 0, "skip_reason": ""}
            return {"passed": True, **counts, "tools": {}}

        return run

    for name, attribute in (("tests", "gpu_tests"), ("sanitizer", "sanitizer")):
        monkeypatch.setattr(suite, attribute, work(name))
    path = tmp_path / "r.json"
    arguments = ["--smoke", "--out", str(path), "--parts", "tests", "sanitizer"]
    assert suite.main(arguments) == 1  # a part has failed
    assert suite.main(arguments) == 0
    assert ran == ["tests", "sanitizer", "tests"]  # what failed runs again, what is done does not
    assert suite.main([*arguments, "--again"]) == 0
    assert ran[3:] == ["tests", "sanitizer"]
    assert path.with_suffix(".md").read_text().startswith("# GPU suite, smoke run")


def test_a_crash_costs_one_model(tmp_path, monkeypatch):
    done = SimpleNamespace(returncode=-9, stderr="Killed\n")
    monkeypatch.setattr(suite.subprocess, "run", lambda *_, **__: done)
    arguments = ["--smoke", "--out", str(tmp_path / "r.json"), "--models", "sdxl"]
    assert suite.main([*arguments, "--parts", "curve", "graphs"]) == 1
    parts = json.loads((tmp_path / "r.json").read_text())["parts"]
    assert set(parts) == {"sdxl/curve", "sdxl/graphs"}
    assert parts["sdxl/curve"]["failure"] == "the process ended with -9: Killed"


def test_smoke_results_stay_out_of_the_results():
    assert suite.default_out("cpu", smoke=True) == ROOT / "bench-out" / "gpu-smoke.json"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "no CUDA device is available"), (["--device", "cpu"], "too large for a CPU")],
)
def test_without_a_gpu_only_smoke_runs(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        suite.main(arguments)
    assert message in capsys.readouterr().err


def test_cycles_give_the_same_result_each_time():
    small = models.Backbone.make("sd15", "cpu", smoke=True)
    found = graphs.cycles(small, count=4)
    assert found["same_result"] and found["cycles"] == 4
    assert found["reason"] == graphs.NO_GRAPHS and "host" in found["growth_bytes"]


@pytest.mark.slow
def test_smoke_run_end_to_end(tmp_path):
    """Every part, of two models, in the processes that a real run has."""
    path = tmp_path / "smoke.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_suite.py"), "--smoke"]
    command += ["--out", str(path), "--models", "sd15", "wan"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    found = json.loads(path.read_text())
    assert done.returncode == 0, (report.faults(found), done.stderr[-2000:])
    labels = [f"{model}/{part}" for model in ("sd15", "wan") for part in suite.PARTS]
    assert set(found["parts"]) == {*suite.FIRST, *labels, *suite.LAST}
    assert not any(part["failure"] for part in found["parts"].values())
    for model in ("sd15", "wan"):
        rows = {row["way"]: row for row in found["parts"][f"{model}/runs"]["rows"]}
        assert rows[runs.ENGINE]["difference"] < 1e-5
        assert rows[runs.ENGINE_THG]["nfe"] == 8  # 70 % of 12
        points = found["parts"][f"{model}/curve"]["points"]
        assert all(
            point["ms"] is None and point["reason"]
            for point in points
            if "graphed" in point["mode"]
        )
        assert all(point["ms"] > 0 for point in points if "graphed" not in point["mode"])
    assert found["parts"]["kernels"]["rows"]
    assert found["parts"]["cold_start"]["first_image_s"] > 0
    assert "goals" in done.stdout and report.NEEDS_GPU in done.stdout
