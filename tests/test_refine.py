"""Local search of grids, against the same search without anything shared between tries."""

from __future__ import annotations

import pytest

from gaussian import NODES, VP, Fixture, Gaussian, W
from search_cases import few_nodes_fixture, task_of  # noqa: F401  (the fixture few_nodes)
from thg_engine.fitting import search as searching
from thg_engine.fitting.refine import Refiner
from thg_engine.fitting.rows import corrected, errors, fit_rows
from thg_engine.fitting.search import search
from thg_engine.fitting.spans import Grid
from thg_engine.fitting.store import Store

GRIDS = {"cfg": Grid(NODES, NODES), "thg": Grid(NODES, (0, 8, 16)), "late": Grid((0, 14, 19), (0,))}


def error_of(fixture: Fixture, grid: Grid) -> float:
    base, last = fixture.base(grid), fixture.nodes.last
    plan = corrected(base, fit_rows(fixture.engine, base, [*grid.nodes, last], fixture.fit))
    return float(errors(fixture.engine, plan, fixture.fit).mean())


def by_hand(fixture: Fixture, grid: Grid, rounds: int) -> Grid:
    """Each node one back or else one on, where the mean error of the fitted rows falls."""
    nodes, lowest = list(grid.nodes), error_of(fixture, grid)
    both = [node in grid.both for node in nodes]
    for _ in range(rounds):
        for k in range(1, len(nodes)):
            for shift in (-1, 1):
                moved = nodes.copy()
                moved[k] += shift
                if moved[k] in nodes or moved[k] == fixture.nodes.last:
                    continue
                fresh = tuple(n for n, is_both in zip(moved, both, strict=True) if is_both)
                error = error_of(fixture, Grid(tuple(moved), fresh))
                if error < lowest:
                    nodes, lowest = moved, error
                    break
    fresh = tuple(n for n, is_both in zip(nodes, both, strict=True) if is_both)
    return Grid(tuple(nodes), fresh)


@pytest.mark.parametrize(("name", "rounds"), [("cfg", 1), ("thg", 1), ("late", 2)])
@pytest.mark.parametrize("kind", ["epsilon", "flow_prediction"])
def test_moves_that_are_taken(kind: str, name: str, rounds: int) -> None:
    fixture, grid = Fixture(kind), GRIDS[name]
    nodes: list[int] = []
    refiner = Refiner(
        *(fixture.engine, fixture.base, fixture.fit, fixture.nodes.last),
        on_node=lambda: nodes.append(1),
    )
    fixture.model.rows = 0
    found = refiner.refined(grid, rounds)
    cost = fixture.model.rows
    fixture.model.rows = 0
    assert found == by_hand(fixture, grid, rounds)
    assert cost < 0.5 * fixture.model.rows, "what comes before a move is not run again"
    assert len(found.both) == len(grid.both) and found.coarse_rows == grid.coarse_rows
    assert found != grid and error_of(fixture, found) < error_of(fixture, grid)
    assert len(nodes) in [done * (len(grid.nodes) - 1) for done in range(1, rounds + 1)]
    assert refiner.refined(grid, 0) == grid


def test_rounds_end_where_nothing_changes() -> None:
    fixture = Fixture("epsilon")
    refiner = Refiner(fixture.engine, fixture.base, fixture.fit, fixture.nodes.last)
    found = refiner.refined(GRIDS["late"], 50)
    assert found == refiner.refined(found, 1) == by_hand(fixture, GRIDS["late"], 50)


def test_the_best_grid_of_every_scale_is_refined(
    few_nodes,
    monkeypatch,
    tmp_path,
) -> None:
    """From the grid that is best there, within each budget; kept where it is better held out."""
    poor, rich = Grid((0, 6, 12), (0, 6, 12)), Grid((0, 3, 6, 9, 12, 13), (0, 3, 6, 9, 12, 13))
    monkeypatch.setattr(searching, "candidate_grids", lambda *_: (poor, rich))
    monkeypatch.setattr(searching, "MAX_REFINED", 5)
    model = Gaussian(VP, "epsilon", 0.3)
    more = {"budgets": (6, 12), "refine": 1}
    task = task_of(model, Store(tmp_path), **more)
    plans = search(task, {}).plans
    grids = {
        tuple(min(range(16), key=lambda j: abs(task.nodes.points[j].timestep - t)) for t in times)
        for times in (plan.timesteps for plan in plans)
    }
    expected = set()
    for scale in task.guidance_scales:
        runs = searching.Converged.of(task, scale)

        def base(grid: Grid, scale: float = scale):
            entry = searching.entry_of(task, grid, ())
            return searching.base_plan(entry, task.schedule, task.prediction_type, scale)

        refiner = Refiner(task.engine, base, runs.fit, task.nodes.last)
        expected.add(refiner.refined(poor, 1).nodes)
    assert poor.nodes not in grids and rich.nodes in grids
    assert grids - {rich.nodes} == expected and len(expected) == 2
    model.rows = 0
    again = search(task_of(model, Store(tmp_path), **more), {}).plans
    assert again == plans and not model.rows, "nothing is done twice"
    plain = search(task_of(model, Store(tmp_path), budgets=(6, 12)), {}).plans
    assert {len(plan.timesteps) for plan in plain} == {3, 6} and len(plain) == 2
    best = min(plan.error_at(W) for plan in plans if len(plan.timesteps) == 3)
    assert best < min(plan.error_at(W) for plan in plain if len(plan.timesteps) == 3)
