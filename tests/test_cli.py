"""The command line: what it writes, what it says, how it refuses."""

from __future__ import annotations

import json

import pytest

from thg_engine import __version__
from thg_engine.cli import build_parser, main
from thg_engine.curves import Calibration


def test_help_teaches(capsys):
    commands = ([], ["demo"], ["calibrate"], ["reproduce"], ["doctor"])
    for arguments in ([*command, "--help"] for command in commands):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
        text = capsys.readouterr().out
        assert "usage: thg-engine" in text
        assert len(text.splitlines()) > 4
    with pytest.raises(SystemExit):
        main(["--version"])
    assert __version__ in capsys.readouterr().out


def test_every_command_has_a_function():
    parser = build_parser()
    every = (["demo"], ["doctor"], ["calibrate", "demo", "--prompts", "x"], ["reproduce", "--list"])
    for arguments in every:
        assert callable(parser.parse_args(arguments).run)


@pytest.fixture
def captions(tmp_path):
    file = tmp_path / "captions.txt"
    file.write_text("a photo of a red bag\n\na photo of a blue coat\na photo of a pink dress\n")
    return file


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--images", "0"], "images=0"),
        (["demo", "--guidance-scale", "1"], "guidance_scale=1.0"),
        (["calibrate", "demo", "--prompts", "missing.txt"], "--prompts='missing.txt'"),
        (["calibrate", "no/such/model", "--prompts", "CAPTIONS"], "MODEL='no/such/model'"),
        (["calibrate", "demo", "--prompts", "CAPTIONS", "--guidance-scale", "1"], "guidance_scale"),
        (["calibrate", "demo", "--prompts", "CAPTIONS", "--solver", "rk4"], "solver='rk4'"),
        (["calibrate", "demo", "--prompts", "CAPTIONS", "--steps", "0"], "num_inference_steps=0"),
        (["calibrate", "demo", "--prompts", "CAPTIONS", "--batch-size", "0"], "batch_size=0"),
        (["demo", "--out", "CAPTIONS/sub"], "--out="),
    ],
)
def test_mistakes_end_in_one_line(arguments, message, captions, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments = [argument.replace("CAPTIONS", str(captions)) for argument in arguments]
    assert main(arguments) == 2
    stderr = capsys.readouterr().err
    assert message in stderr
    assert "Traceback" not in stderr
    assert len(stderr.strip().splitlines()) == 1


def test_one_caption_is_too_few(tmp_path, capsys):
    file = tmp_path / "one.txt"
    file.write_text("a cat\n")
    assert main(["calibrate", "demo", "--prompts", str(file)]) == 2
    assert "at least two captions" in capsys.readouterr().err


def test_calibrate_writes_a_file_that_compile_takes(captions, tmp_path, capsys):
    import thg_engine
    from thg_engine.demo import load_pipeline

    out = tmp_path / "curves.json"
    arguments = ["calibrate", "demo", "--prompts", str(captions), "--out", str(out), "--steps", "8"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "IoU of halves" in printed
    curves = Calibration.load(out)
    assert (curves.num_prompts, curves.num_steps, curves.model) == (3, 8, "demo")
    pipe = thg_engine.compile(load_pipeline(), calibration=out, nfe=15)
    assert pipe.thg.preview(pipe.scheduler, 10).nfe <= 15


def test_doctor_prints_versions(capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for word in ("torch", "diffusers", "triton", "cuda"):
        assert word in printed


@pytest.mark.slow
def test_demo_measures_what_it_prints(tmp_path, capsys):
    assert main(["demo", "--quick", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    document = json.loads((tmp_path / "demo.json").read_text())
    rows = {row["method"]: row for row in document["methods"]}
    assert rows["CFG"]["nfe"] == 100
    assert {row["nfe"] for row in rows.values()} == {100, 70, 40, 24}
    for row in rows.values():
        assert row["seconds_per_image"] > 0
        assert row["c2"] == document["c2"] > 1
        assert row["method"] in printed
    assert rows["CFG"]["psnr_to_cfg"] is None
    # The point of a calibrated grid: closer to full guidance than the fixed interval.
    assert rows["THG"]["psnr_to_cfg"] > rows["CFG-Cache"]["psnr_to_cfg"]
    assert "but plans" in printed
    # And of a plan: closer to the solution than the full guidance that costs 2.5 times as much.
    plan, full = rows["plan, nfe=40"], rows["CFG"]
    assert plan["num_steps"] == 20
    assert plan["rel_error_to_converged"] < 0.5 * full["rel_error_to_converged"]
    assert document["machine"]
    assert "torch" in document["versions"]
    from PIL import Image

    with Image.open(tmp_path / "demo.png") as sheet:
        assert sheet.width > 600
        assert sheet.height > 900
