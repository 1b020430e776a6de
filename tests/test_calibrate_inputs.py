"""What calibrations and evaluations refuse before they begin, and what they do not take over."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest

import thg_engine
from pipelines import ddim, tiny
from thg_engine.cli import main
from thg_engine.demo import load_pipeline
from thg_engine.errors import InvalidArgument
from thg_engine.evaluation.garments import IMAGES, LABELS, check_data
from thg_engine.integrations.diffusers.calibrate_plans import _Job, _stock, stock_scheduler
from thg_engine.integrations.diffusers.planned import end_of, native_schedule
from thg_engine.integrations.diffusers.sampling import MAX_SEED, Noises

PROMPTS = [f"a photo of a {name}" for name in ("cat", "dog", "hat", "cup", "box", "car")]
QUICK: dict[str, Any] = {"budgets": (8,), "progress": False, "height": 16, "width": 16}


@pytest.mark.parametrize("name", ["ddim", "dpm++2m", "unipc"])
def test_stock_solvers_are_what_their_names_say(name: str) -> None:
    """Whatever is set on the pipeline's own scheduler: only the noise schedule is the model's."""
    odd = diffusers.DPMSolverMultistepScheduler.from_config(
        ddim().config,
        **{"algorithm_type": "sde-dpmsolver++", "solver_order": 3, "use_karras_sigmas": True},
        **{"solver_type": "heun", "thresholding": True, "final_sigmas_type": "sigma_min"},
    )
    plain, found = (dict(stock_scheduler(own, "vp", name).config) for own in (ddim(), odd))
    assert {k: v for k, v in found.items() if k[0] != "_"} == {
        k: v for k, v in plain.items() if k[0] != "_"
    }
    assert found["beta_start"] == ddim().config.beta_start
    if name != "ddim":
        assert found["solver_order"] == 2 and not found["use_karras_sigmas"]


def test_flows_with_a_grid_for_each_size() -> None:
    own = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    schedule, predicts = native_schedule(own)
    assert end_of(own, schedule).sigma_t == 0.0
    assert _stock(own, "flow", predicts) == {}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": MAX_SEED}, "seed="),
        ({"seed": -1}, "seed="),
        *(({"refine": bad}, "refine=") for bad in (-1, True, 0.5)),
        ({"negative_prompt": ["ugly"]}, "negative_prompt="),
        ({"height": 7}, "refuses the call"),
    ],
)
def test_typed_errors_of_what_the_pipeline_would_not_take(changes: Any, named: str) -> None:
    pipe = tiny()
    pipe.unet.conv_in.register_forward_pre_hook(lambda *_: pytest.fail("the denoiser ran"))
    with pytest.raises(InvalidArgument, match=named):
        thg_engine.calibrate_plans(pipe, PROMPTS, **{**QUICK, **changes})


def test_kept_work_is_of_the_same_negative_prompt() -> None:
    def settings(negative: str) -> list[str]:
        given = (tiny(), tuple(PROMPTS), (5.0,), negative, Noises(1, 0, 4))
        job = _Job(*given, {"height": 16, "width": 16})
        return job._settings(job._task((8,), None, False)[0])

    assert settings("") == settings("") != settings("blurry")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--budgets", "16"], "--budgets"),
        (["--refine", "1"], "--refine"),
        (["--samples", "2"], "--samples"),
        (["--work-dir", "x"], "--work-dir"),
        (["--max-sequence-length", "1"], "--max-sequence-length"),
        (["--plans", "--steps", "20"], "--steps"),
        (["--out", "."], "--out"),
        (["--plans", "--out", "."], "--out"),
    ],
)
def test_flags_that_would_be_ignored(
    flags: list[str], named: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("thg_engine.cli_calibrate._load", lambda _: pytest.fail("loaded"))
    Path("prompts.txt").write_text("\n".join(PROMPTS))
    assert main(["calibrate", "demo", "--prompts", "prompts.txt", *flags]) == 2
    assert named in capsys.readouterr().err


def test_data_that_is_no_data(tmp_path: Path) -> None:
    check_data("")
    with pytest.raises(InvalidArgument, match="is not in it"):
        check_data(str(tmp_path))
    (tmp_path / IMAGES).write_bytes(gzip.compress(bytes(16 + 28 * 28 * 3)))
    (tmp_path / LABELS).write_bytes(b"no gzip")
    with pytest.raises(InvalidArgument, match="cannot be read"):
        check_data(str(tmp_path))
    (tmp_path / LABELS).write_bytes(gzip.compress(bytes(8 + 2)))
    with pytest.raises(InvalidArgument, match="as many labels"):
        check_data(str(tmp_path))
    (tmp_path / LABELS).write_bytes(gzip.compress(bytes(8 + 3)))
    check_data(str(tmp_path))
    (tmp_path / IMAGES).write_bytes(gzip.compress(bytes(16)))
    (tmp_path / LABELS).write_bytes(gzip.compress(bytes(8)))
    with pytest.raises(InvalidArgument, match="as many labels"):
        check_data(str(tmp_path))


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"a": 1}), json.dumps({"rows": [{}]})])
def test_results_that_scores_cannot_be_added_to(
    text: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    started = "thg_engine.reproduce.running.generate"
    monkeypatch.setattr(started, lambda *_, **__: pytest.fail("generated"))
    (tmp_path / "results.json").write_text(text)
    command = ["reproduce", "sd15", "--model", "demo", "--out", str(tmp_path), "--limit", "2"]
    assert main(command) == 2
    assert "results.json in it" in capsys.readouterr().err


def test_plans_of_a_flow_with_its_own_length_of_text() -> None:
    with pytest.raises(InvalidArgument, match="max_sequence_length"):
        thg_engine.calibrate_plans(
            load_pipeline("flow"), PROMPTS, progress=False, max_sequence_length=100_000
        )
