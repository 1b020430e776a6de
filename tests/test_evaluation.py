"""The evaluation's file and command: resuming, refusals, plans that are ours, a run end to end."""

from __future__ import annotations

import dataclasses
import json
import math
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import thg_engine
from evaluation_boxes import flow_box, sd_box
from thg_engine.cli import main
from thg_engine.errors import InvalidArgument
from thg_engine.evaluation import cli, evaluate, ours, runner
from thg_engine.evaluation.methods import Method, guided, plain, unique
from thg_engine.evaluation.settings import QUICK, Settings
from thg_engine.evaluation.store import Store
from thg_engine.fitting import search, shipped
from thg_engine.fitting.front import PlanFront
from thg_engine.fitting.reference import make_nodes
from thg_engine.guidance import THG

COLUMNS = {
    *("method", "solver", "ours", "guidance_scale", "num_steps", "nfe", "seconds", "c2"),
    *("psnr_to_converged", "psnr_to_same_n", "rel_error", "ci95"),
}
TINY: dict[str, Any] = {
    "pipelines": ("sd",),
    "guidance_scales": (5.0,),
    "quality_scales": (2.0,),
    "solver_steps": (2,),
    "main_steps": (),
    "reuse_steps": (2,),
    "reuse_solvers": ("ddim",),
    "prompts": 2,
    "selection_prompts": 6,
    "seeds": 3,
    "reference_steps": 4,
    "quality_images": 8,
    "quality_steps": 2,
    "budgets": (8,),
}


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A handful of methods in the place of all: the command is under test here."""
    few = evaluate.baselines

    def some(*given: Any) -> Any:
        names = ("CFG", "one-gate delta reuse", "CFG-Cache")
        for method in few(*given):
            if method.name in names and method.solver in ("ddim", "dpmpp2m"):
                yield method

    monkeypatch.setattr(evaluate, "baselines", some)
    monkeypatch.setattr(evaluate, "REFERENCE_STEPS", 4)
    monkeypatch.setattr("thg_engine.evaluation.scores.REFERENCE_STEPS", 4)
    monkeypatch.setattr(
        search, "make_nodes", lambda schedule, end: make_nodes(schedule, 12, 1, end)
    )
    monkeypatch.setattr(shipped, "shipped_front", lambda _fingerprint: None)
    # The package has a function of the module's name.
    calibration = import_module("thg_engine.integrations.diffusers.calibrate_plans")
    monkeypatch.setattr(calibration, "STOCK_STEPS", (4,))
    for name, value in TINY.items():
        monkeypatch.setitem(QUICK, name, value)


@pytest.mark.usefixtures("short")
def test_quick_end_to_end_and_again(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    out = tmp_path / "out"
    command = ["evaluate", "--quick", "--pipeline", "sd", "--out", str(out)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "calibrated plan" in printed and "PSNR to converged" in printed
    assert "against the best baseline" in printed
    document = json.loads((out / "evaluate.json").read_text())
    assert (out / "sd-w5.png").read_bytes().startswith(b"\x89PNG")
    rows = document["rows"]
    compared = [(one["method"], one["num_steps"], one["cost"]) for one in document["comparison"]]
    ours_rows = [row for row in rows if row["ours"]]
    expected = {(r["method"], r["num_steps"], c) for r in ours_rows for c in ("nfe", "seconds")}
    assert set(compared) == expected and len(compared) == len(expected)
    assert all(set(row) >= COLUMNS for row in rows)
    assert {row["ours"] for row in rows} == {True, False}
    for row in rows:
        assert (row["psnr_to_same_n"] is None) == (row["method"] == "CFG")
        assert row["ci95"][0] <= row["psnr_to_converged"] <= row["ci95"][1]
        assert row["seconds"] > 0 and row["c2"] > 0 and row["seeds"] == 3
        if row["method"] == "calibrated plan":
            assert row["num_steps"] == 50 and row["nfe"] <= row["budget"] == 8
        else:
            assert row["num_steps"] <= row["nfe"] <= 2 * row["num_steps"]
            assert row["budget"] is None
    assert "calibrated plan" in {row["method"] for row in rows}
    assert "calibrated plan, 8 NFE" in printed
    quality = document["quality"]
    assert {row["guidance_scale"] for row in quality} == {2.0}
    assert all(row["images"] == 8 and math.isfinite(row["frechet_floor"]) for row in quality)
    assert all(0 <= row["class_accuracy"] <= 1 for row in quality)

    def never(*_given: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr(runner.Bench, "measure", never)
    monkeypatch.setattr(evaluate.Judge, "score", never)
    assert main(command) == 0
    again = json.loads((out / "evaluate.json").read_text())
    assert again["rows"] == rows and again["quality"] == quality
    assert len(again["runs"]) == 2
    assert main([*command, "--seed", "7"]) == 2
    assert "seed=0" in capsys.readouterr().err


@pytest.mark.usefixtures("short")
def test_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: Any) -> None:
    settings = Settings(**{**TINY, "quality_images": 0})
    box, whole = sd_box(), runner.Bench.measure
    count = [0]

    def stops(self: Any, method: Method) -> Any:
        count[0] += 1
        if count[0] == 5:
            raise KeyboardInterrupt
        return whole(self, method)

    monkeypatch.setattr(runner.Bench, "measure", stops)
    store = Store(tmp_path / "evaluate.json", settings.document(), {})
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(box, settings, store, lambda _text: None, progress=False)
    kept = json.loads((tmp_path / "evaluate.json").read_text())["pipelines"]["sd"]["measurements"]
    assert len(kept) == 4
    store = Store(tmp_path / "evaluate.json", settings.document(), {})
    evaluate.evaluate(box, settings, store, lambda _text: None, progress=False)
    part = store.document["pipelines"]["sd"]
    assert part["measurements"][:4] == kept
    assert len(part["measurements"]) == count[0] - 1 == 3 * len(part["catalogues"]["5"])
    assert len(store.document["rows"]) == len(part["catalogues"]["5"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "2"], "seeds=2"),
        (["--guidance-scales", "1"], "guidance_scales=1.0"),
        (["--prompts", "0"], "prompts=0"),
        (["--prompts", "41"], "prompts=41"),
        (["--seed", "900000"], "seed=900000"),
        (["--quality-images", "3"], "quality_images=3"),
        (["--data", "nowhere"], "--data='nowhere'"),
        (["--out", "FILE/sub"], "--out="),
        (["--out", "FOREIGN"], "cannot be read"),
    ],
)
def test_mistakes_end_in_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    def never(_name: str) -> None:
        raise AssertionError("loaded a pipeline")

    monkeypatch.setattr("thg_engine.evaluation.box.load_box", never)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "evaluate.json").write_text("[]")
    places = {"FILE/sub": "file/sub", "FOREIGN": "foreign"}
    assert main(["evaluate", *(places.get(a, a) for a in arguments)]) == 2
    stderr = capsys.readouterr().err
    assert message in stderr and len(stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"solver_steps": (30,)}, "divide 1000"),
        ({"reference_steps": 100}, "twice"),
        ({"pipelines": ("sd", "sd")}, "each once"),
        ({"pipelines": ("sdxl",)}, "use one of"),
    ],
)
def test_settings_are_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        Settings(**change)


def test_a_folder_belongs_to_one_evaluation(tmp_path: Path) -> None:
    path, settings = tmp_path / "evaluate.json", Settings()
    store = Store(path, settings.document(), {})
    store.part("sd", "aaaa")
    store.save(force=True)
    with pytest.raises(InvalidArgument, match="prompts=20"):
        Store(path, dataclasses.replace(settings, prompts=3).document(), {})
    with pytest.raises(InvalidArgument, match="another 'sd'"):
        Store(path, settings.document(), {}).part("sd", "bbbb")


def test_names_tell_methods_apart() -> None:
    one, two = (Method("x", "ddim", 10, plain) for _ in range(2))
    assert unique([one, one]) == [one]
    with pytest.raises(InvalidArgument, match="names of their own"):
        unique([one, dataclasses.replace(two, ours=True)])


def test_plans_of_a_front_are_points_of_ours(tmp_path: Path, monkeypatch: Any) -> None:
    """Fitted once, on selection prompts; compiled per budget."""
    asked: list[Any] = []

    def calibrate_plans(pipe: Any, prompts: Any, **options: Any) -> PlanFront:
        asked.append((prompts, options))
        return front_in_the_box()

    monkeypatch.setattr(thg_engine, "calibrate_plans", calibrate_plans)
    monkeypatch.setattr(shipped, "shipped_front", lambda _fingerprint: None)
    settings = Settings(**{**TINY, "budgets": (3, 5), "reuse_steps": ()})
    for _ in range(2):
        found = [*ours.our_methods(flow_box(), settings, tmp_path, lambda _text: None)]
    assert len(asked) == 1
    options = {"guidance_scales": [5.0, 2.0], "seed": 900_000, "budgets": (3, 5)}
    folder = {"work_dir": tmp_path / "calibration", "progress": True}
    assert asked[0][1] == {**options, **folder, "max_sequence_length": 1}
    assert not {*asked[0][0]} & {*cli_prompts(settings)}
    keys = [method.key for method in found if method.budget]
    assert keys == ["calibrated plan/dpmpp2m/50/3", "calibrated plan/dpmpp2m/50/5"]
    compiled: list[Any] = []
    monkeypatch.setattr(thg_engine, "compile", lambda pipe, **kwargs: compiled.append(kwargs))
    with found[-1].change(flow_box(), 50):
        assert compiled == [{"calibration": front_in_the_box(), "nfe": 5}]


def front_in_the_box() -> PlanFront:
    (front,) = (f for f in shipped.shipped_fronts() if f.model.endswith("(sd)"))
    return front


def test_plans_in_the_box_are_taken_where_they_reach(tmp_path: Path, monkeypatch: Any) -> None:
    """What a user gets without a calibration is what is measured."""

    def calibrate_plans(*_args: Any, **_options: Any) -> PlanFront:
        raise RuntimeError("calibrated")

    monkeypatch.setattr(thg_engine, "calibrate_plans", calibrate_plans)
    said: list[str] = []
    reach = front_in_the_box().guidance_scales
    settings = Settings(**{**TINY, "guidance_scales": reach, "quality_scales": reach})
    found = ours.chosen_front(sd_box(), settings, tmp_path, said.append)
    assert found == front_in_the_box() == PlanFront.load(tmp_path / "plans-sd.json")
    assert said == [f"sd: calibrated plans: those in the box, of {found.date}"]
    beyond = dataclasses.replace(settings, guidance_scales=(reach[-1] + 1,))
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(RuntimeError, match="calibrated"):
        ours.chosen_front(sd_box(), beyond, other, said.append)


def test_fitted_reuse_is_kept_and_meets_full_guidance(tmp_path: Path, monkeypatch: Any) -> None:
    """Closer to full guidance than extrapolation on the same rows, on prompts it has not seen."""
    box, point = sd_box(), ("ddim", 20)
    settings = Settings(**{**TINY, "reuse_steps": (20,), "reference_steps": 40})
    weights = ours.fitted_reuse(box, settings, tmp_path, point, "70%")
    monkeypatch.setattr(thg_engine, "fit_reuse", None)
    assert weights == ours.fitted_reuse(box, settings, tmp_path, point, "70%"), "read, not fitted"
    assert (tmp_path / "reuse-sd-ddim-20-70-percent.json").exists()
    bench = runner.Bench(box, evaluate.report_prompts(6), 5.0, 0, 40)
    linear, fitted = (
        bench.measure(Method(f"{guidance}", *point, guided(guidance)))
        for guidance in (THG(grid=ours.coarse_grid("70%", 20), reuse="linear"), THG(reuse=weights))
    )
    assert linear.nfe == fitted.nfe == 28
    assert fitted.psnr_to_same_n > linear.psnr_to_same_n + 1


def cli_prompts(settings: Settings) -> list[str]:
    return evaluate.report_prompts(settings.prompts)


def test_missing_flow_is_left_out_of_all(monkeypatch: Any, tmp_path: Path) -> None:
    from thg_engine.errors import MissingWeights

    def load(name: str) -> Any:
        if name == "flow":
            raise MissingWeights("not there")
        return sd_box()

    monkeypatch.setattr("thg_engine.evaluation.box.load_box", load)
    store, said = Store(tmp_path / "evaluate.json", {"seeds": 3}, {}), []
    assert cli._boxes(("sd", "flow"), True, store, said.append) == [sd_box()]
    assert "not there" in said[0]
    with pytest.raises(MissingWeights):
        cli._boxes(("flow",), False, store, said.append)
