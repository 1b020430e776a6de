"""Baselines of the evaluation: what they cost, what they compute, and that nothing stays behind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from evaluation_boxes import flow_box, sd_box
from thg_engine.evaluation.baselines import baselines, gamma_for_share, published_thg
from thg_engine.evaluation.box import Box
from thg_engine.evaluation.branches import AdaptiveGuidance, FrequencyCache, split_frequencies
from thg_engine.evaluation.caches import (
    faster_cache,
    hooked_blocks,
    pyramid_attention_broadcast,
    why_no_deepcache,
)
from thg_engine.evaluation.methods import Method, OneGate, adaptive, frequency_cache, guided, plain
from thg_engine.evaluation.prompts import quality_prompts, report_prompts, selection_prompts
from thg_engine.evaluation.runner import measure_c2, run
from thg_engine.evaluation.settings import Settings
from thg_engine.evaluation.solvers import SOLVERS, build
from thg_engine.guidance import FRESH, HELD, THG, CFGCache, GuidanceInterval, SelectiveGuidance

PROMPTS = report_prompts(2)
BOXES = {"noise": sd_box, "flow": flow_box}
STEPS = 10
SMALL = Settings(
    solver_steps=(STEPS,),
    main_steps=(20,),
    reuse_steps=(STEPS,),
    reuse_solvers=("ddim",),
    selection_prompts=6,
)


def latents(box: Box, method: Method, scale: float = 5.0, seed: int = 0) -> torch.Tensor:
    return run(box, method, PROMPTS, box.noise(2, seed), scale).latents


def traces(box: Box) -> list[dict[str, object]]:
    """What code could leave on the pipeline: class, components, attributes of every module."""
    pipe = box.pipe
    left: list[dict[str, object]] = [{"class": type(pipe), "keys": sorted(vars(pipe))}]
    left.append({key: id(part) for key, part in pipe.components.items()})
    for part in box.denoiser.modules():
        hooks = len(part._forward_hooks) + len(part._forward_pre_hooks)
        left.append({"own": sorted(vars(part)), "hooks": hooks, "class": type(part)})
    return left


@contextlib.contextmanager
def gaussian_data(box: Box) -> Iterator[None]:
    """The network's place is taken by the exact output for Gaussian data, another per branch."""
    alphas = box.pipe.scheduler.alphas_cumprod.double() if box.family == "noise" else None

    def output(x: torch.Tensor, t: float) -> torch.Tensor:
        pairs = len(x) // 2
        mean = torch.tensor([0.3, -0.8]).repeat_interleave(pairs)[:, None, None, None].double()
        spread = torch.tensor([0.9, 1.1]).repeat_interleave(pairs)[:, None, None, None].double()
        if alphas is None:
            alpha, sigma = 1 - t / 1000, t / 1000
        else:
            squared = float(np.interp(t, np.arange(1000), alphas.numpy()))
            alpha, sigma = squared**0.5, (1 - squared) ** 0.5
        eps = sigma * (x.double() - alpha * mean) / ((alpha * spread) ** 2 + sigma**2)
        data = mean + alpha * spread**2 * (x - alpha * mean) / ((alpha * spread) ** 2 + sigma**2)
        return (eps if alphas is not None else eps - data).to(x.dtype)

    def forward(*args: Any, **kwargs: Any) -> tuple[torch.Tensor]:
        x = args[0] if args else kwargs["hidden_states"]
        t = kwargs["timestep"] if "timestep" in kwargs else args[1]
        return (output(x, float(torch.as_tensor(t).reshape(-1)[0])),)

    box.denoiser.forward = forward
    try:
        yield
    finally:
        del box.denoiser.forward


@pytest.mark.parametrize("family", BOXES)
def test_all_solvers_approach_one_solution(family: str) -> None:
    """Ten times the steps bring every solver to the same latents, within 0.6 %."""
    box, scale = BOXES[family](), 3.0
    with gaussian_data(box):
        reference = latents(box, Method("x", "dpmpp2m", 1000, plain), scale)
        for solver in SOLVERS[family]:
            methods = (Method("x", solver, n, plain) for n in (25, 250))
            gaps = (latents(box, method, scale) - reference for method in methods)
            far, near = (float(gap.norm() / reference.norm()) for gap in gaps)
            assert near < 6e-3 and near < 0.5 * far, (solver, far, near)


@pytest.mark.parametrize("family", BOXES)
def test_solvers_start_and_end_alike(family: str) -> None:
    box = BOXES[family]()
    ends = set()
    for solver in SOLVERS[family]:
        scheduler = build(family, solver, box.pipe.scheduler.config)
        scheduler.set_timesteps(STEPS)
        assert float(scheduler.timesteps[0]) == pytest.approx(999), solver
        if family == "flow" and solver != "heun":
            even = [999 * (1 - i / STEPS) for i in range(STEPS)]
            assert scheduler.timesteps.tolist() == pytest.approx(even, rel=1e-5)
        sigmas = getattr(scheduler, "sigmas", None)
        if sigmas is not None and len(sigmas) < 1000:
            ends.add(round(float(sigmas[-1]), 3))
    assert ends == ({0.029} if family == "noise" else {0.0})


EXPECTED = {
    "CFG": 20,
    "CFG-Cache without FFT": 10 + 2 + 2,  # rows 0, 1; then 2 and 7
    "CFG-Cache": 14,
    "Guidance Interval": 14,
    "Selective Guidance": 14,
    "one-gate delta reuse": 15,
    "THG (published, 70%)": 14,
}


def test_counted_evaluations_are_what_each_method_promises() -> None:
    box = sd_box()
    found: dict[str, float] = {}
    for method in baselines(box, 5.0, SMALL, lambda _text: None):
        wanted = method.solver in ("ddim", "heun", "pndm") and method.num_steps == STEPS
        if wanted and method.name != "DeepCache":
            output = run(box, method, PROMPTS, box.noise(2, 0), 5.0)
            found[method.key] = output.nfe
            assert output.latents.isfinite().all()
    assert found.pop("CFG/heun/10") == 38
    assert found.pop("CFG/pndm/10") == 22
    for name, nfe in EXPECTED.items():
        assert found.pop(f"{name}/ddim/{STEPS}") == nfe, name
    assert 10 < found.pop("THG (published)/ddim/10") < 20
    assert 10 < found.pop("Adaptive Guidance/ddim/10") <= 20
    assert found.pop("Adaptive Guidance (70%)/ddim/10") == pytest.approx(14, abs=4)
    assert not found


def test_one_gate_rows() -> None:
    assert OneGate(0.5).rows([0.0] * 6, 5.0) == (FRESH,) * 3 + (HELD,) * 3
    assert OneGate(0.0).rows([0.0] * 3, 5.0) == (FRESH, HELD, HELD)
    with pytest.raises(ValueError, match="gate"):
        OneGate(1.5)


def by_hand(box: Box, steps: int, scale: float, combine) -> torch.Tensor:
    """A DDIM loop over the network, with ``combine(i, t, both)`` forming the guided output."""
    pipe = box.pipe
    scheduler = build("noise", "ddim", pipe.scheduler.config)
    scheduler.set_timesteps(steps)
    cond, uncond = pipe.encode_prompt(PROMPTS, "cpu", 1, True)
    x = box.noise(2, 0)
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):

            def both(x=x, t=t):
                context = torch.cat([uncond, cond])
                return pipe.unet(torch.cat([x, x]), t, encoder_hidden_states=context)[0].chunk(2)

            x = scheduler.step(combine(i, float(t), both, scale), t, x).prev_sample
    return x


def test_adaptive_guidance_against_a_loop_by_hand() -> None:
    box, through, rows = sd_box(), torch.zeros(2, dtype=torch.bool), [0]
    gamma = 0.9

    def combine(_i, _t, both, scale):
        u, c = both()
        guided_out = torch.where(through[:, None, None, None], c, u + scale * (c - u))
        rows[0] += 2 + int((~through).sum())
        for j in range(2):
            a, b = c[j].double().flatten(), u[j].double().flatten()
            through[j] |= bool(a @ b / (a.norm() * b.norm()) > gamma)
        return guided_out

    expected = by_hand(box, STEPS, 5.0, combine)
    output = run(box, Method("ag", "ddim", STEPS, adaptive(gamma)), PROMPTS, box.noise(2, 0), 5.0)
    torch.testing.assert_close(output.latents, expected, rtol=1e-3, atol=1e-3)
    assert output.nfe == rows[0] / 2
    assert STEPS < output.nfe < 2 * STEPS


def test_frequency_cache_against_numpy() -> None:
    box, kept = sd_box(), {}

    def parts(values):
        spectrum = np.fft.fftshift(np.fft.fft2(values.double().numpy()), axes=(-2, -1))
        grid = np.indices((8, 8)) - 4
        low = (grid**2).sum(0) <= 1
        return spectrum * low, spectrum * ~low

    def combine(i, t, both, scale):
        u, c = both()
        if i < 2 or (i - 2) % 5 == 0:
            kept["low"], kept["high"] = parts(u - c)
        else:
            kept["low"] = kept["low"] * (1.1 if 99 < t < 901 else 1.0)
            kept["high"] = kept["high"] * (1.1 if -1 < t < 301 else 1.0)
            spectrum = np.fft.ifftshift(kept["low"] + kept["high"], axes=(-2, -1))
            u = c + torch.from_numpy(np.fft.ifft2(spectrum).real).float()
        return u + scale * (c - u)

    expected = by_hand(box, STEPS, 5.0, combine)
    found = latents(box, Method("fft", "ddim", STEPS, frequency_cache()))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    without = latents(box, Method("held", "ddim", STEPS, guided(CFGCache())))
    assert (found - without).norm() > 1e-2 * found.norm()


def test_frequencies_add_up() -> None:
    x = torch.randn(2, 3, 10, 8)
    low, high = split_frequencies(x)
    whole = torch.fft.ifft2(torch.fft.ifftshift(low + high, dim=(-2, -1))).real
    torch.testing.assert_close(whole, x)
    assert int((low != 0).sum()) == 2 * 3 * 5  # a circle of radius 1


def test_a_policy_begins_anew_with_every_run() -> None:
    box = sd_box()
    for change in (adaptive(0.9), frequency_cache()):
        method = Method("twice", "ddim", 5, change)
        with method.prepared(box) as call:
            first, second = (call(PROMPTS, box.noise(2, 0), 5.0) for _ in range(2))
        assert torch.equal(first, second)


def test_the_threshold_spends_the_share() -> None:
    cosines = torch.linspace(0.5, 0.99, 20, dtype=torch.float64)[:, None].repeat(1, 3)
    gamma = gamma_for_share(cosines, 0.7)
    # 2 N share = N + guided steps: 8 of 20, the last of which is the one that exceeds gamma.
    assert int((cosines[:, 0] <= gamma).sum()) + 1 == 8


CHANGES = {
    "plain": plain,
    "thg": guided(THG(grid=2, reuse="linear")),
    "interval": guided(GuidanceInterval()),
    "selective": guided(SelectiveGuidance()),
    "gate": guided(OneGate()),
    "adaptive": adaptive(),
    "frequencies": frequency_cache(),
}


@pytest.mark.parametrize("family", BOXES)
def test_nothing_is_left_behind(family: str) -> None:
    box = BOXES[family]()
    stock = Method("stock", "dpmpp2m", 4, plain)
    expected = latents(box, stock)
    before = traces(box)  # after a call: the first one sets attributes of the pipeline's own
    changes = dict(CHANGES)
    if family == "flow":
        changes |= {"faster": faster_cache(), "pab": pyramid_attention_broadcast()}
    for name, change in changes.items():
        latents(box, Method(name, "dpmpp2m", 4, change))
        assert traces(box) == before, name
        with pytest.raises(RuntimeError), Method(name, "dpmpp2m", 4, change).prepared(box):
            raise RuntimeError
        assert traces(box) == before, name
    assert torch.equal(latents(box, stock), expected)


def test_attention_caches_on_a_flow() -> None:
    """Both hook every block's joint attention; FasterCache leaves unconditional rows out."""
    box, count = flow_box(), len(flow_box().denoiser.transformer_blocks)
    stock = latents(box, Method("cfg", "euler", STEPS, plain))
    for change, nfe in ((faster_cache(), None), (pyramid_attention_broadcast(), 2 * STEPS)):
        method = Method("cache", "euler", STEPS, change)
        with method.prepared(box):
            assert len(hooked_blocks(box.denoiser)) == count
        output = run(box, method, PROMPTS, box.noise(2, 0), 5.0)
        assert output.nfe == nfe or STEPS < output.nfe < 2 * STEPS
        gap = (output.latents - stock).norm() / stock.norm()
        assert 0 < gap < 0.2


def test_flow_baselines_run() -> None:
    box, said = flow_box(), []
    settings = Settings(solver_steps=(4,), main_steps=(), reuse_steps=(8,), reuse_solvers=("ddim",))
    names = set()
    for method in baselines(box, 5.0, settings, said.append):
        if method.num_steps == 8:
            output = run(box, method, PROMPTS, box.noise(2, 0), 5.0)
            names.add(method.name)
            assert 8 <= output.nfe <= 16 and output.latents.isfinite().all()
    assert {"FasterCache", "PAB", "THG (published)", "Adaptive Guidance"} <= names
    assert any("DeepCache" in text for text in said)
    assert [name for name, _ in published_thg(box, 28, None)] == ["THG (published)"]


def test_deepcache_where_it_is_installed() -> None:
    pytest.importorskip("DeepCache")
    from thg_engine.evaluation.caches import deep_cache

    box = sd_box()
    assert why_no_deepcache(box) == ""
    stock = latents(box, Method("cfg", "ddim", STEPS, plain))
    before = traces(box)  # after a call: the first one sets attributes of the pipeline's own
    every = latents(box, Method("deep", "ddim", STEPS, deep_cache(1)))
    third = latents(box, Method("deep", "ddim", STEPS, deep_cache(3)))
    assert torch.equal(every, stock)
    assert 0 < (third - stock).norm() < 0.5 * stock.norm()
    assert traces(box) == before


def test_prompts_of_report_and_selection_are_disjoint() -> None:
    report, selection = report_prompts(40), selection_prompts(40)
    assert len({*report, *selection}) == 80
    for prompts in (report[:20], selection[:20]):
        assert len({p.split()[-1] for p in prompts}) > 7
        assert len({p.split()[4] for p in prompts}) > 6
    captions, classes, colours = quality_prompts(160)
    assert len(set(captions)) == 80 and captions[:80] == captions[80:]
    assert len(set(zip(classes, colours, strict=True))) == 80


def test_c2_is_a_ratio_of_times() -> None:
    assert 0.5 < measure_c2(sd_box(), PROMPTS, repeats=3) < 5


def test_policies_hold_no_state_of_their_own() -> None:
    policy = AdaptiveGuidance(0.5)
    policy.cosines.append(torch.zeros(1))
    policy.begin()
    assert policy.cosines == []
    assert FrequencyCache(4).interval == 5
