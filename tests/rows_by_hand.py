"""A plan's rows written out on numpy arrays."""

from __future__ import annotations

import numpy as np

from thg_engine.plan import Row


class Plain:
    """A row's formula written out on numpy arrays; X to S are newest first and never cut."""

    def __init__(self, x: np.ndarray) -> None:
        self.X, self.C, self.D, self.E, self.S = [x], [], [], [], []

    def run(self, row: Row, c: np.ndarray, u: np.ndarray) -> None:
        if row.evaluates_both:
            delta = c - u
            self.D = [delta, *self.D]
        else:
            delta = sum((w * d for w, d in zip(row.delta_weights, self.D, strict=False)), 0 * c)
            pairs = zip(row.cond_change_weights, self.C, strict=False)
            delta = delta + sum(v * (c - past) for v, past in pairs)
        self.C, self.E = [c, *self.C], [c + row.guidance_weight * delta, *self.E]

        def total(*columns):
            return sum(w * v for ws, vs in columns for w, v in zip(ws, vs, strict=False)) + 0 * c

        if row.updates_state:
            state = total(
                (row.state_update, self.S),
                (row.state_delta_update, self.D),
                (row.state_sample_update, self.X),
                (row.state_guided_update, self.E),
            )
            self.S = [state, *self.S]
        x = total(
            (row.sample_weights, self.X),
            (row.guided_weights, self.E),
            (row.cond_weights, self.C),
            (row.step_delta_weights, self.D),
            (row.state_weights, self.S),
        )
        self.X = [x, *self.X]
