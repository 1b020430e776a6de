"""The evaluation's numbers: metrics, comparison with baselines, and plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch

from thg_engine.evaluation.comparison import comparison, curves_of
from thg_engine.evaluation.garments import TINTS, real_images
from thg_engine.evaluation.metrics import (
    frechet_distance,
    interval95,
    kernel_distance,
    psnr,
    relative_error,
)
from thg_engine.evaluation.plots import plot_rows
from training import data


def test_psnr_and_relative_error_against_numpy() -> None:
    x, y = torch.rand(3, 3, 8, 8), torch.rand(3, 3, 8, 8)
    a, b = x.double().numpy(), y.double().numpy()
    mse = ((a - b) ** 2).reshape(3, -1).mean(1)
    np.testing.assert_allclose(psnr(x, y), -10 * np.log10(mse), rtol=1e-12)
    gap = np.linalg.norm((a - b).reshape(3, -1), axis=1) / np.linalg.norm(b.reshape(3, -1), axis=1)
    np.testing.assert_allclose(relative_error(x, y), gap, rtol=1e-12)
    assert psnr(x, x) == [100.0] * 3


@pytest.mark.parametrize("count", [2, 3, 5, 21, 40])
def test_intervals_against_scipy(count: int) -> None:
    values = np.random.default_rng(0).normal(30, 2, count)
    low, high = scipy.stats.t.interval(0.95, count - 1, values.mean(), scipy.stats.sem(values))
    assert interval95(list(values)) == pytest.approx([low, high], rel=2e-4)
    assert interval95([1.0]) is None


def test_distances_against_independent_formulas() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(40, 6)), rng.normal(0.5, 1.5, size=(40, 6))
    root = scipy.linalg.sqrtm(np.cov(x.T) @ np.cov(y.T)).real
    gap = ((x.mean(0) - y.mean(0)) ** 2).sum()
    expected = gap + np.trace(np.cov(x.T) + np.cov(y.T) - 2 * root)
    first, second = torch.from_numpy(x), torch.from_numpy(y)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-8)

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return (a @ b / 6 + 1) ** 3

    n = len(x)
    within = [
        np.mean([k(s[i], s[j]) for i in range(n) for j in range(n) if i != j]) for s in (x, y)
    ]
    across = np.mean([k(a, b) for a in x for b in y])
    assert kernel_distance(first, second) == pytest.approx(sum(within) - 2 * across, rel=1e-9)


def test_real_images_are_the_training_scripts() -> None:
    assert tuple(data.RGB[name] for name in data.COLOURS) == TINTS
    folder = data.DEFAULT_DATA_DIR
    if not folder.is_dir():
        pytest.skip(f"no Fashion-MNIST at {folder}")
    classes, colours = torch.tensor([0, 3, 3, 9]), torch.tensor([0, 1, 7, 4])
    first, second = real_images(str(folder), classes, colours, 0)
    assert first.shape == second.shape == (4, 3, 32, 32)
    assert not torch.equal(first, second)
    grey = data.load(folder, "t10k")
    plain_grey = grey.grey.float() / 255
    for image, label in zip(first, classes, strict=True):
        brightest = image.amax(0) / image.amax()
        pool = plain_grey[grey.classes == label]
        scaled = pool / pool.amax((1, 2), keepdim=True)
        assert (scaled - brightest).abs().amax((1, 2)).min() < 1e-4


def test_comparison_by_hand() -> None:
    """Between 1 s with 30 dB and 4 s with 40 dB, 2 s buy 35 dB."""
    base = {"pipeline": "sd", "guidance_scale": 5.0, "solver": "ddim", "num_steps": 10}

    def row(method: str, mine: bool, seconds: float, level: float) -> dict[str, Any]:
        cost = {"nfe": (5 if method == "gate" else 10) * seconds, "seconds": seconds, "ci95": None}
        return {
            **base,
            "method": method,
            "ours": mine,
            "budget": None,
            **cost,
            "psnr_to_converged": level,
        }

    rows = [
        row("CFG", False, 1.0, 30.0),
        row("CFG", False, 4.0, 40.0),
        row("CFG", False, 5.0, 39.0),  # later and worse: no point of the curve
        row("gate", False, 2.5, 36.0),  # late, but of half the NFE
        row("short", True, 0.5, 20.0),
        row("plan", True, 2.0, 38.0),
        row("long", True, 6.0, 45.0),
    ]
    found = {(one["cost"], one["method"]): one for one in comparison(rows)}
    middle = found["seconds", "plan"]
    assert middle["baseline"] == middle["equal"] == "CFG, ddim"
    assert middle["baseline_psnr"] == pytest.approx(35.0) and middle["lead"] == pytest.approx(3.0)
    assert middle["equal_cost"] == pytest.approx(4.0**0.8)
    assert middle["share"] == pytest.approx(2.0 / 4.0**0.8)
    assert middle["value"] == 2.0
    counted = found["nfe", "plan"]
    assert counted["value"] == 20.0 and counted["baseline"] == "gate, ddim"
    assert counted["baseline_psnr"] == 36.0 and counted["equal"] == "CFG, ddim"
    assert counted["share"] == pytest.approx(middle["share"])
    early, late = found["seconds", "short"], found["seconds", "long"]
    assert early["baseline"] is None and early["lead"] is None
    assert early["equal"] == "CFG, ddim" and early["equal_cost"] == 1.0, "its cheapest point"
    assert early["share"] == 0.5
    assert late["lead"] == pytest.approx(5.0) and late["equal"] is None and late["share"] is None
    assert comparison([row("short", True, 0.5, 20.0)]) == []


def test_plots_hold_every_curve(tmp_path: Path) -> None:
    base = {"pipeline": "sd", "guidance_scale": 5.0, "solver": "ddim", "seconds": 1.0}
    more = {"rel_error": 0.1, "rel_error_ci95": [-0.1, 0.3], "psnr_to_same_n": None}
    rows = [
        {**base, **more, "method": name, "ours": mine, "nfe": nfe, "psnr_to_converged": 30.0}
        | {"ci95": [29.0, 31.0]}
        for name, mine, nfe in [
            ("calibrated plan", True, 40.0),
            ("calibrated plan", True, 20.0),
            ("CFG", False, 20.0),
        ]
    ]
    curves = curves_of(rows)
    assert list(curves) == ["CFG, ddim", "calibrated plan, ddim"]
    assert [row["nfe"] for row in curves["calibrated plan, ddim"]] == [20.0, 40.0]
    (path,) = plot_rows(rows, tmp_path)
    assert path.name == "sd-w5.png" and path.stat().st_size > 10_000
