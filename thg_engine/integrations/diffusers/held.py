"""Deltas and conditional outputs of past rows in plain torch, where no fused step keeps them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...guidance import GuidanceRow


class HeldGuidance:
    """What the rows of one run hold; as deep as any of ``rows`` reads."""

    def __init__(self, rows: Sequence[GuidanceRow] = ()) -> None:
        self._deltas: list[Tensor] = []
        self._conds: list[Tensor] = []
        self._depth = max((len(row.delta_weights) for row in rows), default=0)
        self._changes = max((len(row.cond_change_weights) for row in rows), default=0)

    def clear(self) -> None:
        """Forget everything."""
        self._deltas.clear()
        self._conds.clear()

    def is_short(self, row: GuidanceRow) -> bool:
        """Whether ``row`` reads more than there is."""
        short = len(self._deltas) < len(row.delta_weights)
        return short or len(self._conds) < len(row.cond_change_weights)

    def fresh(self, row: GuidanceRow, cond: Tensor, uncond: Tensor) -> Tensor:
        """The boosted delta of a row that evaluates both branches, float32; remembered."""
        # Differences of half-precision outputs are held in float32: w would amplify their rounding.
        delta = cond.float() - uncond.float()
        self._deltas.insert(0, delta)
        del self._deltas[self._depth :]
        self._remember(cond)
        return row.boost * delta

    def held(self, row: GuidanceRow, cond: Tensor) -> Tensor:
        """The boosted delta of a row that evaluates the conditional branch alone, float32."""
        delta = row.boost * self.reused(row, cond)
        self._remember(cond)
        return delta

    def reused(self, row: GuidanceRow, cond: Tensor) -> Tensor:
        """The same without its boost, for somebody who only looks; nothing is remembered."""
        delta = torch.zeros_like(cond, dtype=torch.float32)
        for weight, held in zip(row.delta_weights, self._deltas, strict=False):
            delta = delta + weight * held
        for weight, past in zip(row.cond_change_weights, self._conds, strict=False):
            delta = delta + weight * (cond.float() - past)
        return delta

    def _remember(self, cond: Tensor) -> None:
        if self._changes:
            # A copy: a captured graph overwrites its outputs in the next call.
            self._conds.insert(0, cond.to(torch.float32, copy=True))
        del self._conds[self._changes :]
