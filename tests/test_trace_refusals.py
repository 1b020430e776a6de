"""What tracing refuses, by class, by setting and by what strangers' steps do."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from scheduler_cases import CLASSES, available, build, names, prepared, real_run
from thg_engine.errors import UntraceableScheduler
from thg_engine.trace import trace, trace_cache_clear

TOLERANCE = 1e-6


@pytest.mark.parametrize("name", names("refused"))
def test_refused_class_is_named_with_its_reason(name):
    case = available(name)
    with pytest.raises(UntraceableScheduler, match=name) as error:
        trace(build(name), case.steps)
    assert case.reason in str(error.value)


@pytest.mark.parametrize(
    ("name", "config", "reason"),
    [
        ("DDIMScheduler", {"clip_sample": True}, "clip_sample=False"),
        ("DDPMScheduler", {"clip_sample": True}, "clip_sample=False"),
        ("HeunDiscreteScheduler", {"clip_sample": True}, "clip_sample=False"),
        ("DDIMScheduler", {"thresholding": True}, "thresholding=False"),
        ("DPMSolverMultistepScheduler", {"thresholding": True}, "thresholding=False"),
        ("UniPCMultistepScheduler", {"thresholding": True}, "thresholding=False"),
        ("CMStochasticIterativeScheduler", {"clip_denoised": True}, "clip_denoised=False"),
        ("DDPMScheduler", {"variance_type": "learned_range"}, "fixed variance_type"),
        ("DPMSolverMultistepScheduler", {"variance_type": "learned"}, "fixed variance_type"),
    ],
)
def test_clipping_and_learned_variance_are_named(name, config, reason):
    with pytest.raises(UntraceableScheduler, match=name) as error:
        trace(build(name, **config), 10)
    assert reason in str(error.value)


def test_documentation_lists_every_class():
    """docs/schedulers.md is written by tests/scheduler_report.py."""
    text = (Path(__file__).parents[1] / "docs" / "schedulers.md").read_text(encoding="utf-8")
    assert [name for name in CLASSES if f"| {name} |" not in text] == []


def test_setting_without_effect_is_no_reason_to_refuse():
    """CogVideoX' DDIM has clip_sample=True in its config and never reads it."""
    scheduler = build("CogVideoXDDIMScheduler")
    assert scheduler.config.clip_sample
    assert trace(scheduler, 5).residual < TOLERANCE


def test_non_finite_rows_are_refused_where_the_scheduler_itself_fails():
    config = {"predict_x0": False, "final_sigmas_type": "zero"}
    run = real_run(prepared("UniPCMultistepScheduler", 5, **config))
    assert not torch.isfinite(run.samples[-1]).all()
    with pytest.raises(UntraceableScheduler, match="row 4 has coefficients that are not finite"):
        trace(build("UniPCMultistepScheduler", **config), 5)


class Fake:
    """A linear first-order flow scheduler to break in one place at a time."""

    order = 1
    init_noise_sigma = 1.0

    def __init__(self, **config):
        self.config = {"num_train_timesteps": 1000, **config}

    def set_timesteps(self, num_inference_steps, device=None):
        self.sigmas = torch.linspace(1.0, 0.0, num_inference_steps + 1, dtype=torch.float64)
        self.timesteps = self.sigmas[:-1] * 1000
        self.i = 0

    def scale_model_input(self, sample, timestep):
        return sample

    def step(self, model_output, timestep, sample, return_dict=True):
        h = self.sigmas[self.i + 1] - self.sigmas[self.i]
        self.i += 1
        return (self.update(sample, h, model_output),)

    def update(self, x, h, v):
        return x + h * v


def _fake(update=None, **methods):
    fake = type("Broken", (Fake,), {**({"update": update} if update else {}), **methods})()
    fake.set_timesteps(4)
    return fake


def test_a_linear_stranger_is_traced():
    table = trace(_fake())
    assert [row.output_weights for row in table.rows] == [(-0.25,)] * 4
    assert table.prediction_type == "flow_prediction"
    assert table.residual < 1e-12


@pytest.mark.parametrize(
    ("methods", "cause"),
    [
        ({"update": lambda s, x, h, v: x + h * torch.tanh(v)}, "not linear"),
        ({"update": lambda s, x, h, v: x + h * v + 0.01}, "no window|not linear"),
        ({"update": lambda s, x, h, v: x + h * v.clamp(-30, 30)}, "not linear"),
        ({"update": lambda s, x, h, v: x + h * v / v.norm()}, "not linear"),
        ({"update": lambda s, x, h, v: x + h * (v - v.mean(1, keepdim=True))}, "not linear"),
        ({"update": lambda s, x, h, v: x + h * v.roll(1, -1)}, "not linear|no window"),
        ({"update": lambda s, x, h, v: x + h * torch.rand_like(x)}, "rand_like"),
        ({"update": lambda s, x, h, v: x + torch.randn(3)}, "noise of shape"),
        (
            {"update": lambda s, x, h, v: x + torch.randn_like(x) + torch.randn_like(v)},
            "more than one noise",
        ),
        ({"update": lambda s, x, h, v: x[..., :1]}, "shape"),
        ({"update": lambda s, x, h, v: x / 0.0}, "not finite"),
        ({"update": lambda s, x, h, v: v["missing"]}, "raises"),
        ({"scale_model_input": lambda s, x, t: x + 1.0}, "scale_model_input"),
    ],
)
def test_unknown_behaviour_is_refused(methods, cause):
    with pytest.raises(UntraceableScheduler, match=f"Broken: .*({cause})"):
        trace(_fake(**methods))


def test_reused_noise_is_refused():
    def update(self, x, h, v):
        fresh = torch.randn_like(x)
        kept, self.kept = getattr(self, "kept", fresh), fresh
        return x + h * v + 0.1 * fresh + 0.2 * kept

    with pytest.raises(UntraceableScheduler, match="reuse the noise"):
        trace(_fake(update), 20)
    assert trace(_fake(update), 4).window == (4, 4)  # a short run still holds all of its past


@pytest.mark.parametrize("overlap", [False, True])
def test_brownian_noise_is_traced_unless_intervals_overlap(overlap):
    def update(self, x, h, v):
        begin = self.sigmas[0 if overlap else self.i - 1]
        return x + h * v + 0.1 * self.noise_sampler(begin, self.sigmas[self.i])

    scheduler = _fake(update)
    scheduler.noise_sampler = None
    if overlap:
        with pytest.raises(UntraceableScheduler, match="reuses Brownian noise"):
            trace(scheduler)
    else:
        assert [row.noise_weight for row in trace(scheduler).rows] == [0.1] * 4


def test_unknown_noise_schedule_is_refused():
    def forget(self, x, h, v):
        return x + h * v

    scheduler = _fake(forget)
    scheduler.sigmas = scheduler.sigmas * 50.0
    with pytest.raises(UntraceableScheduler, match="noise schedule"):
        trace(scheduler)


def test_classes_of_the_same_name_do_not_share_tables():
    double = _fake(lambda self, x, h, v: x + 2.0 * h * v)
    assert trace(double) is trace(double)
    assert trace(_fake()).rows != trace(double).rows


def test_a_refusal_is_remembered(monkeypatch):
    """Tracing a step that is not linear takes as long as any other, in every call of a pipeline."""
    trace_cache_clear()
    trace_module = sys.modules["thg_engine.trace"]  # the package has a function of that name
    scheduler, messages = build("DDIMScheduler", clip_sample=True), []
    for _ in range(2):
        with pytest.raises(UntraceableScheduler) as error:
            trace(scheduler, 6)
        messages.append(str(error.value))
        monkeypatch.setattr(trace_module, "_trace", None)  # nobody may call it again
    assert messages[0] == messages[1] and "clip_sample" in messages[0]
    trace_cache_clear()
