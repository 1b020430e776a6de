"""Compiled pipelines: full guidance is bit-identical to stock, evaluations are the plan's."""

from __future__ import annotations

import diffusers
import pytest
import torch

import thg_engine
from pipelines import KINDS, METHODS, SD, CountRows, call, ddim, make, tiny
from thg_engine import CFG, THG, Engine
from thg_engine.grid import MappedGrid
from thg_engine.lowering import plan_from_table
from thg_engine.trace import trace

# numpy's complaint about schedulers that hand it tensors.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Should have t:UserWarning"),  # torchsde
    pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You have passed . text prompts:FutureWarning"),
]

NAMES = sorted(name for name in dir(diffusers) if name.endswith("Scheduler"))
FOR_SD = [scheduler.__name__ for scheduler in ddim().compatibles] + ["DDIMScheduler"]


def same_as_stock(pipe, **kwargs):
    """Whether CFG leaves the call bit-identical."""
    stock = call(pipe, **kwargs)
    thg_engine.compile(pipe, "cfg")
    found = call(pipe, **kwargs)
    assert torch.isfinite(stock).all()
    return torch.equal(found, stock)


# -- reduction -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_cfg_is_bit_identical_for_every_scheduler(name):
    """Every scheduler that diffusers has; one that cannot run stock cannot run compiled."""
    pipe = tiny()
    try:
        pipe.scheduler = make(name)
        stock = call(pipe, num_inference_steps=5)
    except Exception as error:
        if isinstance(error, ImportError):
            pytest.skip(f"{name} needs a package that is not here: {error}".strip())
        assert name not in FOR_SD, "this one runs with Stable Diffusion"
        with pytest.raises(type(error)):
            thg_engine.compile(pipe, "cfg").scheduler = make(name)
            call(pipe, num_inference_steps=5)
        return
    thg_engine.compile(pipe, "cfg")
    with CountRows(pipe.unet) as count:
        found = call(pipe, num_inference_steps=5)
    assert torch.isfinite(stock).all()
    assert torch.equal(found, stock)
    assert count.total == pipe.thg.plan.nfe == 2 * len(pipe.scheduler.timesteps)


def test_enumeration_found_the_schedulers():
    assert len(NAMES) > 40
    assert set(FOR_SD) <= set(NAMES)
    assert {"PNDMScheduler", "HeunDiscreteScheduler", "UniPCMultistepScheduler"} <= set(FOR_SD)


DPM = "DPMSolverMultistepScheduler"
CONFIGS = [
    (DPM, {"use_karras_sigmas": True}),
    (DPM, {"algorithm_type": "sde-dpmsolver++"}),
    (DPM, {"algorithm_type": "dpmsolver++", "solver_order": 3, "euler_at_final": True}),
    (DPM, {"use_lu_lambdas": True, "solver_type": "heun"}),
    ("EulerDiscreteScheduler", {"use_exponential_sigmas": True}),
    ("EulerDiscreteScheduler", {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}),
    ("UniPCMultistepScheduler", {"solver_order": 3, "disable_corrector": [0]}),
    ("PNDMScheduler", {"skip_prk_steps": True}),
    ("DDIMScheduler", {"clip_sample": True}),
    ("DDIMScheduler", {"thresholding": True, "prediction_type": "v_prediction"}),
    ("DDIMScheduler", {"prediction_type": "sample", "rescale_betas_zero_snr": True}),
    ("DDPMScheduler", {"variance_type": "fixed_large", "clip_sample": True}),
    (DPM, {"thresholding": True}),
]


@pytest.mark.parametrize(("name", "config"), CONFIGS)
def test_cfg_is_bit_identical_for_configs(name, config):
    scheduler = make(name, **config)
    assert {key: scheduler.config[key] for key in config} == config
    assert same_as_stock(tiny(scheduler=scheduler), num_inference_steps=6)


PLAIN_CALLS = [
    {"prompt": ["a cat", "red dog", "blue house tree"], "negative_prompt": ["bad", "", "bad dog"]},
    {"num_images_per_prompt": 3, "negative_prompt": "bad"},
    {"prompt": ["a cat", "red dog"], "num_images_per_prompt": 2, "guidance_scale": 1.01},
    {"guidance_scale": 1.0},
    {"guidance_scale": 0.0},
    {"eta": 0.7},
    {"num_inference_steps": 1},
    {"output_type": "np"},
]


@pytest.mark.parametrize(
    ("kind", "kwargs"),
    [("text", kwargs) for kwargs in PLAIN_CALLS]
    + [(k, c) for k in KINDS[1:] for c in PLAIN_CALLS[:4]],
)
def test_cfg_is_bit_identical_for_every_kind_of_call(kind, kwargs):
    if kind != "text":
        kwargs = {**kwargs, "num_inference_steps": kwargs.get("num_inference_steps", 4) + 1}
    pipe = tiny(kind, seed=len(kwargs))
    stock = call(pipe, **kwargs)
    thg_engine.compile(pipe, CFG())
    found = call(pipe, **kwargs)
    same = (found == stock).all() if kwargs.get("output_type") else torch.equal(found, stock)
    assert same


@pytest.mark.parametrize(
    ("kind", "scheduler", "kwargs"),
    [
        ("text", "DDIMScheduler", {"guidance_rescale": 0.7}),
        ("text", "DDIMScheduler", {"height": 24, "width": 40}),
        ("text", "EulerDiscreteScheduler", {"timesteps": [900, 610, 400, 77, 3]}),
        ("text", "EulerDiscreteScheduler", {"sigmas": [14.0, 6.0, 2.5, 0.7, 0.1]}),
        ("text", DPM, {"timesteps": [999, 500, 250, 20]}),
        ("img2img", "DDPMScheduler", {"timesteps": [900, 600, 400, 70], "strength": 0.6}),
        ("img2img", "HeunDiscreteScheduler", {"strength": 0.3, "num_inference_steps": 10}),
        ("img2img", "KDPM2AncestralDiscreteScheduler", {"strength": 0.55}),
        ("img2img", "PNDMScheduler", {"strength": 0.6}),
        ("img2img", "DDIMScheduler", {"strength": 1.0, "eta": 1.0}),
        ("inpaint", "EulerAncestralDiscreteScheduler", {"strength": 1.0}),
        ("inpaint", "UniPCMultistepScheduler", {"strength": 0.4}),
        ("inpaint9", "LMSDiscreteScheduler", {"strength": 0.99}),
        ("inpaint9", "DEISMultistepScheduler", {"strength": 1.0, "num_images_per_prompt": 2}),
    ],
)
def test_cfg_is_bit_identical_for_special_calls(kind, scheduler, kwargs):
    assert same_as_stock(tiny(kind, make(scheduler)), **kwargs)


def test_cfg_is_bit_identical_with_embeddings_and_latents_given():
    pipe = tiny()
    generator = torch.Generator().manual_seed(3)
    given = {
        "prompt": None,
        "prompt_embeds": torch.randn(2, 16, 16, generator=generator),
        "negative_prompt_embeds": torch.randn(2, 16, 16, generator=generator),
        "latents": torch.randn(2, 4, 7, 11, generator=generator),
    }
    assert same_as_stock(pipe, **given)
    del given["latents"]
    stock, found = (
        call(each, **given, generator=[torch.Generator().manual_seed(i) for i in (1, 2)], eta=0.3)
        for each in (tiny(), pipe)
    )
    assert torch.equal(found, stock)


# -- exact NFE -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "name",
    ["HeunDiscreteScheduler", "PNDMScheduler", DPM],
)
def test_counted_rows_are_the_plan(method, name):
    pipe = thg_engine.compile(tiny(scheduler=make(name)), METHODS[method])
    with CountRows(pipe.unet) as count:
        call(pipe, prompt=["a cat", "a dog"], num_inference_steps=7)
    stats = pipe.thg.stats()
    assert count.total == 2 * pipe.thg.plan.nfe
    assert pipe.thg.plan.num_rows == len(pipe.scheduler.timesteps) == stats["last_rows"]
    assert stats["last_nfe"] == stats["evaluations"] == pipe.thg.plan.nfe
    assert stats["refreshes"] == stats["failed_runs"] == 0 and stats["fallbacks"] == {}
    expected = [4 if row.evaluates_both else 2 for row in pipe.thg.plan.rows]
    assert count.rows == expected


@pytest.mark.parametrize("name", sorted(set(FOR_SD)))
def test_counted_rows_are_the_plan_for_every_scheduler(name):
    try:
        pipe = thg_engine.compile(tiny("img2img", make(name)), THG(grid=2, boost=1.1))
    except ImportError as error:
        pytest.skip(f"{name} needs a package that is not here: {error}".strip())
    seen = []
    watch = lambda pipe, i, t, tensors: seen.append(float(t)) or tensors  # noqa: E731
    with CountRows(pipe.unet) as count:
        call(pipe, num_inference_steps=5, callback_on_step_end=watch)
    assert count.total == pipe.thg.plan.nfe == pipe.thg.stats()["last_nfe"]
    assert count.total < 2 * pipe.thg.plan.num_rows
    assert seen == [row.timestep for row in pipe.thg.plan.rows]


@pytest.mark.parametrize("strength", [0.3, 0.8, 1.0])
def test_truncated_runs_map_the_grid_by_noise_level(strength):
    """Coarse points of a full run at 20 steps, found again in the last part of 20 others."""
    full = thg_engine.compile(tiny(), THG(grid=(0, 2, 5, 9, 14))).thg.preview(ddim(), 20)
    grid = MappedGrid((0, 2, 5, 9, 14), tuple(row.lambda_t for row in full.rows))
    pipe = thg_engine.compile(tiny("img2img"), THG(grid=grid))
    call(pipe, num_inference_steps=20, strength=strength)
    skipped = 20 - int(20 * strength)
    assert pipe.thg.plan.num_rows == 20 - skipped
    expected = {0, *(i - skipped for i in (0, 2, 5, 9, 14) if i >= skipped)}
    assert pipe.thg.plan.coarse_grid == tuple(sorted(expected))


# -- the engine with the traced scheduler ----------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("DDIMScheduler", {}),
        ("DDIMScheduler", {"prediction_type": "v_prediction"}),
        ("EulerDiscreteScheduler", {}),
        (DPM, {}),
        ("UniPCMultistepScheduler", {}),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_engine_with_traced_scheduler_agrees_with_the_pipeline(name, config, seed):
    """Within 8 ulp of the largest term that a row sums: largest sample times largest weight.

    UniPC's corrector, written over samples and outputs alone, has weights of 93 that cancel.
    """
    pipe = tiny(scheduler=make(name, **config), seed=seed)
    stock = call(pipe, seed=seed)
    table = trace(pipe.scheduler, 8)
    plan = plan_from_table(table, CFG(), 5.0)
    cond, uncond = pipe.encode_prompt("a photo of cat", "cpu", 1, True)
    x_T = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    peak = []

    @torch.no_grad()
    def denoise(x, t, embeds):
        return pipe.unet(x, t[0], encoder_hidden_states=embeds).sample

    with torch.no_grad():
        found = Engine(denoise).sample(
            x_T * plan.initial_scale,
            cond.detach(),
            uncond.detach(),
            plan,
            callback=lambda run: peak.append(float(run.sample.abs().max())),
        )
    weights = [w for row in plan.rows for w in (*row.sample_weights, *row.guided_weights)]
    bound = 8 * torch.finfo(torch.float32).eps * max(peak) * max(map(abs, weights))
    assert (found - stock).abs().max() <= bound


def test_settings_of_the_fixture_are_those_of_stable_diffusion():
    assert {key: ddim().config[key] for key in SD} == SD
