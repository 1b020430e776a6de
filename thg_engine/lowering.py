r"""Lowering: a solver and a guidance method become the rows of one plan.

Two forms of Algorithm 1 (arXiv 2511.04117):

- *combined*: one state x = x^T + x^H, the held delta goes through the sampler's own step. Exact
  for first-order steps of noise, data and flow models, and all that a foreign scheduler allows.
- *two-state*: tortoise and hare keep their own solver histories, on the fine and on the coarse
  grid. Every quantity is linear in stored registers, so it is tracked as a `LinearForm` over them
  and x^T never needs a register: x^T_i = X[i] - x^H_i.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import TypedDict

from .errors import InvalidArgument
from .guidance import THG, UNGUIDED, Guidance, GuidanceRow
from .plan import Row, SamplingPlan, Weights
from .schedule import Point
from .solvers import Solver, solver_table
from .table import SolverTable

FORMS = ("auto", "combined", "two_state")
Symbol = tuple[str, int]
"""A stored value: register letter and the row that wrote it."""


def guidance_rows(
    guidance: Guidance, lambdas: Sequence[float], guidance_scale: float
) -> tuple[GuidanceRow, ...]:
    """Rows of ``guidance``; none evaluates the unconditional branch where w = 1 makes it idle."""
    if not isinstance(guidance_scale, Real) or not math.isfinite(guidance_scale):
        raise InvalidArgument("guidance_scale", guidance_scale, "give a finite number, w.")
    if guidance_scale == 1.0:
        return (UNGUIDED,) * len(lambdas)
    rows = guidance.rows(lambdas, guidance_scale)
    if len(rows) != len(lambdas):
        remedy = f"rows() must give one row per model call ({len(lambdas)}), got {len(rows)}."
        raise InvalidArgument("guidance", guidance.name, remedy)
    return rows


def plan_from_table(
    table: SolverTable, guidance: Guidance, guidance_scale: float, notes: tuple[str, ...] = ()
) -> SamplingPlan:
    """The combined form: ``guidance`` in front of every step of a (traced) solver table."""
    rows: list[Row] = []
    for step, guided in zip(
        table.rows, guidance_rows(guidance, table.lambdas, guidance_scale), strict=True
    ):
        rows.append(
            Row(
                timestep=step.timestep,
                lambda_t=table.lambdas[len(rows)],
                input_scale=step.input_scale,
                sample_weights=step.sample_weights,
                guided_weights=step.output_weights,
                noise_weight=step.noise_weight,
                state_weights=step.state_weights,
                state_update=step.state_update,
                state_sample_update=step.state_sample_update,
                state_guided_update=step.state_output_update,
                **_guidance_columns(guided, guidance_scale),
            )
        )
    return SamplingPlan(
        tuple(rows),
        guidance.name,
        table.name,
        guidance_scale,
        table.prediction_type,
        table.initial_scale,
        (*notes, *_notes(guidance, table.lambdas, guidance_scale)),
    )


def plan_from_timesteps(
    timesteps: Sequence[float],
    lambdas: Sequence[float],
    guidance: Guidance,
    guidance_scale: float,
    solver: str,
    notes: tuple[str, ...] = (),
) -> SamplingPlan:
    """Guidance alone: which calls evaluate both branches, for a scheduler that steps by itself."""
    guided = guidance_rows(guidance, lambdas, guidance_scale)
    rows = tuple(
        Row(timestep=t, lambda_t=value, **_guidance_columns(row, guidance_scale))
        for t, value, row in zip(timesteps, lambdas, guided, strict=True)
    )
    notes = (*notes, *_notes(guidance, lambdas, guidance_scale))
    return SamplingPlan(rows, guidance.name, solver, guidance_scale, notes=notes)


def _notes(guidance: Guidance, lambdas: Sequence[float], guidance_scale: float) -> tuple[str, ...]:
    return guidance.notes(lambdas, guidance_scale) if isinstance(guidance, THG) else ()


def plan_from_solver(
    solver: Solver,
    points: Sequence[Point],
    guidance: Guidance,
    guidance_scale: float,
    prediction_type: str = "epsilon",
    form: str = "auto",
) -> SamplingPlan:
    """A plan of a closed-form solver along ``points`` (N + 1, from noise to data).

    Args:
        solver: steps both tortoise and hare.
        points: the fine grid.
        guidance: the method.
        guidance_scale: w.
        prediction_type: diffusers' string.
        form: "combined", "two_state" (Algorithm 1 to the letter), or "auto": combined where it is
            the same, which needs one register less, and where delta is extrapolated, which the
            two-state form does not do.
    """
    if form not in FORMS:
        raise InvalidArgument("form", form, f"use one of {', '.join(FORMS)}.")
    table = solver_table(solver, points, prediction_type)
    rows = guidance_rows(guidance, table.lambdas, guidance_scale)
    holds = any(not row.evaluates_both and row.delta_weights for row in rows)
    extrapolates = any(row.delta_weights not in ((), (1.0,)) for row in rows)
    is_same = extrapolates or not holds or solver.jumps_exactly(prediction_type)
    if form == "combined" or (form == "auto" and is_same):
        return plan_from_table(table, guidance, guidance_scale)
    lowered = _TwoState(solver, tuple(points), rows, guidance_scale, prediction_type).rows()
    notes = ("tortoise and hare keep separate solver histories (Algorithm 1)",)
    return SamplingPlan(
        lowered, guidance.name, solver.name, guidance_scale, prediction_type, 1.0, notes
    )


class _Columns(TypedDict):
    """The guidance part of a `Row`."""

    evaluates_both: bool
    guidance_weight: float
    delta_weights: Weights
    cond_change_weights: Weights


def _guidance_columns(row: GuidanceRow, guidance_scale: float) -> _Columns:
    """Columns of `Row` that say how the guided output is formed."""
    guided = row.evaluates_both or row.delta_weights or row.cond_change_weights
    return {
        "evaluates_both": row.evaluates_both,
        "guidance_weight": (guidance_scale - 1.0) * row.boost if guided else 0.0,
        "delta_weights": () if row.evaluates_both else row.delta_weights,
        "cond_change_weights": () if row.evaluates_both else row.cond_change_weights,
    }


@dataclass
class LinearForm:
    """A linear combination of stored values."""

    terms: dict[Symbol, float] = field(default_factory=dict)

    def plus(self, other: LinearForm, weight: float = 1.0) -> LinearForm:
        """``self + weight * other``."""
        terms = dict(self.terms)
        for symbol, value in other.terms.items():
            terms[symbol] = terms.get(symbol, 0.0) + weight * value
        return LinearForm({symbol: value for symbol, value in terms.items() if value != 0.0})


def _symbol(register: str, row: int, weight: float = 1.0) -> LinearForm:
    return LinearForm({(register, row): weight})


@dataclass
class _TwoState:
    """Lowers Algorithm 1 with separate histories; one instance per plan."""

    solver: Solver
    points: tuple[Point, ...]
    guided: tuple[GuidanceRow, ...]
    guidance_scale: float
    prediction_type: str
    coarse: list[int] = field(default_factory=list)
    boost: float = 1.0
    """Boost of the span that is open."""
    hare: dict[int, LinearForm] = field(default_factory=dict)
    """x^H at each coarse point."""
    delta: dict[int, LinearForm] = field(default_factory=dict)
    """(w - 1) b delta at each coarse point; empty where delta is dropped."""
    tortoise: dict[int, LinearForm] = field(default_factory=dict)
    writes: dict[str, list[int]] = field(default_factory=lambda: {"D": [], "S": []})
    """Rows that shifted D and S so far."""

    def rows(self) -> tuple[Row, ...]:
        """One `Row` per fine step."""
        first = self.guided[0]
        if not (first.evaluates_both or not first.delta_weights):
            raise InvalidArgument("guidance", first, "row 0 must evaluate both branches or none.")
        return tuple(self._row(i, guided) for i, guided in enumerate(self.guided))

    def _row(self, i: int, guided: GuidanceRow) -> Row:
        if guided.cond_change_weights or (guided.delta_weights not in ((), (1.0,))):
            remedy = "the two-state form only holds the newest delta; use form='combined'."
            raise InvalidArgument("guidance", guided, remedy)
        if not guided.coarse and guided.boost != self.boost and guided.delta_weights:
            remedy = "a held row has the boost of its span; use form='combined' for another."
            raise InvalidArgument("guidance", guided, remedy)
        update = LinearForm()
        dropped = not (guided.evaluates_both or guided.delta_weights)
        if i == 0 or guided.coarse or (dropped and self.delta[self.coarse[0]].terms):
            update = self._coarse_step(i, guided)
        self.tortoise[i] = _symbol("X", i).plus(self._hare_at(i), -1.0)
        step = self.solver.weights(self._history(range(i, -1, -1)), self.points[i + 1], self._type)
        x_next = self._hare_at(i + 1)
        for k, weight in enumerate(step.sample):
            x_next = x_next.plus(self.tortoise[i - k], weight)
        for k, weight in enumerate(step.output):
            x_next = x_next.plus(_symbol("C", i - k), weight)
        columns = self._columns(i, x_next)
        before = self._columns(i, update, state_shift=int(bool(update.terms)))
        return Row(
            timestep=self.points[i].timestep,
            lambda_t=self.points[i].lambda_t,
            evaluates_both=guided.evaluates_both,
            guidance_weight=(self.guidance_scale - 1.0) * guided.boost
            if guided.evaluates_both
            else 0.0,
            sample_weights=columns["X"],
            cond_weights=columns["C"],
            step_delta_weights=columns["D"],
            state_weights=columns["S"],
            state_update=before["S"],
            state_delta_update=before["D"],
        )

    @property
    def _type(self) -> str:
        return self.prediction_type

    def _history(self, rows: Sequence[int]) -> list[Point]:
        return [self.points[j] for j in rows[: self.solver.order]]

    def _coarse_step(self, i: int, guided: GuidanceRow) -> LinearForm:
        """Open a span at row i; returns what the row stores into S (empty: nothing)."""
        value = self._hare_at(i) if self.coarse else LinearForm()
        self.boost = guided.boost
        self.coarse.insert(0, i)
        self.delta[i] = LinearForm()
        self.hare[i] = value
        if guided.evaluates_both:
            self.writes["D"].append(i)
            weight = (self.guidance_scale - 1.0) * guided.boost
            self.delta[i] = _symbol("D", i, weight)
            if value.terms:
                self.writes["S"].append(i)
                self.hare[i] = _symbol("S", i)
                return value
        return LinearForm()

    def _hare_at(self, j: int) -> LinearForm:
        """x^H at fine point j: the hare's solver run from the last coarse point straight to it."""
        span = self.coarse[0]
        if j == span:
            return self.hare[span]
        step = self.solver.weights(self._history(self.coarse), self.points[j], self._type)
        value = LinearForm()
        for c, weight in zip(self.coarse, step.sample, strict=False):
            value = value.plus(self.hare[c], weight)
        for c, weight in zip(self.coarse, step.output, strict=False):
            value = value.plus(self.delta[c], weight)
        return value

    def _columns(self, i: int, form: LinearForm, state_shift: int = 0) -> dict[str, Weights]:
        """Dense weights by register age in row i; ``state_shift`` reads S before its own update."""
        age: dict[str, Callable[[int], int]] = {
            "X": lambda row: i - row,
            "C": lambda row: i - row,
            "D": lambda row: len(self.writes["D"]) - 1 - self.writes["D"].index(row),
            "S": lambda row: len(self.writes["S"]) - 1 - self.writes["S"].index(row) - state_shift,
        }
        columns: dict[str, Weights] = {}
        for register, age_of in age.items():
            weights = {age_of(row): v for (name, row), v in form.terms.items() if name == register}
            size = max(weights, default=-1) + 1
            columns[register] = tuple(weights.get(k, 0.0) for k in range(size))
        return columns
