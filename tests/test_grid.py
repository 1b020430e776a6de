"""Coarse grids: Algorithm 2 by brute force, budgets, and grids carried to other runs."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curves_fixture import calibration, random_calibration
from thg_engine.errors import InvalidArgument
from thg_engine.grid import (
    MappedGrid,
    check_grid,
    default_grid,
    even_grid_for_nfe,
    grid_for_nfe,
    grid_for_rho,
    grid_iou,
    grid_nfe,
    look_before_you_leap,
    map_grid,
    max_spans,
    uniform_grid,
)

ratios_lists = st.lists(st.floats(0.01, 500.0), min_size=1, max_size=30)


def ladder(n: int) -> tuple[float, ...]:
    return tuple(np.linspace(-4, 4, n).tolist())


def algorithm_2(ratios, rho, order) -> tuple[int, ...]:
    """The grid from the error bound itself: c_H (m h)^(p+1) <= rho m c_T h^(p+1), in rationals."""
    n, grid, i = len(ratios), [], 0
    while i < n:
        grid.append(i)
        m = 1
        while m < n and Fraction(m + 1) ** order <= Fraction(rho) * Fraction(ratios[i]):
            m += 1
        i += m
    return tuple(grid)


@settings(deadline=None, max_examples=200)
@given(ratios_lists, st.floats(0.05, 20.0), st.integers(1, 3))
def test_algorithm_2_against_the_bound_in_exact_arithmetic(ratios, rho, order):
    assert look_before_you_leap(max_spans(ratios, rho, order)) == algorithm_2(ratios, rho, order)


def test_exact_powers_are_not_floored_below():
    for order in (1, 2, 3):
        for m in range(1, 30):
            ratios = [float(m**order)] * 40
            assert max_spans(ratios, 1.0, order) == (m,) * 40


@settings(deadline=None, max_examples=80)
@given(st.integers(0, 1000), st.integers(1, 60), st.floats(0.2, 5.0), st.floats(1.1, 20.0))
def test_a_larger_scale_never_allows_a_longer_span(seed, n, rho, w):
    curves = random_calibration(seed)
    spans = [max_spans(curves.ratio(ladder(n), s), rho, 1) for s in (w, 1.3 * w)]
    assert all(a >= b for a, b in zip(*spans, strict=True))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("order", [1, 2])
def test_scale_and_rho_that_cancel_give_one_grid(seed, order):
    """The paper's (6.5, .93), (7.5, 1.1), (8.5, 1.22): rho ~ w - 1 leaves the grid as it is."""
    curves = random_calibration(seed, order=order)
    grids = {
        grid_for_rho(curves, ladder(50), w, 1.1 * (w - 1) / 6.5) for w in (1.5, 6.5, 7.5, 8.5, 30.0)
    }
    assert len(grids) == 1
    # rho is 1.1 at w = 7.5 and by that rule 0.93 at 6.5 and 1.27 at 8.5 (the paper rounds to 1.22).
    printed = {round(w, 1): round(1.1 * (w - 1) / 6.5, 2) for w in (6.5, 7.5, 8.5)}
    assert printed == {6.5: 0.93, 7.5: 1.1, 8.5: 1.27}


@pytest.mark.parametrize("seed", range(3))
def test_denser_grid_for_larger_scale(seed):
    curves = random_calibration(seed)
    sizes = [
        len(grid_for_rho(curves, ladder(50), w, 1.1)) for w in (1.2, 2.0, 4.0, 7.5, 15.0, 60.0)
    ]
    assert sizes == sorted(sizes) and sizes[-1] > sizes[0]


def smallest_rho_grid(curves, lambdas, w, nfe, cutoff):
    """Try every rho at which any span of any row changes, smallest first."""
    ratios = curves.ratio(lambdas, w)
    n, p = len(lambdas), curves.order
    for rho in sorted({m**p / r for r in ratios for m in range(1, n + 1)}):
        grid = look_before_you_leap(max_spans(ratios, rho, p))
        if grid_nfe(grid, n, cutoff) <= nfe:
            return grid
    raise AssertionError("row 0 alone must fit")


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("cutoff", [None, 7, 0])
@pytest.mark.parametrize("n", [1, 2, 9, 21])
def test_grid_for_nfe_is_the_smallest_rho_that_fits(n, cutoff, order):
    for seed in range(6):
        curves = random_calibration(seed, order=order)
        for nfe in range(n + 1, 2 * n + 2):
            grid = grid_for_nfe(curves, ladder(n), 5.0, nfe, cutoff)
            assert grid == smallest_rho_grid(curves, ladder(n), 5.0, nfe, cutoff)
            assert grid_nfe(grid, n, cutoff) <= nfe


def test_grid_for_nfe_is_quick_on_long_runs():
    grid = grid_for_nfe(random_calibration(2), ladder(1000), 7.5, 1300)
    assert 1250 <= grid_nfe(grid, 1000) <= 1300


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 60), st.data())
def test_even_grid_spends_the_whole_budget(n, data):
    nfe = data.draw(st.integers(n + 1, 2 * n))
    cutoff = data.draw(st.one_of(st.none(), st.integers(0, n + 2)))
    grid = check_grid(even_grid_for_nfe(n, nfe, cutoff), n)
    limit = n if cutoff is None else min(cutoff, n)
    assert grid_nfe(grid, n, cutoff) == min(nfe, n + limit)
    if limit:  # gaps differ by one row at most
        gaps = np.diff([i for i in grid if i < limit] + [limit])
        assert gaps.max() - gaps.min() <= 1


def test_simple_grids():
    assert uniform_grid(7, 3) == (0, 3, 6) and uniform_grid(1, 9) == (0,)
    assert default_grid(10) == (0, 1, 2, 4, 6, 8)
    assert default_grid(50) == (*range(10), *range(10, 50, 2))
    assert grid_nfe(default_grid(50), 50) == 80
    assert default_grid(1) == (0,)
    assert grid_nfe((0, 3, 9), 12) == 15 and grid_nfe((0, 3, 9), 12, cutoff=9) == 14


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_mapping(data):
    """Identity on the same grid; elsewhere sorted, with row 0, never ahead of the noise level."""
    size = st.integers(1, 40)
    values = st.floats(-6, 6).map(lambda v: round(v, 2))
    source = sorted(data.draw(st.lists(values, min_size=1, max_size=40, unique=True)))
    target = sorted(data.draw(st.lists(values, min_size=1, max_size=40, unique=True)))
    inner = data.draw(st.sets(st.integers(1, 39), max_size=data.draw(size)))
    indices = tuple(sorted({0} | {i for i in inner if i < len(source)}))
    mapped = MappedGrid(indices, tuple(source))
    assert mapped.on(source) == indices == map_grid([source[i] for i in indices], source)
    found = mapped.on(target)
    assert check_grid(found, len(target)) == found
    expected = {0}
    for i in indices:
        later = [j for j, value in enumerate(target) if value >= source[i] - 1e-3]
        expected |= set(later[:1])
    assert found == tuple(sorted(expected))


def test_mapping_truncated_and_infinite_runs():
    lambdas = ladder(20)
    mapped = MappedGrid((0, 1, 2, 5, 9, 14), lambdas)
    # img2img runs the last rows only: coarse points fall on the same noise levels, row 0 is added.
    assert mapped.on(lambdas[7:]) == (0, 2, 7)
    assert mapped.on(lambdas[15:]) == (0,)
    # Noise that a float32 schedule computes a little differently stays on its row.
    assert mapped.on([v - 5e-4 for v in lambdas]) == mapped.indices
    for rounding in (5e-4, -5e-4):
        assert mapped.on([v + rounding for v in lambdas[1:]]) == (0, 1, 4, 8, 13)
    # Pure noise is at -inf in a schedule and at the bound in stored curves: one and the same row.
    flow = (-20.0, -3.0, -1.0, 0.0, 2.0)
    assert MappedGrid((0, 3), flow).on((-math.inf, *flow[1:])) == (0, 3)
    assert MappedGrid((0, 3), flow).on((-math.inf, -2.0, 0.5)) == (0, 2)
    assert MappedGrid((0, 3), (-math.inf, *flow[1:])).on(flow) == (0, 3)


def test_two_calls_at_one_point_share_a_coarse_point():
    """Two-stage solvers visit noise levels twice."""
    assert map_grid([-1.0, 1.0], [-1.0, -1.0, 1.0, 1.0, 2.0]) == (0, 2)


def test_iou():
    assert grid_iou((0, 1, 2), (0, 1, 2)) == 1.0
    assert grid_iou((0, 1, 2, 3), (0, 2, 5)) == pytest.approx(2 / 5)
    assert grid_iou((0,), (1,)) == 0.0


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: max_spans([1.0], 0.0, 1), "rho"),
        (lambda: max_spans([1.0], math.nan, 1), "rho"),
        (lambda: uniform_grid(5, 0), "interval"),
        (lambda: uniform_grid(5, True), "interval"),
        (lambda: even_grid_for_nfe(5, 5), "nfe"),
        (lambda: grid_for_nfe(random_calibration(0), ladder(5), 3.0, 5), "nfe"),
        (lambda: grid_for_nfe(random_calibration(0), ladder(5), 1.0, 8), "guidance_scale"),
        (lambda: grid_for_rho(random_calibration(0), ladder(5), math.inf, 1.0), "guidance_scale"),
        (lambda: check_grid((), 5), "grid"),
        (lambda: check_grid((1, 2), 5), "grid"),
        (lambda: check_grid((0, 2, 2), 5), "grid"),
        (lambda: check_grid((0, 2.0), 5), "grid"),
        (lambda: check_grid((0, 5), 5), "grid"),
    ],
)
def test_refusals(call, argument):
    with pytest.raises(InvalidArgument) as caught:
        call()
    assert caught.value.argument == argument


def test_known_curves_give_a_known_grid():
    """Constant ratio 6 at w = 3 and rho = 1: spans of 3; twice the rho: spans of 6."""
    curves = calibration([-1.0, 1.0], [6.0, 6.0], [1.0, 1.0])
    assert grid_for_rho(curves, ladder(12), 3.0, 1.0) == (0, 3, 6, 9)
    assert grid_for_rho(curves, ladder(12), 3.0, 2.0) == (0, 6)
    second = calibration([-1.0, 1.0], [18.0, 18.0], [1.0, 1.0], order=2)
    assert grid_for_rho(second, ladder(12), 3.0, 1.0) == (0, 3, 6, 9)
    assert grid_for_rho(second, ladder(12), 3.0, 4.0) == (0, 6)
