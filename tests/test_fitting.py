"""Fitting of plans: rows, ridge, converged runs and grids against references of their own."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from thg_engine import CFG, THG, Engine
from thg_engine.errors import InvalidArgument
from thg_engine.fitting import ridge
from thg_engine.fitting.front import PlanEntry, base_plan
from thg_engine.fitting.reference import Batch, Nodes, converge, make_nodes
from thg_engine.fitting.registers import Registers
from thg_engine.fitting.ridge import Products, cross_validated
from thg_engine.fitting.rows import Correction, corrected, errors, fit_rows
from thg_engine.fitting.spans import Grid, SpanErrors, inner_products
from thg_engine.lowering import plan_from_solver
from thg_engine.plan import Row, SamplingPlan
from thg_engine.schedule import NoiseSchedule
from thg_engine.solvers import SOLVERS

COLUMNS = ("sample_weights", "guided_weights", "cond_weights", "step_delta_weights")
COLUMNS += ("state_weights", "state_update", "state_delta_update", "state_sample_update")
COLUMNS += ("state_guided_update", "delta_weights", "cond_change_weights")
WIDTH = 6
W = 4.0
TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")


def schedule_of(kind: str) -> NoiseSchedule:
    if kind == "flow":
        return NoiseSchedule("flow", 1000, "flow_prediction")
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    return NoiseSchedule.from_alphas_cumprod(np.cumprod(1 - betas))


class Gaussian:
    """Data N(mu, s^2) per coordinate, mu = c for either branch: outputs are exact, and linear."""

    s = 0.7

    def __init__(self, schedule: NoiseSchedule, prediction_type: str, bend: float = 0.0) -> None:
        self.schedule, self.type, self.bend = schedule, prediction_type, bend
        self.rows = 0

    def field(self, x, t: float, c):
        """(x_0, eps) as expected by the model; ``bend`` makes it no Gaussian's any more."""
        point = self.schedule.point(t)
        a, b = point.alpha_t, point.sigma_t
        x0 = c + a * self.s**2 / (a**2 * self.s**2 + b**2) * (x - a * c)
        if self.bend:
            x0 = x0 + self.bend * a * torch.tanh(3 * x0) * torch.sin(2 * x + 3 * c)
        return x0, (x - a * x0) / b

    def __call__(self, x, t, c):
        self.rows += len(x)
        x0, eps = self.field(x, float(t[0]), c)
        point = self.schedule.point(float(t[0]))
        made = {"epsilon": eps, "sample": x0, "flow_prediction": eps - x0}
        return made.get(self.type, point.alpha_t * eps - point.sigma_t * x0)

    def engine(self) -> Engine:
        wide = {"register_dtype": torch.float64, "model_dtype": torch.float64}
        return Engine(self, graph=False, **wide)


def batch_of(seed: int, size: int = 4, dim: int = WIDTH):
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(size, dim, generator=generator, dtype=torch.float64) for _ in range(3)]
    return Batch(draw[0], 0.8 * draw[1], 0.3 * draw[2])


class Plain:
    """A row's formula written out on numpy arrays; X to S are newest first and never cut."""

    def __init__(self, x: np.ndarray) -> None:
        self.X, self.C, self.D, self.E, self.S = [x], [], [], [], []

    def run(self, row: Row, c: np.ndarray, u: np.ndarray) -> None:
        if row.evaluates_both:
            delta = c - u
            self.D = [delta, *self.D]
        else:
            delta = sum((w * d for w, d in zip(row.delta_weights, self.D, strict=False)), 0 * c)
            pairs = zip(row.cond_change_weights, self.C, strict=False)
            delta = delta + sum(v * (c - past) for v, past in pairs)
        self.C, self.E = [c, *self.C], [c + row.guidance_weight * delta, *self.E]

        def total(*columns):
            return sum(w * v for ws, vs in columns for w, v in zip(ws, vs, strict=False)) + 0 * c

        if row.updates_state:
            state = total(
                (row.state_update, self.S),
                (row.state_delta_update, self.D),
                (row.state_sample_update, self.X),
                (row.state_guided_update, self.E),
            )
            self.S = [state, *self.S]
        x = total(
            (row.sample_weights, self.X),
            (row.guided_weights, self.E),
            (row.cond_weights, self.C),
            (row.step_delta_weights, self.D),
            (row.state_weights, self.S),
        )
        self.X = [x, *self.X]


def random_plan() -> SamplingPlan:
    """Every column filled as far back as there is something to read."""
    rng, rows, deltas, states = np.random.default_rng(0), [], 0, 0
    for i in range(5):
        both = i in (0, 1, 3)
        deltas, before, states = deltas + both, states, states + 1
        depths = (i + 1, i + 1, i + 1, deltas, states, before, deltas, i + 1, i + 1, deltas, i)
        columns = {
            name: tuple(0.4 * rng.normal(size=min(depth, 3)))
            for name, depth in zip(COLUMNS, depths, strict=True)
        }
        rows.append(Row(900.0 - 150 * i, 0.3 * i, 1.0, both, 1.5 + i, **columns))
    return SamplingPlan(tuple(rows), "random", "random", W)


def test_registers_are_the_row_formula() -> None:
    """All columns at once, against numpy and against the engine's own rows, in float64."""
    plan, (x, cond, uncond, _) = random_plan(), batch_of(0)
    model = Gaussian(schedule_of("vp"), "epsilon")
    plain, registers = Plain(x.numpy()), Registers([x])
    for row in plan.rows:
        now = registers.samples[0]
        t = torch.full((len(x),), row.timestep)
        c, u = model(now, t, cond), model(now, t, uncond)
        plain.run(row, c.numpy(), u.numpy())
        registers.observe(row, c, u if row.evaluates_both else None)
        registers.push(registers.following(row), 4)
        np.testing.assert_allclose(registers.samples[0].numpy(), plain.X[0], rtol=1e-12)
    assert len(registers.samples) == len(registers.states) == 4
    found = model.engine().sample(x, cond, uncond, plan)
    np.testing.assert_allclose(found.numpy(), plain.X[0], rtol=1e-11)


def features(samples: int = 7, k: int = 3, size: int = 20, noise: float = 0.1):
    """Features of very different sizes, and a target made of them."""
    rng = np.random.default_rng(0)
    given = rng.normal(size=(samples, k, size)) * np.array([1.0, 100.0, 1e-2])[:k, None]
    y = np.einsum("k,bkn->bn", np.array([1.0, 2e-2, -30.0])[:k], given)
    y = y + noise * rng.normal(size=y.shape)
    return given, y


def products_of(given: np.ndarray, y: np.ndarray) -> Products:
    return Products.of([torch.from_numpy(f) for f in given.swapaxes(0, 1)], torch.from_numpy(y))


def by_lstsq(given, y, mu: float, sizes) -> np.ndarray:
    """min |y - F b|^2 + mu |s b|^2 as one stacked least-squares problem."""
    design = np.concatenate([given[i].T for i in range(len(given))])
    design = np.concatenate([design, math.sqrt(mu) * np.diag(sizes)])
    return np.linalg.lstsq(design, np.concatenate([*y, np.zeros(len(sizes))]), rcond=None)[0]


def test_ridge_against_stacked_least_squares_and_brute_force_folds() -> None:
    given, y = features()
    sizes = np.sqrt((given**2).sum(axis=(0, 2)))
    folds = np.arange(len(y)) % ridge.MAX_FOLDS
    left_out = []
    for mu in ridge.PENALTIES:
        error = 0.0
        for fold in range(ridge.MAX_FOLDS):
            b = by_lstsq(given[folds != fold], y[folds != fold], mu, sizes)
            error += ((y - np.einsum("k,bkn->bn", b, given))[folds == fold] ** 2).sum()
        left_out.append(error / (y**2).sum())
    fit = cross_validated(products_of(given, y))
    best = int(np.argmin(left_out))
    assert fit.penalty == ridge.PENALTIES[best]
    assert fit.gain == pytest.approx(left_out[best], rel=1e-6)
    np.testing.assert_allclose(fit.weights, by_lstsq(given, y, fit.penalty, sizes), rtol=1e-6)


def test_noise_is_refused_and_what_is_exact_is_found() -> None:
    given, _ = features()
    noise = np.random.default_rng(5).normal(size=(len(given), 20))
    refused = cross_validated(products_of(given, noise))
    assert refused.weights == (0.0,) * 3 and refused.penalty == math.inf and refused.gain == 1.0
    # Samples that contradict each other: what helps one half harms the other.
    signs = np.array([1, -1, 1, -1, 1, -1, 1])[:, None]
    torn = cross_validated(products_of(given[:6, :1], signs[:6] * given[:6, 0]))
    assert torn.weights == (0.0,)
    given, y = features(noise=0.0)
    fit = cross_validated(products_of(given, y))
    np.testing.assert_allclose(fit.weights, [1.0, 2e-2, -30.0], rtol=1e-6)
    assert fit.gain < 1e-12
    one = cross_validated(products_of(given[:1], y[:1]))
    assert one.weights == (0.0, 0.0, 0.0), "one sample cannot be left out"


def test_samples_of_one_prompt_are_left_out_together() -> None:
    """A feature for each prompt: of the weight of one left out, only its other sample knows."""
    features = [*torch.eye(3, dtype=torch.float64).repeat(2, 1).T[:, :, None]]
    target = torch.tensor([3.0, -1.0, 2.0] * 2, dtype=torch.float64)[:, None]
    alone, shared = (Products.of(features, target, prompts) for prompts in ((), (7, 2, 9) * 2))
    assert alone.folds().tolist() == [5, 4, 3, 2, 1, 0]
    assert shared.folds().tolist() == [1, 0, 2] * 2
    np.testing.assert_allclose(cross_validated(alone).weights, (3.0, -1.0, 2.0), rtol=1e-6)
    assert cross_validated(shared).weights == (0.0,) * 3
    one = Products.of(features, target, (5,) * 6)
    assert cross_validated(one).weights == (0.0,) * 3, "one prompt cannot be left out"


def test_products_of_two_processes_are_those_of_one() -> None:
    given, y = features()
    whole = products_of(given, y)
    parts = [products_of(given[:3], y[:3]), products_of(given[3:], y[3:])]
    packed = torch.cat([part.packed() for part in parts])
    again = Products.unpacked(packed, 3)
    for name in ("gram", "moment", "energy", "prompts"):
        assert torch.equal(getattr(again, name), getattr(Products.joined(parts), name))
    assert cross_validated(again).weights == pytest.approx(cross_validated(whole).weights)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_converged_runs_end_at_the_solution_of_the_ode(prediction_type) -> None:
    """Guided outputs of a Gaussian are linear in x: an affine ODE, solved by DOP853 to 1e-10.

    Flow matching's dx/ds is its velocity; VP's is integrated in the same time, s = sigma/(a+sigma),
    of the scaled state x / (a + sigma), which for every x_0 and eps moves along the same line.
    """
    schedule = schedule_of("flow" if prediction_type == "flow_prediction" else "vp")
    model, batch = Gaussian(schedule, prediction_type), batch_of(1, 2, 3)
    nodes = make_nodes(schedule, 60, 4)
    found = converge(model.engine(), schedule, nodes, batch, W, prediction_type)
    x, cond, uncond, _ = batch

    def velocity(t, flat):
        """dx/dt = alpha' x_0 + sigma' eps with the guided prediction."""
        state, h = torch.from_numpy(flat.reshape(x.shape)), 1e-4
        x0c, epsc = model.field(state, t, cond)
        x0u, epsu = model.field(state, t, uncond)
        x0, eps = x0u + W * (x0c - x0u), epsu + W * (epsc - epsu)
        a, b = schedule.point(t - h), schedule.point(t + h)
        da, db = (b.alpha_t - a.alpha_t) / (2 * h), (b.sigma_t - a.sigma_t) / (2 * h)
        return (da * x0 + db * eps).numpy().ravel()

    last = nodes.last - 1
    times = [nodes.points[0].timestep, nodes.points[last].timestep]
    # Inside: the log-SNR of VP has a kink at every whole timestep, and differences cross the ends.
    times[0] -= 1e-3
    start = x.numpy().ravel()
    solved = solve_ivp(velocity, times, start, method="DOP853", rtol=1e-7, atol=1e-7)
    expected = solved.y[:, -1].reshape(x.shape)
    scale = np.abs(expected).max()
    gap = np.abs(found.samples[last].numpy() - expected).max() / scale
    assert gap < (6e-3 if schedule.kind == "vp" else 2e-3), gap
    assert model.rows and found.samples.shape == (nodes.last + 1, 2, 3)
    assert found.conds.shape == found.deltas.shape == (nodes.last, 2, 3)
    for j in (0, 7, last):
        t = torch.full((2,), nodes.points[j].timestep)
        c, u = model(found.samples[j], t, cond), model(found.samples[j], t, uncond)
        torch.testing.assert_close(found.conds[j], c)
        torch.testing.assert_close(found.deltas[j], c - u)


@pytest.mark.parametrize("count", [2, 60, 400])
def test_nodes(count) -> None:
    for kind in ("vp", "flow"):
        nodes = make_nodes(schedule_of(kind), count, 3)
        times = [point.timestep for point in nodes.points]
        assert all(b < a for a, b in itertools.pairwise(times)) and times[-1] == 0.0
        assert len(nodes.substeps) == nodes.last and nodes.substeps[-1] == 1
        if kind == "vp":
            assert all(t == int(t) for t in times) and times[0] == 999
    with pytest.raises(InvalidArgument, match=r"^schedule="):
        make_nodes(NoiseSchedule("edm"))


class Fixture:
    """Converged runs of a bent Gaussian, and a base plan on some of their nodes."""

    def __init__(self, prediction_type: str, bend: float = 0.3) -> None:
        self.schedule = schedule_of("flow" if prediction_type == "flow_prediction" else "vp")
        self.type, model = prediction_type, Gaussian(self.schedule, prediction_type, bend)
        self.model, self.engine = model, model.engine()
        self.nodes = make_nodes(self.schedule, 24, 3)
        self.fit = [self.converged(batch_of(seed, 6)) for seed in (1, 2, 3, 4)]
        self.held_out = [self.converged(batch_of(seed, 6)) for seed in (9, 10, 11)]

    def converged(self, batch):
        return converge(self.engine, self.schedule, self.nodes, batch, W, self.type)

    def base(self, grid: Grid) -> SamplingPlan:
        times = tuple(self.nodes.points[j].timestep for j in grid.nodes)
        entry = PlanEntry("dpmpp2m", times, grid.coarse_rows, ())
        return base_plan(entry, self.schedule, self.type, W)


@pytest.fixture(scope="module", params=TYPES)
def fixture(request) -> Fixture:
    return Fixture(request.param)


NODES = (0, 4, 8, 12, 16, 19, 22)


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


def spans_of(count: int = 9) -> tuple[SpanErrors, torch.Tensor]:
    schedule = schedule_of("vp")
    model = Gaussian(schedule, "epsilon", 0.3)
    nodes = make_nodes(schedule, count, 2)
    run = converge(model.engine(), schedule, nodes, batch_of(4, 3), W, "epsilon")
    growth = np.linspace(2.0, 1.0, nodes.last + 1)
    return SpanErrors(nodes, inner_products(run), growth), run


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
