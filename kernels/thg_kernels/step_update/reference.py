r"""The fused step in plain torch: what every other backend must equal.

A row turns the registers and the denoiser's outputs of this call into the next sample:

    D shifts, D_0 = c - u                                    where the unconditional branch ran
    delta_hat = D_0, or sum_k w_k D_k + sum_k v_k (c - C_k)  where it did not
    H shifts, H_0 = sum_k r'_k H_k + sum_k p'_k D_k          where the row updates the hare
    E_0 = c + g delta_hat
    X_{-1} = sum a_k X_k + sum b_k E_k + sum q_k C_k + sum p_k D_k + sum r_k H_k + s z

Columns that are zero are not read, so a register nobody needs may hold anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

Weights = tuple[float, ...]


class RowLike(Protocol):
    """The columns of a row, as `thg_engine.plan.Row` has them (meaning and formulas there)."""

    @property
    def evaluates_both(self) -> bool: ...
    @property
    def updates_hare(self) -> bool: ...
    @property
    def guidance_weight(self) -> float: ...
    @property
    def delta_weights(self) -> Weights: ...
    @property
    def cond_change_weights(self) -> Weights: ...
    @property
    def sample_weights(self) -> Weights: ...
    @property
    def guided_weights(self) -> Weights: ...
    @property
    def cond_weights(self) -> Weights: ...
    @property
    def step_delta_weights(self) -> Weights: ...
    @property
    def hare_weights(self) -> Weights: ...
    @property
    def hare_sample_update(self) -> Weights: ...
    @property
    def hare_delta_update(self) -> Weights: ...
    @property
    def noise_weight(self) -> float: ...


@dataclass
class Registers:
    """State of one run: past values, newest first, all of the latent's shape and one dtype.

    Attributes:
        samples: X_0 (the current sample), X_1, ...
        depths: how many entries of "X", "C", "D", "E", "H" the plan reads; older ones are dropped.
    """

    samples: list[Tensor]
    depths: Mapping[str, int]
    conds: list[Tensor] = field(default_factory=list)
    deltas: list[Tensor] = field(default_factory=list)
    guided: list[Tensor] = field(default_factory=list)
    hares: list[Tensor] = field(default_factory=list)

    def push(self, register: str, value: Tensor) -> None:
        """Shift ``value`` into a register, keeping as many entries as the plan reads."""
        names = {"X": "samples", "C": "conds", "D": "deltas", "E": "guided", "H": "hares"}
        stack: list[Tensor] = getattr(self, names[register])
        stack.insert(0, value)
        # The current sample is the result of a step even where no row reads it.
        del stack[max(self.depths[register], int(register == "X")) :]


def step_update(
    registers: Registers,
    row: RowLike,
    cond: Tensor,
    uncond: Tensor | None,
    noise: Tensor | None = None,
) -> Tensor:
    """Run one row; returns the next sample, which is also the registers' new X_0.

    Args:
        registers: state; changed in place.
        row: the coefficients.
        cond: denoiser output for the condition, shape of the latent, any float dtype.
        uncond: unconditional output; exactly where ``row.evaluates_both``.
        noise: unit Gaussian z, shape of the latent; where ``row.noise_weight`` is not 0.
    Raises:
        ValueError: an input is missing, superfluous or of another shape; no register has changed.
    """
    _check_inputs(registers, row, cond, uncond, noise)
    dtype = registers.samples[0].dtype
    # A denoiser may write every call into the same buffer, so registers hold copies.
    cond = cond.to(dtype, copy=True)
    registers.push("C", cond)
    if uncond is not None:
        registers.push("D", cond - uncond.to(dtype))
    if row.updates_hare:
        previous = (row.hare_sample_update, registers.hares)
        deltas = (row.hare_delta_update, registers.deltas)
        registers.push("H", _combine(previous, deltas, like=cond))
    if registers.depths["E"]:
        registers.push("E", _guided_output(registers, row, cond, uncond))
    x_next = _next_sample(registers, row)
    if row.noise_weight != 0.0 and noise is not None:
        x_next = x_next + row.noise_weight * noise.to(dtype)
    registers.push("X", x_next)
    return x_next


def _check_inputs(
    registers: Registers, row: RowLike, cond: Tensor, uncond: Tensor | None, noise: Tensor | None
) -> None:
    if (uncond is not None) != row.evaluates_both:
        given = "no uncond" if uncond is None else "uncond"
        raise ValueError(f"{given} for a row with evaluates_both={row.evaluates_both}.")
    if noise is None and row.noise_weight != 0.0:
        raise ValueError(f"no noise for a row with noise_weight={row.noise_weight!r}.")
    shape = registers.samples[0].shape
    for name, value in (("cond", cond), ("uncond", uncond), ("noise", noise)):
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} of shape {tuple(value.shape)}: give {tuple(shape)}.")


def _next_sample(registers: Registers, row: RowLike) -> Tensor:
    """The solver's update without its noise."""
    return _combine(
        (row.sample_weights, registers.samples),
        (row.guided_weights, registers.guided),
        (row.cond_weights, registers.conds),
        (row.step_delta_weights, registers.deltas),
        (row.hare_weights, registers.hares),
        like=registers.samples[0],
    )


def _guided_output(
    registers: Registers, row: RowLike, cond: Tensor, uncond: Tensor | None
) -> Tensor:
    """E_0 = c + g delta_hat; the conditional output itself where g is 0."""
    if row.guidance_weight == 0.0:
        return cond
    if uncond is not None:
        return cond + row.guidance_weight * (cond - uncond.to(cond.dtype))
    weights = row.cond_change_weights
    # c - C_k is formed first, because the two are close.
    pairs = zip(weights, registers.conds[1:], strict=False)
    changes = [cond - past if weight else cond for weight, past in pairs]
    delta = _combine((row.delta_weights, registers.deltas), (weights, changes), like=cond)
    return cond + row.guidance_weight * delta


def _combine(*columns: tuple[Sequence[float], Sequence[Tensor]], like: Tensor) -> Tensor:
    """sum over columns and ages of weight * value; entries of weight 0 are not read."""
    total: Tensor | None = None
    for weights, values in columns:
        for age, weight in enumerate(weights):
            if weight != 0.0:
                term = weight * values[age]
                total = term if total is None else total + term
    return torch.zeros_like(like) if total is None else total
