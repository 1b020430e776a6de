r"""Reuse of deltas by least squares: what held deltas weigh is fitted to the model.

At each row that evaluates the conditional branch alone, on the trajectory of the rows fitted so
far, the next sample x_{i+1} of the extrapolating row misses that of full guidance with the same
solver and number of steps, x*_{i+1}. Through the solver's weight b_0 of the guided output and
g = w - 1, a change of delta moves the sample by b_0 g as much, so the weights solve

    (x*_{i+1} - x_{i+1}) / (b_0 g)  ~  sum_k dw_k D_k + sum_k dv_k (c - C_k)

with a ridge towards the extrapolation, chosen by cross-validation over samples. The target is the
sample and not the fresh delta: what earlier rows got wrong is made good, which matters more than
how well delta itself is met. Nothing but delta changes, so any scheduler can step.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..documents import fields_of, read_document, write_document
from ..engine import Engine
from ..errors import CalibrationError, InvalidArgument
from ..plan import Row, SamplingPlan, Weights
from ..reuse import RowWeights
from .reference import Batch, Trajectory, evaluate_both
from .registers import Registers
from .ridge import Products, cross_validated
from .rows import DEPTH, Gather, corrected, evaluate, fit_rows, observe

FORMAT = "thg-engine-reuse"
VERSION = 1
DIGITS = 9
"""Significant digits of weights; registers are float32."""
TOLERANCE = 1e-3
"""Of half log-SNR: a run whose rows lie elsewhere is another run."""


@dataclass(frozen=True)
class ScaleWeights:
    """Fitted rows at one guidance scale; each field one value per row.

    Attributes:
        guidance_scale: w.
        deltas: w_k, newest first; () where both branches or no guidance is evaluated.
        changes: v_k of c - C_1, c - C_2, ...
        gains: squared distance to full guidance of the next sample, on samples left out, over that
            of extrapolation; 1 where the fit was refused and extrapolation is kept.
    """

    guidance_scale: float
    deltas: tuple[Weights, ...]
    changes: tuple[Weights, ...]
    gains: tuple[float, ...]


@dataclass(frozen=True)
class FittedReuse:
    """Weights of held deltas for runs of one length, grid and range of guidance scales.

    Attributes:
        lambdas: half log-SNR of the rows.
        coarse_rows: rows that evaluate both branches.
        fits: by guidance scale, growing; weights are interpolated linearly between two.
        solver: that the fit ran on.
        model, fingerprint, num_samples, date, machine: where the weights come from.
    """

    lambdas: tuple[float, ...]
    coarse_rows: tuple[int, ...]
    fits: tuple[ScaleWeights, ...]
    solver: str = ""
    model: str = ""
    fingerprint: str = ""
    num_samples: int = 0
    date: str = ""
    machine: str = ""

    def __post_init__(self) -> None:
        fits = tuple(sorted(self.fits, key=lambda fit: fit.guidance_scale))
        object.__setattr__(self, "fits", fits)
        scales = [fit.guidance_scale for fit in fits]
        if not fits or len(set(scales)) < len(scales) or not all(map(math.isfinite, scales)):
            raise InvalidArgument("fits", scales, "give one fit for each of some finite scales.")
        rows, coarse = len(self.lambdas), self.coarse_rows
        for fit in fits:
            if not len(fit.deltas) == len(fit.changes) == len(fit.gains) == rows:
                raise InvalidArgument("fits", len(fit.deltas), f"give {rows} rows, one per lambda.")
            flat = [v for part in (*fit.deltas, *fit.changes) for v in part]
            if not all(map(math.isfinite, flat)):
                raise InvalidArgument("fits", fit.guidance_scale, "give finite weights.")
        if any(not 0 <= i < rows for i in coarse) or sorted(set(coarse)) != list(coarse):
            raise InvalidArgument("coarse_rows", coarse, "give growing indices of the rows.")

    @property
    def guidance_scales(self) -> tuple[float, ...]:
        """Scales that the weights were fitted at, growing."""
        return tuple(fit.guidance_scale for fit in self.fits)

    def grid_for(self, lambdas: Sequence[float]) -> tuple[int, ...] | None:
        """The coarse rows; None where the run has other rows."""
        return None if self._why_not_rows(lambdas) else self.coarse_rows

    def weights_for(
        self, lambdas: Sequence[float], coarse_rows: Sequence[int], guidance_scale: float
    ) -> tuple[RowWeights, ...] | str:
        """Weights of every row, or why there are none for this run."""
        low, high = self.guidance_scales[0], self.guidance_scales[-1]
        why = self._why_not_rows(lambdas)
        if not why and tuple(coarse_rows) != self.coarse_rows:
            why = "reuse was fitted on another coarse grid"
        if not why and not low - 1e-9 <= guidance_scale <= high + 1e-9:
            scales = f"w = {low:g}" if low == high else f"w from {low:g} to {high:g}"
            why = f"reuse was fitted at {scales}, not at {guidance_scale:g}"
        return why or self._between(guidance_scale)

    def _why_not_rows(self, lambdas: Sequence[float]) -> str:
        if len(lambdas) != len(self.lambdas):
            return f"reuse was fitted to {len(self.lambdas)} rows, not to {len(lambdas)}"
        pairs = zip(lambdas, self.lambdas, strict=True)
        if not all(math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=TOLERANCE) for a, b in pairs):
            return "reuse was fitted to rows at other noise levels"
        return ""

    def _between(self, guidance_scale: float) -> tuple[RowWeights, ...]:
        below = [fit for fit in self.fits if fit.guidance_scale <= guidance_scale + 1e-9]
        above = [fit for fit in self.fits if fit.guidance_scale >= guidance_scale - 1e-9]
        low, high = below[-1], above[0]
        width = high.guidance_scale - low.guidance_scale
        share = (guidance_scale - low.guidance_scale) / width if width > 0 else 0.0
        columns = zip(low.deltas, high.deltas, low.changes, high.changes, strict=True)
        return tuple((_mixed(a, b, share), _mixed(c, d, share)) for a, b, c, d in columns)

    def document(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = {"format": FORMAT, "version": VERSION, **asdict(self)}
        # Pure noise has no half log-SNR, and JSON no infinity.
        values["lambdas"] = [v if math.isfinite(v) else str(v) for v in self.lambdas]
        for fit in values["fits"]:
            columns = zip(fit.pop("deltas"), fit.pop("changes"), fit.pop("gains"), strict=True)
            fit["rows"] = [[list(d), list(c), gain] for d, c, gain in columns]
        return values

    def save(self, path: str | Path) -> None:
        """Write the weights as JSON, one row a line."""
        document = self.document()
        fits = document.pop("fits")
        blocks = []
        for fit in fits:
            rows = ",\n   ".join(json.dumps(row) for row in fit["rows"])
            blocks.append(f'{{"guidance_scale": {fit["guidance_scale"]}, "rows": [\n   {rows}]}}')
        lines = [f"{json.dumps(k)}: {json.dumps(v, allow_nan=False)}" for k, v in document.items()]
        text = ",\n ".join([*lines, f'"fits": [\n  {", ".join(blocks)}]'])
        write_document(path, f"{{{text}\n}}\n")

    @classmethod
    def load(cls, path: str | Path) -> FittedReuse:
        """Read weights.

        Raises:
            CalibrationError: missing file, no JSON, another format or version, bad or missing
                field.
        """
        return cls.from_document(read_document(path, "reuse weights"), str(path))

    @classmethod
    def from_document(cls, document: Any, origin: str) -> FittedReuse:
        """Weights from parsed JSON; ``origin`` names it in errors."""
        values = fields_of(document, origin, FORMAT, VERSION, "fit again: thg_engine.fit_reuse")
        try:
            values["lambdas"] = tuple(map(float, values["lambdas"]))
            values["coarse_rows"] = tuple(values["coarse_rows"])
            values["fits"] = tuple(map(_scale_weights, values["fits"]))
            return cls(**values)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CalibrationError(f"{origin!r} is damaged: {error}") from error


def _scale_weights(document: dict[str, Any]) -> ScaleWeights:
    rows = document["rows"]
    return ScaleWeights(
        float(document["guidance_scale"]),
        tuple(tuple(map(float, row[0])) for row in rows),
        tuple(tuple(map(float, row[1])) for row in rows),
        tuple(float(row[2]) for row in rows),
    )


def _mixed(one: Weights, other: Weights, share: float) -> Weights:
    pairs = zip_longest(one, other, fillvalue=0.0)
    return tuple((1 - share) * a + share * b for a, b in pairs)


def full_guidance(plan: SamplingPlan) -> SamplingPlan:
    """``plan`` with both branches in every row that has guidance, the solver as it is."""
    g = plan.guidance_scale - 1.0
    columns: dict[str, Any] = {"delta_weights": (), "cond_change_weights": ()}
    rows = (replace(r, evaluates_both=True, guidance_weight=g, **columns) for r in plan.rows)
    return replace(plan, rows=tuple(rows))


@torch.no_grad()
def follow(engine: Engine, plan: SamplingPlan, batch: Batch) -> Trajectory:
    """The run of full guidance with the solver of ``plan``, at its rows and the end."""
    registers = Registers([plan.initial_scale * batch.noise.to(engine.register_dtype)])
    samples, conds, deltas = [registers.samples[0].cpu()], [], []
    for row in full_guidance(plan).rows:
        x = registers.samples[0] * row.input_scale
        registers.observe(row, *evaluate_both(engine, x, row.timestep, batch.cond, batch.uncond))
        conds.append(registers.conds[0].cpu())
        deltas.append(registers.deltas[0].cpu())
        registers.push(registers.following(row), DEPTH)
        samples.append(registers.samples[0].cpu())
    return Trajectory(batch, torch.stack(samples), torch.stack(conds), torch.stack(deltas))


def _check(plan: SamplingPlan, deltas: int, cond_changes: int) -> None:
    if not plan.steps_itself or plan.stochastic:
        remedy = "weights are fitted on the rows of a deterministic solver."
        raise InvalidArgument("plan", f"<{plan.method} on {plan.solver}>", remedy)
    if any(row.cond_weights or row.step_delta_weights for row in plan.rows):
        remedy = "weights are fitted in the combined form."
        raise InvalidArgument("plan", f"<{plan.method} on {plan.solver}>", remedy)
    for name, value, low in (("deltas", deltas, 1), ("cond_changes", cond_changes, 0)):
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not (whole and low <= value < DEPTH):
            remedy = f"give a whole number from {low} to {DEPTH - 1}."
            raise InvalidArgument(name, value, remedy)


@torch.no_grad()
def fit_weights(
    engine: Engine,
    plan: SamplingPlan,
    trajectories: Sequence[Trajectory],
    *,
    deltas: int = 3,
    cond_changes: int = 0,
    gather: Gather = lambda rows: rows,
    on_row: Callable[[], None] = lambda: None,
) -> ScaleWeights:
    """Weights of every held row of ``plan``.

    Args:
        engine: around the denoiser.
        plan: rows that extrapolate, combined form, deterministic.
        trajectories: `follow` of the samples to fit to.
        deltas, cond_changes: how many of each a row may read.
        gather, on_row: brings rows of other processes; is called after each row.
    """
    _check(plan, deltas, cond_changes)
    runs = [_Run.of(trajectory) for trajectory in trajectories]
    rows, gains = [], []
    for i, row in enumerate(plan.rows):
        gain = 1.0
        if row.evaluates_both or not row.delta_weights or _effect(row) == 0.0:
            for run in runs:
                observe(engine, run.registers, row, run.trajectory.batch)
        else:
            parts = [run.products(engine, row, i, deltas, cond_changes) for run in runs]
            row, gain = _fit_row(row, Products.joined(parts), runs, deltas, gather)
        for run in runs:
            run.registers.push(run.registers.following(row), DEPTH)
        rows.append(row)
        gains.append(float(f"{gain:.4g}"))
        on_row()
    columns = tuple(() if row.evaluates_both else row.delta_weights for row in rows)
    changes = tuple(row.cond_change_weights for row in rows)
    return ScaleWeights(plan.guidance_scale, columns, changes, tuple(gains))


def _fit_row(
    row: Row, products: Products, runs: Sequence[_Run], deltas: int, gather: Gather
) -> tuple[Row, float]:
    """A held row with fitted weights, which the runs then take, and its gain."""
    size, held = products.moment.shape[1], min(len(runs[0].registers.deltas), deltas)
    fit = cross_validated(Products.unpacked(gather(products.packed()).cpu(), size))
    row = _refined(row, fit.weights[:held], fit.weights[held:])
    for run in runs:
        run.registers.observe(row, run.cond, None)
    return row, fit.gain


def _effect(row: Row) -> float:
    """How much the next sample changes with delta: b_0 g, through the solver's state too."""
    direct = row.guided_weights[0] if row.guided_weights else 0.0
    if row.state_weights and row.state_guided_update:
        direct += row.state_weights[0] * row.state_guided_update[0]
    return direct * row.guidance_weight


def _refined(row: Row, deltas: Sequence[float], changes: Sequence[float]) -> Row:
    """``row`` with corrections added to its weights."""
    pairs = zip_longest(row.delta_weights, deltas, fillvalue=0.0)
    found = _trimmed([a + b for a, b in pairs])
    return replace(row, delta_weights=found, cond_change_weights=_trimmed(changes))


def _trimmed(values: Sequence[float]) -> Weights:
    """Rounded to what is stored; a register that only zeros read is not kept."""
    found = [float(f"{value:.{DIGITS}g}") for value in values]
    while found and found[-1] == 0.0:
        found.pop()
    return tuple(found)


@dataclass
class _Run:
    """One batch on its way: where it is, where it should be, and what it has just been told."""

    trajectory: Trajectory
    registers: Registers
    cond: Tensor

    @classmethod
    def of(cls, trajectory: Trajectory) -> _Run:
        x = trajectory.samples[0].to(trajectory.batch.noise.device)
        return cls(trajectory, Registers([x]), x)

    def products(
        self, engine: Engine, row: Row, i: int, deltas: int, cond_changes: int
    ) -> Products:
        """Of what the weights of row ``i`` multiply and of what they are to make good."""
        held = self.registers
        x = held.samples[0] * row.input_scale
        self.cond = evaluate(engine, x, row.timestep, self.trajectory.batch.cond)
        features = held.deltas[:deltas]
        features += [self.cond - past for past in held.conds[:cond_changes]]
        columns = (held.samples, held.conds, held.deltas, held.guided, held.states)
        base = Registers(*(list(values) for values in columns))
        base.observe(row, self.cond, None)
        target = self.trajectory.samples[i + 1].to(x.device)
        missed = (target - base.following(row)) / _effect(row)
        return Products.of(features, missed, self.trajectory.batch.prompts)


def fit_steps(
    engine: Engine,
    plan: SamplingPlan,
    trajectories: Sequence[Trajectory],
    gather: Gather = lambda rows: rows,
    on_row: Callable[[], None] = lambda: None,
) -> SamplingPlan:
    """``plan`` with every row's step corrected towards full guidance, not its delta alone.

    Rows that evaluate both branches make good, too, what held rows before them got wrong. Such a
    plan steps by itself: `Engine.sample` runs it, a scheduler cannot.

    Args:
        engine, plan, trajectories, gather, on_row: as in `fit_weights`.
    """
    _check(plan, 1, 0)
    nodes = range(plan.num_rows + 1)
    return corrected(plan, fit_rows(engine, plan, nodes, trajectories, gather, on_row))
