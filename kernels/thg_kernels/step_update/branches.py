"""Where the branches of each sample stand in a batch of denoiser rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from ..errors import InvalidInput


@dataclass(frozen=True)
class BranchRows:
    """Denoiser rows of B samples; -1 stands for a branch that is not there.

    Attributes:
        cond: per sample the row of its conditional branch; -1 leaves the sample out of the step.
        uncond: per sample the row of its unconditional branch.
    Raises:
        InvalidInput: lengths that differ, a number below -1, one row for two branches.
    """

    cond: tuple[int, ...]
    uncond: tuple[int, ...]
    _tensors: dict[torch.device, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("cond", "uncond"):
            rows: Sequence[int] = getattr(self, name)
            if not isinstance(rows, Sequence):
                raise InvalidInput(name, rows, "give one row number per sample.")
            for row in rows:
                if isinstance(row, bool) or not isinstance(row, int) or row < -1:
                    raise InvalidInput(name, row, "give row numbers from 0, or -1 for none.")
            object.__setattr__(self, name, tuple(rows))
        if len(self.cond) != len(self.uncond):
            remedy = f"cond names {len(self.cond)} samples; give as many."
            raise InvalidInput("uncond", self.uncond, remedy)
        used = [row for row in (*self.cond, *self.uncond) if row >= 0]
        if len(set(used)) < len(used):
            remedy = "every branch needs a row of its own."
            raise InvalidInput("cond + uncond", (self.cond, self.uncond), remedy)

    @classmethod
    def both(cls, batch: int) -> BranchRows:
        """Diffusers' order: the unconditional half first."""
        return _both(batch)

    @classmethod
    def cond_only(cls, batch: int) -> BranchRows:
        """The conditional branch alone."""
        return _cond_only(batch)

    @property
    def batch(self) -> int:
        """B."""
        return len(self.cond)

    @cached_property
    def num_rows(self) -> int:
        """Rows that a batch must have to hold them all."""
        return max((*self.cond, *self.uncond), default=-1) + 1

    def tensor(self, device: torch.device) -> Tensor:
        """int32, shape ``(2, B)``: cond, uncond; made once per device."""
        found = self._tensors.get(device)
        if found is None:
            rows = [self.cond, self.uncond]
            found = torch.tensor(rows, dtype=torch.int32, device=device)
            # A tracer's fake must not outlive its trace.
            if type(found) is Tensor:
                self._tensors[device] = found
        return found


# Kept, because a loop asks for them in every step and each holds its tensors.
@lru_cache(maxsize=64)
def _both(batch: int) -> BranchRows:
    return BranchRows(tuple(range(batch, 2 * batch)), tuple(range(batch)))


@lru_cache(maxsize=64)
def _cond_only(batch: int) -> BranchRows:
    return BranchRows(tuple(range(batch)), (-1,) * batch)
