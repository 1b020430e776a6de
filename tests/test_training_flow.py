"""Training, export and loading of the second boxed pipeline, on random latents."""

from __future__ import annotations

import argparse
from pathlib import Path

import diffusers
import pytest
import torch
import transformers

import thg_engine
from thg_engine import THG
from thg_engine.demo import load_pipeline
from thg_engine.demo.pipeline_loader import FLOW_DIR, FOLDERS
from thg_engine.errors import InvalidArgument, MissingWeights, ThgError
from training import card, data, evaluate, export, train_flow
from training.captions import strata
from training.flow_model import FlowModel, build_scheduler
from training.tokenizer import build_tokenizer

CALL = {"num_inference_steps": 2, "max_sequence_length": 1, "output_type": "pt"}


def write_latents(runs: Path) -> None:
    """What ``train_vae`` leaves, with random numbers for images."""
    generator = torch.Generator().manual_seed(1)
    runs.mkdir(parents=True, exist_ok=True)
    parts = {
        name: torch.randint(bound, (64,), generator=generator)
        for name, bound in (("classes", 10), ("colours", 8), ("tones", 3))
    }
    latents = torch.randn(64, 4, 8, 8, generator=generator) - 0.25
    torch.save({"latents": latents, "scaling_factor": 0.5, **parts}, runs / "latents.pt")


def flags(runs: Path, *more: str) -> argparse.Namespace:
    given = ["--out", str(runs), "--steps", "2", "--batch-size", "8", *more]
    return train_flow.command_line().parse_args(given)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_latents(folder)
    train_flow.train(flags(folder))
    return folder


@pytest.fixture(scope="module")
def exported(runs: Path) -> Path:
    folder = runs / "box" / "flow"
    export.export_flow(runs, folder)
    return folder


@pytest.fixture(scope="module")
def pipe(exported: Path) -> diffusers.StableDiffusion3Pipeline:
    return load_pipeline("flow", path=exported)


# The one in the box, once it is there, has to pass as well.
@pytest.fixture(params=["exported", *(["box"] if FLOW_DIR.is_dir() else [])])
def folder(request: pytest.FixtureRequest, exported: Path) -> Path:
    return exported if request.param == "exported" else FLOW_DIR


def test_components_are_genuine(folder: Path) -> None:
    pipe = load_pipeline("flow", path=folder)
    assert type(pipe) is diffusers.StableDiffusion3Pipeline
    assert type(pipe.transformer) is diffusers.SD3Transformer2DModel
    assert type(pipe.scheduler) is diffusers.FlowMatchEulerDiscreteScheduler
    assert type(pipe.vae) is diffusers.AutoencoderKL
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        assert type(encoder) is transformers.CLIPTextModelWithProjection
    for tokenizer in (pipe.tokenizer, pipe.tokenizer_2):
        assert isinstance(tokenizer, transformers.CLIPTokenizer)
    assert pipe.text_encoder_3 is None and pipe.tokenizer_3 is None
    assert {parameter.dtype for parameter in pipe.transformer.parameters()} == {torch.float32}
    processors = {type(p).__name__ for p in pipe.transformer.attn_processors.values()}
    assert processors == {"JointAttnProcessor2_0"}


def test_files(folder: Path) -> None:
    assert export.folder_bytes(folder) <= 6_000_000
    suffixes = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert suffixes == {".json", ".md", ".safetensors", ".txt"}  # what the wheel takes
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "Fashion-MNIST" in text
    assert "$" not in text
    card.check_card(folder / "README.md")


def test_calls(pipe: diffusers.StableDiffusion3Pipeline) -> None:
    def call(prompt: str | list[str], seed: int = 0, **more: object) -> torch.Tensor:
        return pipe(
            prompt, generator=torch.Generator().manual_seed(seed), **{**CALL, **more}
        ).images

    image = call("a photo of a dark red dress")
    assert image.shape == (1, 3, 32, 32) and image.isfinite().all()
    negative = {"negative_prompt": ["a bag", ""], "num_images_per_prompt": 2}
    assert call(["a red bag", "a blue dress"], **negative).shape == (4, 3, 32, 32)
    assert call("a red bag", max_sequence_length=256).shape == (1, 3, 32, 32)
    assert call("a red bag", output_type="pil")[0].size == (32, 32)
    latent = call("a red bag", output_type="latent")
    assert latent.shape == (1, 4, 8, 8)
    assert not torch.equal(latent, call("a blue dress", output_type="latent"))
    assert torch.equal(latent, call("a red bag", output_type="latent", negative_prompt=""))


def test_guidance_methods(pipe: diffusers.StableDiffusion3Pipeline) -> None:
    def call() -> torch.Tensor:
        given = {**CALL, "num_inference_steps": 8, "output_type": "latent"}
        return pipe("a red bag", generator=torch.Generator().manual_seed(0), **given).images

    stock = call()
    try:
        thg_engine.compile(pipe, "cfg")
        assert torch.equal(call(), stock)
        thg_engine.compile(pipe, THG(grid=2))
        assert call().isfinite().all()
        assert pipe.thg.stats()["last_nfe"] == pipe.thg.plan.nfe < 16
    finally:
        thg_engine.uncompile(pipe)


def test_half_precision(exported: Path) -> None:
    pipe = load_pipeline("flow", torch.float16, exported)
    assert {part.dtype for part in (pipe.transformer, pipe.vae, pipe.text_encoder)} == {
        torch.float16
    }


def test_counted_zero_tokens_are_many_zero_tokens() -> None:
    """What training computes with one weighted token is what the pipeline does with n of them."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(data.vocabulary())
    model = FlowModel(tokenizer).double().eval()
    for parameter in model.transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    captions = ["a photo of a red dress", "", "a bag"]
    tokens = torch.tensor(tokenizer(captions, padding="max_length").input_ids)
    noisy = torch.randn(3, 4, 8, 8, dtype=torch.float64)
    sigma = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    counts = torch.tensor([1.0, 16.0, 256.0], dtype=torch.float64)
    with torch.no_grad():
        context, pooled = model.encode(tokens)
        stock = [
            model.transformer(
                noisy[i : i + 1],
                torch.cat([context[i : i + 1], torch.zeros(1, int(count), 96).double()], 1),
                pooled[i : i + 1],
                1000 * sigma[i : i + 1],
            ).sample
            for i, count in enumerate(counts)
        ]
        model.count_zero_tokens()
        counted = model(noisy, sigma, tokens, counts)
    torch.testing.assert_close(counted, torch.cat(stock), rtol=1e-6, atol=1e-6)


def test_encoding_is_the_pipelines(pipe: diffusers.StableDiffusion3Pipeline) -> None:
    model = FlowModel(pipe.tokenizer).eval()
    model.text_encoder, model.text_encoder_2 = pipe.text_encoder, pipe.text_encoder_2
    tokens = torch.tensor(pipe.tokenizer(["a red bag", ""], padding="max_length").input_ids)
    with torch.no_grad():
        context, pooled = model.encode(tokens)
        embeds = pipe.encode_prompt("a red bag", None, None, max_sequence_length=3)
    torch.testing.assert_close(torch.cat([embeds[0], embeds[1]])[:, :16], context)
    torch.testing.assert_close(torch.cat([embeds[2], embeds[3]]), pooled)
    assert embeds[0].shape == (1, 19, 96) and not embeds[0][:, 16:].any()


def test_velocity_is_the_schedulers(runs: Path) -> None:
    """With the true velocity, the pipeline's scheduler walks from noise to the centred latents."""
    source = train_flow.FlowLatents(flags(runs), build_tokenizer(data.vocabulary()))
    noisy, sigma, velocity, _, zero_tokens = source.batch(torch.Generator().manual_seed(3))
    mixed = sigma[:, None, None, None]
    x_0, noise = noisy - mixed * velocity, noisy + (1 - mixed) * velocity
    assert source.data["latents"].mean().abs() < 1e-5
    assert source.shift_factor == pytest.approx(-0.5, abs=0.1)
    assert ((zero_tokens >= 1) & (zero_tokens <= 256)).all()
    scheduler = build_scheduler()
    scheduler.set_timesteps(5)
    assert scheduler.timesteps[0] == 1000 and scheduler.sigmas[0] == 1
    sample = noise
    for t in scheduler.timesteps:
        sample = scheduler.step(velocity, t, sample, return_dict=False)[0]
    torch.testing.assert_close(sample, x_0, rtol=1e-4, atol=1e-4)


def test_latents_come_from_the_box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(2)
    grey = torch.randint(256, (20, 32, 32), generator=generator, dtype=torch.uint8)
    garments = data.Garments(grey, torch.arange(20) % 10, torch.arange(20) % 3)
    monkeypatch.setattr(data, "load", lambda folder, split: garments)
    given = flags(tmp_path / "new")
    train_flow.ensure_latents(given)
    source = train_flow.FlowLatents(given, build_tokenizer(data.vocabulary()))
    latents = source.data["latents"]
    assert latents.shape == (40, 4, 8, 8) and latents.dtype == torch.float32
    assert latents.std().item() == pytest.approx(1, abs=1e-3)
    saved = given.out / "latents.pt"
    before = saved.stat().st_mtime_ns
    train_flow.ensure_latents(given)  # they are there: kept
    assert saved.stat().st_mtime_ns == before


def test_noise_levels() -> None:
    levels = train_flow.noise_levels(8000, torch.Generator().manual_seed(0))
    uniform, rest = levels[::8], torch.cat([levels[k::8] for k in range(1, 8)])
    assert levels.min() > 0 and levels.max() < 1
    assert uniform.quantile(0.1).item() == pytest.approx(0.1, abs=0.01)
    logits = rest.logit()
    assert logits.mean().item() == pytest.approx(0, abs=0.02)
    assert logits.std().item() == pytest.approx(1, abs=0.02)
    drawn = strata(10, torch.Generator().manual_seed(0))
    assert torch.equal((10 * drawn).long(), torch.arange(10))


def test_interrupted_training_ends_where_an_unbroken_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = []
    step = train_flow._step
    for stops in (False, True):
        torch.manual_seed(0)
        runs = tmp_path / str(stops)
        write_latents(runs)
        given = flags(runs, "--steps", "4", "--save-every", "2")
        if stops:
            calls = iter([step, step, step])  # a fourth call finds none: stopped after a save
            monkeypatch.setattr(train_flow, "_step", lambda *a, calls=calls: next(calls)(*a))
            with pytest.raises(StopIteration):
                train_flow.train(given)
            monkeypatch.setattr(train_flow, "_step", step)
        train_flow.train(given)
        ends.append(torch.load(runs / "flow.pt", weights_only=True))
    assert ends[0]["step"] == ends[1]["step"] == 4
    for name, value in ends[0]["average"].items():
        assert torch.equal(value, ends[1]["average"][name]), name


def test_card_takes_measurements_twice(exported: Path, tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text((exported / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    numbers = {"class_accuracy": 0.9, "colour_accuracy": 1.0, "joint_accuracy": 0.9}
    rows = [{"w": w, "seconds": 7.0, "frechet": 3.25, **numbers} for w in ("real", 1.0, 7.5)]
    result = {
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "shift": 1.0,
        "steps": 28,
        "samples": 512,
        "t5_tokens": 1,
        "machine": "a machine",
        "rows": rows,
    }
    for samples in (512, 1024):
        card.fill_measured(path, {**result, "samples": samples})
    text = path.read_text(encoding="utf-8")
    assert "| 7.5 | 0.900 | 1.000 | 0.900 | 3.25 | 7 |" in text
    assert "1024 samples" in text and "512 samples" not in text and "Not yet" not in text
    path.write_text("another card", encoding="utf-8")
    with pytest.raises(SystemExit, match="markers are missing"):
        card.check_card(path)


def test_evaluation_draws_both_pipelines(pipe: diffusers.StableDiffusion3Pipeline) -> None:
    args = evaluate.command_line().parse_args(["--steps", "2", "--batch-size", "2"])
    for each in (pipe, load_pipeline()):
        assert evaluate.generate(each, ["a red bag"] * 3, args, 3.0).shape == (3, 3, 32, 32)


def test_names_and_missing_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidArgument, match=r"name='sdxl': use one of 'sd', 'flow'\."):
        load_pipeline("sdxl")
    monkeypatch.setitem(FOLDERS, "flow", tmp_path / "flow")
    with pytest.raises(MissingWeights, match=r"training\.export --flow") as caught:
        load_pipeline("flow")
    assert isinstance(caught.value, ThgError) and isinstance(caught.value, FileNotFoundError)
