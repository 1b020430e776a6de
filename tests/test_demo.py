"""The pipeline in the box is a genuine, trained, guided pipeline within its size."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import torch
import transformers

import thg_engine.demo as demo
import thg_engine.demo.compare as compare
from thg_engine.demo.classifier import CLASSES, COLOURS, WEIGHTS
from thg_engine.demo.compare import methods, prompts
from thg_engine.demo.pipeline_loader import FLOW_DIR, PIPELINE_DIR
from thg_engine.fitting.shipped import shipped_front
from thg_engine.integrations.diffusers.resolve import fingerprint


def test_components_are_genuine():
    pipe = demo.load_pipeline()
    assert type(pipe) is diffusers.StableDiffusionPipeline
    assert type(pipe.vae) is diffusers.AutoencoderKL
    assert type(pipe.unet) is diffusers.UNet2DConditionModel
    assert type(pipe.text_encoder) is transformers.CLIPTextModel
    assert isinstance(pipe.tokenizer, transformers.CLIPTokenizer)
    config = pipe.scheduler.config
    sd15 = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "prediction_type": "epsilon",
    }
    assert isinstance(pipe.scheduler, diffusers.DDIMScheduler)
    assert {key: config[key] for key in sd15} == sd15


def test_sizes():
    files = [path for path in PIPELINE_DIR.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8_000_000
    assert WEIGHTS.stat().st_size <= 1_000_000
    from safetensors import safe_open

    for path in [*PIPELINE_DIR.rglob("*.safetensors"), WEIGHTS]:
        with safe_open(path, "pt") as weights:
            dtypes = {weights.get_tensor(key).dtype for key in weights.keys()}  # noqa: SIM118
        assert torch.float16 in dtypes
        assert torch.float32 not in dtypes
    assert "Fashion-MNIST" in Path(PIPELINE_DIR, "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_guidance_matters():
    """Class accuracy rises clearly from w = 1 to w = 5 at 50 DDIM steps, on 160 images."""
    pipe, classifier = demo.load_pipeline(), demo.load_classifier()
    captions, classes, colours = prompts(160)
    accuracy = {}
    for scale in (1.0, 5.0):
        images = []
        generator = torch.Generator().manual_seed(0)
        for start in range(0, len(captions), 40):
            part = captions[start : start + 40]
            images.append(
                pipe(
                    part,
                    num_inference_steps=50,
                    guidance_scale=scale,
                    generator=generator,
                    output_type="pt",
                ).images
            )
        class_logits, colour_logits = classifier(torch.cat(images))
        right = class_logits.argmax(1) == classes
        accuracy[scale] = right.float().mean().item()
        both = (right & (colour_logits.argmax(1) == colours)).float().mean().item()
        accuracy[scale, "joint"] = both
    assert accuracy[5.0] >= 0.95
    assert accuracy[5.0] - accuracy[1.0] >= 0.08
    assert accuracy[5.0, "joint"] > accuracy[1.0, "joint"]


def test_components_of_the_flow_are_genuine():
    pipe = demo.load_pipeline("flow")
    assert type(pipe) is diffusers.StableDiffusion3Pipeline
    assert type(pipe.transformer) is diffusers.SD3Transformer2DModel
    assert type(pipe.scheduler) is diffusers.FlowMatchEulerDiscreteScheduler
    assert type(pipe.text_encoder) is transformers.CLIPTextModelWithProjection
    assert pipe.text_encoder_3 is None
    files = [path for path in FLOW_DIR.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 6_000_000


def test_guidance_matters_to_the_flow():
    """Class accuracy rises clearly from w = 1 to w = 5 at 14 Euler steps, on 80 images."""
    pipe, classifier = demo.load_pipeline("flow"), demo.load_classifier()
    captions, classes, _ = prompts(80)
    accuracy = {}
    for scale in (1.0, 5.0):
        images = pipe(
            captions,
            num_inference_steps=14,
            guidance_scale=scale,
            generator=torch.Generator().manual_seed(0),
            max_sequence_length=1,
            output_type="pt",
        ).images
        accuracy[scale] = (classifier(images)[0].argmax(1) == classes).float().mean().item()
    assert accuracy[5.0] >= 0.93
    assert accuracy[5.0] - accuracy[1.0] >= 0.08


def test_prompts_cover_classes_and_colours():
    captions, classes, colours = prompts(80)
    assert len(set(captions)) == 80
    assert set(classes.tolist()) == set(range(len(CLASSES)))
    assert set(colours.tolist()) == set(range(len(COLOURS)))
    assert captions[0] == f"a photo of a {COLOURS[0]} {CLASSES[0]}"
    assert not any(" a orange" in caption for caption in captions)


def test_methods_spend_the_same_budget():
    lambdas = [-3 + 0.12 * i for i in range(50)]
    guided = [method.guidance for method in methods() if method.guidance is not None]
    for guidance in guided:
        rows = guidance.rows(lambdas, 5.0)
        assert sum(1 + row.evaluates_both for row in rows) == 70
    assert len(guided) == 3 and methods()[1].num_steps == 35


def test_no_plan_is_shown_where_it_is_not_fitted(monkeypatch):
    """Beyond the calibrated scales rows would be unfitted, under the name of a plan."""
    ran = []
    found = {}

    class Runner:
        batches = ()

        def __init__(self, pipe, captions, settings):
            self.plans = shipped_front(fingerprint(pipe.unet))

        def converged(self):
            return torch.zeros(1)

        def run(self, method):
            ran.append(method.label)
            raise StopIteration

    monkeypatch.setattr(compare, "_Runner", Runner)
    monkeypatch.setattr(compare, "methods", lambda: methods()[5:] + methods()[:1])
    for scale in (5.0, 9.0):
        with pytest.raises(StopIteration):
            compare.compare(compare.Settings(guidance_scale=scale), progress=False)
        found[scale] = ran.pop()
    assert found == {5.0: "plan, nfe=40", 9.0: "CFG"}


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="model_index"):
        demo.load_pipeline(path=tmp_path)
    with pytest.raises(FileNotFoundError, match="no classifier weights"):
        demo.load_classifier(tmp_path / "none.safetensors")
