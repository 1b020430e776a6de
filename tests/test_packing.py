"""Rows with registers by age against the packed table: values, slots, bytes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixture import vp_points
from pipelines import make
from thg_engine import CFG, THG, Engine
from thg_engine.lowering import plan_from_solver, plan_from_table
from thg_engine.packing import step_table
from thg_engine.plan import Row, SamplingPlan
from thg_engine.solvers import SOLVERS
from thg_engine.trace import trace
from thg_kernels.step_update import Column

# -- values ----------------------------------------------------------------------------------------


def run_by_age(plan, x, outputs):
    """The formulas of `plan.py` with stacks of past values, newest first, in NumPy."""
    stacks = {"X": [x], "C": [], "D": [], "E": [], "S": []}

    def total(weights, stack):
        pairs = zip(weights, stack, strict=False)
        return sum((w * value for w, value in pairs if w != 0.0), np.zeros_like(x))

    for row, (cond, uncond) in zip(plan.rows, outputs, strict=True):
        if row.evaluates_both:
            delta = cond - uncond
            stacks["D"].insert(0, delta)
        else:
            changes = [cond - past for past in stacks["C"]]
            delta = total(row.delta_weights, stacks["D"]) + total(row.cond_change_weights, changes)
        guided = cond + (row.guidance_weight * delta if row.guidance_weight else 0.0)
        stacks["C"].insert(0, cond)
        stacks["E"].insert(0, guided)
        if row.updates_state:
            state = total(row.state_update, stacks["S"])
            state = state + total(row.state_delta_update, stacks["D"])
            state = state + total(row.state_sample_update, stacks["X"])
            state = state + total(row.state_guided_update, stacks["E"])
            stacks["S"].insert(0, state)
        x = total(row.sample_weights, stacks["X"]) + total(row.guided_weights, stacks["E"])
        x = x + total(row.cond_weights, stacks["C"]) + total(row.step_delta_weights, stacks["D"])
        x = x + total(row.state_weights, stacks["S"])
        stacks["X"].insert(0, x)
    return x


def random_rows(draw):
    """Rows that read only what has been written, at ages up to 3."""
    rows, written = [], {"X": 1, "C": 0, "D": 0, "E": 0, "S": 0}
    number = st.integers(-3, 3).map(lambda n: n / 4)

    def weights(letter, most=3):
        return tuple(draw(st.lists(number, max_size=min(most, written[letter]))))

    for i in range(draw(st.integers(1, 9))):
        both = draw(st.booleans())
        row = Row(timestep=float(9 - i), lambda_t=float(i), evaluates_both=both)
        row = replace(row, guidance_weight=draw(number), input_scale=1.0 + i)
        if not both:
            changes = weights("C")
            row = replace(row, delta_weights=weights("D"), cond_change_weights=changes)
        state_update = weights("S")
        written["C"] += 1
        written["E"] += 1
        written["D"] += both
        row = replace(
            row,
            sample_weights=(0.5, *weights("X")[1:]),
            guided_weights=weights("E"),
            cond_weights=weights("C"),
            step_delta_weights=weights("D"),
        )
        if draw(st.booleans()):
            row = replace(
                row,
                state_update=state_update,
                state_delta_update=weights("D"),
                state_sample_update=weights("X"),
                state_guided_update=weights("E"),
            )
        written["S"] += row.updates_state
        rows.append(replace(row, state_weights=weights("S")))
        written["X"] += 1
    return tuple(rows)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.data())
def test_packed_rows_compute_what_the_rows_say(data):
    plan = SamplingPlan(random_rows(data.draw), "random", "random", 3.0)
    generator = np.random.default_rng(len(plan.rows))
    outputs = [(generator.normal(size=(2, 5)), generator.normal(size=(2, 5))) for _ in plan.rows]
    calls = iter(outputs)
    fed = []

    def denoise(x, t, cond):
        fed.append((x.clone(), t.clone()))
        c, u = map(torch.from_numpy, next(calls))
        return torch.cat([u, c]) if len(x) == 4 else c

    x = generator.normal(size=(2, 5))
    condition = torch.zeros(2, 1)
    engine = Engine(denoise, register_dtype=torch.float64, model_dtype=torch.float64)
    found = engine.sample(torch.from_numpy(x), condition, condition, plan)
    expected = run_by_age(plan, x, outputs)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-12)
    assert [len(x) for x, _ in fed] == [4 if row.evaluates_both else 2 for row in plan.rows]
    for (x_fed, t), row in zip(fed, plan.rows, strict=True):
        assert (t == row.timestep).all()
        assert torch.equal(x_fed[: len(x_fed) // 2], x_fed[len(x_fed) // 2 :]) or len(x_fed) == 2


# -- slots -----------------------------------------------------------------------------------------

HELD = THG(grid=3)


def table(name, guidance, **config):
    return step_table(plan_from_table(trace(make(name, **config), 20), guidance, 5.0))


@pytest.mark.parametrize(
    ("slots", "name", "guidance"),
    [
        (1, "DDIMScheduler", CFG()),  # the sample, in place
        (2, "DDIMScheduler", HELD),  # and the delta
        (3, "DPMSolverMultistepScheduler", CFG()),  # X_0, X_1, E_1
        (4, "DPMSolverMultistepScheduler", HELD),
        (1, "EulerDiscreteScheduler", CFG()),
        (6, "UniPCMultistepScheduler", CFG()),  # X_0 .. X_2, E_1, E_2, the corrected sample
    ],
)
def test_as_many_slots_as_are_alive_at_once(slots, name, guidance):
    assert table(name, guidance).num_slots == slots


def test_nothing_is_stored_that_nobody_reads():
    rows = table("DDIMScheduler", HELD).lines
    stored = [i for i, row in enumerate(rows) if row[Column.SLOT_DELTA] >= 0]
    # Rows 0, 3, .. 18 evaluate both; the last delta is still read by row 19.
    assert stored == list(range(0, 20, 3))
    assert all(row[Column.SLOT_GUIDED] == row[Column.SLOT_COND] == -1 for row in rows)
    last = table("DPMSolverMultistepScheduler", CFG()).lines[-2]
    assert last[Column.SLOT_GUIDED] == -1, "no row follows that could read it"


def test_the_two_state_form_keeps_the_hare():
    plan = plan_from_solver(SOLVERS["dpmpp2m"], vp_points(12), HELD, 5.0, form="two_state")
    rows = step_table(plan).lines
    assert any(row[Column.SLOT_STATE] >= 0 for row in rows)
    assert step_table(plan) is step_table(plan)


# -- bytes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expected", "row", "name", "guidance"),
    [
        # c, u, x in and out, both halves of the next input
        (2 * 2 + 4 + 4 + 2 * 2, 4, "DDIMScheduler", CFG()),
        # c, u, x in and out, delta out, one half: the next row holds
        (2 * 2 + 4 + 4 + 4 + 2, 3, "DDIMScheduler", HELD),
        # c, delta in, x in and out, one half
        (2 + 4 + 4 + 4 + 2, 4, "DDIMScheduler", HELD),
        # c, delta in, x in and out, both halves: the next row refreshes
        (2 + 4 + 4 + 4 + 4, 5, "DDIMScheduler", HELD),
        # c, u, X_0, X_1, E_1, x out, e out, both halves
        (4 + 3 * 4 + 2 * 4 + 4, 4, "DPMSolverMultistepScheduler", CFG()),
        # c, delta, X_0, X_1, E_1, x out, e out, one half
        (2 + 4 + 3 * 4 + 2 * 4 + 2, 4, "DPMSolverMultistepScheduler", HELD),
        # A stochastic step reads its noise, too.
        (2 * 2 + 4 + 4 + 4 + 2 * 2, 4, "EulerAncestralDiscreteScheduler", CFG()),
        (0, 20, "DDIMScheduler", CFG()),  # the terminal row
    ],
)
def test_bytes_counted_by_hand(expected, row, name, guidance):
    """Half-precision model, float32 registers."""
    assert table(name, guidance).bytes_per_element(row, itemsize=2) == expected
