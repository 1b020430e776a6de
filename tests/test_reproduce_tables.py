"""The published tables of ``thg-engine reproduce``, and what its command refuses."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import pytest

from reproduce_cases import request
from thg_engine.cli import main
from thg_engine.errors import InvalidArgument, MissingPackage, MissingWeights, ThgError
from thg_engine.guidance import CFGCache
from thg_engine.reproduce import methods
from thg_engine.reproduce.checks import check_metrics
from thg_engine.reproduce.generation import Sampler
from thg_engine.reproduce.methods import SOLVERS, Context, guidance_of, register_guidance
from thg_engine.reproduce.metrics import METRICS
from thg_engine.reproduce.tables import table, tables

BAD = [
    ([], "TABLE=None"),
    (["table-9"], "TABLE='table-9'"),
    (["sd15"], "--model=None"),
    (["sd15", "--model", "no/such"], "--model='no/such'"),
    (["audioldm2", "--model", "demo"], "--model='demo'"),
    (["sd15", "--model", "demo", "--rows", "ddim"], "--rows='ddim'"),
    (["sd15", "--model", "demo", "--rows", ","], "--rows=''"),
    (["sd15", "--model", "demo", "--limit", "1"], "--limit=1"),
    (["sd15", "--model", "demo", "--batch-size", "0"], "--batch-size=0"),
    (["sd15", "--model", "demo", "--seed", "-1"], "--seed=-1"),
    (["sd15", "--model", "demo", "--metrics", "fad"], "--metrics='fad'"),
    (["sd15", "--model", "demo", "--metrics", "psnr"], "--metrics='psnr'"),
    (["sd15", "--model", "demo", "--metrics", "clip-score"], "--weights='clip-score=PATH'"),
    (["sd15", "--model", "demo", "--weights", "clip-score"], "--weights='clip-score'"),
    (["sd15", "--model", "demo", "--weights", "cmmd=no/such"], "--weights='cmmd=no/such'"),
    (["sd15", "--model", "demo", "--prompts", "no.txt"], "--prompts='no.txt'"),
    (["sd15", "--model", "demo", "--prompts", "OTHER"], "--prompts='a cat'"),
    (["sd15", "--model", "demo", "--images", "no/such"], "--images='no/such'"),
    (["sd15", "--model", "demo", "--audio", "."], "--audio='.'"),
    (["sd15", "--model", "demo", "--calibration", "no.json"], "no.json"),
    (["sd15", "--model", "demo", "--out", "OTHER/sub"], "--out="),
    (["sd15", "--model", "PIPE", "--metrics", "none"], "--prompts=None"),
    (["sd35", "--model", "PIPE"], "it holds a StableDiffusionPipeline"),
    (["sd15", "--model", "PIPE", "--metrics", "class-accuracy"], "--metrics='class-accuracy'"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[message for _, message in BAD])
def test_mistakes_end_in_one_line_before_anything_runs(
    arguments, message, tmp_path, monkeypatch, capsys
):
    from thg_engine.demo.pipeline_loader import PIPELINE_DIR

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Sampler, "_load", lambda self: pytest.fail("a pipeline was loaded"))
    (tmp_path / "other.txt").write_text("a cat\na dog\n")
    named = {"OTHER": "other.txt", "OTHER/sub": "other.txt/sub", "PIPE": str(PIPELINE_DIR)}
    line = ["reproduce", *(named.get(part, part) for part in arguments)]
    assert main(line if "--out" in line else [*line, "--out", "out"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not list(tmp_path.glob("out/*"))


def test_a_reference_is_asked_for(tmp_path):
    from thg_engine.demo.pipeline_loader import PIPELINE_DIR

    captions = tmp_path / "captions.txt"
    captions.write_text("a cat\na dog\n")
    line = ["reproduce", "sd15", "--model", str(PIPELINE_DIR), "--prompts", str(captions)]
    line += ["--out", str(tmp_path / "out"), "--metrics", "cmmd", "--weights", f"cmmd={tmp_path}"]
    with pytest.raises(InvalidArgument, match=r"--images=None: cmmd compare with .*COCO"):
        request(*line)


def test_what_is_missing_is_named_with_its_command(monkeypatch, tmp_path):
    for module in ("torch_fidelity", "ImageReward", "frechet_audio_distance"):
        monkeypatch.setitem(sys.modules, module, None)
    for name, kind in (("fid", "image"), ("image-reward", "image"), ("fad", "audio")):
        (distribution,) = METRICS[name].packages.values()
        with pytest.raises(MissingPackage, match=rf"metric {name} .*pip install {distribution}"):
            check_metrics([name], kind, {}, boxed=False)
    assert issubclass(MissingPackage, ThgError)


def test_tables_hold_what_was_published():
    """Against the paper's own numbers, a row of each table; and the cost of every known grid."""
    assert set(tables()) == {"sd15", "sd35", "audioldm2", "same-budget", "boost", "rho"}
    published = {(key, row.name): row for key, one in tables().items() for row in one.rows}
    assert dict(published["sd15", "dpm2-thg"].published) == {
        **{"fid": 12.909, "cmmd": 0.60868, "clip-score": 26.205, "image-reward": 0.14926}
    }
    assert published["sd35", "thg"].published["image-reward"] == 1.02365
    assert dict(published["audioldm2", "thg"].published) == {"fad": 2.764, "clap": 0.2342}
    assert published["boost", "boost-1.15"].published["fid"] == 14.472
    assert published["rho", "rho-1.3"].published["image-reward"] == 0.108
    nfes = [row.nfe for row in table("rho").rows]
    assert nfes == [75, 73, 70, 69, 67]
    for (key, name), row in published.items():
        if row.method == "cfg":
            assert row.nfe == 2 * row.num_steps
        elif row.options.get("grid") != "calibrated" and row.method != "cfg-cache-fft":
            method = guidance_of(row, Context(table(key).model))
            rows = method.rows([float(i) for i in range(row.num_steps)], 7.5)
            assert row.num_steps + sum(r.evaluates_both for r in rows) == row.nfe, name


def test_an_unknown_method_is_not_available():
    row = replace(table("sd15").rows[0], method="no-such-method")
    with pytest.raises(methods.NotAvailable, match="no method 'no-such-method'"):
        guidance_of(row, Context("stable-diffusion-1.5"))
    row = table("audioldm2").select(["thg"])[0]
    with pytest.raises(methods.NotAvailable, match=r"rho = 0.9 at N = 50 .*--calibration"):
        guidance_of(row, Context("audioldm2"))


def test_a_method_can_be_plugged_in():
    row = table("sd35").select(["cfg-cache"])[0]
    before = dict(methods._FACTORIES)
    register_guidance("cfg-cache-fft", lambda row, context: CFGCache(**row.options))
    try:
        method = guidance_of(row, Context("stable-diffusion-3.5-large"))
        rows = method.rows([0.0] * 28, 3.5)
        assert 28 + sum(r.evaluates_both for r in rows) == row.nfe == 38
    finally:
        methods._FACTORIES.clear()
        methods._FACTORIES.update(before)


@pytest.mark.filterwarnings("ignore:.*algorithm_type.*:FutureWarning")
@pytest.mark.parametrize(("key", "solver"), [("ddim", "ddim"), ("dpm2", "dpm2"), ("lms2", "lms2")])
def test_schedulers_are_the_papers_solvers(key, solver):
    """The scheduler's own steps against the closed form of the solver it is taken for."""
    from thg_engine.demo import load_pipeline
    from thg_engine.schedule import grid_points
    from thg_engine.solvers import get_solver, solver_table
    from thg_engine.trace import trace

    scheduler = SOLVERS[key](load_pipeline().scheduler.config)
    scheduler.set_timesteps(16)  # below 15, the multistep scheduler ends in a first-order step
    steps = trace(scheduler).rows
    assert len(steps) == 16
    expected = solver_table(get_solver(solver), grid_points(scheduler), "epsilon").rows
    scale = scheduler.init_noise_sigma  # schedulers in sigma keep x / alpha, the forms keep x
    for row, want in zip(steps, expected, strict=True):
        assert len(row.output_weights) == len(want.output_weights)
        if scale == 1:
            np.testing.assert_allclose(row.sample_weights, want.sample_weights, rtol=1e-5)
            np.testing.assert_allclose(row.output_weights, want.output_weights, rtol=1e-4)
        else:
            sigmas = [p.sigma_t / p.alpha_t for p in grid_points(scheduler)]
            i = steps.index(row)
            h = sigmas[i + 1] - sigmas[i]
            r = h / (2 * (sigmas[i] - sigmas[i - 1])) if i else 0.0
            gains = [h * (1 + r), -h * r] if i else [h]
            np.testing.assert_allclose(row.output_weights, gains, rtol=1e-4)


def test_the_velocity_pipeline_stands_in_or_is_missed(tmp_path):
    from thg_engine.demo.pipeline_loader import FOLDERS

    line = ["reproduce", "sd35", "--model", "demo", "--limit", "2", "--rows", "cfg,thg"]
    line += ["--out", str(tmp_path)]
    if not (FOLDERS["flow"] / "model_index.json").is_file():
        with pytest.raises(MissingWeights, match="'flow' pipeline"):
            request(*line)
        return
    assert main(line) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["nfe"]["counted"] for row in rows] == [56, 38]


def test_list_names_every_row_and_need(capsys):
    assert main(["reproduce", "--list"]) == 0
    printed = capsys.readouterr().out
    for key, one in tables().items():
        assert f"{key}: " in printed
        assert all(row.name in printed for row in one.rows)
    assert all(name in printed for name in METRICS)
    assert "pip install torch-fidelity" in printed
