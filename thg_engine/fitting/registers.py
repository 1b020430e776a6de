"""Rows of a plan on plain tensors: what fitting measures errors with, besides no kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from torch import Tensor

from ..plan import Row


@dataclass
class Registers:
    """X, C, D, E and S of one batch, newest first, all in the dtype of the samples.

    Attributes:
        samples, conds, deltas, guided, states: see `thg_engine.plan`.
    """

    samples: list[Tensor]
    conds: list[Tensor] = field(default_factory=list)
    deltas: list[Tensor] = field(default_factory=list)
    guided: list[Tensor] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)

    def copy(self) -> Registers:
        """The same values; what happens to one of both does not to the other."""
        return Registers(*(list(getattr(self, each.name)) for each in fields(self)))

    def observe(self, row: Row, cond: Tensor, uncond: Tensor | None) -> None:
        """Take in the denoiser's outputs of ``row``: C, D and E shift.

        Args:
            row: what is being run.
            cond: the conditional output, any floating dtype.
            uncond: the unconditional one; None where the row does not evaluate it.
        """
        wide = self.samples[0].dtype
        cond = cond.to(wide)
        if row.evaluates_both and uncond is not None:
            self.deltas.insert(0, cond - uncond.to(wide))
            delta = self.deltas[0]
        else:
            delta = _sum(cond, (row.delta_weights, self.deltas))
            for weight, past in zip(row.cond_change_weights, self.conds, strict=False):
                delta = delta + weight * (cond - past)
        self.conds.insert(0, cond)
        self.guided.insert(0, cond + row.guidance_weight * delta)

    def following(self, row: Row) -> Tensor:
        """The next sample of ``row``, whose outputs have been observed; S shifts, X does not."""
        if row.updates_state:
            updates = (row.state_update, self.states), (row.state_delta_update, self.deltas)
            more = (row.state_sample_update, self.samples), (row.state_guided_update, self.guided)
            self.states.insert(0, _sum(self.samples[0], *updates, *more))
        steps = (row.sample_weights, self.samples), (row.guided_weights, self.guided)
        outputs = (row.cond_weights, self.conds), (row.step_delta_weights, self.deltas)
        return _sum(self.samples[0], *steps, *outputs, (row.state_weights, self.states))

    def push(self, sample: Tensor, depth: int) -> None:
        """Make ``sample`` the current one and forget what is older than ``depth``."""
        self.samples.insert(0, sample)
        for register in (self.samples, self.conds, self.deltas, self.guided, self.states):
            del register[depth:]


def _sum(like: Tensor, *columns: tuple[Sequence[float], list[Tensor]]) -> Tensor:
    """sum_k weight_k value_k over all columns."""
    total = like.new_zeros(like.shape)
    for weights, values in columns:
        for weight, value in zip(weights, values, strict=False):
            if weight != 0.0:
                total = total.add(value, alpha=weight)
    return total
