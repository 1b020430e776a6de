"""Fronts: files, interpolation, choices by hand, and calibrations that go on where they stopped."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from fitted_plans import STOCK
from gaussian import VP, Gaussian, W
from search_cases import few_nodes_fixture, task_of  # noqa: F401  (the fixture few_nodes)
from thg_engine.curves import Calibration
from thg_engine.errors import CalibrationError, InvalidArgument
from thg_engine.fitting import search as searching
from thg_engine.fitting.choose import Target, choose, parse_match, stock_error
from thg_engine.fitting.front import PlanEntry, PlanFront, ScaleFit, base_plan
from thg_engine.fitting.reference import make_nodes
from thg_engine.fitting.rows import Correction
from thg_engine.fitting.search import Task, search, spread, undominated
from thg_engine.fitting.spans import Grid
from thg_engine.fitting.store import Store
from thg_engine.integrations.diffusers.resolve import load_calibration
from thg_engine.lowering import plan_from_table
from thg_engine.solvers import get_solver, solver_table

CURVES = Calibration(
    "m", "", "vp/epsilon", "ddim", 1, 5.0, 9, 2, "", "", (0.0, 1.0), (1.0, 2.0), (3.0, 4.0)
)


def correction(seed: int) -> Correction:
    a = 1 / (3 + seed)
    return Correction((a, -a / 7), (a / 3,), (0.1 * a, a, a**3), 0.123456)


def entry(steps: int, coarse: int, error: float, scales=(3.0, 7.0), solver="dpmpp2m") -> PlanEntry:
    times = tuple(999.0 - 900.0 * i / steps for i in range(steps))
    fits = tuple(
        ScaleFit(w, error * (1 + k), 0.1 * error, 3 * error, tuple(map(correction, range(steps))))
        for k, w in enumerate(scales)
    )
    return PlanEntry(solver, times, tuple(range(coarse)), fits)


PLANS = (entry(4, 4, 0.08), entry(6, 2, 0.1), entry(8, 2, 0.04), entry(10, 10, 0.02))


def front_of(plans=PLANS, stock=STOCK, curves=None) -> PlanFront:
    origin = ("model", "abc", "vp/epsilon", "def", "123", 8, 4, 240, "2026-01-01", "machine")
    return PlanFront(*origin, (0.01, 0.02), (4, 8, 8), tuple(plans), tuple(stock), curves)


def test_json_round_trip(tmp_path) -> None:
    front = front_of(curves=CURVES)
    front.save(tmp_path / "a.json")
    again = PlanFront.load(tmp_path / "a.json")
    rounded = [
        [float(f"{x:.9g}") for x in (*c.samples, *c.conds, *c.deltas)]
        for e in front.plans
        for f in e.fits
        for c in f.corrections
    ]
    found = [
        [*c.samples, *c.conds, *c.deltas]
        for e in again.plans
        for f in e.fits
        for c in f.corrections
    ]
    assert found == rounded and again.plans[0].fits[0].corrections[0].gain == 0.1235
    assert replace(again, plans=front.plans) == front
    again.save(tmp_path / "b.json")
    assert PlanFront.load(tmp_path / "b.json") == again, "rounding once is enough"
    assert load_calibration(tmp_path / "a.json") == (CURVES, again)
    assert [e.nfe for e in again.plans] == sorted(e.nfe for e in front.plans)


DAMAGE = {
    "version": (lambda d: d.update(version=2), "version 2"),
    "format": (lambda d: d.update(format="x"), "is not a"),
    "plans": (lambda d: d.pop("plans"), "plans"),
    "none": (lambda d: d.update(plans=[]), "at least one"),
    "unknown": (lambda d: d.update(extra=1), "extra"),
    "seconds": (lambda d: d.update(seconds=[0.1, -1]), "seconds"),
    "stock": (lambda d: d["stock"][0].pop("error"), "error"),
    "solver": (lambda d: d["plans"][0].update(solver="magic"), "magic"),
    "timesteps": (lambda d: d["plans"][0]["timesteps"].reverse(), "timesteps"),
    "coarse": (lambda d: d["plans"][0].update(coarse_rows=[1, 2]), "coarse_rows"),
    "beyond": (lambda d: d["plans"][0].update(coarse_rows=[0, 99]), "coarse_rows"),
    "short": (lambda d: d["plans"][0]["fits"][0]["corrections"].pop(), "one correction per"),
    "scales": (lambda d: d["plans"][0]["fits"].reverse(), "guidance scales"),
    "nan": (lambda d: d["plans"][0]["fits"][0].update(error=math.nan), "errors"),
    "zero": (lambda d: d["plans"][0]["fits"][0].update(base_error=0), "errors"),
    "text": (lambda d: d["plans"][0]["fits"][0].update(error="0.1"), "damaged"),
    "letters": (lambda d: d["plans"][0].update(timesteps=["b", "a"]), "damaged"),
    "weights": (lambda d: d["plans"][0]["fits"][0]["corrections"][0][0].append("x"), "damaged"),
    "family": (lambda d: d.update(scheduler_family="vp"), "scheduler_family"),
    "fewer": (lambda d: d["plans"][1]["fits"].pop(), "same guidance scales"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_files_say_what_is_wrong(kind, tmp_path) -> None:
    damage, message = DAMAGE[kind]
    document = json.loads(front_of().to_json())
    damage(document)
    path = tmp_path / "front.json"
    path.write_text(json.dumps(document))
    with pytest.raises(CalibrationError, match=message) as caught:
        PlanFront.load(path)
    assert "front.json" in str(caught.value)


def test_what_is_no_front_at_all(tmp_path) -> None:
    for text in ("", "[]", "{", "3"):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(CalibrationError, match=r"x\.json"):
            PlanFront.load(tmp_path / "x.json")
    with pytest.raises(CalibrationError, match="cannot read"):
        load_calibration(tmp_path / "missing.json")
    with pytest.raises(InvalidArgument, match=r"^calibration=3"):
        load_calibration(3)


def test_rows_between_scales_are_interpolated_by_hand() -> None:
    low = Correction((0.1,), (0.2, 0.3), (), 0.5)
    high = Correction((0.5, 0.4), (0.2,), (1.0,), 0.1)
    times = (900.0, 500.0)
    fits = (
        ScaleFit(3.0, 0.01, 0, 0.05, (Correction(), low)),
        ScaleFit(7.0, 0.04, 0, 0.2, (Correction(), high)),
    )
    plan = PlanEntry("ddim", times, (0, 1), fits)
    base, found = base_plan(plan, VP, "epsilon", 4.0), plan.plan(VP, "epsilon", 4.0)
    b, f = base.rows[1], found.rows[1]
    assert found.rows[0] == base.rows[0]
    assert f.sample_weights == pytest.approx((b.sample_weights[0] + 0.2, 0.1))
    assert f.cond_weights == pytest.approx((0.2, 0.225))
    assert f.step_delta_weights == pytest.approx((0.25,))
    assert f.guided_weights == b.guided_weights and f.guidance_weight == 3.0
    assert plan.error_at(4.0) == pytest.approx(0.01**0.75 * 0.04**0.25)
    assert plan.plan(VP, "epsilon", 7.0).rows[1].step_delta_weights == (1.0,)
    assert (plan.error_at(3.0), plan.error_at(7.0)) == pytest.approx((0.01, 0.04))
    for beyond, error in ((2.9, 0.05), (7.1, 0.2)):
        assert plan.plan(VP, "epsilon", beyond) is base_plan(plan, VP, "epsilon", beyond)
        assert plan.error_at(beyond) == error and not plan.covers(beyond)
    half = replace(plan, fits=(fits[0], replace(fits[1], corrections=(), error=0.2)))
    assert half.plan(VP, "epsilon", 5.0) is base_plan(half, VP, "epsilon", 5.0)
    assert half.error_at(5.0) == pytest.approx(0.1), "base rows have the base's error"
    assert half.plan(VP, "epsilon", 3.0) != base_plan(half, VP, "epsilon", 3.0)


def test_pareto_and_cost() -> None:
    front = front_of()
    names = [(e.num_steps, e.nfe) for e in front.pareto(3.0, 2.0)]
    # (6, 8) costs what (4, 8) does, and is worse.
    assert names == [(4, 8), (8, 10), (10, 20)]
    assert [e.cost(1.5) for e in front.plans] == [6.0, 7.0, 9.0, 15.0]
    cheap_both = front_of((*PLANS, entry(7, 7, 0.03)))
    assert [e.nfe for e in cheap_both.pareto(3.0, 1.1)] == [8, 14, 20]


def test_choice_for_every_kind_of_target() -> None:
    """c2 = 2, N = 20: full guidance takes 40."""
    front, here = front_of(), (0.1, 0.2)

    def chosen(scale=3.0, **target):
        return choose(front, Target(**target), scale, 20, here)

    for target in ({"nfe": 10}, {"nfe": 19}, {"speedup": 4}, {"speedup": 3.9}, {"seconds": 1.0}):
        found = chosen(**target)
        assert (found.entry.num_steps, found.unmet) == (8, ""), target
    found = chosen(speedup=4.0)
    assert found.speedup == pytest.approx(4.0) and found.error == pytest.approx(0.04)
    assert [e.num_steps for e in found.neighbours] == [4, 10]
    assert chosen(nfe=0.51).entry.num_steps == 10, "half of 40, and there is a plan of 20"
    assert chosen(seconds=100.0).neighbours == (front.plans[2],)
    assert chosen(match="dpm++2m@8").entry.num_steps == 10, "0.0125: not even the best"
    assert "1.60 times the error of dpm++2m@8" in chosen(match="dpm++2m@8").unmet
    found = chosen(7.0, match="ddim@10")  # 0.08: 8 rows have 2 * 0.04
    assert (found.entry.num_steps, found.unmet) == (8, "")
    missed = chosen(nfe=4)
    assert missed.entry.num_steps == 4
    assert missed.unmet == "nfe=4 is out of reach: the cheapest plan takes 8 evaluations, budget 4"
    assert chosen(seconds=0.5).unmet.endswith("the fastest plan takes 0.8 s a sample")
    assert chosen(speedup=100).unmet.endswith(
        "speedup=100 is out of reach: the fastest plan gives 5x"
    )


def test_evaluations_are_counted_where_they_are_asked_for() -> None:
    """Both branches cost hardly more than one: the dense plan is faster, but evaluates more."""
    front = front_of((entry(8, 2, 0.04), entry(7, 7, 0.03)))
    found = choose(front, Target(nfe=10), 3.0, 20, (0.1, 0.11))
    assert (found.entry.nfe, found.unmet) == (10, "")
    assert choose(front, Target(speedup=2.0), 3.0, 20, (0.1, 0.11)).entry.nfe == 14


def test_errors_of_stock_solvers_between_steps() -> None:
    front = front_of()
    for n in (8, 13, 20, 31, 50):
        assert stock_error(front, f"dpm++2m@{n}", 3.0) == pytest.approx(0.8 / n**2)
    assert stock_error(front, "dpmpp2m@20", 99.0) == pytest.approx(0.8 / 400)
    assert stock_error(front, "DDIM@20", 3.0) == pytest.approx(0.04), "measured at 7 alone"
    assert parse_match("DPM++@7") == ("dpm++2m", 7)
    for match, message in (
        ("dpm++2m@7", "8 to 50"),
        ("ddim@41", "10 to 40"),
        ("lms@9", "ddim, dpm"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            stock_error(front, match, 3.0)
    with pytest.raises(InvalidArgument, match="none"):
        stock_error(front_of(stock=()), "ddim@9", 3.0)


@pytest.mark.parametrize(
    ("target", "name"),
    [
        *(({}, "target"), ({"nfe": 9, "speedup": 2}, "target"), ({"speedup": 0}, "speedup")),
        *(({"speedup": True}, "speedup"), ({"seconds": math.nan}, "seconds")),
        *(({"seconds": "1"}, "seconds"), ({"nfe": 0.4}, "nfe"), ({"nfe": True}, "nfe")),
        *(({"match": m}, "match") for m in ("ddim", "@5", "ddim@0", "ddim@x", 5)),
    ],
)
def test_targets_that_make_no_sense(target, name) -> None:
    with pytest.raises(InvalidArgument, match=rf"^{name}="):
        Target(**target)


def stock_plan(scale: float):
    points = make_nodes(VP, 6).points
    table = solver_table(get_solver("ddim"), points, "epsilon")
    return plan_from_table(table, searching.CFG(), scale)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("share", [0.15, 0.5, 0.8, 0.95])
def test_an_interrupted_search_goes_on(share, few_nodes, tmp_path) -> None:
    """Nothing is evaluated twice but what the interruption cut off, and the result is equal."""

    def run(store: Store, limit: float = math.inf):
        model, evaluate = Gaussian(VP, "epsilon", 0.3), Gaussian.__call__

        class Counted(Gaussian):
            def __call__(self, x, t, c):
                if self.rows >= limit:
                    raise Interrupted
                return evaluate(self, x, t, c)

        model.__class__ = Counted
        try:
            found = search(task_of(model, store), {("ddim", 6): stock_plan})
        except Interrupted:
            found = None
        return found, model.rows

    whole, rows = run(Store())
    kept = Store(tmp_path / "store")
    assert run(kept, share * rows)[0] is None
    found, more = run(kept)
    assert found == whole
    # One batch's run, or one fit, may have been under way.
    unit = max(2 * 5 * 30, 2 * (10 + 4 + 4) * 6) + 20
    assert more <= (1 - share) * rows + unit < rows + unit
    assert run(kept) == (whole, 0)


def test_a_search_writes_only_where_it_may(few_nodes, tmp_path) -> None:
    silent = Store(tmp_path / "other", writes=False, suffix="-1-of-2")
    search(task_of(Gaussian(VP, "epsilon", 0.3), silent), {})
    names = {path.suffix for path in (tmp_path / "other").iterdir()}
    assert names == {".safetensors"}, "each process keeps its own runs, and one the numbers"


def test_store(tmp_path) -> None:
    store, name = Store(tmp_path / "new"), "fit-" + "0b-" * 100
    assert store.json(name) is None and store.tensors("x") is None
    store.put_json(name, {"a": [1.5, None]})
    store.put_json(name + "1b", 2)
    store.put_tensors("x", {"t": torch.arange(6.0).reshape(2, 3).T})
    assert store.json(name) == {"a": [1.5, None]} and store.json(name + "1b") == 2
    assert torch.equal(store.tensors("x")["t"], torch.arange(6.0).reshape(2, 3).T)
    assert Store(tmp_path / "new", suffix="-0-of-2").tensors("x") is None
    assert not list((tmp_path / "new").glob("*.partial"))
    none = Store()
    none.put_json("a", 1)
    assert none.json("a") is None


def test_kept_grids_and_spreads(few_nodes) -> None:
    grids = [
        Grid((0, 1, 2), (0, 1)),
        Grid((0, 1, 2), (0, 2)),
        Grid((0, 1), (0, 1)),
        Grid((0,), (0,)),
    ]
    errors = (0.3, 0.2, 0.25, 0.9)
    measured = {g: ScaleFit(W, e, 0, 1) for g, e in zip(grids, errors, strict=True)}
    assert undominated(measured, grids) == tuple(grids[1:])
    task = task_of(Gaussian(VP, "epsilon"), Store())
    found = spread(task, 5, 0.35, 0.02)
    assert found.nodes[0] == 0 and found.both == found.nodes and len(found.nodes) == 5
    for bad in ({"budgets": (3,)}, {"budgets": ()}, {"solver": "magic"}, {"fit": []}):
        with pytest.raises(InvalidArgument):
            task_of(Gaussian(VP, "epsilon"), Store(), **bad)


def test_what_is_best_at_any_scale_is_kept(few_nodes, monkeypatch) -> None:
    """Of three grids of as many rows, two are best at one scale each, and the third at none."""
    grids = [Grid((0, middle, 10), (0, middle, 10)) for middle in (4, 5, 6)]
    errors = {W: (0.2, 0.3, 0.4), 2.0: (0.3, 0.2, 0.4)}

    def measured(task: Task, grid: Grid, runs: searching.Converged) -> ScaleFit:
        scale = runs.guidance_scale
        return ScaleFit(scale, errors[scale][grids.index(grid)], 0.1, 1.0)

    monkeypatch.setattr(searching, "candidate_grids", lambda *args: tuple(grids))
    monkeypatch.setattr(searching, "fitted", measured)
    task = task_of(Gaussian(VP, "epsilon", 0.3), Store())
    plans = search(task, {}).plans
    found = {p.timesteps[1]: tuple((f.guidance_scale, f.error) for f in p.fits) for p in plans}
    low, high = (task.nodes.points[j].timestep for j in (4, 5))
    assert found == {low: ((2.0, 0.3), (W, 0.2)), high: ((2.0, 0.2), (W, 0.3))}


def test_a_fit_that_does_not_help_is_not_kept(few_nodes, monkeypatch) -> None:
    worse = tuple(Correction((0.5,), (), ()) for _ in range(3))
    monkeypatch.setattr(searching, "fit_rows", lambda *args: worse)
    task = task_of(Gaussian(VP, "epsilon", 0.3), Store())
    runs = searching.Converged.of(task, W)
    fit = searching.fitted(task, Grid((0, 5, 10), (0, 5)), runs)
    assert fit.corrections == () and fit.error == fit.base_error
    assert fit.ci95 > 0
