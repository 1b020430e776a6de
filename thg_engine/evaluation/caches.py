"""Baselines that come from libraries: DeepCache, and diffusers' FasterCache and PAB.

Each is put into the pipeline by its own code and taken out by `Box.as_before`. Their caches last
for one call, so that a pipeline is prepared anew for every call.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .box import Box
from .methods import Change


def why_no_deepcache(box: Box) -> str:
    """Why DeepCache does not apply here; empty if it does."""
    if not hasattr(box.pipe, "unet"):
        return "DeepCache: keeps deep blocks of a UNet; this pipeline has a transformer"
    if importlib.util.find_spec("DeepCache") is None:
        return "DeepCache: not installed (pip install DeepCache)"
    return ""


def deep_cache(interval: int) -> Change:
    """DeepCache, branch 0: of ``interval`` steps, one runs the whole UNet, the rest its outermost
    level. Rows still count in full, since both branches pass through it: compare its seconds.

    Source: Ma et al. 2023, arXiv 2312.00858; the package ``DeepCache``.
    """

    @contextmanager
    def change(box: Box, _num_steps: int) -> Iterator[None]:
        from DeepCache import DeepCacheSDHelper

        helper = DeepCacheSDHelper(pipe=box.pipe)
        helper.set_params(cache_interval=interval, cache_branch_id=0)
        helper.enable()
        try:
            yield
        finally:
            helper.disable()

    return change


def why_no_attention_caches(box: Box) -> str:
    """Why diffusers' FasterCache and PAB do not apply here; empty if they do."""
    if not hasattr(box.pipe, "transformer"):
        name = "FasterCache and PAB of diffusers"
        return f"{name}: split keyword inputs and name blocks of transformers; this is a UNet"
    return ""


def faster_cache(skip: int = 5) -> Change:
    """diffusers' FasterCache with its defaults: attention every other step, the unconditional
    branch every ``skip``-th below timestep 641, low and high frequencies amplified.

    Source: Lv et al. 2024, arXiv 2410.19355; ``diffusers.FasterCacheConfig``.
    """

    @contextmanager
    def change(box: Box, _num_steps: int) -> Iterator[None]:
        from diffusers import FasterCacheConfig, apply_faster_cache

        config = FasterCacheConfig(
            unconditional_batch_skip_range=skip,
            tensor_format="BCHW",
            attention_weight_callback=lambda _module: 0.5,  # its own default, without its warning
            current_timestep_callback=_clock(box),
            _unconditional_conditional_input_kwargs_identifiers=_SD3_INPUTS,
        )
        with _quiet():
            apply_faster_cache(box.denoiser, config)
        yield

    return change


_SD3_INPUTS = ("hidden_states", "encoder_hidden_states", "timestep", "pooled_projections")


def pyramid_attention_broadcast(skip: int = 2) -> Change:
    """diffusers' PAB: the joint attention of every block is computed every ``skip``-th step
    between timesteps 800 and 100, and its last output taken otherwise.

    Source: Zhao et al. 2024, arXiv 2408.12588; ``diffusers.PyramidAttentionBroadcastConfig``.
    """

    @contextmanager
    def change(box: Box, _num_steps: int) -> Iterator[None]:
        from diffusers import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast

        config = PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=skip,
            # From the start of the name: a pattern that also fits a parent would hook twice.
            spatial_attention_block_identifiers=("^transformer_blocks.*attn$",),
            current_timestep_callback=_clock(box),
        )
        apply_pyramid_attention_broadcast(box.denoiser, config)
        yield

    return change


def hooked_blocks(denoiser: Any) -> list[str]:
    """Names of the modules that carry a hook of diffusers, for tests and reports."""
    named = denoiser.named_modules()
    return [name for name, part in named if name and re.search("attn$", name) and _hooks(part)]


def _hooks(part: Any) -> bool:
    return bool(getattr(getattr(part, "_diffusers_hook", None), "hooks", None))


def _clock(box: Box) -> Callable[[], float]:
    """The timestep of the call that runs; Stable Diffusion 3's pipeline does not tell it."""

    def now() -> float:
        scheduler = box.pipe.scheduler
        return float(scheduler.timesteps[scheduler.step_index or 0])

    return now


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without diffusers' notice that FasterCache is experimental; restored afterwards."""
    from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
