"""The GPU suite's figures are what they say: times, speed-ups, goals, verdicts."""

from __future__ import annotations

import contextlib
import math
from types import SimpleNamespace

import pytest
import torch

from gpu_suite_parts import checks, curve, report, runs, timing


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
