"""Fitting of plans: registers, ridge and converged runs against references of their own."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from gaussian import TYPES, Gaussian, W, batch_of, schedule_of
from rows_by_hand import Plain
from thg_engine.errors import InvalidArgument
from thg_engine.fitting import ridge
from thg_engine.fitting.reference import converge, make_nodes
from thg_engine.fitting.registers import Registers
from thg_engine.fitting.ridge import Products, cross_validated
from thg_engine.plan import Row, SamplingPlan
from thg_engine.schedule import NoiseSchedule

COLUMNS = ("sample_weights", "guided_weights", "cond_weights", "step_delta_weights")
COLUMNS += ("state_weights", "state_update", "state_delta_update", "state_sample_update")
COLUMNS += ("state_guided_update", "delta_weights", "cond_change_weights")


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
