"""The search for plans: which grids are tried, what they are weighed by, which are kept."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gaussian import VP, Gaussian, W
from search_cases import (
    best_of_all,
    cost_of,
    few_nodes_fixture,  # noqa: F401  (a fixture)
    spans_of,
    task_of,
)
from thg_engine.errors import CalibrationError
from thg_engine.fitting import search as searching
from thg_engine.fitting.front import ScaleFit
from thg_engine.fitting.reference import LAMBDA_LIMITS
from thg_engine.fitting.search import search, spread
from thg_engine.fitting.spans import Grid, SpanErrors
from thg_engine.fitting.store import Store


def test_growth_is_that_of_the_exact_flow() -> None:
    """Of a Gaussian, deviations scale with the spread sqrt(alpha^2 s^2 + sigma^2) of x_t."""
    task = task_of(Gaussian(VP, "epsilon"), Store(), guidance_scales=(W,))
    found = searching.sensitivities(task, searching.Converged.of(task, W).fit)
    for j, point in enumerate(task.nodes.points):
        if j in np.linspace(1, task.nodes.last - 1, searching.PROBES).astype(int):
            exact = Gaussian.s / math.hypot(point.alpha_t * Gaussian.s, point.sigma_t)
            assert found[j] == pytest.approx(exact, rel=0.02), j
    assert found[-1] == 1.0 and len(found) == task.nodes.last + 1


def test_spread_by_time_and_by_half_log_snr() -> None:
    task = task_of(Gaussian(VP, "epsilon"), Store())
    points = task.nodes.points[:-1]
    axes = {0.0: [p.timestep for p in points], 1.0: [p.lambda_t for p in points]}
    for share, values in axes.items():
        values = np.clip(values, *LAMBDA_LIMITS) if share else np.array(values)
        nodes = spread(task, 7, share, 0.02).nodes
        gaps = np.diff(values[list(nodes)])
        wide = np.abs(np.diff(values)).max()  # nodes are where they are
        assert np.abs(gaps - gaps.mean()).max() <= wide
    even, bent = (spread(task, 7, share, 0.02).nodes for share in (0.0, 1.0))
    assert even != bent and even[0] == bent[0] == 0 and even[-1] == bent[-1]


def test_grids_of_the_dynamic_programme_are_tried(few_nodes, monkeypatch) -> None:
    """At a budget of time: calls with both branches, at what they cost here."""
    asked: list[tuple[float, float]] = []
    sparse = Grid((0, 3, 6, 9), (0, 6))

    def best(self: SpanErrors, budget: float, c2: float) -> Grid:
        asked.append((budget, c2))
        return sparse

    monkeypatch.setattr(SpanErrors, "best", best)
    task = task_of(Gaussian(VP, "epsilon", 0.3), Store(), c2=1.5)
    grids = searching.candidate_grids(task, searching.Converged.of(task, W).fit)
    assert asked == [(6.0, 1.5), (9.0, 1.5)]
    assert grids.count(sparse) == 1 and len(set(grids)) == len(grids)
    counts = {len(grid.nodes) for grid in grids if grid != sparse}
    assert counts == {4, 6} and all(g.nodes == g.both for g in grids if g != sparse)


@pytest.mark.parametrize("c2", [1.34, 1.62, 1.97])
@pytest.mark.parametrize("budget", [6.7, 7.5])
def test_grids_keep_to_a_budget_whatever_c2(budget, c2) -> None:
    """The best at c2 rounded up, by brute force: at most a twentieth of an evaluation away."""
    spans, _ = spans_of()
    unit = min(range(10, 21), key=lambda q: math.ceil(c2 * q) / q)
    above, within = math.ceil(c2 * unit) / unit, math.floor(budget * unit) / unit
    assert c2 <= above <= c2 + 0.05
    found = spans.best(budget, c2)
    assert len(found.nodes) + (c2 - 1) * len(found.both) <= budget
    assert cost_of(spans, found) == pytest.approx(best_of_all(spans, within, above), rel=1e-12)


def test_half_width_of_the_mean() -> None:
    values = torch.tensor([0.1, 0.2, 0.4, 0.9], dtype=torch.float64)
    expected = 1.96 * np.std(values.numpy(), ddof=1) / 2
    assert searching.half_width(values) == pytest.approx(expected)
    assert searching.half_width(values[:1]) == math.inf


@pytest.mark.parametrize("where", ["error", "base_error"])
def test_grids_on_which_a_run_overflows_make_no_plan(
    where,
    few_nodes,
    monkeypatch,
) -> None:
    grids = [Grid((0, middle, 10), (0, middle, 10)) for middle in (4, 5)]
    bad = [grids[0]]

    def measured(task, grid, runs) -> ScaleFit:
        values = {"error": 0.1, "base_error": 1.0}
        if grid in bad and runs.guidance_scale == 2.0:
            values[where] = math.nan
        return ScaleFit(runs.guidance_scale, values["error"], 0.1, values["base_error"])

    monkeypatch.setattr(searching, "candidate_grids", lambda *args: tuple(grids))
    monkeypatch.setattr(searching, "fitted", measured)
    task = task_of(Gaussian(VP, "epsilon", 0.3), Store())
    (plan,) = search(task, {}).plans
    assert plan.timesteps[1] == task.nodes.points[5].timestep
    bad.append(grids[1])
    with pytest.raises(CalibrationError, match="overflowed"):
        search(task, {})
