"""Sampling plans: what they refuse, what they say, and the JSON round trip."""

from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError, fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixture import vp_points
from thg_engine.errors import InvalidPlan
from thg_engine.guidance import CFG, THG, CFGCache, GuidanceInterval, SelectiveGuidance
from thg_engine.lowering import plan_from_solver, plan_from_timesteps
from thg_engine.plan import Row, SamplingPlan
from thg_engine.solvers import SOLVERS

FRESH = Row(9.0, 0.0, guidance_weight=2.0, sample_weights=(1.0,), guided_weights=(0.5,))
HELD = replace(FRESH, evaluates_both=False, delta_weights=(1.0,))
COND = replace(FRESH, evaluates_both=False, guidance_weight=0.0)

METHODS = [
    CFG(),
    THG(grid=(0, 2, 3, 7), boost=1.1, cutoff=9),
    CFGCache(3, 0.2),
    GuidanceInterval(0.2, 0.6),
    SelectiveGuidance(0.4),
]


def make(*rows: Row, **changes) -> SamplingPlan:
    return SamplingPlan(rows, "test", "none", 3.0, **changes)


@pytest.mark.parametrize(
    ("rows", "where", "value"),
    [
        ([HELD], "rows[0]", "D_0"),
        ([COND, HELD], "rows[1]", "D_0"),
        ([FRESH, replace(HELD, delta_weights=(0.0, 1.0))], "rows[1]", "D_1"),
        ([FRESH, FRESH, replace(HELD, delta_weights=(0.0, 0.0, 1.0))], "rows[2]", "D_2"),
        ([replace(COND, step_delta_weights=(1.0,))], "rows[0]", "D_0"),
        ([FRESH, replace(COND, step_delta_weights=(0.5, 1.0))], "rows[1]", "D_1"),
        ([replace(FRESH, sample_weights=(1.0, 0.5))], "rows[0]", "X_1"),
        ([FRESH, replace(FRESH, sample_weights=(1.0, 0.0, 0.5))], "rows[1]", "X_2"),
        ([replace(FRESH, guided_weights=(1.0, 0.5))], "rows[0]", "E_1"),
        ([FRESH, replace(FRESH, guided_weights=(1.0, 0.0, 0.5))], "rows[1]", "E_2"),
        ([replace(COND, cond_weights=(1.0, 0.5))], "rows[0]", "C_1"),
        ([FRESH, replace(HELD, cond_change_weights=(0.0, 1.0))], "rows[1]", "C_2"),
        ([replace(FRESH, state_weights=(1.0,))], "rows[0]", "S_0"),
        ([replace(FRESH, state_update=(1.0,))], "rows[0]", "S_1"),
        ([replace(COND, state_delta_update=(1.0,))], "rows[0]", "D_0"),
        (
            [replace(FRESH, state_delta_update=(1.0,)), replace(FRESH, state_weights=(0.0, 1.0))],
            "rows[1]",
            "S_1",
        ),
    ],
)
def test_reads_before_writes_are_refused(rows, where, value):
    with pytest.raises(InvalidPlan, match="evaluate both branches earlier") as caught:
        make(*rows)
    assert (caught.value.argument, caught.value.value) == (where, value)


def test_reads_after_writes_are_allowed():
    make(FRESH, HELD, replace(HELD, cond_change_weights=(0.3, 0.2)))
    make(FRESH, COND, FRESH, replace(HELD, delta_weights=(2.0, -1.0)))
    hare = replace(FRESH, state_delta_update=(1.0,), state_weights=(1.0,))
    make(hare, replace(hare, state_update=(1.0,), state_weights=(0.5, 0.5)))
    # Columns of weight zero are not read; g = 0 reads no delta.
    make(replace(HELD, guidance_weight=0.0))
    make(FRESH, replace(HELD, delta_weights=(1.0, 0.0)))
    make(replace(FRESH, sample_weights=(1.0, 0.0)))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "column",
    [field.name for field in fields(Row) if field.name not in ("lambda_t", "evaluates_both")],
)
def test_numbers_that_are_not_finite_are_refused(column, bad):
    value = (0.0, bad) if column.endswith(("weights", "update")) else bad
    with pytest.raises(InvalidPlan) as caught:
        make(FRESH, FRESH, replace(FRESH, **{column: value}))
    assert caught.value.argument == f"rows[2].{column}"


def test_other_refusals():
    with pytest.raises(InvalidPlan, match="at least one row"):
        make()
    with pytest.raises(InvalidPlan, match=r"rows\[1\]\.lambda_t"):
        make(FRESH, replace(FRESH, lambda_t=math.nan))
    with pytest.raises(InvalidPlan, match="prediction_type='noise'"):
        make(FRESH, prediction_type="noise")
    for name in ("guidance_scale", "initial_scale"):
        with pytest.raises(InvalidPlan, match=name):
            replace(make(FRESH), **{name: math.nan})


def test_frozen_and_counted():
    plan = make(FRESH, HELD, COND, FRESH)
    assert (plan.num_rows, plan.nfe, plan.coarse_grid) == (4, 6, (0, 3))
    assert plan.steps_itself and not plan.stochastic
    assert not make(FRESH, replace(FRESH, sample_weights=(), guided_weights=())).steps_itself
    assert make(FRESH, replace(FRESH, noise_weight=0.1)).stochastic
    for target, name in ((plan, "rows"), (plan.rows[0], "timestep")):
        with pytest.raises(FrozenInstanceError):
            setattr(target, name, ())
    # A list handed in cannot be edited behind the plan's back.
    rows = [FRESH, HELD]
    plan = SamplingPlan(rows, "test", "none", 3.0)
    rows.clear()
    assert plan.rows == (FRESH, HELD) and hash(plan) == hash(make(FRESH, HELD))


def test_register_depths():
    assert make(FRESH).register_depths() == {"X": 1, "C": 0, "D": 0, "E": 1, "S": 0}
    assert make(FRESH, HELD).register_depths()["D"] == 1
    third = replace(
        HELD,
        delta_weights=(1.0, -0.5),
        cond_change_weights=(0.0, 0.2),
        sample_weights=(1.0, 0.0, 0.1),
        guided_weights=(0.5, 0.1),
    )
    assert make(FRESH, FRESH, third).register_depths() == {"X": 3, "C": 3, "D": 2, "E": 2, "S": 0}
    # Trailing zeros hold nothing.
    padded = replace(FRESH, sample_weights=(1.0, 0.0, 0.0), guided_weights=(0.5, 0.0))
    assert make(padded).register_depths() == {"X": 1, "C": 0, "D": 0, "E": 1, "S": 0}


@pytest.mark.parametrize("solver", ["ddim", "dpmpp2m"])
@pytest.mark.parametrize("guidance", METHODS, ids=lambda method: method.name)
def test_json_round_trip(solver, guidance):
    plan = plan_from_solver(SOLVERS[solver], vp_points(13), guidance, 4.5)
    again = SamplingPlan.from_json(plan.to_json())
    assert again == plan and hash(again) == hash(plan)
    assert json.loads(plan.to_json())["nfe"] == plan.nfe


finite = st.floats(allow_nan=False, allow_infinity=False)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.tuples(finite, st.floats(allow_nan=False), finite), min_size=1, max_size=5),
    st.lists(st.text(max_size=9), max_size=2),
)
def test_json_round_trip_of_any_number(numbers, notes):
    rows = [
        replace(FRESH, timestep=t, lambda_t=value, sample_weights=(weight,))
        for t, value, weight in numbers
    ]
    plan = make(*rows, notes=tuple(notes))
    assert SamplingPlan.from_json(plan.to_json()) == plan


def test_json_holds_infinite_log_snr():
    plan = make(replace(FRESH, lambda_t=-math.inf), replace(FRESH, lambda_t=math.inf))
    text = plan.to_json()
    json.loads(text, parse_constant=pytest.fail)  # strict JSON has no Infinity
    assert SamplingPlan.from_json(text) == plan


def tampered(change) -> str:
    document = json.loads(make(FRESH, HELD, FRESH).to_json())
    change(document)
    return json.dumps(document)


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        (lambda d: d.update(nfe=4), "nfe"),
        (lambda d: d.pop("nfe"), "nfe"),
        (lambda d: d["rows"].pop(), "nfe"),
        (lambda d: d["rows"][2].update(evaluates_both=False), "nfe"),
        (lambda d: d["rows"].pop(0), "rows[0]"),
        (lambda d: d["rows"].clear(), "rows"),
        (lambda d: d["rows"][0].update(timestep=math.nan), "rows[0].timestep"),
        (lambda d: d["rows"][0].update(lambda_t="warm"), "text"),
        (lambda d: d["rows"][0].update(lambda_t="nan"), "rows[0].lambda_t"),
        (lambda d: d["rows"][0].update(sample_weights=["x"]), "text"),
        (lambda d: d["rows"][0].update(colour=1), "text"),
        (lambda d: d["rows"][0].pop("timestep"), "text"),
        (lambda d: d.update(rows=7), "text"),
        (lambda d: d.update(version=2), "text"),
        (lambda d: d.update(format="thg-engine-calibration"), "text"),
        (lambda d: d.pop("format"), "text"),
        (lambda d: d.pop("method"), "text"),
        (lambda d: d.update(prediction_type="noise"), "prediction_type"),
    ],
)
def test_tampered_documents_are_refused(change, argument):
    with pytest.raises(InvalidPlan) as caught:
        SamplingPlan.from_json(tampered(change))
    assert caught.value.argument == argument


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '"x"', None])
def test_no_plan_document(text):
    with pytest.raises(InvalidPlan):
        SamplingPlan.from_json(text)


def test_explain_has_one_line_a_row():
    plan = plan_from_solver(SOLVERS["ddim"], vp_points(12), METHODS[1], 4.5)
    lines = plan.explain().splitlines()
    assert len(lines) == 2 + 12
    assert lines[0] == "thg on ddim, w = 4.5: NFE 16 of 24 (67 %), 12 steps"
    for i, (line, row) in enumerate(zip(lines[2:], plan.rows, strict=True)):
        assert int(line.split()[0]) == i
        assert ("cond + uncond" in line) == row.evaluates_both
        expected = "delta fresh" if row.evaluates_both else "delta held" if i < 9 else "none"
        assert expected in line
        if i < 9:
            assert f"g = {3.5 * (1.0 if i == 2 else 1.1):g}" in line
    noted = make(FRESH, notes=("first", "second")).explain().splitlines()
    assert noted[-2:] == ["note: first", "note: second"] and len(noted) == 5
    extrapolated = make(FRESH, replace(HELD, delta_weights=(1.5,), cond_change_weights=(0.25,)))
    assert "delta = +1.5 D_0 +0.25 (c - C_1), g = 2" in extrapolated.explain()
    two_state = plan_from_solver(SOLVERS["dpmpp2m"], vp_points(12), METHODS[1], 4.5)
    assert two_state.explain().count("its own solver") == 8


def test_plot_draws_a_picture(tmp_path):
    from PIL import Image

    plan = plan_from_solver(SOLVERS["ddim"], vp_points(12), METHODS[1], 4.5)
    plan.plot(tmp_path / "plan.png")
    with Image.open(tmp_path / "plan.png") as image:
        assert image.format == "PNG" and image.width > 400
        assert len(image.convert("RGB").getcolors(1 << 24)) > 10
    plan.plot(str(tmp_path / "new" / "plan.svg"))
    assert "<svg" in (tmp_path / "new" / "plan.svg").read_text(encoding="utf-8")


def test_guidance_alone_is_a_plan_without_steps():
    plan = plan_from_timesteps([9, 5, 1], [-1.0, 0.0, 1.0], THG(grid=(0, 2)), 3.0, "Foreign")
    assert plan.nfe == 5 and not plan.steps_itself
    assert SamplingPlan.from_json(plan.to_json()) == plan
