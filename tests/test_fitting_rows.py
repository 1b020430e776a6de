"""Fitting of plans: corrected rows and the choice of grids against references of their own."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from gaussian import NODES, TYPES, Fixture, W, batch_of, schedule_of
from search_cases import best_of_all, cost_of, spans_of
from thg_engine import CFG, THG
from thg_engine.fitting.front import PlanEntry, base_plan
from thg_engine.fitting.reference import Batch, Nodes, converge, make_nodes
from thg_engine.fitting.rows import Correction, corrected, errors, fit_rows
from thg_engine.fitting.spans import Grid, SpanErrors, inner_products
from thg_engine.lowering import plan_from_solver
from thg_engine.solvers import SOLVERS


@pytest.fixture(scope="module", params=TYPES)
def fixture(request) -> Fixture:
    return Fixture(request.param)


@pytest.mark.parametrize("both", [NODES, (0, 8, 16)], ids=["cfg", "thg"])
def test_fitted_rows_are_nearer_to_the_converged_run(fixture, both) -> None:
    """On samples that they were not fitted to; `errors` is the engine's run against x*_0."""
    grid = Grid(NODES, both)
    base = fixture.base(grid)
    assert base.method == ("cfg" if both == NODES else "thg") and base.nfe == grid.nfe
    found = fit_rows(fixture.engine, base, [*NODES, fixture.nodes.last], fixture.fit)
    plan = corrected(base, found)
    plain = errors(fixture.engine, base, fixture.held_out)
    fitted = errors(fixture.engine, plan, fixture.held_out)
    assert fitted.mean() < 0.5 * plain.mean()
    run = fixture.held_out[0]
    end = fixture.engine.sample(*run.batch[:3], plan)
    expected = (end - run.final).norm(dim=1) / run.final.norm(dim=1)
    torch.testing.assert_close(fitted[: len(end)], expected, rtol=1e-9, atol=0)
    assert all(row.gain <= 1.0 for row in found)


def test_one_batch_or_two_or_two_processes(fixture) -> None:
    """The same numbers however the samples are split."""
    base, nodes = fixture.base(Grid(NODES, (0, 8, 16))), [*NODES, fixture.nodes.last]
    split = fit_rows(fixture.engine, base, nodes, fixture.fit)
    joined = [torch.cat(parts) for parts in zip(*(t.batch[:3] for t in fixture.fit), strict=True)]
    whole = fit_rows(fixture.engine, base, nodes, [fixture.converged(Batch(*joined))])
    # A process that holds the second batch alone, and is given what the first one has sent.
    sent: list[torch.Tensor] = []

    def send(rows):
        sent.append(rows)
        return rows

    fit_rows(fixture.engine, base, nodes, fixture.fit, send)
    recorded = iter(sent)
    second = fit_rows(
        fixture.engine, base, nodes, fixture.fit[1:], lambda rows: _beside(next(recorded), rows)
    )
    # A penalty may change with the last digit where two predict alike, not the run.
    for other in (whole, second):
        pair = [corrected(base, found) for found in (split, other)]
        ends = [fixture.engine.sample(*fixture.held_out[0].batch[:3], plan) for plan in pair]
        torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-5)


def _beside(whole: torch.Tensor, mine: torch.Tensor) -> torch.Tensor:
    """What a gather of both processes gives; what is mine must be what the whole run had."""
    torch.testing.assert_close(whole[-len(mine) :], mine, rtol=1e-5, atol=1e-7)
    return torch.cat([whole[: -len(mine)], mine])


def test_corruption_is_undone() -> None:
    """The converged run of its own steps, one base row off by a known amount: put right exactly."""
    fixture = Fixture("epsilon", bend=0.0)
    nodes = Nodes(fixture.nodes.points, (1,) * fixture.nodes.last)
    args = (fixture.engine, fixture.schedule, nodes)
    runs = [converge(*args, batch_of(seed), W, "epsilon") for seed in range(3)]
    every = tuple(range(nodes.last))
    base = fixture.base(Grid(every, every))
    assert float(errors(fixture.engine, base, runs).max()) < 1e-10
    off = list(base.rows)
    amount = Correction((0.01,), (-0.02,), (0.05,))
    one = replace(base, rows=base.rows[:4])
    off[3] = corrected(one, [Correction()] * 3 + [amount]).rows[3]
    broken = replace(base, rows=tuple(off))
    found = fit_rows(fixture.engine, broken, [*every, nodes.last], runs[:2])
    before = float(errors(fixture.engine, broken, runs[2:]).max())
    after = float(errors(fixture.engine, corrected(broken, found), runs[2:]).max())
    assert after < 1e-3 * before
    assert found[3].gain < 1e-6


def test_no_correction_is_the_base() -> None:
    fixture = Fixture("epsilon")
    base = fixture.base(Grid((0, 8, 16), (0, 8)))
    assert corrected(base, [Correction()] * 3) == base
    zero = Correction((0.0,), (0.0,), (0.0,))
    given = batch_of(3)[:3]
    end = [fixture.engine.sample(*given, plan) for plan in (base, corrected(base, [zero] * 3))]
    assert torch.equal(*end)
    with pytest.raises(ValueError, match="shorter"):
        corrected(base, [zero] * 2)


def test_span_errors_are_least_squares_on_the_vectors() -> None:
    """Without the ridge, numpy's lstsq on the stacked samples themselves."""
    spans, run = spans_of()
    last = spans.nodes.last
    for j, a, t in ((0, 0, 3), (4, 4, 6), (5, 3, 7), (7, 7, last)):
        before = spans._before(j, t)
        older = before if a == j else spans._before(a, t)
        columns = [run.samples[j], run.conds[j], run.deltas[a]]
        columns += [] if before is None else [run.conds[before]]
        columns += [] if older in (None, a) else [run.deltas[older]]
        design = torch.stack([c.flatten() for c in columns], 1).numpy()
        y = run.samples[t].flatten().numpy()
        b = np.linalg.lstsq(design, y, rcond=None)[0]
        residual = ((y - design @ b) ** 2).sum() / float((run.final**2).sum())
        expected = spans.growth[t] ** 2 * residual
        assert spans.error(j, a, t) == pytest.approx(expected, rel=2e-2, abs=1e-9)


def test_best_full_grid_is_the_best_of_all() -> None:
    spans, _ = spans_of()
    for n in (2, 3, 4):
        inner = itertools.combinations(range(1, spans.nodes.last), n - 1)
        best = min(cost_of(spans, Grid((0, *rest), (0, *rest))) for rest in inner)
        found = spans.best_full(n)
        assert len(found.nodes) == n and found.both == found.nodes
        assert cost_of(spans, found) == pytest.approx(best, rel=1e-12)
    every = spans.best_full(spans.nodes.last + 5).nodes
    assert every == tuple(range(spans.nodes.last)), "no node twice"


@pytest.mark.parametrize("c2", [2.0, 1.3])
@pytest.mark.parametrize("budget", [5.0, 7.0])
def test_best_grid_is_the_best_of_all_within_the_budget(budget, c2) -> None:
    spans, _ = spans_of()
    found = spans.best(budget, c2)
    cost = len(found.nodes) + (c2 - 1) * len(found.both)
    assert cost <= budget + 1e-9 and found.nodes[0] == found.both[0] == 0
    assert cost_of(spans, found) == pytest.approx(best_of_all(spans, budget, c2), rel=1e-12)


def test_equal_branches_leave_errors_finite() -> None:
    """An empty caption beside an empty negative prompt: every delta is zero."""
    spans, run = spans_of()
    run.deltas.zero_()
    same = SpanErrors(spans.nodes, inner_products(run), spans.growth)
    finite = same.of_full_rows()[np.isfinite(same.of_full_rows())]
    assert not np.isnan(same.of_full_rows()).any() and len(finite)
    assert same.best_full(3).nodes[0] == 0 and len(same.best_full(3).nodes) == 3


def test_base_rows_are_those_of_the_solver() -> None:
    schedule = schedule_of("vp")
    entry = PlanEntry("dpmpp2m", (999.0, 700.0, 400.0, 100.0), (0, 2), ())
    points = [*(schedule.point(t) for t in entry.timesteps), make_nodes(schedule, 2).points[-1]]
    guidance = THG(grid=(0, 2), reuse="linear")
    made = plan_from_solver(SOLVERS["dpmpp2m"], points, guidance, W, "epsilon", "combined")
    assert base_plan(entry, schedule, "epsilon", W).rows == made.rows
    full = replace(entry, coarse_rows=(0, 1, 2, 3))
    made = plan_from_solver(SOLVERS["dpmpp2m"], points, CFG(), W, "epsilon", "combined")
    assert base_plan(full, schedule, "epsilon", W).rows == made.rows
    assert (entry.nfe, full.nfe) == (6, 8) and entry.cost(1.5) == 5.0 and full.is_full
