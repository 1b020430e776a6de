"""One sampling step of one row: guidance, extrapolation, solver update with history."""

from .reference import Registers, RowLike, step_update

__all__ = ["Registers", "RowLike", "step_update"]
