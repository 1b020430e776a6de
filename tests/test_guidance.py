"""Guidance methods: row patterns, costs, and what they refuse."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curves_fixture import calibration, random_calibration
from thg_engine.errors import InvalidArgument
from thg_engine.grid import MappedGrid
from thg_engine.guidance import (
    CFG,
    GUIDANCE_NAMES,
    THG,
    CFGCache,
    Guidance,
    GuidanceInterval,
    SelectiveGuidance,
)
from thg_engine.lowering import guidance_rows

CURVES = random_calibration(seed=0)


def ladder(n: int) -> tuple[float, ...]:
    return tuple(np.linspace(-4, 4, n).tolist())


def rows_of(guidance, n: int, w: float = 7.5):
    return guidance.rows(ladder(n), w)


def cost(guidance, n: int, w: float = 7.5) -> int:
    return sum(1 + row.evaluates_both for row in rows_of(guidance, n, w))


def pattern(guidance, n: int) -> str:
    """One letter a row: F both branches, H held delta, . no guidance; capital B, b: boosted."""
    letters = []
    for row in rows_of(guidance, n):
        letter = "F" if row.evaluates_both else "H" if row.delta_weights else "."
        letters.append({"F": "B", "H": "b"}[letter] if row.boost != 1.0 else letter)
    return "".join(letters)


@pytest.mark.parametrize(
    ("guidance", "nfe"),
    [
        (CFG(), 100),
        (CFGCache(), 70),
        (SelectiveGuidance(0.6), 70),
        (SelectiveGuidance(), 70),
        (GuidanceInterval(), 70),
        (THG(nfe=70), 70),
        (THG(nfe=0.7), 70),
        (THG(nfe=70, calibration=CURVES), 70),
        (THG(), 80),
        (THG(cutoff=30), 70),
    ],
)
def test_costs_at_50_steps(guidance, nfe):
    assert cost(guidance, 50) == nfe


@pytest.mark.parametrize(
    ("guidance", "expected"),
    [
        (CFG(), "FFFFFFFFFFFF"),
        (CFGCache(interval=3, start=0.25), "FFFFHHFHHFHH"),
        (CFGCache(interval=1, start=0.0), "FFFFFFFFFFFF"),
        (CFGCache(interval=5, start=4), "FFFFFHHHHFHH"),
        (SelectiveGuidance(0.5), "FFFFFF......"),
        (SelectiveGuidance(0.0), "FFFFFFFFFFFF"),
        (SelectiveGuidance(1.0), "............"),
        (GuidanceInterval(0.25, 0.75), "...FFFFFF..."),
        (GuidanceInterval(2, 5), "..FFF......."),
        (GuidanceInterval(0.0, 1.0), "FFFFFFFFFFFF"),
        (GuidanceInterval(2, 0.5), "..FFFF......"),
        (THG(grid=1), "FFFFFFFFFFFF"),
        (THG(grid=4), "FHHHFHHHFHHH"),
        (THG(grid=5), "FHHHHFHHHHFH"),
        (THG(grid=[0, 1, 5]), "FFHHHFHHHHHH"),
        (THG(grid=(0, 1, 5), cutoff=8), "FFHHHFHH...."),
        (THG(grid=(0, 1, 5), cutoff=0.25), "FFH........."),
        (THG(grid=(0, 1, 5), cutoff=0), "............"),
        (THG(grid=(0, 1, 5), cutoff=0.0), "............"),
        (THG(grid=(0, 1, 5), cutoff=1.0), "FFHHHFHHHHHH"),
        (THG(grid=(0, 1, 5), cutoff=99), "FFHHHFHHHHHH"),
        # Boost: spans of more than one fine step, also as the cut-off or the end shortens them.
        (THG(grid=(0, 1, 5), boost=1.1), "FBbbbBbbbbbb"),
        (THG(grid=(0, 1, 5, 11), boost=1.1), "FBbbbBbbbbbF"),
        (THG(grid=(0, 1, 5), boost=1.1, cutoff=6), "FBbbbF......"),
        (THG(grid=(0, 1, 5), boost=1.1, cutoff=7), "FBbbbBb....."),
        (THG(grid=(0, 1, 5), boost=1.1, cutoff=2), "FF.........."),
        (THG(nfe=18), "FHFHFHFHFHFH"),
        (THG(nfe=16, cutoff=4), "FFFF........"),
        (THG(nfe=14, cutoff=6), "FHHFHH......"),
        (THG(nfe=0.75), "FHFHFHFHFHFH"),
        (THG(nfe=1000), "FFFFFFFFFFFF"),
        (THG(), "FFFFHFHFHFHF"),
    ],
)
def test_row_patterns(guidance, expected):
    assert pattern(guidance, 12) == expected


def test_shares_of_rows_are_not_floored_by_rounding():
    """0.29 x 100 is 28.999999999999996 in float64."""
    assert pattern(THG(grid=1, cutoff=0.29), 100).count("F") == 29
    assert pattern(SelectiveGuidance(0.29), 100).count(".") == 29
    assert pattern(GuidanceInterval(0.29, 0.57), 100) == "." * 29 + "F" * 28 + "." * 43


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_thg_rows_against_a_walk_along_the_grid(data):
    """Every row re-derived from the grid by looking for its own span."""
    n = data.draw(st.integers(1, 40))
    inner = data.draw(st.sets(st.integers(1, max(1, n - 1)), max_size=n))
    grid = tuple(sorted({0} | {i for i in inner if i < n}))
    cutoff = data.draw(st.one_of(st.none(), st.integers(0, n + 3), st.floats(0, 1)))
    rows = rows_of(THG(grid=grid, boost=1.25, cutoff=cutoff), n)
    limit = n if cutoff is None else cutoff
    limit = math.floor(limit * n + 1e-9) if isinstance(limit, float) else min(limit, n)
    for i, row in enumerate(rows):
        if i >= limit:
            assert not row.evaluates_both and row.delta_weights == ()
            assert not row.cond_change_weights
            continue
        assert row.evaluates_both == row.coarse == (i in grid)
        assert row.delta_weights == (1.0,)
        start = max(g for g in grid if g <= i)
        stop = min([g for g in grid if g > i] + [limit])
        assert row.boost == (1.25 if stop - start > 1 else 1.0)
    assert len(rows) == n
    # The hare must learn that its force has gone: one coarse point at the cut-off.
    assert limit == n or rows[limit].coarse


@pytest.mark.parametrize("name", GUIDANCE_NAMES)
@pytest.mark.parametrize("n", [1, 2, 3, 7, 20, 35, 100])
def test_every_method_fits_every_length(name, n):
    guidance = GUIDANCE_NAMES[name]()
    assert isinstance(guidance, Guidance) and guidance.name == name
    rows = rows_of(guidance, n)
    assert len(rows) == n
    # No row may hold a delta before one was evaluated.
    held = [i for i, row in enumerate(rows) if not row.evaluates_both and row.delta_weights]
    fresh = [i for i, row in enumerate(rows) if row.evaluates_both]
    assert not held or min(fresh) < min(held)


@pytest.mark.parametrize("name", GUIDANCE_NAMES)
@pytest.mark.parametrize("n", [1, 13, 50])
def test_scale_one_costs_one_evaluation_a_row(name, n):
    rows = guidance_rows(GUIDANCE_NAMES[name](), ladder(n), 1.0)
    assert len(rows) == n and not any(row.evaluates_both or row.delta_weights for row in rows)


@pytest.mark.parametrize("n", [20, 35, 50])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_calibrated_budget_is_kept_and_used(n, seed):
    curves = random_calibration(seed)
    for share in (0.55, 0.7, 0.85, 1.0):
        spent = cost(THG(nfe=share, calibration=curves), n)
        assert spent <= round(share * 2 * n)
        assert spent >= round(share * 2 * n) - 4
    assert cost(THG(nfe=n + 1, calibration=curves), n) == n + 1


def test_calibration_decides_the_grid():
    dense_early = calibration([-4, 0, 4], [1, 10, 10], [1, 1, 1])
    thg = THG(rho=2.0).with_calibration(dense_early)
    grid = thg.coarse_grid(ladder(50), 2.0)
    gaps = np.diff(grid)
    assert gaps[0] == 2 and gaps[-1] > 10
    assert THG(calibration=dense_early).coarse_grid(ladder(50), 2.0) == THG(
        calibration=dense_early, rho=1.0
    ).coarse_grid(ladder(50), 2.0)
    # At w <= 1 there is no hare to measure; the default grid stands in.
    assert thg.coarse_grid(ladder(50), 0.5) == THG().coarse_grid(ladder(50), 0.5)


def test_cutoff_frees_budget_for_earlier_rows():
    plain = THG(nfe=70, calibration=CURVES).coarse_grid(ladder(50), 7.5)
    cut = THG(nfe=70, calibration=CURVES, cutoff=30).coarse_grid(ladder(50), 7.5)
    assert sum(i < 30 for i in cut) > sum(i < 30 for i in plain)
    assert cost(THG(nfe=70, calibration=CURVES, cutoff=30), 50) <= 70


def test_grid_may_be_an_array_or_mapped():
    assert THG(grid=np.array([0, 2, 5])).grid == (0, 2, 5)
    assert THG(grid=range(0, 12, 3)).grid == (0, 3, 6, 9)
    mapped = MappedGrid((0, 2, 6), ladder(12))
    assert pattern(THG(grid=mapped), 12) == "FHFHHHFHHHHH"
    assert THG(grid=[0, 1]) == THG(grid=(0, 1)) and hash(THG(grid=[0, 1]))


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        *(
            (lambda v=v: THG(boost=v), "boost")
            for v in (0, -1.0, math.nan, math.inf, "1", None, True)
        ),
        *((lambda v=v: THG(rho=v), "rho") for v in (0, -1.0, math.nan, math.inf, "1", True)),
        *((lambda v=v: THG(cutoff=v), "cutoff") for v in (-1, 1.5, math.nan, math.inf, "x", True)),
        *((lambda v=v: THG(nfe=v), "nfe") for v in (1.5, 0.0, -0.1, math.nan, "70", True)),
        *((lambda v=v: THG(grid=v), "grid") for v in (0, -2, True, 0.5, "abc", (), (1, 2), (0, 0))),
        *((lambda v=v: THG(grid=v), "grid") for v in ((0, 3, 2), (0, 1.5), (0, "1"), (0, -1))),
        (lambda: THG(calibration="curves.json"), "calibration"),
        (lambda: THG(rho=1.1, nfe=70), "nfe"),
        (lambda: THG(grid=(0, 1), nfe=70), "grid"),
        (lambda: THG(grid=3, rho=1.0), "grid"),
        (lambda: rows_of(THG(rho=1.1), 50), "rho"),
        (lambda: rows_of(THG(nfe=50), 50), "nfe"),
        (lambda: rows_of(THG(nfe=0.5), 50), "nfe"),
        (lambda: rows_of(THG(nfe=-3), 50), "nfe"),
        (lambda: rows_of(THG(nfe=20, calibration=CURVES), 20), "nfe"),
        (lambda: rows_of(THG(grid=(0, 50)), 50), "grid"),
        (lambda: rows_of(THG(calibration=CURVES), 50, math.inf), "guidance_scale"),
        *((lambda v=v: CFGCache(interval=v), "interval") for v in (0, -1, 2.0, "2", None, True)),
        *((lambda v=v: CFGCache(start=v), "start") for v in (-1, 1.5, math.nan, None, "x", True)),
        *(
            (lambda v=v: GuidanceInterval(v, 0.9), "start")
            for v in (-0.1, 2.0, None, "x", math.nan)
        ),
        *(
            (lambda v=v: GuidanceInterval(0.1, v), "stop")
            for v in (-0.1, 2.0, None, "x", 0.1, 0.05)
        ),
        (lambda: GuidanceInterval(7, 3), "stop"),
        *(
            (lambda v=v: SelectiveGuidance(v), "skip")
            for v in (-0.1, 1.1, math.nan, "x", None, True)
        ),
    ],
)
def test_malformed_arguments_are_named(make, argument):
    with pytest.raises(InvalidArgument) as caught:
        make()
    assert caught.value.argument == argument
    assert str(caught.value).startswith(f"{argument}=") and caught.value.remedy


def test_a_method_with_too_few_rows_is_refused():
    class Short:
        name = "short"

        def rows(self, lambdas, guidance_scale):
            return CFG().rows(lambdas[1:], guidance_scale)

    with pytest.raises(InvalidArgument, match="one row per model call"):
        guidance_rows(Short(), ladder(5), 3.0)
