"""The GPU suite: published models, a store that resumes, and every part end to end."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from types import SimpleNamespace

import diffusers
import pytest
import torch

from gpu_suite_parts import ROOT, graphs, models, report, runs, store_module, suite
from thg_engine import CFG

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
