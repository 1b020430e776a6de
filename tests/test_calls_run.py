"""Pipelines with one call per branch: which call is which, and guidance that comes and goes."""

from __future__ import annotations

import pytest
import torch

import thg_engine
import zoo_all  # noqa: F401  (it fills the registry)
from by_hand import ByHand, Network
from thg_engine import CFG, THG
from thg_engine.adapters import register, unregister
from zoo import ZOO, arguments, build, call

HELD = THG(grid=3)
STEPS = {"num_inference_steps": 8}


class Windowed(ByHand):
    """By hand, in rows that are guided; a delta from before a gap counts for nothing."""

    def __init__(self, pipe, entry, coarse, guided) -> None:
        super().__init__(pipe, entry, coarse)
        self.guided = guided

    def calls(self, values):
        if self.cond is not None or self.step + 1 in self.guided:
            return super().calls(values)
        self.step, self.delta = self.step + 1, None
        return values


def switched(rows):
    """A callback that leaves guidance on in these rows only."""

    def callback(pipe, i, t, tensors):
        pipe._guidance_scale = 5.0 if i + 1 in rows else 1.0
        return {}

    return callback


def compared(entry, guided, evaluations, method=HELD, **changes):
    pipe = build(entry)
    with Network(pipe, entry) as network:
        found = call(entry, thg_engine.compile(pipe, method), **STEPS, **changes)
        plan, stats = pipe.thg.plan, pipe.thg.stats()
        thg_engine.uncompile(pipe)
    assert len(network.rows) == stats["last_nfe"] == evaluations
    with Windowed(pipe, entry, set(plan.coarse_grid), guided):
        expected = call(entry, pipe, **STEPS, **changes)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4


def test_guidance_that_goes_and_comes_back() -> None:
    """Rows 0 to 2 and 5 to 7: row 5 holds nothing and evaluates both, as row 6 is planned to."""
    guided = {0, 1, 2, 5, 6, 7}
    compared(ZOO["wan"], guided, 8 + 3, callback_on_step_end=switched(guided))


@pytest.mark.parametrize("fused", [None, False])
def test_a_gap_between_two_coarse_rows(fused) -> None:
    """Row 4 would still have the delta of row 0; after the gap it counts for nothing."""
    guided = {0, 1, 4, 5, 6, 7}
    entry = ZOO["wan"]
    pipe = thg_engine.compile(build(entry), THG(grid=8), fused=fused)
    call(entry, pipe, **STEPS, callback_on_step_end=switched(guided))
    assert pipe.thg.stats()["refreshes"] == 1 and pipe.thg._last.coarse == [0, 4]
    compared(entry, guided, 8 + 2, THG(grid=8), callback_on_step_end=switched(guided))


def test_guidance_that_the_pipeline_ends() -> None:
    """Lumina 2 drops the second call after half of the steps and keeps its scale."""
    compared(ZOO["lumina2"], {0, 1, 2, 3}, 8 + 2, cfg_trunc_ratio=0.5)


@pytest.mark.parametrize("branch", ["prompt_embeds", "negative_prompt_embeds"])
@pytest.mark.parametrize("how", ["swap", "edit"])
def test_conditioning_that_changes_in_a_run(branch, how) -> None:
    entry = ZOO["wan"]

    def callback(pipe, i, t, tensors):
        if i != 0:
            return {}
        if how == "edit":
            tensors[branch].mul_(0.5)
            return {}
        return {branch: tensors[branch] * 0.5}

    changes = {
        "callback_on_step_end": callback,
        "callback_on_step_end_tensor_inputs": ["latents", branch],
    }
    pipe = thg_engine.compile(build(entry), HELD)
    call(entry, pipe, **STEPS, **changes)
    assert pipe.thg.stats()["refreshes"] == 1


@pytest.mark.parametrize("branch", ["prompt_embeds", "negative_prompt_embeds"])
def test_conditioning_that_is_edited_without_a_callback(branch) -> None:
    entry = ZOO["wan"]
    pipe = build(entry)
    embeds = pipe.encode_prompt("a photo of cat", "bad dog")
    texts = dict(zip(("prompt_embeds", "negative_prompt_embeds"), embeds, strict=True))
    seen = []

    def edit(*_) -> None:
        seen.append(1)
        if len(seen) == 2:  # both branches of row 0 have read it
            texts[branch].mul_(0.5)

    pipe.transformer.proj_out.register_forward_pre_hook(edit)
    thg_engine.compile(pipe, HELD)
    call(entry, pipe, **STEPS, **texts, prompt=None, negative_prompt=None)
    assert pipe.thg.stats()["refreshes"] == 1


@pytest.mark.parametrize("at", ["cond", "uncond"])
def test_a_call_that_raises_leaves_nothing_to_the_next(at) -> None:
    entry = ZOO["wan"]
    pipe = thg_engine.compile(build(entry), HELD)
    expected = call(entry, pipe)
    layer, seen = pipe.transformer.proj_out, []

    def fail(*_):
        seen.append(1)
        if len(seen) == {"cond": 3, "uncond": 2}[at]:
            raise KeyboardInterrupt

    handle = layer.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        call(entry, pipe)
    handle.remove()
    assert "KeyboardInterrupt" in pipe.thg.report()
    assert torch.equal(call(entry, pipe), expected)


def test_one_text_for_both_branches_and_another_summary() -> None:
    """Flux with the same embeddings object twice: the pooled ones tell the branches apart."""
    entry = ZOO["flux_true_cfg"]
    pipe = build(entry)
    given = arguments(entry)
    embeds, pooled, _ = pipe.encode_prompt(given["prompt"], given["prompt"])
    texts = {
        **{"prompt": None, "negative_prompt": None},
        **{"prompt_embeds": embeds, "negative_prompt_embeds": embeds},
        **{"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": -pooled},
    }
    stock = call(entry, pipe, **texts)
    assert torch.equal(call(entry, thg_engine.compile(pipe, CFG()), **texts), stock)
    call(entry, thg_engine.compile(pipe, THG(grid=2)), **texts)
    stats = pipe.thg.stats()
    assert stats["last_rows"] == 4 and stats["last_nfe"] == 6


def test_branches_out_of_turn_run_in_full() -> None:
    """A loop whose branches change places: full guidance, and the reason."""
    base = type(build(ZOO["wan"]))

    class Loop(base):
        def __call__(self, cond, uncond, steps=6):
            x = torch.ones(1, 16, 1, 4, 4)
            self.scheduler.set_timesteps(steps)
            self._num_timesteps = steps
            for i, t in enumerate(self.scheduler.timesteps):
                given = [cond, uncond] if i < 3 else [uncond, cond]
                out = [
                    self.transformer(
                        hidden_states=x,
                        timestep=t.expand(1),
                        encoder_hidden_states=text,
                        return_dict=False,
                    )[0]
                    for text in given
                ]
                c, u = out if i < 3 else out[::-1]
                x = self.scheduler.step(u + 3.0 * (c - u), t, x, return_dict=False)[0]
            return x

        guidance_scale = 3.0

    parts = build(ZOO["wan"])
    width = parts.transformer.config.in_channels
    pipe = Loop(**parts.components)
    pipe.transformer.config.in_channels = width
    texts = [torch.randn(1, 5, parts.transformer.config.text_dim) for _ in range(2)]
    register(Loop, denoiser="transformer", calls=True)
    try:
        stock = pipe(*texts)
        thg_engine.compile(pipe, THG(grid=6))
        pipe(*texts)
        assert pipe.thg.stats()["last_nfe"] > 6
        assert "do not alternate" in pipe.thg.report()
        thg_engine.uncompile(pipe)
        assert torch.equal(pipe(*texts), stock)
    finally:
        unregister(Loop)
