"""What `compile` refuses, what it leaves alone, and what it says."""

from __future__ import annotations

import dataclasses
import inspect

import diffusers
import pytest
import torch

import thg_engine
from pipelines import CountRows, call, ddim, tiny
from thg_engine import CFG, THG, Calibration, SamplingPlan
from thg_engine.errors import CalibrationError, InvalidArgument
from thg_engine.integrations.diffusers import slicing
from thg_engine.integrations.diffusers.adapters import argument_names, find_record
from thg_engine.integrations.diffusers.layouts import LAYOUTS
from thg_engine.integrations.diffusers.reasons import UNGUIDED
from thg_engine.integrations.diffusers.records import RECORDS
from thg_engine.integrations.diffusers.resolve import fingerprint
from thg_engine.lowering import plan_from_solver
from thg_engine.schedule import NoiseSchedule
from thg_engine.solvers import SOLVERS

# numpy's complaint about schedulers that hand it tensors.
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")
HELD = THG(grid=3, boost=1.1)


def fresh(seed=0, kind="text", **kwargs):
    """What a pipeline compiled just now gives."""
    return call(thg_engine.compile(tiny(kind, seed=seed), HELD), **kwargs)


# -- refusals --------------------------------------------------------------------------------------


def plan_of(rows, form="combined", w=5.0):
    schedule = NoiseSchedule.from_scheduler(ddim())
    points = [schedule.point(float(t)) for t in torch.linspace(900, 0, rows + 1).tolist()]
    return plan_from_solver(SOLVERS["dpmpp2m"], points, THG(grid=2), w, form=form)


def curves(**changes):
    values = {
        "model": "other",
        "fingerprint": "0123456789abcdef",
        "scheduler_family": "vp/epsilon",
        "solver": "ddim",
        "order": 1,
        "guidance_scale": 5.0,
        "num_steps": 3,
        "num_prompts": 1,
        "prompts_sha256": "",
        "date": "2025-01-01",
        "lambdas": (-3.0, 0.0, 3.0),
        "tortoise": (1.0, 1.0, 1.0),
        "hare": (0.1, 0.1, 0.1),
    }
    return Calibration(**{**values, **changes})


ANY, OTHER = curves(fingerprint=""), curves(fingerprint="", model="b")
AT_COMPILE = [
    ({"guidance": "tortoise"}, InvalidArgument, "guidance='tortoise'.*cfg-cache"),
    ({"guidance": 5}, InvalidArgument, "guidance=5"),
    ({"guidance": THG}, InvalidArgument, "guidance=<class.*give a method"),
    ({"guidance": None}, InvalidArgument, "guidance=None"),
    ({"nfe": 0.0}, InvalidArgument, "nfe=0.0"),
    ({"nfe": 0.5}, InvalidArgument, "nfe=0.5.*half"),
    ({"nfe": 1.5}, InvalidArgument, "nfe=1.5"),
    ({"nfe": 0}, InvalidArgument, "nfe=0:"),
    ({"nfe": -3}, InvalidArgument, "nfe=-3"),
    ({"nfe": True}, InvalidArgument, "nfe=True"),
    ({"nfe": float("nan")}, InvalidArgument, "nfe=nan"),
    ({"nfe": "0.7"}, InvalidArgument, "nfe='0.7'"),
    ({"guidance": "cfg", "nfe": 0.7}, InvalidArgument, "nfe=0.7.*fixed cost"),
    ({"guidance": THG(rho=1.1), "nfe": 0.7}, InvalidArgument, "nfe=0.7"),
    ({"guidance": THG(grid=2), "nfe": 0.7}, InvalidArgument, "grid=2"),
    ({"guidance": plan_of(4), "nfe": 0.7}, InvalidArgument, "nfe=0.7.*finished plan"),
    ({"guidance": plan_of(4, "two_state")}, InvalidArgument, "guidance=.*form='combined'"),
    ({"calibration": 7}, InvalidArgument, "calibration=7"),
    ({"calibration": "missing.json"}, CalibrationError, "missing.json"),
    ({"calibration": curves()}, CalibrationError, "'other', another architecture"),
    ({"guidance": THG(calibration=curves())}, CalibrationError, "'other', another architecture"),
    (
        {"guidance": THG(calibration=ANY), "calibration": OTHER},
        InvalidArgument,
        "calibration=.*one of",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "match"), AT_COMPILE)
def test_refused_at_compile(arguments, error, match):
    pipe = tiny()
    before = {key: id(value) for key, value in vars(pipe).items()}
    with CountRows(pipe.unet) as count, pytest.raises(error, match=match):
        thg_engine.compile(pipe, **arguments)
    assert not count.rows
    assert type(pipe) is diffusers.StableDiffusionPipeline
    assert {key: id(value) for key, value in vars(pipe).items()} == before
    assert not hasattr(pipe.unet, "_diffusers_hook") and "forward" not in vars(pipe.unet)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "thg-engine-calibration"}', "{}"])
def test_damaged_calibration_is_refused(text, tmp_path):
    path = tmp_path / "curves.json"
    path.write_text(text)
    pipe = tiny()
    with pytest.raises(CalibrationError, match=r"curves\.json"):
        thg_engine.compile(pipe, calibration=path)
    assert not hasattr(pipe, "thg") and not hasattr(pipe.unet, "_diffusers_hook")


AT_CALL = [
    (THG(grid=(0, 3, 9)), "grid=.*8 rows"),
    (THG(nfe=5), "nfe=5.*at least 9"),
    (THG(rho=1.1), "rho=1.1.*calibration"),
    (plan_of(5), "guidance='<plan of 5 rows>'.*8 model calls"),
]


@pytest.mark.parametrize(("method", "match"), AT_CALL)
def test_refused_before_the_first_denoiser_call(method, match):
    """Only the call knows the number of rows."""
    pipe = thg_engine.compile(tiny(), method)
    with CountRows(pipe.unet) as count, pytest.raises(InvalidArgument, match=match):
        call(pipe)
    assert not count.rows
    thg_engine.compile(pipe, HELD)
    assert torch.equal(call(pipe), fresh())


@pytest.mark.parametrize("pipe", [None, "a pipeline", torch.nn.Linear(2, 2), tiny])
def test_not_a_pipeline(pipe):
    with pytest.raises(InvalidArgument, match=r"pipe=.*from_pretrained"):
        thg_engine.compile(pipe)


def test_a_pipeline_class_is_not_a_pipeline():
    with pytest.raises(InvalidArgument, match="pipe='StableDiffusionPipeline'"):
        thg_engine.compile(diffusers.StableDiffusionPipeline)


# -- pipelines that nobody described ---------------------------------------------------------------


class OwnLoop(diffusers.StableDiffusionPipeline):
    """A loop of its own: under a known name or not, another pipeline."""

    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


class Renamed(diffusers.StableDiffusionPipeline):
    """The stock loop under another name."""


def test_unknown_pipelines_run_unchanged_with_a_warning():
    parts = {**tiny().components, "requires_safety_checker": False}
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=4,
    )
    plain = diffusers.DDPMPipeline(unet=unet, scheduler=diffusers.DDPMScheduler())
    unknown = "no adapter record describes OwnLoop"
    for pipe, reason in ((OwnLoop(**parts), unknown), (plain, f"DDPMPipeline: {UNGUIDED}")):
        name, message = type(pipe).__name__, f"as it is: {reason}"
        with pytest.warns(UserWarning, match=message) as seen:
            assert thg_engine.compile(pipe, HELD) is pipe
        assert seen[0].filename == __file__
        assert type(pipe).__name__ == name and not hasattr(pipe.unet, "_diffusers_hook")
        assert f"not active, {reason}" in pipe.thg.report()
        assert pipe.thg.plan is None and pipe.thg.stats()["runs"] == 0
        with pytest.raises(InvalidArgument, match="guidance='x'"):
            thg_engine.compile(pipe, "x")
        thg_engine.uncompile(pipe)
        assert "thg" not in vars(pipe)


def test_a_subclass_with_the_stock_loop_is_known():
    pipe = Renamed(**tiny().components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    thg_engine.compile(pipe, HELD)
    assert type(pipe).__name__ == "Renamed" and isinstance(pipe, Renamed)
    assert torch.equal(call(pipe, height=16, width=16), fresh())
    assert find_record(OwnLoop) is None


def test_a_pipeline_without_its_denoiser_is_left_alone():
    pipe = thg_engine.compile(tiny(), HELD)
    first, pipe.unet = pipe.unet, None
    with pytest.warns(UserWarning, match="no denoiser in .unet"):
        thg_engine.compile(pipe, HELD)
    assert type(pipe) is diffusers.StableDiffusionPipeline
    assert "no denoiser in .unet" in pipe.thg.report()
    assert not hasattr(first, "_diffusers_hook")


def test_adapter_knows_the_signature_of_the_unet():
    signature = inspect.signature(diffusers.UNet2DConditionModel.forward)
    layout = LAYOUTS["UNet2DConditionModel"]
    named = {layout.sample, *layout.batched, *layout.unbatched, *layout.shared}
    assert named | {"return_dict"} == set(signature.parameters) - {"self"}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_name_arguments_that_there_are(name):
    from diffusers import models

    beside = (diffusers.WuerstchenPriorPipeline, diffusers.WuerstchenDecoderPipeline)
    homes = (diffusers, models, *(inspect.getmodule(pipeline) for pipeline in beside))
    kind = next(getattr(home, name) for home in homes if hasattr(home, name))
    layout = LAYOUTS[name]
    known = (layout.sample, *layout.batched, *layout.unbatched, *layout.shared)
    assert set(known) <= set(argument_names(kind)), set(known) - set(argument_names(kind))
    assert argument_names(kind)[0] == layout.sample and len(set(known)) == len(known)


@pytest.mark.parametrize("name", RECORDS)
def test_records_name_pipelines_that_there_are(name):
    from diffusers import pipelines

    assert hasattr(diffusers, name) or hasattr(pipelines, name)


# -- what is said ----------------------------------------------------------------------------------


def test_report_before_and_after_a_call():
    pipe = thg_engine.compile(tiny())
    report = pipe.thg.report()
    assert "conservative default grid" in report and "no call yet" in report
    assert "fused step: on where" in report and "graphs: none" in report
    preview = pipe.thg.plan
    assert (preview.num_rows, preview.nfe) == (50, 80)
    call(pipe)
    plan = pipe.thg.plan
    report = pipe.thg.report()
    assert f"NFE {plan.nfe} of 16 on DDIMScheduler, w = 5" in report
    assert "both branches at rows " + ", ".join(map(str, plan.coarse_grid)) in report
    assert SamplingPlan.from_json(plan.to_json()) == plan
    assert thg_engine.compile(pipe, nfe=0.6).thg.plan.nfe == 60
    assert "budget is spread evenly" in pipe.thg.report()


def test_calibration_of_the_same_architecture_is_used_and_named(tmp_path):
    pipe = tiny()
    measured = curves(fingerprint=fingerprint(pipe.unet), model="tiny")
    measured.save(tmp_path / "c.json")
    thg_engine.compile(pipe, calibration=tmp_path / "c.json", nfe=12)
    assert "calibration of tiny (2025-01-01)" in pipe.thg.report()
    with CountRows(pipe.unet) as count:
        call(pipe)
    assert count.total == pipe.thg.plan.nfe <= 12
    thg_engine.compile(pipe, THG(rho=1.5), calibration=measured)
    call(pipe)
    pipe.unet = diffusers.UNet2DConditionModel.from_config({**pipe.unet.config, "sample_size": 16})
    with (
        CountRows(pipe.unet) as count,
        pytest.raises(CalibrationError, match="another architecture"),
    ):
        call(pipe)
    assert not count.rows


class Tint:
    """An attention processor that takes a tensor of unknown layout."""

    def __init__(self):
        self.inner = diffusers.models.attention_processor.AttnProcessor2_0()

    def __call__(
        self,
        attn,
        hidden_states,
        encoder_hidden_states=None,
        attention_mask=None,
        temb=None,
        tint=None,
    ):
        out = self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        return out if tint is None else out * tint.reshape(-1, 1, 1)


def test_arguments_of_unknown_layout_run_full_guidance_with_the_reason():
    pipe = tiny()
    pipe.unet.set_attn_processor(Tint())
    extra = {"cross_attention_kwargs": {"tint": torch.tensor([0.9, 1.1]), "odd": torch.ones(3)}}
    stock = call(pipe, **extra)
    assert not torch.equal(stock, call(pipe))
    thg_engine.compile(pipe, HELD)
    with CountRows(pipe.unet) as count:
        assert torch.equal(call(pipe, **extra), stock)
    assert count.total == pipe.thg.stats()["last_nfe"] == 16
    reason = "cross_attention_kwargs has shape (3,), its batch is not 2"
    assert pipe.thg.stats()["fallbacks"] == {reason: 1}
    assert f"full guidance in 1 call(s): {reason}" in pipe.thg.report()
    call(pipe, cross_attention_kwargs={"tint": None})
    assert pipe.thg.stats()["last_nfe"] == pipe.thg.plan.nfe < 16
    thg_engine.compile(pipe, CFG())
    call(pipe, **extra)
    assert pipe.thg.stats()["fallbacks"] == {}


def test_slices_of_every_batched_argument():
    """[uncond, cond] everywhere; what is shared stays, what disagrees is refused by name."""
    layout = LAYOUTS["UNet2DConditionModel"]
    pairs = torch.arange(4.0).reshape(4, 1)
    named = {
        "sample": pairs,
        "timestep": torch.tensor(7),
        "encoder_hidden_states": pairs + 1,
        "added_cond_kwargs": {"image_embeds": [pairs + 2, pairs + 3]},
        "cross_attention_kwargs": {"scale": 0.5},
        "return_dict": False,
    }
    half = slicing.slice_half(named, layout, 1)
    assert torch.equal(half["sample"], pairs[2:])
    assert torch.equal(half["added_cond_kwargs"]["image_embeds"][1], pairs[2:] + 3)
    assert half["timestep"] is named["timestep"]
    assert half["cross_attention_kwargs"] == {"scale": 0.5} and half["return_dict"] is False
    vector = slicing.slice_half({**named, "timestep": torch.arange(4)}, layout, 1)["timestep"]
    assert vector.tolist() == [2, 3]
    for name, value in {
        "encoder_hidden_states": pairs[:2],
        "timestep": torch.arange(3),
        "down_block_additional_residuals": (pairs, pairs[:1]),
        "cross_attention_kwargs": {"masks": torch.ones(3, 1)},
        "something_new": [pairs],
    }.items():
        with pytest.raises(slicing.CannotSlice, match=name):
            slicing.slice_half({**named, name: value}, layout, 1)
    with pytest.raises(slicing.CannotSlice, match="batch of 3"):
        slicing.slice_half({**named, "sample": pairs[:3]}, layout, 1)


def test_unknown_scheduler_is_placed_by_step_number_and_said_so():
    class Odd(diffusers.DDIMScheduler):
        """Its noise levels cannot be read."""

        def set_timesteps(self, *args, **kwargs):
            super().set_timesteps(*args, **kwargs)
            self.timesteps = self.timesteps.flip(0) * 0 + torch.arange(8).flip(0) - 3

        def step(self, model_output, timestep, sample, **kwargs):
            return (sample - 0.1 * model_output,)

    pipe = tiny()
    pipe.scheduler = Odd.from_config(ddim().config)
    thg_engine.compile(pipe, HELD)
    call(pipe)
    assert "noise level of Odd is unknown" in pipe.thg.report()
    assert pipe.thg.stats()["last_nfe"] == pipe.thg.plan.nfe == 11


def test_settings_compare_by_value():
    pipe = thg_engine.compile(tiny(), THG(grid=2))
    assert dataclasses.replace(pipe.thg.settings) == pipe.thg.settings


@pytest.mark.parametrize("value", [None, 3, "pipe"])
def test_uncompile_of_what_is_no_object_is_refused(value):
    with pytest.raises(InvalidArgument, match="pipe="):
        thg_engine.uncompile(value)
