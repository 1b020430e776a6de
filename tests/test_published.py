"""Grids and calibrations in the package against the paper and against diffusers' schedulers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from thg_engine.errors import InvalidArgument
from thg_engine.grid import check_grid, grid_nfe
from thg_engine.guidance import THG
from thg_engine.published import (
    published,
    published_grid,
    published_models,
    shipped_calibration,
    shipped_calibrations,
)

SD15, SD35 = "stable-diffusion-1.5", "stable-diffusion-3.5-large"
SD15_CONFIG = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SD35_CONFIG = {
    "in_channels": 16,
    "num_layers": 38,
    "num_attention_heads": 38,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
}


@pytest.mark.parametrize(
    ("rho", "nfe"), [(0.9, 75), (1.0, 73), (1.1, 70), (1.2, 69), (1.3, 67), (None, 70)]
)
def test_stable_diffusion_15_costs_what_the_paper_says(rho, nfe):
    setting = published(SD15, rho)
    assert setting.nfe == nfe
    assert (setting.num_steps, setting.guidance_scale, setting.boost) == (50, 7.5, 1.1)
    thg = THG(grid=setting.grid, boost=setting.boost, cutoff=setting.cutoff)
    rows = thg.rows(setting.grid.lambdas, setting.guidance_scale)
    assert sum(1 + row.evaluates_both for row in rows) == nfe
    # Past the cut-off (row 38 of 50) there is no guidance at all.
    assert [bool(row.delta_weights) for row in rows] == [True] * 38 + [False] * 12


def test_stable_diffusion_35_costs_what_the_paper_says():
    setting = published(SD35)
    assert (setting.nfe, setting.rho, setting.boost, setting.num_steps) == (38, 1.0, 1.2, 28)
    thg = THG(grid=setting.grid, boost=setting.boost, cutoff=setting.cutoff)
    # The scheduler's own first row is pure noise, which the stored grid keeps at a bound.
    for first in (setting.grid.lambdas[0], -math.inf):
        rows = thg.rows((first, *setting.grid.lambdas[1:]), 3.5)
        assert sum(1 + row.evaluates_both for row in rows) == 38


def spell(*parts):
    """Row numbers; a pair is an inclusive range."""
    ranges = (range(p[0], p[1] + 1) if isinstance(p, tuple) else [p] for p in parts)
    return tuple(i for part in ranges for i in part)


@pytest.mark.parametrize(
    ("model", "rho", "expected"),
    [
        (SD15, 0.9, spell((0, 8), *range(10, 34, 2), (34, 49))),
        (SD15, 1.0, spell((0, 7), *range(9, 37, 2), (37, 49))),
        (SD15, 1.1, spell((0, 6), 8, 10, 12, 14, 17, 20, 23, 26, 28, 30, 32, 34, 36, (38, 49))),
        (SD15, 1.2, spell((0, 5), 7, 9, 11, *range(14, 30, 3), 31, 33, 35, 37, 39, (41, 49))),
        (SD15, 1.3, spell((0, 4), 6, 8, *range(10, 35, 3), 36, 38, 40, 42, (44, 49))),
        (SD35, 0.9, spell((0, 3), 5, 7, 10, 13, 16, 18, 20, (22, 26))),
        (SD35, 1.0, spell(0, 1, 2, 4, 6, 9, 12, 15, 18, 20, (22, 26))),
        (SD35, 1.1, spell(0, 1, 2, 4, 6, 9, 13, 17, 20, (22, 25), 27)),
        (SD35, 1.2, spell(0, 1, 2, 4, 7, 11, 15, 19, 21, 23, 25, 27)),
        (SD35, 1.3, spell(0, 1, 3, 6, 10, 15, 19, 22, 24, 26)),
    ],
)
def test_grids_are_the_papers(model, rho, expected):
    grid = published(model, rho).grid
    assert grid.indices == expected
    assert check_grid(grid.indices, len(grid.lambdas)) == expected


def test_stored_log_snr_of_ddim():
    """Recomputed from the scheduler's own alphas_cumprod, not by this package."""
    import diffusers

    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
        clip_sample=False, set_alpha_to_one=False,
    )  # fmt: skip
    scheduler.set_timesteps(50)
    levels = scheduler.alphas_cumprod[scheduler.timesteps].double().numpy()
    found = published(SD15).grid.lambdas
    np.testing.assert_allclose(found, 0.5 * np.log(levels / (1 - levels)), atol=1e-5)


def test_stored_log_snr_of_flow_matching():
    import diffusers

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(28)
    sigmas = scheduler.sigmas[:-1].double().numpy()
    found = published(SD35).grid.lambdas
    assert sigmas[0] == 1.0 and found[0] == -20.0
    np.testing.assert_allclose(found[1:], np.log((1 - sigmas[1:]) / sigmas[1:]), atol=1e-5)


def test_architecture_match():
    unet = published_grid(SD15_CONFIG)
    assert unet is not None and (unet.model, unet.rho) == (SD15, 1.1)
    as_lists = SD15_CONFIG | {"block_out_channels": [320, 640, 1280, 1280]}
    assert published_grid(as_lists) == unet
    transformer = published_grid(SD35_CONFIG)
    assert transformer is not None and (transformer.model, transformer.rho) == (SD35, 1.0)
    for changes in (
        {"in_channels": 9},  # inpainting
        {"cross_attention_dim": 1024},  # SD 2
        {"block_out_channels": (320, 640, 1280)},  # SDXL
    ):
        assert published_grid(SD15_CONFIG | changes) is None
    for changes in ({"num_layers": 24}, {"joint_attention_dim": 2048}, {"in_channels": 4}):
        assert published_grid(SD35_CONFIG | changes) is None
    assert published_grid({}) is None


@pytest.mark.parametrize("steps", [20, 35, 100])
@pytest.mark.parametrize("rho", [0.9, 1.1, 1.3])
def test_mapping_to_other_step_counts(steps, rho):
    import diffusers

    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    )
    scheduler.set_timesteps(steps)
    levels = scheduler.alphas_cumprod[scheduler.timesteps].double().numpy()
    lambdas = (0.5 * np.log(levels / (1 - levels))).tolist()
    setting = published(SD15, rho)
    grid = check_grid(setting.grid.on(lambdas), steps)
    limit = round(setting.cutoff * steps)
    assert len(grid) <= len(setting.grid.indices) + 1  # row 0 is always a coarse point
    for i in grid[1:]:  # each sits on the first row at or past a published noise level
        gaps = [lambdas[i] - setting.grid.lambdas[k] for k in setting.grid.indices]
        assert any(gap >= -1e-3 and lambdas[i] - gap > lambdas[i - 1] for gap in gaps)
    share = grid_nfe(grid, steps, limit) / (2 * steps)
    assert {20: (0.6, 0.88), 35: (0.6, 0.85), 100: (0.55, 0.7)}[steps][0] < share
    assert share < {20: (0.6, 0.88), 35: (0.6, 0.85), 100: (0.55, 0.7)}[steps][1]


@pytest.mark.parametrize("first", [1, 10, 25, 40, 49])
def test_truncated_runs(first):
    """img2img: the last rows of the same fine grid keep their coarse points."""
    grid = published(SD15).grid
    found = grid.on(grid.lambdas[first:])
    assert found == tuple(sorted({0} | {i - first for i in grid.indices if i >= first}))


def test_refusals():
    assert set(published_models()) == {SD15, SD35}
    with pytest.raises(InvalidArgument, match=r"model='sdxl'.*stable-diffusion-1\.5"):
        published("sdxl")
    for rho in (1.05, math.nan, "main"):
        with pytest.raises(InvalidArgument, match=r"rho=.*published are 0\.9, 1"):
            published(SD15, rho)


def test_shipped_calibrations_give_grids_that_cost_what_is_asked():
    for curves in shipped_calibrations():
        assert shipped_calibration(curves.fingerprint) == curves
        for n in (20, 50):
            lambdas = np.linspace(curves.lambdas[0], curves.lambdas[-1], n).tolist()
            for w in (2.0, 5.0, 7.5):
                for share in (0.6, 0.7, 0.9):
                    rows = THG(calibration=curves, nfe=share).rows(lambdas, w)
                    spent = sum(1 + row.evaluates_both for row in rows)
                    assert round(2 * n * share) - 3 <= spent <= round(2 * n * share)
    assert shipped_calibration("no such fingerprint") is None
