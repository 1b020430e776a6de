r"""Closed-form solver steps between arbitrary times.

With x_t = alpha_t x_0 + sigma_t eps and lambda_t = log(alpha_t / sigma_t), a step maps the samples
and model outputs at past points to the sample at the next one, linearly:

    x_next = sum_k a_k x(t_k) + sum_k b_k out(t_k),        t_0 the current point, t_1 the one before

Schedulers only step along their own grid. The hare jumps between coarse points and to the fine
points inside a span, and calibration steps to midpoints, so both need these forms.

References:
    Song et al. 2021, arXiv 2010.02502 (DDIM); Lu et al. 2022, arXiv 2206.00927 (DPM-Solver) and
    arXiv 2211.01095 (DPM-Solver++); Karras et al. 2022, arXiv 2206.00364 (the sigma variable);
    Lipman et al. 2023, arXiv 2210.02747 (flow matching).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from .errors import InvalidArgument
from .schedule import Point
from .table import PREDICTION_TYPES, SolverRow, SolverTable


@dataclass(frozen=True)
class StepWeights:
    """Weights of past samples (a_k) and past model outputs (b_k), newest first, host float64."""

    sample: tuple[float, ...]
    output: tuple[float, ...]


StepFunction = Callable[[Sequence[Point], Point, str], StepWeights]


def _form(point: Point, prediction_type: str, wanted: str) -> tuple[float, float]:
    """(p, q) with ``wanted`` ("x0" or "eps") = p x + q out at ``point``."""
    alpha, sigma = point.alpha_t, point.sigma_t
    forms = {
        "epsilon": lambda: ((1 / alpha, -sigma / alpha), (0.0, 1.0)),
        "sample": lambda: ((0.0, 1.0), (1 / sigma, -alpha / sigma)),
        "v_prediction": lambda: ((alpha, -sigma), (sigma, alpha)),
        "flow_prediction": lambda: ((1.0, -sigma), (1.0, 1.0 - sigma)),
    }
    if prediction_type not in forms:
        remedy = f"use one of {', '.join(PREDICTION_TYPES)}."
        raise InvalidArgument("prediction_type", prediction_type, remedy)
    try:
        x0, eps = forms[prediction_type]()
    except ZeroDivisionError:
        remedy = f"a {prediction_type} model says nothing about {wanted} here; drop this point."
        raise InvalidArgument("point", point, remedy) from None
    return x0 if wanted == "x0" else eps


def ddim(history: Sequence[Point], point_next: Point, prediction_type: str) -> StepWeights:
    r"""DDIM, first order: x_next = alpha_next x0 + sigma_next eps.

    Source: Song et al. 2021, arXiv 2010.02502, eq. 12 with eta = 0.
    """
    x0 = _form(history[0], prediction_type, "x0")
    eps = _form(history[0], prediction_type, "eps")
    alpha, sigma = point_next.alpha_t, point_next.sigma_t
    return StepWeights((alpha * x0[0] + sigma * eps[0],), (alpha * x0[1] + sigma * eps[1],))


def flow_euler(history: Sequence[Point], point_next: Point, prediction_type: str) -> StepWeights:
    r"""Euler for flow matching, first order: x_next = x + (sigma_next - sigma_cur) v.

    Source: Lipman et al. 2023, arXiv 2210.02747; alpha_t = 1 - sigma_t.
    """
    if prediction_type != "flow_prediction":
        remedy = "flow Euler integrates a velocity; use 'ddim' for other predictions."
        raise InvalidArgument("prediction_type", prediction_type, remedy)
    return StepWeights((1.0,), (point_next.sigma_t - history[0].sigma_t,))


def dpm_solver_2(history: Sequence[Point], point_next: Point, prediction_type: str) -> StepWeights:
    r"""DPM-Solver-2, multistep: the noise prediction extrapolated in lambda, second order.

    x_next = (alpha_next / alpha_cur) x - sigma_next (e^h - 1) [eps_0 + h / (2 h_1) (eps_0 - eps_1)]
    with h = lambda_next - lambda_cur and h_1 = lambda_cur - lambda_prev.

    Source: Lu et al. 2022, arXiv 2206.00927, with the history of arXiv 2211.01095, appendix B.
    """
    if len(history) < 2 or math.isinf(point_next.lambda_t):
        return ddim(history, point_next, prediction_type)
    cur, prev = history[0], history[1]
    h = point_next.lambda_t - cur.lambda_t
    slope = h / (2 * (cur.lambda_t - prev.lambda_t))
    # sigma_next (e^h - 1), written so that a large h cannot overflow.
    gain = -point_next.alpha_t * cur.sigma_t / cur.alpha_t * math.expm1(-h)
    return _combine(
        (point_next.alpha_t / cur.alpha_t),
        [-gain * (1 + slope), gain * slope],
        [_form(cur, prediction_type, "eps"), _form(prev, prediction_type, "eps")],
    )


def dpm_solver_pp_2m(
    history: Sequence[Point], point_next: Point, prediction_type: str
) -> StepWeights:
    r"""DPM-Solver++ 2M: the data prediction extrapolated in lambda, second order.

    x_next = (sigma_next / sigma_cur) x - alpha_next (e^-h - 1) [x0_0 + h / (2 h_1) (x0_0 - x0_1)]

    Source: Lu et al. 2022, arXiv 2211.01095, algorithm 2.
    """
    if len(history) < 2 or math.isinf(point_next.lambda_t):
        return ddim(history, point_next, prediction_type)
    cur, prev = history[0], history[1]
    h = point_next.lambda_t - cur.lambda_t
    slope = h / (2 * (cur.lambda_t - prev.lambda_t))
    gain = -point_next.alpha_t * math.expm1(-h)
    return _combine(
        point_next.sigma_t / cur.sigma_t,
        [gain * (1 + slope), -gain * slope],
        [_form(cur, prediction_type, "x0"), _form(prev, prediction_type, "x0")],
    )


def linear_multistep_2(
    history: Sequence[Point], point_next: Point, prediction_type: str
) -> StepWeights:
    r"""Two-step Adams-Bashforth on a non-uniform grid, second order (PLMS, ``LMSDiscrete``).

    In s = sigma_t / alpha_t and y = x / alpha_t the diffusion ODE is dy/ds = eps; for flow matching
    it is dx/dsigma = v. With h = s_next - s_cur and h_1 = s_cur - s_prev,

        y_next = y + (h + h^2 / (2 h_1)) f_0 - h^2 / (2 h_1) f_1

    Source: Hairer, Norsett and Wanner, Solving ODEs I, section III.5; Liu et al. 2022,
    arXiv 2202.09778 (PNDM).
    """
    flow = prediction_type == "flow_prediction"
    points = [*history[:2], point_next]
    if not flow and any(point.alpha_t == 0 for point in points):
        remedy = "sigma_t / alpha_t is infinite at zero SNR; use 'dpmpp2m' or 'ddim' there."
        raise InvalidArgument("history", history, remedy)
    times = [p.sigma_t if flow else p.sigma_t / p.alpha_t for p in points]
    h = times[-1] - times[0]
    if len(history) < 2:
        gains = [h]
    else:
        curvature = h * h / (2 * (times[0] - times[1]))
        gains = [h + curvature, -curvature]
    if flow:
        return StepWeights((1.0,), tuple(gains))
    forms = [_form(point, prediction_type, "eps") for point in history[:2]]
    gains = [point_next.alpha_t * gain for gain in gains]
    return _combine(point_next.alpha_t / history[0].alpha_t, gains, forms)


def _combine(
    carry: float, gains: Sequence[float], forms: Sequence[tuple[float, float]]
) -> StepWeights:
    """Weights of ``carry * x + sum_k gains_k (p_k x_k + q_k out_k)``, trailing zeros dropped."""
    sample = [gain * p for gain, (p, _) in zip(gains, forms, strict=True)]
    sample[0] += carry
    while len(sample) > 1 and sample[-1] == 0.0:
        sample.pop()
    return StepWeights(
        tuple(sample), tuple(gain * q for gain, (_, q) in zip(gains, forms, strict=False))
    )


@dataclass(frozen=True)
class Solver:
    """A named closed-form solver.

    Attributes:
        name: key in `SOLVERS`.
        order: global order of accuracy, which is also the number of past points a step reads.
        step: the function that gives the weights of one step.
    """

    name: str
    order: int
    step: StepFunction

    def weights(
        self, history: Sequence[Point], point_next: Point, prediction_type: str
    ) -> StepWeights:
        """Weights of one step from ``history`` (newest first) to ``point_next``.

        Raises:
            InvalidArgument: no past point, two equal past points, or a step that does not advance.
        """
        if not history:
            raise InvalidArgument("history", history, "give at least the current point.")
        past = list(history[: self.order])
        ladder = [*reversed(past), point_next]
        if any(not b.lambda_t > a.lambda_t for a, b in pairwise(ladder)):
            remedy = "half log-SNR must grow from each point to the next; give distinct points."
            raise InvalidArgument("history", tuple(p.lambda_t for p in ladder), remedy)
        return self.step(past, point_next, prediction_type)

    def jumps_exactly(self, prediction_type: str) -> bool:
        """Whether one jump with a held output equals the fine steps with the same output.

        True for first-order steps of noise, data and flow models; not for v-prediction, where a
        held v is another vector field than the held (eps, x0) pair, and not with a history.
        """
        return self.order == 1 and prediction_type != "v_prediction"


SOLVERS: dict[str, Solver] = {
    solver.name: solver
    for solver in (
        Solver("ddim", 1, ddim),
        Solver("flow_euler", 1, flow_euler),
        Solver("dpm2", 2, dpm_solver_2),
        Solver("dpmpp2m", 2, dpm_solver_pp_2m),
        Solver("lms2", 2, linear_multistep_2),
    )
}


def get_solver(name: str) -> Solver:
    """The solver called ``name``; `InvalidArgument` lists the names there are."""
    if name not in SOLVERS:
        raise InvalidArgument("solver", name, f"use one of {', '.join(SOLVERS)}.")
    return SOLVERS[name]


def solver_table(solver: Solver, points: Sequence[Point], prediction_type: str) -> SolverTable:
    """Table of ``solver`` along ``points`` (N + 1 of them, from noise to data)."""
    if len(points) < 2:
        raise InvalidArgument("points", points, "give at least two, from noise to data.")
    rows = []
    for i, point in enumerate(points[:-1]):
        history = [points[i - k] for k in range(min(solver.order, i + 1))]
        step = solver.weights(history, points[i + 1], prediction_type)
        rows.append(SolverRow(point.timestep, 1.0, step.sample, step.output))
    lambdas = tuple(point.lambda_t for point in points[:-1])
    return SolverTable(solver.name, prediction_type, tuple(rows), lambdas)
