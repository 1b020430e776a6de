r"""Solver tables: a sampler step as a row of numbers.

Every deterministic diffusers scheduler is linear in past samples and past model outputs, with
coefficients that the timestep grid alone decides,

    x_{i+1} = sum_k a_k X_k + sum_k b_k E_k  (+ s z, z ~ N(0, 1), for stochastic schedulers)

where X_0 is the sample before row i, X_1 the one before row i - 1, E_0 the model output of row i
and so on. `trace.py` recovers the numbers from a scheduler, `solvers.py` writes them in closed
form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from .errors import InvalidArgument

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction")


@dataclass(frozen=True)
class SolverRow:
    """One model call and the step that follows it, all host float64.

    Attributes:
        timestep: what the denoiser is told (training-time index, or sigma * 1000 for flow models).
        input_scale: the denoiser is fed ``input_scale * X_0`` (diffusers' ``scale_model_input``).
        sample_weights: a_k for X_0, X_1, ... (newest first).
        output_weights: b_k for E_0, E_1, ... (newest first).
        noise_weight: s, standard deviation of the fresh noise added by a stochastic scheduler.
        noise_draws: the dtype of each unit Gaussian tensor that the scheduler's step draws in this
            row, "float32" or "model"; () also where the noise has another source.
        noise_draw: which of them is z.
        state_weights: (r',), or () without a state.
        state_update: (r,), or () where there is no state yet.
        state_sample_update: a'_k.
        state_output_update: b'_k.
    """

    timestep: float
    input_scale: float
    sample_weights: tuple[float, ...]
    output_weights: tuple[float, ...]
    noise_weight: float = 0.0
    noise_draws: tuple[str, ...] = ()
    noise_draw: int = 0
    state_weights: tuple[float, ...] = ()
    state_update: tuple[float, ...] = ()
    state_sample_update: tuple[float, ...] = ()
    state_output_update: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        numbers = (self.timestep, self.input_scale, self.noise_weight)
        weights = [f.name for f in fields(self) if f.name.endswith(("weights", "update"))]
        for name, value in (("row", numbers), *((name, getattr(self, name)) for name in weights)):
            if not all(map(math.isfinite, value)):
                raise InvalidArgument(name, value, "every coefficient of a row must be finite.")


@dataclass(frozen=True)
class SolverTable:
    """The rows of one sampling run.

    Attributes:
        name: scheduler class or closed-form solver the rows come from.
        prediction_type: one of `PREDICTION_TYPES` (diffusers' strings).
        initial_scale: x_T is unit Gaussian noise times this (``init_noise_sigma``).
        rows: one per model call, in order of execution.
        lambdas: half log-SNR log(alpha_t / sigma_t) at each row's point, dimensionless; grows.
        residual: largest relative error against the scheduler itself (0 in closed form).
        edits: whether the rows hold also where samples are changed between two steps, as inpainting
            and callbacks do.
    """

    name: str
    prediction_type: str
    rows: tuple[SolverRow, ...]
    lambdas: tuple[float, ...]
    initial_scale: float = 1.0
    residual: float = 0.0
    edits: bool = True

    def __post_init__(self) -> None:
        if not self.rows:
            raise InvalidArgument("rows", self.rows, "a solver table needs at least one row.")
        if len(self.lambdas) != len(self.rows):
            remedy = f"give one half log-SNR per row ({len(self.rows)})."
            raise InvalidArgument("lambdas", len(self.lambdas), remedy)
        if self.prediction_type not in PREDICTION_TYPES:
            remedy = f"use one of {', '.join(PREDICTION_TYPES)}."
            raise InvalidArgument("prediction_type", self.prediction_type, remedy)

    @property
    def window(self) -> tuple[int, int]:
        """How many past (model outputs, samples) a step reads, the current ones included."""
        return (
            max(_span(w) for r in self.rows for w in (r.output_weights, r.state_output_update)),
            max(_span(w) for r in self.rows for w in (r.sample_weights, r.state_sample_update)),
        )

    @property
    def has_state(self) -> bool:
        """Whether the solver keeps a state besides the sample."""
        return any(row.state_weights for row in self.rows)

    @property
    def stochastic(self) -> bool:
        """Whether any row adds fresh noise."""
        return any(row.noise_weight != 0.0 for row in self.rows)

    @property
    def timesteps(self) -> tuple[float, ...]:
        """What the denoiser is told, row by row."""
        return tuple(row.timestep for row in self.rows)


def _span(weights: Sequence[float]) -> int:
    """Length of ``weights`` without its trailing zeros."""
    return max((k + 1 for k, weight in enumerate(weights) if weight != 0.0), default=0)
