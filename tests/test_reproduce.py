"""``thg-engine reproduce`` end to end on the pipeline in the box."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

from thg_engine.cli import main
from thg_engine.demo import load_classifier
from thg_engine.demo.compare import prompts
from thg_engine.errors import InvalidArgument, MissingPackage, MissingWeights, ThgError
from thg_engine.guidance import CFGCache
from thg_engine.reproduce import methods
from thg_engine.reproduce.checks import check_metrics
from thg_engine.reproduce.distances import mmd
from thg_engine.reproduce.generation import Sampler, Shard
from thg_engine.reproduce.methods import SOLVERS, Context, guidance_of, register_guidance
from thg_engine.reproduce.metrics import METRICS, Samples, Setting
from thg_engine.reproduce.request import check
from thg_engine.reproduce.running import generate
from thg_engine.reproduce.samples import Folder, read_wav, write_wav, write_whole
from thg_engine.reproduce.tables import table, tables

ROWS = "cfg,cfg-cache,thg,cfg-20,thg-20"
COUNT = 4


def command(out: Path, *more: str, rows: str = ROWS, count: int = COUNT) -> list[str]:
    fixed = ["reproduce", "same-budget", "--model", "demo", "--rows", rows, "--out", str(out)]
    return [*fixed, "--limit", str(count), "--batch-size", "2", *more]


def request(*arguments: str):
    """What `check` makes of a command line."""
    parser = argparse.ArgumentParser()
    from thg_engine.reproduce.cli import add_parser

    add_parser(parser.add_subparsers())
    return check(parser.parse_args(list(arguments)))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One run: its folder, its status, what it printed."""
    out = tmp_path_factory.mktemp("reproduced")
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr(
            "sys.stdout",
            SimpleNamespace(
                write=lines.append, flush=lambda: None, isatty=lambda: False, encoding="utf-8"
            ),
        )
        status = main(command(out))
    return out, status, "".join(lines)


@pytest.fixture(scope="module")
def results(made):
    """Its rows by name."""
    document = json.loads((made[0] / "results.json").read_text())
    return {row["row"]: row for row in document["rows"]}


def pixels(folder: Path, count: int = COUNT) -> np.ndarray:
    """Images ``(B, H, W, 3)`` of a row, read without the code under test."""
    return np.stack([np.asarray(Image.open(folder / f"{i:06d}.png")) for i in range(count)])


def features(images: np.ndarray) -> np.ndarray:
    """The classifier's, float64."""
    batch = torch.from_numpy(images.copy()).permute(0, 3, 1, 2).float() / 255
    return load_classifier().features(batch).double().numpy()


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


def brute_mmd(x: np.ndarray, y: np.ndarray, sigma: float = 10.0) -> float:
    def kernel(a, b):
        return float(
            np.mean([[np.exp(-((p - q) ** 2).sum() / (2 * sigma**2)) for q in b] for p in a])
        )

    return 1000 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y))


def test_published_stands_beside_measured(made, results):
    _, status, printed = made
    assert status == 0
    assert printed.count("14.232 | ") == 1 and "14.232 | -" not in printed
    assert results["thg"]["published"] == {
        **{"fid": 14.232, "cmmd": 0.59354, "clip-score": 26.197, "image-reward": 0.11576},
        "psnr": 24.16,
    }
    assert set(results["thg"]["measured"]) == {
        *("fid", "cmmd", "psnr", "class-accuracy", "joint-accuracy"),
    }
    assert f"14.232 | {results['thg']['measured']['fid']:.3f}" in printed
    assert "not to be compared" in printed and "full guidance from other seeds" in printed


def test_evaluations_are_counted(results):
    expected = {"cfg": 100, "thg": 70, "cfg-20": 40}
    for name, nfe in expected.items():
        assert results[name]["nfe"] == {"published": nfe, "plan": nfe, "counted": nfe}
    # The grid of this row is ours, from the calibration in the box: the plan may differ from the
    # published cost, what is counted may not differ from the plan.
    ours = results["thg-20"]["nfe"]
    assert ours["published"] == 30 and 20 < ours["counted"] == ours["plan"] <= 40


def test_a_method_that_is_not_there_is_not_replaced(made, results):
    """Until it arrives: then this row has scores, and the next test is the one that stays."""
    if results["cfg-cache"]["measured"]:
        pytest.skip("the frequency weights of CFG-Cache have arrived")
    row = results["cfg-cache"]
    assert row["measured"] == {} and row["published"]["fid"] == 14.422
    assert "cfg-cache-fft" in row["unavailable"]
    assert "cfg-cache: not available:" in made[2]
    assert not (made[0] / "cfg-cache").exists()


def test_scores_are_those_of_an_independent_computation(made, results):
    out = made[0]
    ours, base, real = (pixels(out / name) for name in ("thg", "cfg", "reference"))
    measured = results["thg"]["measured"]
    x, y = features(real), features(ours)
    unit = [f / np.linalg.norm(f, axis=1, keepdims=True) for f in (x, y)]
    assert measured["cmmd"] == pytest.approx(brute_mmd(*unit), abs=1e-6)
    square = ((ours.astype(float) - base) ** 2).reshape(COUNT, -1).mean(1)
    assert measured["psnr"] == pytest.approx(np.mean(10 * np.log10(255**2 / square)), abs=1e-4)
    _, classes, colours = prompts(COUNT)
    batch = torch.from_numpy(ours).permute(0, 3, 1, 2).float() / 255
    found = [logits.argmax(1) for logits in load_classifier()(batch)]
    assert measured["class-accuracy"] == (found[0] == classes).float().mean().item()
    both = (found[0] == classes) & (found[1] == colours)
    assert measured["joint-accuracy"] == both.float().mean().item()


@pytest.mark.filterwarnings("ignore:Matrix is singular")  # features that are 0 on all images
def test_frechet_distance_against_scipy(tmp_path):
    """More images than features, so that square roots of matrices are well conditioned."""
    generator = np.random.default_rng(0)
    sets = []
    for name, spread in (("a", 255), ("b", 140)):
        (tmp_path / name).mkdir()
        coarse = generator.integers(0, spread, (160, 4, 4, 3), dtype=np.uint8)
        images = coarse.repeat(8, 1).repeat(8, 2)
        for i, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / name / f"{i:06d}.png")
        sets.append(features(images))
    files = [sorted((tmp_path / name).iterdir()) for name in ("a", "b")]
    score = METRICS["fid"].make(Setting(files[0], (32, 32), boxed=True))
    first = score(Samples(files[1], [""] * 160))
    assert score(Samples(files[1], [""] * 160)) == first  # nothing is left of the last row
    (m1, m2), (s1, s2) = ([f.mean(0) for f in sets], [np.cov(f.T) for f in sets])
    root = scipy.linalg.sqrtm(s1 @ s2).real
    expected = ((m1 - m2) ** 2).sum() + np.trace(s1 + s2 - 2 * root)
    assert first == pytest.approx(expected, rel=1e-4)


def test_mmd_against_brute_force():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 7, generator=generator, dtype=torch.float64) * 9 for n in (13, 8))
    assert mmd(x, y) == pytest.approx(brute_mmd(x.numpy(), y.numpy()), rel=1e-10)
    assert mmd(x, x) == pytest.approx(0, abs=1e-9)


class Interrupted:
    """Saves that end in Ctrl-C after some; counts denoiser calls and pipelines on the way."""

    def __init__(self, monkeypatch, after: int) -> None:
        self.left, self.calls, self.loads = after, 0, 0
        save, count, load = Sampler._save, Sampler._count, Sampler._load

        def stop(sampler, path, sample):
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            save(sampler, path, sample)

        def counted(sampler, *arguments):
            self.calls += 1
            count(sampler, *arguments)

        def loaded(sampler):
            self.loads += 1
            return load(sampler)

        monkeypatch.setattr(Sampler, "_save", stop)
        monkeypatch.setattr(Sampler, "_count", counted)
        monkeypatch.setattr(Sampler, "_load", loaded)


def test_an_interrupted_run_goes_on(made, tmp_path, monkeypatch, capsys):
    seen = Interrupted(monkeypatch, after=2)
    arguments = command(tmp_path, "--metrics", "none", rows="cfg-20")
    assert main(arguments) == 130
    assert sorted(bytes_of(tmp_path / "cfg-20")) == ["000000.png", "000001.png"]
    assert not list((tmp_path / "cfg-20").glob(".*"))  # no half a file
    assert seen.calls == 40  # two batches of 20 steps, the second one lost
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "cfg-20").glob("*.png")}

    seen.left, seen.calls = -1, 0
    assert main(arguments) == 0
    assert seen.calls == 20  # the batch that was lost, and nothing else
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    assert bytes_of(tmp_path / "cfg-20") == bytes_of(made[0] / "cfg-20")

    seen.calls = seen.loads = 0
    assert main(arguments) == 0
    assert seen.calls == seen.loads == 0


def test_more_prompts_may_follow(tmp_path, monkeypatch):
    seen = Interrupted(monkeypatch, after=-1)
    for count, calls in ((2, 20), (4, 20), (2, 0)):
        seen.calls = 0
        arguments = command(tmp_path, "--metrics", "none", rows="cfg-20", count=count)
        assert main(arguments) == 0
        assert seen.calls == calls
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["rows"][0]["samples"] == 2
    assert document["rows"][0]["nfe"]["counted"] == 40


def test_shards_make_the_same_files(made, tmp_path):
    """Two processes against one, byte for byte; and each sample belongs to exactly one of them."""
    line = command(tmp_path, "--metrics", "none", rows="cfg-20,thg-20")
    parts = [Shard(i, 2).batches(7, 2) for i in (0, 1)]
    assert sorted(i for part in parts for batch in part for i in batch) == list(range(7))
    for index in (0, 1):
        generate(request(*line), Shard(index, 2), progress=False)
        assert len(bytes_of(tmp_path / "cfg-20")) == 2 * (index + 1)
    for row in ("cfg-20", "thg-20"):
        assert bytes_of(tmp_path / row) == bytes_of(made[0] / row)
        records = sorted(path.name for path in (tmp_path / row).glob("*.jsonl"))
        assert records == ["evaluations-0.jsonl", "evaluations-1.jsonl"]
    assert Folder(tmp_path / "cfg-20", "image").evaluations() == (40.0, 40)


def test_the_batch_size_decides_nothing(made, tmp_path):
    """But the rounding of kernels that take another path for another size: one level of 255."""
    line = command(tmp_path, "--metrics", "none", "--batch-size", "3", rows="cfg-20")
    generate(request(*line), Shard(), progress=False)
    gap = pixels(tmp_path / "cfg-20").astype(int) - pixels(made[0] / "cfg-20")
    assert np.abs(gap).max() <= 1


def test_images_differ_and_follow_the_seed(made):
    images = pixels(made[0] / "cfg-20").astype(float)
    assert all(np.abs(images[i] - images[0]).mean() > 5 for i in range(1, COUNT))
    reference = pixels(made[0] / "reference").astype(float)
    gaps = np.abs(reference - pixels(made[0] / "cfg")).mean((1, 2, 3))
    assert (gaps > 1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--seed", "1"], "seed = 0, this run has 1"),
        (["--dtype", "bfloat16"], "dtype = 'float32', this run has 'bfloat16'"),
        (["--prompts", "PROMPTS"], "was made of other prompts"),
    ],
)
def test_a_folder_of_other_settings_is_refused(made, change, message, tmp_path, capsys):
    captions = tmp_path / "captions.txt"
    captions.write_text("a photo of a red bag\na photo of a blue coat\n")
    before = {path: path.stat().st_mtime_ns for path in made[0].rglob("*")}
    arguments = [str(captions) if part == "PROMPTS" else part for part in change]
    assert main(command(made[0], *arguments)) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert {path: path.stat().st_mtime_ns for path in made[0].rglob("*")} == before


def test_scores_of_an_earlier_run_stay(made, results):
    """As when one environment has one package and another the next."""
    assert main(command(made[0], "--metrics", "cmmd", rows="thg")) == 0
    document = json.loads((made[0] / "results.json").read_text())
    after = {row["row"]: row for row in document["rows"]}
    assert after["thg"]["measured"] == results["thg"]["measured"]
    assert after["cfg"] == results["cfg"]


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


def test_half_a_file_never_takes_the_name(tmp_path):
    def cut_short(path):
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "a.png", cut_short)
    assert not list(tmp_path.iterdir())


def test_sound_survives_the_disk(tmp_path):
    sound = np.sin(np.linspace(0, 40, 1600)) * 1.2  # beyond full scale: clipped, not wrapped
    write_wav(tmp_path / "a.wav", sound, 16_000)
    found, rate = read_wav(tmp_path / "a.wav")
    assert rate == 16_000
    np.testing.assert_allclose(found, np.clip(sound, -1, 1), atol=1 / 32767)


def test_sounds_are_made_counted_and_resumed(tmp_path, monkeypatch):
    """On a genuine AudioLDM 2 of tiny random parts, with fewer steps than the table's."""
    from thg_engine.reproduce.generation import Job
    from zoo_videos_audio import audioldm2

    pipe, arguments = audioldm2()
    pipe.set_progress_bar_config(disable=True)
    # Its decoder paints three channels, which no vocoder can voice: latents as sound will do.
    pipe.mel_spectrogram_to_waveform = lambda mel: mel.flatten(1)
    monkeypatch.setattr(Sampler, "_load", lambda self: listening(self, pipe))
    chosen = replace(table("audioldm2"), guidance_scale=arguments["guidance_scale"])
    captions = tuple(arguments["prompt"])[:2] if isinstance(arguments["prompt"], list) else ()
    captions = captions or (arguments["prompt"],) * 2
    job = Job(chosen, "demo", captions, 0, torch.float32, None, tmp_path, 2)
    row = replace(chosen.rows[1], num_steps=6, options={"interval": 2, "start": 0.5})
    Sampler(job).run(row, guidance_of(row, Context("audioldm2")))
    folder = job.folder(row.name)
    sounds = [read_wav(path) for path in folder.files(2)]
    assert all(np.isfinite(sound).all() and len(sound) > 0 for sound, _ in sounds)
    assert {rate for _, rate in sounds} == {pipe.vocoder.config.sampling_rate}
    assert folder.evaluations() == (11.0, 11)  # 6 rows, both branches in 0, 1, 2, 3, 5
    Sampler(job).run(row, guidance_of(row, Context("audioldm2")))
    assert folder.evaluations() == (11.0, 11) and len(list(folder.path.glob("*.jsonl"))) == 1


def listening(sampler, pipe):
    """The pipeline with the sampler's counter, as `Sampler._load` leaves it."""
    sampler._first_layer(pipe).register_forward_hook(sampler._count)
    return pipe


def test_fad_scores_the_first_samples_alone(tmp_path, monkeypatch):
    """Against a stand-in with the package's interface: it takes folders, and -1 is its failure."""
    seen = {}

    class FrechetAudioDistance:
        def __init__(self, **options):
            seen["options"] = options

        def score(self, background, evaluated):
            seen["folders"] = [len(os.listdir(folder)) for folder in (background, evaluated)]
            return seen.get("answer", 2.5)

    stand_in = SimpleNamespace(FrechetAudioDistance=FrechetAudioDistance)
    monkeypatch.setitem(sys.modules, "frechet_audio_distance", stand_in)
    files = [tmp_path / f"{i:06d}.wav" for i in range(5)]
    for path in files:
        write_wav(path, np.zeros(160), 16_000)
    score = METRICS["fad"].make(Setting(reference=files, weights={"fad": tmp_path}))
    assert score(Samples(files[:3], ["a"] * 3)) == 2.5
    assert seen["folders"] == [5, 3]
    wanted = {"model_name": "vggish", "sample_rate": 16_000, "ckpt_dir": str(tmp_path)}
    assert seen["options"] == wanted
    seen["answer"] = -1
    with pytest.raises(ThgError, match="failed"):
        score(Samples(files[:3], ["a"] * 3))


def test_image_reward_pairs_prompts_with_files(tmp_path, monkeypatch):
    """Against a stand-in with the package's interface."""
    given = {}

    def load(name, **options):
        given.update(options, name=name)
        return SimpleNamespace(score=lambda prompt, path: len(prompt) + int(Path(path).stem))

    monkeypatch.setitem(sys.modules, "ImageReward", SimpleNamespace(load=load))
    score = METRICS["image-reward"].make(Setting(weights={"image-reward": tmp_path}))
    files = [tmp_path / "10.png", tmp_path / "20.png"]
    assert score(Samples(files, ["a", "bcd"])) == (11 + 23) / 2
    assert given["name"] == str(tmp_path / "ImageReward.pt")
    assert given["med_config"] == str(tmp_path / "med_config.json")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIP of random weights with the boxed pipeline's tokenizer."""
    import transformers

    from thg_engine.demo.pipeline_loader import PIPELINE_DIR

    folder = tmp_path_factory.mktemp("clip")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(PIPELINE_DIR / "tokenizer")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2, "projection_dim": 8}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**small, **ends, "vocab_size": len(tokenizer), "max_position_embeddings": 77}
    vision = {**small, "image_size": 16, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(folder)
    side = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    images = transformers.CLIPImageProcessor(**side)
    transformers.CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def test_clip_scores_against_the_model_itself(made, clip_folder):
    import transformers

    files = [made[0] / "cfg" / f"{i:06d}.png" for i in range(COUNT)]
    captions = prompts(COUNT)[0]
    weights = {"cmmd": clip_folder, "clip-score": clip_folder}
    real = [made[0] / "reference" / f"{i:06d}.png" for i in range(COUNT)]
    setting = Setting(real, (32, 32), weights, batch_size=3)
    model = transformers.CLIPModel.from_pretrained(clip_folder).eval()
    processor = transformers.CLIPProcessor.from_pretrained(clip_folder)
    images = [Image.open(path) for path in files]
    inputs = processor(text=captions, images=images, return_tensors="pt", padding=True)
    with torch.no_grad():
        out = model(**inputs)
    cosines = torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds)
    expected = max(100 * cosines.mean().item(), 0)  # torchmetrics' floor
    score = METRICS["clip-score"].make(setting)
    assert score(Samples(files, captions)) == pytest.approx(expected, abs=1e-3)
    embeds = []
    for folder in ("reference", "cfg"):
        x = torch.from_numpy(pixels(made[0] / folder)).permute(0, 3, 1, 2) / 255
        x = torch.nn.functional.interpolate(x, size=(16, 16), mode="bicubic")
        mean, std = (
            torch.tensor(v).view(1, 3, 1, 1)
            for v in (processor.image_processor.image_mean, processor.image_processor.image_std)
        )
        with torch.no_grad():
            e = pooled_embedding(model, (x - mean) / std)
        embeds.append((e / e.norm(dim=1, keepdim=True)).double().numpy())
    found = METRICS["cmmd"].make(setting)(Samples(files, captions))
    assert found == pytest.approx(brute_mmd(*embeds), abs=1e-6)


def pooled_embedding(model, pixel_values):
    """CLIP's image embedding, layer by layer."""
    return model.visual_projection(model.vision_model(pixel_values=pixel_values)[1])


def test_list_names_every_row_and_need(capsys):
    assert main(["reproduce", "--list"]) == 0
    printed = capsys.readouterr().out
    for key, one in tables().items():
        assert f"{key}: " in printed
        assert all(row.name in printed for row in one.rows)
    assert all(name in printed for name in METRICS)
    assert "pip install torch-fidelity" in printed
