"""The fused step inside pipelines: equal to the scheduler's own to rounding, whatever happens."""

from __future__ import annotations

import copy
import itertools
import pickle
import threading

import diffusers
import pytest
import torch

import thg_engine
from pipelines import CountRows, call, make, tiny
from test_compile import FOR_SD
from thg_engine import THG
from thg_engine.errors import InvalidArgument
from thg_engine.integrations.diffusers import controller
from thg_engine.integrations.diffusers.deferred import BranchSum
from thg_engine.integrations.diffusers.stepping import SteppedScheduler

pytestmark = [
    pytest.mark.filterwarnings("ignore:Should have t:UserWarning"),  # torchsde
    pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You have passed . text prompts:FutureWarning"),
]

EPS = torch.finfo(torch.float32).eps
HELD = THG(grid=3)
# ulp of the largest sample, both sides in float32. Those named here shrink the sample by less in a
# whole run than they add and take away again in each step, and lose digits in both.
ULPS = dict.fromkeys(("DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler"), 24)
ULPS |= dict.fromkeys(("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"), 16)
FEW_ULPS = 8
# Classes whose step stays their own, by the beginning of the reason.
MORE = ["CMStochasticIterativeScheduler", "CogVideoXDDIMScheduler", "DDIMInverseScheduler"]
MORE += ["DPMSolverMultistepInverseScheduler", "EDMEulerScheduler", "IPNDMScheduler"]
MORE += ["SASolverScheduler", "TCDScheduler", "LCMScheduler", "EDMDPMSolverMultistepScheduler"]
MORE += ["CosineDPMSolverMultistepScheduler", "DDPMParallelScheduler", "DDIMParallelScheduler"]
NEED_TORCHSDE = ("CosineDPMSolverMultistepScheduler", "DPMSolverSDEScheduler")
OWN_STEP = {
    "CMStochasticIterativeScheduler": "clip_denoised=True",
    "SASolverScheduler": "keeps more between its steps",
    "DPMSolverSDEScheduler": "noise",
    "CosineDPMSolverMultistepScheduler": "noise",
}


def edit(pipe, i, t, tensors):
    return {"latents": 1.1 * tensors["latents"] + 0.05} if i == 3 else {}


def distance(found, expected):
    """Largest difference in ulp of the largest element."""
    return float((found - expected).abs().max() / expected.abs().max() / EPS)


@pytest.mark.parametrize("callback", [None, edit], ids=["plain", "edited"])
@pytest.mark.parametrize("name", sorted({*FOR_SD, *MORE}))
def test_fused_step_is_the_scheduler_s_own_to_a_few_ulp(name, callback):
    """Full guidance and held deltas, also where a callback replaces the latents in the middle."""
    if name in NEED_TORCHSDE:
        pytest.importorskip("torchsde", reason=f"{name} needs torchsde")
    pipe = tiny(scheduler=make(name))
    kwargs = {} if callback is None else {"callback_on_step_end": callback}
    stock = call(pipe, **kwargs)
    own_held = call(thg_engine.compile(pipe, HELD, fused=False), **kwargs)
    held = call(thg_engine.compile(pipe, HELD), **kwargs)
    thg_engine.compile(pipe, "cfg", fused=True)
    found = call(pipe, **kwargs)
    stats, report = pipe.thg.stats(), pipe.thg.report()
    if name in OWN_STEP:
        assert stats["fused_steps"] == 0 and OWN_STEP[name] in report
        assert torch.equal(found, stock) and torch.equal(held, own_held)
        return
    assert stats["fused_steps"] == pipe.thg.plan.num_rows
    assert f"fused step: {stats['fused_steps']} row(s)" in report
    bound = ULPS.get(name, FEW_ULPS)
    assert distance(found, stock) <= bound
    assert distance(held, own_held) <= bound


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", ["img2img", "inpaint", "inpaint9"])
@pytest.mark.parametrize("name", ["DDIMScheduler", "UniPCMultistepScheduler", "PNDMScheduler"])
def test_other_pipelines(kind, name, seed):
    """Runs that start late, and inpainting, which blends the latents after every step."""
    pipe = tiny(kind, scheduler=make(name))
    expected = call(thg_engine.compile(pipe, HELD, fused=False), seed=seed)
    found = call(thg_engine.compile(pipe, HELD), seed=seed)
    assert pipe.thg.stats()["fused_steps"] == pipe.thg.plan.num_rows
    assert distance(found, expected) <= FEW_ULPS


def test_full_guidance_leaves_the_scheduler_alone_unless_asked():
    pipe = tiny()
    stock = call(pipe)
    assert torch.equal(call(thg_engine.compile(pipe, "cfg")), stock)
    assert "bit-identical" in pipe.thg.report() and pipe.thg.stats()["fused_steps"] == 0
    call(thg_engine.compile(pipe, HELD, fused=False))
    assert "fused step: off, as asked for" in pipe.thg.report()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_registers_are_wider_than_the_scheduler(dtype):
    """Against float32 arithmetic on the very same outputs: the scheduler rounds every step."""
    outputs = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5)).to(dtype)

    def run(dtype, **kwargs):
        pipe = tiny(dtype=dtype)
        fixed = outputs.to(dtype)
        pipe.unet.conv_out.register_forward_hook(lambda module, args, out: fixed[-len(out) :])
        start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(6))
        thg_engine.compile(pipe, THG(grid=2), **kwargs)
        return call(pipe, latents=start.bfloat16().to(dtype), num_inference_steps=20).float()

    exact = run(torch.float32, fused=False)
    own, fused = ((run(dtype, fused=f) - exact).norm() for f in (False, None))
    assert fused < 0.5 * own
    assert fused <= torch.finfo(dtype).eps * exact.norm()


def test_the_scheduler_is_itself_again_after_every_call():
    pipe = thg_engine.compile(tiny(), HELD)
    scheduler, seen = pipe.scheduler, []

    def look(pipe, i, t, tensors):
        seen.append((type(pipe.scheduler), type(pipe.scheduler).__name__))
        twin = copy.deepcopy(pipe.scheduler)
        assert isinstance(twin, diffusers.DDIMScheduler)
        if i == 2:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        call(pipe, callback_on_step_end=look)
    assert all(issubclass(kind, SteppedScheduler) for kind, _ in seen)
    assert {name for _, name in seen} == {"DDIMScheduler"}
    assert pipe.scheduler is scheduler and type(scheduler) is diffusers.DDIMScheduler
    assert "step" not in vars(scheduler)
    pickle.loads(pickle.dumps(scheduler))
    assert torch.equal(call(pipe), call(thg_engine.compile(tiny(), HELD)))


def test_a_scheduler_of_somebody_else_steps_by_itself():
    """A callback runs a second pipeline that shares the scheduler's class, and a copy of it."""
    pipe, other = thg_engine.compile(tiny(), HELD), tiny()
    expected, plain, inner = call(pipe), call(other), []

    def callback(pipe, i, t, tensors):
        if i == 1:
            inner.append(call(other))
        return {}

    assert torch.equal(call(pipe, callback_on_step_end=callback), expected)
    assert torch.equal(inner[0], plain)


def test_scale_changed_in_the_middle_reaches_the_row():
    def callback(pipe, i, t, tensors):
        pipe._guidance_scale = 2.0 + i
        return {}

    pipe = tiny()
    expected = call(thg_engine.compile(pipe, HELD, fused=False), callback_on_step_end=callback)
    found = call(thg_engine.compile(pipe, HELD), callback_on_step_end=callback)
    assert pipe.thg.stats()["fused_steps"] == pipe.thg.plan.num_rows
    assert distance(found, expected) <= FEW_ULPS


def both_ways(method, name="DDIMScheduler", prepare=None, **kwargs):
    """Samples and denoiser rows under the scheduler's own step and under the fused one."""
    found = []
    for fused in (False, True):
        pipe = tiny(scheduler=make(name))
        if prepare is not None:
            prepare(pipe)
        with CountRows(pipe.unet) as count:
            sample = call(thg_engine.compile(pipe, method, fused=fused), **kwargs)
        found.append((sample, count.rows))
    stats = pipe.thg.stats()
    assert stats["fused_steps"] == pipe.thg.plan.num_rows and stats["refreshes"] == 0
    return found


def rescales_in(rows):
    def callback(pipe, i, t, tensors):
        pipe._guidance_rescale = 0.7 if i in rows else 0.0
        return {}

    return callback


METHODS = {"cfg": "cfg", "3": HELD, "2": THG(grid=2), "early": THG(grid=(0, 1, 4))}


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("when", ["always", "late", "window"])
def test_a_rescaled_guidance_is_formed_by_the_pipeline(when, method, name):
    """guidance_rescale is no sum of the branches: the row is given the pipeline's own result.

    What it was to hold is held nevertheless.
    """
    rows = {"late": range(2, 99), "window": range(2, 5)}.get(when)
    callback = {"callback_on_step_end": rescales_in(rows)} if rows else {"guidance_rescale": 0.7}
    (own, own_rows), (fused, fused_rows) = both_ways(METHODS[method], name, **callback)
    assert fused_rows == own_rows
    assert distance(fused, own) <= FEW_ULPS


@pytest.mark.parametrize(
    "edit",
    [
        lambda o: o.mul_(0.5),
        lambda o: o.clamp_(-0.1, 0.1),
        lambda o: o[..., :4].zero_(),
        lambda o: o.__setitem__((..., 0), 0.0),
        lambda o: torch.mul(o, 0.9, out=o),
        lambda o: torch.nn.functional.relu(o, inplace=True),
    ],
    ids=["mul_", "clamp_", "view", "setitem", "out", "inplace"],
)
@pytest.mark.parametrize("since", [0, 2])
def test_a_denoiser_hook_that_edits_its_output_in_place(edit, since):
    """From the beginning, where the pipeline guides all rows, and from the third row on."""

    def prepare(pipe):
        calls = itertools.count()

        def hook(module, args, out):
            if next(calls) >= since:
                edit(out[0])

        pipe.unet.register_forward_hook(hook)

    (own, own_rows), (fused, fused_rows) = both_ways(HELD, prepare=prepare)
    assert fused_rows == own_rows
    assert distance(fused, own) <= FEW_ULPS
    assert not torch.equal(own, both_ways(HELD)[0][0])


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("by", ["data", "numpy", "in place"])
def test_a_sample_counts_as_it_is_however_it_was_edited(by, inference):
    def callback(pipe, i, t, tensors):
        latents = tensors["latents"]
        if i == 3 and by == "data":
            latents.data.mul_(1.3)
        elif i == 3 and by == "numpy":
            latents.numpy()[...] *= 1.3
        elif i == 3:
            latents.mul_(1.3)
        return {}

    with torch.inference_mode(inference):
        found = []
        for fused in (False, True):
            pipe = thg_engine.compile(tiny(), HELD, fused=fused)
            found.append(call(pipe, callback_on_step_end=callback).clone())
        plain = call(pipe).clone()
    assert distance(found[1], found[0]) <= FEW_ULPS
    assert distance(plain, found[1]) > 1e3


def test_looking_at_samples_leaves_the_wide_registers_alone():
    """In half precision a callback, or inference mode, must not round the registers to samples."""
    pipe = thg_engine.compile(tiny(dtype=torch.bfloat16), HELD)
    expected = call(pipe)
    assert torch.equal(call(pipe, callback_on_step_end=lambda *args: {}), expected)
    with torch.inference_mode():
        assert torch.equal(call(pipe), expected)


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "PNDMScheduler"])
def test_dtype_of_samples_is_the_scheduler_s_choice(name):
    """Under autocast some keep the float32 of the sample, some take the dtype of the output."""
    seen = []

    def callback(pipe, i, t, tensors):
        seen.append(tensors["latents"].dtype)
        return {}

    for fused in (False, True):
        pipe = thg_engine.compile(tiny(scheduler=make(name)), HELD, fused=fused)
        with torch.autocast("cpu", torch.bfloat16):
            call(pipe, callback_on_step_end=callback)
    half = len(seen) // 2
    assert pipe.thg.stats()["fused_steps"] == half and seen[:half] == seen[half:]


@pytest.mark.parametrize("value", [0, 1, "yes"])
def test_fused_is_none_or_a_bool(value):
    with pytest.raises(InvalidArgument, match="fused="):
        thg_engine.compile(tiny(), HELD, fused=value)


def test_without_a_fast_backend_the_scheduler_steps_unless_asked(monkeypatch):
    monkeypatch.setattr(controller, "choose_backend", lambda device, wide=False: "reference")
    pipe = thg_engine.compile(tiny(), HELD)
    call(pipe)
    assert pipe.thg.stats()["fused_steps"] == 0
    assert "no backend for cpu is ready (thg-engine doctor says why)" in pipe.thg.report()
    call(thg_engine.compile(pipe, HELD, fused=True))
    assert pipe.thg.stats()["fused_steps"] == pipe.thg.plan.num_rows


@pytest.mark.parametrize("value", [threading.Lock(), (x for x in ())], ids=["lock", "generator"])
def test_a_scheduler_that_cannot_be_copied_steps_itself(value):
    pipe = tiny()
    pipe.scheduler.attribute = value
    expected = call(thg_engine.compile(pipe, HELD, fused=False))
    assert torch.equal(call(thg_engine.compile(pipe, HELD)), expected)
    assert "cannot be copied" in pipe.thg.report()


def test_a_callback_steps_the_scheduler_by_hand_and_copies_it():
    """With arguments by position; copies and pickles are of the scheduler's own class."""

    def callback(pipe, i, t, tensors):
        twin = copy.deepcopy(pipe.scheduler)
        x = tensors["latents"]
        twin.step(x, t, x, 0.0)
        for copied in (twin, copy.copy(pipe.scheduler), pickle.loads(pickle.dumps(twin))):
            assert type(copied) is diffusers.DDIMScheduler
        return {}

    pipe = thg_engine.compile(tiny(), HELD)
    expected = call(pipe)
    assert torch.equal(call(pipe, callback_on_step_end=callback), expected)


# -- deferred guidance -----------------------------------------------------------------------------


def pair(batch=2, half=1, calls=None):
    """A deferred pair, its value, and the source that identifies it."""
    value = torch.randn(2 * batch, 3, generator=torch.Generator().manual_seed(1))

    def compute():
        if calls is not None:
            calls.append(1)
        return value

    source = object()
    return BranchSum(value.shape, value, source, None, half, compute), value, source


@pytest.mark.parametrize("half", [0, 1])
def test_the_combine_stays_on_paper(half):
    calls = []
    deferred, value, source = pair(half=half, calls=calls)
    branches, plain = deferred.chunk(2), value.chunk(2)
    uncond, cond = branches[1 - half], branches[half]
    guided = uncond + 7.5 * (cond - uncond)
    assert not calls, "nothing may have been computed"
    assert (guided.guidance_scale, guided.source) == (7.5, source)
    assert (guided.shape, guided.dtype, guided.device) == (
        plain[0].shape,
        torch.float32,
        value.device,
    )
    u, c = plain[1 - half], plain[half]
    assert torch.equal(guided.value(), u + 7.5 * (c - u)) and len(calls) == 1


def test_what_is_no_sum_is_computed_as_the_pipeline_would():
    deferred, value, _ = pair()
    uncond, cond = deferred.chunk(2)
    u, c = value.chunk(2)
    guided = uncond + 3.0 * (cond - uncond)
    expected = u + 3.0 * (c - u)
    assert torch.equal(guided * torch.ones(3), expected)
    assert torch.equal(guided.std(dim=1), expected.std(dim=1))
    assert torch.equal(torch.cat([guided, expected]), torch.cat([expected, expected]))
    assert torch.equal(deferred[:2], u) and float(guided[0, 0]) == float(expected[0, 0])
    assert repr(guided.value()) == repr(expected)


def test_an_edit_in_place_ends_the_waiting_of_all_sums():
    """Sums made before keep the values from before; a half is a view of the pair."""
    deferred, value, _ = pair()
    u, c = value.clone().chunk(2)
    uncond, cond = deferred.chunk(2)
    before = uncond + 3.0 * (cond - uncond)
    cond.mul_(2.0)
    after = uncond + 3.0 * (cond - uncond)
    assert before.guidance_scale is None and not isinstance(after, BranchSum)
    assert torch.equal(before.value(), u + 3.0 * (c - u))
    assert torch.equal(after, u + 3.0 * (2.0 * c - u))
    assert torch.equal(deferred.value(), torch.cat([u, 2.0 * c]))


def test_other_sums_have_no_scale_and_calls_do_not_mix():
    (uncond, cond), (other, _) = pair()[0].chunk(2), pair()[0].chunk(2)
    assert (uncond + cond).guidance_scale is None
    assert (2.0 * uncond).guidance_scale is None
    assert cond.guidance_scale == 1.0 and uncond.guidance_scale == 0.0
    assert not isinstance(cond - other, BranchSum)
