"""Block caches below compiled pipelines: states of one batch never reach another."""

from __future__ import annotations

import copy

import diffusers
import pytest
import torch
from diffusers.hooks.hooks import StateManager
from diffusers.hooks.pyramid_attention_broadcast import PyramidAttentionBroadcastHook

import thg_engine
from test_zoo_compile import Network
from thg_engine import CFG, THG
from thg_engine.fingerprint import why_not_captured
from thg_engine.integrations.diffusers import caches
from thg_engine.integrations.diffusers.records import RECORDS
from zoo import build, call
from zoo_all import ZOO

pytestmark = [
    pytest.mark.filterwarnings("ignore:You have passed", "ignore:.*is deprecated"),
    pytest.mark.filterwarnings("ignore:.*this pipeline is left"),
]
HELD, STEPS = THG(grid=2), 8
COMMON = ["cogvideox", "ltx", "mochi"]
KINDS = ["first block", "taylor", "mag", "pyramid", "faster", "faster distilled"]
PAIRS = [(name, kind) for name in COMMON for kind in KINDS]
PAIRS += [(name, "pyramid") for name in ("latte", "allegro")]
CONTEXTS = ["first block", "taylor", "mag"]
TWO_CALLS = ["wan", "flux_true_cfg", "qwen_image", "cogview4"]


def config(kind: str, pipe):
    """A cache that leaves something out in a run of `STEPS`."""

    def now() -> float:
        # Pipelines tell where they are, but for Latte's.
        return float(getattr(pipe, "_current_timestep", None) or 0)

    if kind == "first block":
        return diffusers.FirstBlockCacheConfig(threshold=0.4)
    if kind == "taylor":
        parts = [r".*blocks\.\d+\.(attn1|attn)"]
        options = {"cache_identifiers": parts, "taylor_factors_dtype": torch.float32}
        return diffusers.TaylorSeerCacheConfig(2, disable_cache_before_step=1, **options)
    if kind == "mag":
        options = {"threshold": 0.2, "max_skip_steps": 1, "retention_ratio": 0.1}
        ones = [1.0] * STEPS
        return diffusers.MagCacheConfig(mag_ratios=ones, num_inference_steps=STEPS, **options)
    if kind == "pyramid":
        return diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 2000),
            current_timestep_callback=now,
        )
    return diffusers.FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 950),
        unconditional_batch_skip_range=1,
        current_timestep_callback=now,
        attention_weight_callback=lambda module: 0.5,
        tensor_format="BFCHW",
        is_guidance_distilled=kind == "faster distilled",
    )


def run(entry, pipe, **changes) -> torch.Tensor:
    return call(entry, pipe, **{"num_inference_steps": STEPS, **changes})


def enable(kind: str, pipe) -> None:
    pipe.transformer.enable_cache(config(kind, pipe))


def states(module) -> list:
    """Hooks that keep one state and know no contexts."""
    hooks = [
        hook
        for part in module.modules()
        for hook in getattr(getattr(part, "_diffusers_hook", None), "hooks", {}).values()
    ]
    return [h for h in hooks if getattr(h, "is_guidance_distilled", True) and hasattr(h, "state")]


class ByHand:
    """The plain pipeline with its cache on; rows between coarse ones are conditional calls.

    Each such call names its context itself, or is given states of its own.
    """

    def __init__(self, pipe, coarse: set[int]) -> None:
        self.module, self.coarse, self.delta = pipe.transformer, coarse, None
        self.row, self.inner, self.alone = 0, pipe.transformer.forward, None

    def __enter__(self) -> None:
        self.module.forward = self._forward

    def __exit__(self, *exc) -> None:
        self.module.forward = self.inner

    def _forward(self, *args, **kwargs):
        row, self.row = self.row, self.row + 1
        if row in self.coarse:
            out = self.inner(*args, **kwargs)
            uncond, cond = out[0].chunk(2)
            self.delta = cond.float() - uncond.float()
            return out
        half = {
            name: value.chunk(2)[1]
            if isinstance(value, torch.Tensor) and value.ndim and len(value) % 2 == 0
            else value
            for name, value in kwargs.items()
        }
        with self.module.cache_context("the conditional branch alone"):
            cond = self._alone(half)[0]
        return (torch.cat([(cond.float() - self.delta).to(cond.dtype), cond]),)

    def _alone(self, half):
        hooks = states(self.module)
        if self.alone is None:
            self.alone = [copy.copy(hook.state) for hook in hooks]
            for hook, state in zip(hooks, self.alone, strict=True):
                state.reset()
                if "Pyramid" not in type(hook).__name__:
                    state.iteration = 2  # so that it computes
        before = [hook.state for hook in hooks]
        for hook, state in zip(hooks, self.alone, strict=True):
            hook.state = state
        try:
            # Past FasterCache's hook on the denoiser, which would split the output.
            return type(self.module).forward(self.module, **half)
        finally:
            for hook, state in zip(hooks, before, strict=True):
                hook.state = state


@pytest.mark.parametrize(("name", "kind"), PAIRS)
@pytest.mark.parametrize("order", ["before", "after"])
def test_full_guidance_with_a_cache_is_bit_identical(name: str, kind: str, order: str) -> None:
    entry = ZOO[name]
    pipe = build(entry)
    plain = run(entry, pipe)
    pipe = build(entry)  # diffusers 0.40 finds no cache put in after the first call
    enable(kind, pipe)
    stock = run(entry, pipe)
    acts = kind != "faster"  # whose attention part waits for rows of one branch
    assert torch.equal(stock, plain) != acts
    pipe = build(entry)
    if order == "before":
        enable(kind, pipe)
    thg_engine.compile(pipe, CFG())
    if order == "after":
        enable(kind, pipe)
    assert torch.equal(run(entry, pipe), stock)
    assert torch.equal(run(entry, pipe), stock), "two runs in a row"
    assert not pipe.thg.stats()["fallbacks"]
    thg_engine.uncompile(pipe)
    assert torch.equal(run(entry, pipe), stock)
    pipe.transformer.disable_cache()
    assert torch.equal(run(entry, pipe), plain)


@pytest.mark.parametrize(("name", "kind"), PAIRS)
@pytest.mark.parametrize("order", ["before", "after"])
def test_held_guidance_with_a_cache_is_what_it_is_by_hand(name, kind, order) -> None:
    entry = ZOO[name]
    pipe = build(entry)
    without = run(entry, thg_engine.compile(pipe, HELD, fused=False))
    thg_engine.uncompile(pipe)
    with Network(pipe, entry) as network:
        if order == "before":
            enable(kind, pipe)
        thg_engine.compile(pipe, HELD, fused=False)
        if order == "after":
            enable(kind, pipe)
        found = run(entry, pipe)
        plan, stats = pipe.thg.plan, pipe.thg.stats()
        assert sum(network.rows) == plan.nfe == stats["last_nfe"] < 2 * STEPS
        assert set(network.rows) == {1, 2} and not stats["fallbacks"] and not stats["refreshes"]
        assert torch.equal(run(entry, pipe), found), "two runs in a row"
        assert not any(
            vars(hook.state).get("_thg_other_batches") for hook in states(network.module)
        )
        thg_engine.uncompile(pipe)
        pipe.transformer.disable_cache()
    enable(kind, pipe)
    with ByHand(pipe, set(plan.coarse_grid)):
        expected = run(entry, pipe)
    assert torch.equal(found, expected)
    assert not torch.equal(found, without), "the cache leaves nothing out"


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_broken_off_leaves_nothing_to_the_next(kind: str) -> None:
    entry = ZOO["cogvideox"]
    pipe = build(entry)
    enable(kind, pipe)
    thg_engine.compile(pipe, HELD)
    expected = run(entry, pipe)

    def callback(pipe, i, t, tensors):
        if i == 4:
            raise RuntimeError("broken off")
        return {}

    with pytest.raises(RuntimeError, match="broken off"):
        run(entry, pipe, seed=2, callback_on_step_end=callback)
    assert torch.equal(run(entry, pipe), expected)


@pytest.mark.parametrize("kind", ["first block", "pyramid"])
def test_two_prompts_and_then_one(kind: str) -> None:
    """The batch of one branch of two prompts is that of both branches of one."""
    entry = ZOO["ltx"]
    pipe = build(entry)
    enable(kind, pipe)
    thg_engine.compile(pipe, HELD)
    one, two = run(entry, pipe), run(entry, pipe, **entry.batch)
    assert torch.equal(run(entry, pipe), one)
    assert torch.equal(run(entry, pipe, **entry.batch), two)


@pytest.mark.parametrize("kind", KINDS)
def test_a_denoiser_with_a_cache_gets_no_graphs(kind: str) -> None:
    pipe = build(ZOO["cogvideox"])
    assert not why_not_captured(pipe.transformer, own="thg")
    enable(kind, pipe)
    assert "decide on the host" in why_not_captured(pipe.transformer, own="thg")


def test_faster_cache_that_leaves_branches_out_is_refused() -> None:
    entry = ZOO["cogvideox"]
    pipe = build(entry)
    cache = config("faster", pipe)
    cache.unconditional_batch_skip_range = 2
    cache.unconditional_batch_timestep_skip_range = (-1, 950)
    plain = run(entry, pipe)
    pipe.transformer.enable_cache(cache)
    stock = run(entry, pipe)
    assert not torch.equal(stock, plain)
    thg_engine.compile(pipe, HELD)
    assert torch.equal(run(entry, pipe), stock)
    assert pipe.thg.stats()["last_nfe"] == 2 * STEPS
    assert "unconditional_batch_skip_range=1" in pipe.thg.report()


# -- pipelines that call once per branch -----------------------------------------------------------


def known(name: str):
    entry = ZOO[name]
    if entry.cls not in RECORDS or entry.missing:
        pytest.skip(f"no record describes {entry.cls}")
    return entry


class CallsByHand(ByHand):
    """One call per branch, the conditional first; held rows answer the second by themselves."""

    def _forward(self, *args, **kwargs):
        (row, second), self.row = divmod(self.row, 2), self.row + 1
        if second and row not in self.coarse:
            return ((self.cond.float() - self.delta).to(self.cond.dtype),)
        out = self.inner(*args, **kwargs)
        if second:
            self.delta = self.cond.float() - out[0].float()
        else:
            self.cond = out[0]
        return out


@pytest.mark.parametrize("kind", CONTEXTS)
@pytest.mark.parametrize("name", TWO_CALLS)
def test_contexts_of_two_calls_stay_the_pipeline_s_own(name: str, kind: str) -> None:
    entry = known(name)
    pipe = build(entry)
    enable(kind, pipe)
    stock = run(entry, pipe)
    thg_engine.compile(pipe, CFG())
    assert torch.equal(run(entry, pipe), stock)
    thg_engine.compile(pipe, HELD, fused=False)
    found, plan = run(entry, pipe), pipe.thg.plan
    assert pipe.thg.stats()["last_nfe"] == plan.nfe < 2 * STEPS
    thg_engine.uncompile(pipe)
    with CallsByHand(pipe, set(plan.coarse_grid)):
        expected = run(entry, pipe)
    scale = expected.float().abs().max()
    assert float((found - expected).abs().max() / scale) < 1e-5


@pytest.mark.parametrize("name", ["wan", "flux_true_cfg", "cogview4"])
def test_one_state_for_both_calls_is_refused(name: str) -> None:
    entry = known(name)
    pipe = build(entry)
    enable("pyramid", pipe)
    assert states(pipe.transformer)
    stock = run(entry, pipe)
    thg_engine.compile(pipe, HELD)
    assert torch.equal(run(entry, pipe), stock)
    assert "PyramidAttentionBroadcast keeps one state" in pipe.thg.report()


def test_contexts_of_diffusers_040_are_strings() -> None:
    """There a manager keeps the name itself, under another attribute."""

    class Manager(StateManager):
        def __init__(self) -> None:
            self._current_context = "cond_uncond"

        def set_context(self, context) -> None:
            self._current_context = context

    module, manager = torch.nn.Linear(2, 2), Manager()
    hook = PyramidAttentionBroadcastHook((0, 1), 2, lambda: 0)
    hook.manager = manager
    diffusers.hooks.HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, "cache")
    found = caches.BlockCaches(module)
    assert found.enter(2) == [] and manager._current_context == "cond_uncond"
    state, undo = hook.state, found.enter(1)
    assert manager._current_context == "cond_uncond, batch 1" and hook.state is not state
    for one in undo:
        one()
    assert manager._current_context == "cond_uncond" and hook.state is state
