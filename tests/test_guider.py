"""`TortoiseHareGuidance` on random tensors: stock guidance bit for bit, held deltas in float64."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Sequence

import diffusers
import pytest
import torch
from diffusers import ClassifierFreeGuidance
from torch import Tensor

import thg_engine
from curves_fixture import random_calibration
from thg_engine import CFG, THG, CFGCache, TortoiseHareGuidance
from thg_engine.errors import CalibrationError, InvalidArgument
from thg_engine.integrations.diffusers.planning import noise_levels
from thg_engine.lowering import guidance_rows, plan_from_timesteps

N, SHAPE = 10, (2, 4, 6, 6)
COND, UNCOND = torch.randn(2, 3), torch.randn(2, 3)
CURVES = dataclasses.replace(random_calibration(0), fingerprint="")
Outputs = Sequence[tuple[Tensor, Tensor]]


def outputs(num_steps: int = N, dtype: torch.dtype = torch.float32, shape=SHAPE) -> Outputs:
    """c and u of every step; u is near c, as a network's is."""
    draw = torch.Generator().manual_seed(0)
    made = []
    for _ in range(num_steps):
        cond = torch.randn(shape, generator=draw)
        made.append((cond, cond + 0.3 * torch.randn(shape, generator=draw)))
    return [(cond.to(dtype), uncond.to(dtype)) for cond, uncond in made]


def step(guider, i: int, given: Outputs, num_steps: int = N, inputs=None, t=None):
    """One turn of a pipeline's loop: the guider's output, and how many branches it asked for."""
    guider.set_state(i, num_steps, torch.tensor(999.0 - i) if t is None else t)
    batches = guider.prepare_inputs(inputs or {"embeds": (COND, UNCOND)})
    asked = guider.num_conditions
    assert len(batches) == asked
    for batch, prediction in zip(batches, given[i], strict=False):
        guider.prepare_models(torch.nn.Module())
        batch.noise_pred = prediction
        guider.cleanup_models(torch.nn.Module())
    return guider(batches), asked


def drive(guider, given: Outputs, **kwargs):
    """A whole run: outputs, and branches asked for."""
    done = [step(guider, i, given, len(given), **kwargs) for i in range(len(given))]
    return [output for output, _ in done], [asked for _, asked in done]


OPTIONS = [
    {"guidance_scale": 7.5},
    {"guidance_scale": 4.0, "guidance_rescale": 0.7},
    {"guidance_scale": 3.5, "use_original_formulation": True},
    {"guidance_scale": 5.0, "start": 0.2, "stop": 0.7, "guidance_rescale": 0.3},
    {"guidance_scale": -2.0, "use_original_formulation": True, "guidance_rescale": 1.0},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_full_guidance_is_stock_bit_for_bit(options, dtype) -> None:
    given = outputs(dtype=dtype)
    stock, branches = drive(ClassifierFreeGuidance(**options), given)
    ours, asked = drive(TortoiseHareGuidance(**options, guidance=CFG()), given)
    assert asked == branches
    for a, b in zip(ours, stock, strict=True):
        assert torch.equal(a.pred, b.pred) and torch.equal(a.pred_cond, b.pred_cond)
        assert a.pred.dtype is dtype
        assert (a.pred_uncond is None) == (b.pred_uncond is None)


def by_hand(given: Outputs, coarse: set[int], boost: float, scale: float, rescale: float, original):
    """Algorithm 1 with one state, in float64."""
    delta, made = None, []
    for i, (cond, uncond) in enumerate(given):
        cond, uncond = cond.double(), uncond.double()
        delta = cond - uncond if i in coarse else delta
        pred = cond + boost * delta * (scale if original else scale - 1)
        if rescale:
            axes = tuple(range(1, pred.dim()))
            ratio = cond.std(axes, keepdim=True) / pred.std(axes, keepdim=True)
            pred = pred * (1 - rescale + rescale * ratio)
        made.append(pred)
    return made


@pytest.mark.parametrize(("dtype", "ulp"), [(torch.float32, 2**-22), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize("boost", [1.0, 1.1])
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[1], OPTIONS[2]], ids=str)
def test_held_deltas_agree_with_float64(options, boost, dtype, ulp) -> None:
    """bfloat16 outputs are rounded once, at the end: the delta is held in float32."""
    given, coarse = outputs(dtype=dtype), (0, 1, 4, 8)
    guider = TortoiseHareGuidance(**options, guidance=THG(grid=coarse, boost=boost))
    ours, asked = drive(guider, given)
    assert asked == [2 if i in coarse else 1 for i in range(N)]
    assert guider.nfe == guider.plan.nfe == N + len(coarse)
    scale, rescale = options["guidance_scale"], options.get("guidance_rescale", 0.0)
    original = options.get("use_original_formulation", False)
    expected = by_hand(given, set(coarse), boost, scale, rescale, original)
    for i, (output, wanted) in enumerate(zip(ours, expected, strict=True)):
        if i == 0 and boost != 1.0:
            wanted = by_hand(given, {0}, 1.0, scale, rescale, original)[0]  # serves its step alone
        fresh = i in coarse and (boost == 1.0 or i == 0)
        # Stock's own formula rounds u + w (c - u) in between, so it is off by more than one.
        slack = 4 * abs(scale) * ulp if fresh else (4 * 2**-22 * abs(scale) + ulp)
        error = (output.pred.double() - wanted).abs().max() / wanted.abs().max()
        assert output.pred.dtype is dtype and error < slack, (i, float(error))


def test_cutoff_and_other_methods() -> None:
    given = outputs()
    guider = TortoiseHareGuidance(guidance=THG(grid=3, cutoff=6))
    ours, asked = drive(guider, given)
    assert asked == [2, 1, 1, 2, 1, 1, 1, 1, 1, 1]
    assert all(torch.equal(ours[i].pred, given[i][0]) for i in range(6, N))
    cached = TortoiseHareGuidance(guidance="cfg-cache")
    rows = guidance_rows(CFGCache(), [0.0] * N, 7.5)
    assert drive(cached, given)[1] == [2 if row.evaluates_both else 1 for row in rows]
    assert cached.guidance == CFGCache()


def test_pipelines_hear_two_branches_outside_of_a_step() -> None:
    """They ask there whether to encode a negative prompt, also after a run that failed."""
    guider, given = TortoiseHareGuidance(guidance=THG(grid=2)), outputs()
    assert guider.num_conditions == 2
    step(guider, 0, given)
    assert guider.num_conditions == 2
    guider.set_state(1, N, torch.tensor(998.0))
    assert guider.num_conditions == 1 and "num_conditions: 1" in repr(guider)
    guider.prepare_inputs({"embeds": (COND, UNCOND)})
    guider.prepare_models(torch.nn.Module())  # and here the denoiser raises
    assert guider.is_conditional and guider.num_conditions == 2
    ended = TortoiseHareGuidance(stop=0.5)
    drive(ended, given)
    assert ended.num_conditions == 2


@pytest.mark.parametrize("died", [0, 1, 2, N - 2])
def test_a_run_that_died_leaves_nothing(died: int) -> None:
    given, other = outputs(), outputs(shape=(1, 3))
    guider = TortoiseHareGuidance(guidance=THG(grid=4))
    for i in range(died + 1):
        step(guider, i, other)
    ours, asked = drive(guider, given)
    fresh, expected = drive(guider.new(), given)
    assert asked == expected and guider.nfe == guider.plan.nfe
    assert all(torch.equal(a.pred, b.pred) for a, b in zip(ours, fresh, strict=True))
    assert not guider._run._held._deltas and guider._run._inputs._seen is None


def test_a_step_that_comes_again_evaluates_both() -> None:
    """As after a run that died in its first step, of a guider that takes over during runs."""
    guider, given = TortoiseHareGuidance(guidance=THG(grid=(0,))), outputs()
    assert [step(guider, i, given)[1] for i in (4, 5, 5, 6, 2, 3)] == [2, 1, 2, 1, 2, 1]
    assert step(guider, 4, outputs(N + 1), N + 1)[1] == 2  # a run of another length


def test_steps_beyond_their_number_are_stocks() -> None:
    """Where a step makes two model calls, loops count on past ``num_inference_steps``."""
    given = outputs()
    stock = [step(ClassifierFreeGuidance(), i, given, 6)[1] for i in range(N)]
    guider = TortoiseHareGuidance(guidance="cfg")
    assert [step(guider, i, given, 6)[1] for i in range(N)] == stock
    assert guider.nfe == N + 6


def test_conditioning_that_changes_is_seen() -> None:
    guider, given = TortoiseHareGuidance(guidance=THG(grid=(0,))), outputs()
    cond = COND.clone()
    latents = torch.randn(3)
    asked = []
    for i in range(8):
        if i == 2:
            cond = cond.clone()  # another object of the same value
        if i == 3:
            cond = cond + 1
        if i == 5:
            cond.mul_(2)
        latents = latents + 1  # one object for both branches: nothing that guides
        pairs = {"embeds": ([cond], [UNCOND]), "hidden": (latents, latents), "t": latents}
        asked.append(step(guider, i, given, inputs=pairs)[1])
    assert asked == [2, 1, 1, 2, 1, 2, 1, 1]
    assert guider.stats()["refreshes"] == 2 and guider.nfe == N - 2 + 3
    longer = torch.cat([COND, COND])
    assert step(guider, 8, given, inputs={"embeds": (longer, UNCOND)})[1] == 2


def test_block_states_are_watched_too() -> None:
    from diffusers.modular_pipelines.modular_pipeline import BlockState

    guider, given = TortoiseHareGuidance(guidance=THG(grid=(0,))), outputs()
    fields = {"embeds": ("cond", "uncond"), "mask": "mask", "extra": ("one", "two")}
    asked = []
    for i, change in enumerate((0, 0, 1, 0)):
        state = BlockState(cond=COND, uncond=UNCOND + change, mask=torch.rand(2))
        guider.set_state(i, N, torch.tensor(999.0 - i))
        batches = guider.prepare_inputs_from_block_state(state, fields)
        assert batches[0].embeds is COND and batches[0].mask is state.mask
        asked.append(len(batches))
        for batch, prediction in zip(batches, given[i], strict=False):
            batch.noise_pred = prediction
        guider(batches)
    assert asked == [2, 1, 2, 2]


def test_outputs_that_do_not_fit_are_refused() -> None:
    guider, given = TortoiseHareGuidance(guidance=THG(grid=(0,))), outputs()
    guider.set_state(0, N, torch.tensor(9.0))
    with pytest.raises(InvalidArgument, match="pred_uncond=None: this step needs both"):
        guider.forward(given[0][0])
    with pytest.raises(InvalidArgument, match="pred_cond='list': the denoiser's output"):
        guider.forward([given[0][0]], given[0][1])
    step(guider, 0, given)
    with pytest.raises(InvalidArgument, match=r"pred_cond=.*6, 7.*a run keeps its shape"):
        step(guider, 1, outputs(shape=(2, 4, 6, 7)))
    assert drive(guider, given)[1] == [2, *[1] * (N - 1)]


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": 1.0},
        {"guidance_scale": 0.0, "use_original_formulation": True},
        {"enabled": False},
        {"start": 0.5, "stop": 0.5},
        {"guidance_scale": 1.0, "guidance_rescale": 0.5},
    ],
    ids=str,
)
def test_no_guidance_is_one_branch(options) -> None:
    given = outputs()
    stock, _ = drive(ClassifierFreeGuidance(**options), given)
    guider = TortoiseHareGuidance(**options, guidance=THG(grid=2))
    ours, asked = drive(guider, given)
    assert asked == [1] * N and guider.nfe == guider.plan.nfe == N
    assert all(torch.equal(a.pred, b.pred) for a, b in zip(ours, stock, strict=True))


def test_window_has_the_method_to_itself() -> None:
    guider = TortoiseHareGuidance(start=0.2, stop=0.8, guidance=THG(grid=3))
    assert drive(guider, outputs())[1] == [1, 1, 2, 1, 1, 2, 1, 1, 1, 1]
    assert guider.plan.coarse_grid == (2, 5) and guider.nfe == guider.plan.nfe == 12
    budget = guider.new(guidance=THG(nfe=13))
    drive(budget, outputs())
    assert budget.nfe == 13
    guider.disable()
    assert guider.num_conditions == 1
    guider.enable()


def test_guidance_that_pauses_comes_back_fresh() -> None:
    guider, given = TortoiseHareGuidance(guidance=THG(grid=(0,))), outputs()
    asked = []
    for i in range(6):
        (guider.disable if i == 2 else guider.enable)()
        asked.append(step(guider, i, given)[1])
    assert asked == [2, 1, 1, 2, 1, 1]


def test_guidance_that_comes_later_is_stocks() -> None:
    """A callback that raises the scale during the run: no plan knew of it."""
    given = outputs()
    for guider in (TortoiseHareGuidance(1.0, guidance=THG(grid=2)), ClassifierFreeGuidance(1.0)):
        done = []
        for i in range(4):
            guider.guidance_scale = 1.0 if i < 2 else 5.0
            done.append(step(guider, i, given))
        assert [asked for _, asked in done] == [1, 1, 2, 2]
        assert torch.equal(done[3][0].pred, given[3][1] + 5.0 * (given[3][0] - given[3][1]))


def test_gradients_are_not_held() -> None:
    guider, given = TortoiseHareGuidance(guidance=THG(grid=2)), outputs()
    given = [(c.requires_grad_(), u) for c, u in given]
    step(guider, 0, given)
    assert not guider._run._held._deltas[0].requires_grad
    step(guider, 1, given)[0].pred.sum().backward()
    assert given[0][0].grad is None and given[1][0].grad is not None
    with torch.inference_mode():
        inputs = {"embeds": (COND + 1, UNCOND + 1)}
        assert drive(guider, outputs(), inputs=inputs)[1] == [2, 1] * (N // 2)


SCHEDULERS = [
    (diffusers.DDIMScheduler(beta_schedule="scaled_linear"), 12),
    (diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), 12),
    (diffusers.EulerDiscreteScheduler(use_karras_sigmas=True), 7),  # the last steps: img2img
    (diffusers.HeunDiscreteScheduler(), 12),
]


@pytest.mark.parametrize(("scheduler", "num_steps"), SCHEDULERS, ids=lambda v: type(v).__name__)
def test_grid_lies_along_the_scheduler(scheduler, num_steps: int) -> None:
    scheduler.set_timesteps(12)
    lambdas, _ = noise_levels(scheduler, len(scheduler.timesteps))
    is_heun = len(lambdas) > 12
    start = 0 if is_heun else 12 - num_steps
    timesteps, lambdas = scheduler.timesteps[start:], lambdas[start : start + num_steps]
    method = THG(calibration=CURVES, nfe=0.7)
    pipe = type("Pipe", (), {"scheduler": scheduler})()
    guider = TortoiseHareGuidance(5.0, guidance=method).follow(pipe)
    for i in range(num_steps):
        step(guider, i, outputs(num_steps), num_steps, t=timesteps[i])
    name = type(scheduler).__name__
    wanted = plan_from_timesteps(timesteps[:num_steps].tolist(), lambdas, method, 5.0, name)
    assert guider.plan == wanted and guider.nfe == wanted.nfe
    unknown = guider.new().follow(None)
    drive(unknown, outputs(num_steps))
    assert "follow" in unknown.plan.notes[0] and unknown.plan.coarse_grid != wanted.coarse_grid


def test_foreign_timesteps_are_placed_by_number() -> None:
    scheduler = diffusers.DDIMScheduler()
    guider = TortoiseHareGuidance().follow(scheduler)
    scheduler.set_timesteps(4)
    drive(guider, outputs())
    assert "does not run along DDIMScheduler" in guider.plan.notes[0]
    with pytest.raises(InvalidArgument, match="source='int'"):
        guider.follow(3)


def test_copies_hold_nothing() -> None:
    guider = TortoiseHareGuidance(guidance=THG(grid=(0,)))
    pipe = type("Pipe", (), {"scheduler": diffusers.DDIMScheduler()})()
    step(guider.follow(pipe), 0, outputs())
    for twin in (copy.deepcopy(guider), pickle.loads(pickle.dumps(guider))):
        assert twin.scheduler is None and twin.plan is None
        assert step(twin, 1, outputs())[1] == 2
    assert guider.new().scheduler is pipe.scheduler
    assert step(guider, 1, outputs())[1] == 1
    guider.reset()
    assert guider.plan is None and guider.nfe == 0 and step(guider, 2, outputs())[1] == 2
    assert guider.stats() == {
        **{"runs": 2, "evaluations": 5, "refreshes": 1},
        **{"last_nfe": 2, "last_rows": 1},
    }


def test_switched_off_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THG_DISABLE", "1")
    assert drive(TortoiseHareGuidance(guidance=THG(grid=5)), outputs())[1] == [2] * N


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": float("nan")}, "guidance_scale=nan: give a finite number"),
        ({"guidance_scale": "7"}, "guidance_scale='7'"),
        ({"guidance_rescale": None}, "guidance_rescale=None"),
        ({"start": 1.0}, r"start=1.0: .*\[0, 1\)"),
        ({"start": 0.5, "stop": 0.2}, r"stop=0.2: .*\[0.5, 1\]"),
        ({"stop": True}, "stop=True"),
        ({"guidance": "hare"}, "guidance='hare'"),
        ({"guidance": {"method": "hare"}}, "guidance=.*give the method itself"),
        ({"guidance": 3}, "guidance=3"),
    ],
)
def test_arguments_are_checked(options, message) -> None:
    with pytest.raises(InvalidArgument, match=message):
        TortoiseHareGuidance(**options)


def test_a_calibration_of_another_model_is_refused() -> None:
    guider = TortoiseHareGuidance(guidance=THG(calibration=random_calibration(0), nfe=0.7))
    with pytest.raises(CalibrationError, match="another architecture"):
        step(guider, 0, outputs())


def test_the_package_gives_it_when_asked() -> None:
    assert thg_engine.TortoiseHareGuidance is TortoiseHareGuidance
    with pytest.raises(AttributeError, match="no attribute 'TortoiseHare'"):
        _ = thg_engine.TortoiseHare
