"""Searches for plans of a Gaussian: tasks of few nodes, and grids by brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from gaussian import VP, Gaussian, W, batch_of, schedule_of
from thg_engine.fitting import search as searching
from thg_engine.fitting.reference import converge, make_nodes
from thg_engine.fitting.search import Task
from thg_engine.fitting.spans import Grid, SpanErrors, inner_products
from thg_engine.fitting.store import Store


def task_of(model: Gaussian, store: Store, **more) -> Task:
    batches = {"fit": [batch_of(1, 5, 3), batch_of(2, 5, 3)], "held_out": [batch_of(3, 4, 3)]}
    given = {**batches, "guidance_scales": (W, 2.0), "budgets": (8, 12), "store": store, **more}
    return Task(model.engine(), VP, "epsilon", **given)


@pytest.fixture(name="few_nodes")
def few_nodes_fixture(monkeypatch) -> None:
    monkeypatch.setattr(
        searching, "make_nodes", lambda schedule, end: make_nodes(schedule, 16, 2, end)
    )


def spans_of(count: int = 9) -> tuple[SpanErrors, torch.Tensor]:
    schedule = schedule_of("vp")
    model = Gaussian(schedule, "epsilon", 0.3)
    nodes = make_nodes(schedule, count, 2)
    run = converge(model.engine(), schedule, nodes, batch_of(4, 3), W, "epsilon")
    growth = np.linspace(2.0, 1.0, nodes.last + 1)
    return SpanErrors(nodes, inner_products(run), growth), run


def cost_of(spans: SpanErrors, grid: Grid) -> float:
    """The objective of a grid, from the errors of single jumps."""
    total, newest = 0.0, None
    for j, t in itertools.pairwise((*grid.nodes, spans.nodes.last)):
        newest = j if j in grid.both else newest
        fresh = spans.of_full_rows()[j, t]
        near = max(j - newest, t - j) <= spans.nodes.last // 4
        held = spans.error(j, newest, t) if near and np.isfinite(fresh) else math.inf
        total += fresh if newest == j else held
    return total


def best_of_all(spans: SpanErrors, budget: float, c2: float) -> float:
    """The least objective of any grid within the budget, by brute force."""
    best, inner = math.inf, range(1, spans.nodes.last)
    for kinds in itertools.product((0, 1, 2), repeat=len(inner)):
        if sum((0, 1, c2)[k] for k in kinds) + c2 > budget + 1e-9:
            continue
        nodes = (0, *(j for j, k in zip(inner, kinds, strict=True) if k))
        both = (0, *(j for j, k in zip(inner, kinds, strict=True) if k == 2))
        best = min(best, cost_of(spans, Grid(nodes, both)))
    return best
