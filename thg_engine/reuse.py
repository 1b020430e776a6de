r"""Deltas between coarse points, extrapolated from the newest ones instead of held as they are.

With coordinates x_0 (newest), x_1, ... of the last coarse points, the delta of a row at x is the
value there of the polynomial through the held deltas D_k:

    delta(x) = sum_k w_k D_k,   w_k = prod_{j != k} (x - x_j) / (x_k - x_j)

of degree 0 (held, Algorithm 1), 1 or 2. Holding is of first order in the length of a span, a
polynomial of degree p of order p + 1. Damping takes a share s of the change that it foretells:
w_k <- (1 - s) [k = 0] + s w_k. Weights may be fitted to a model instead (`FittedWeights`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from .errors import InvalidArgument

DEGREES = {"hold": 0, "linear": 1, "quadratic": 2}
COORDINATES = ("time", "lambda", "row")
FALLBACK = "linear"
"""What stands in where fitted weights do not apply."""
RowWeights = tuple[tuple[float, ...], tuple[float, ...]]
"""w_k of held deltas and v_k of changes of the conditional output, in one row."""


@runtime_checkable
class FittedWeights(Protocol):
    """Weights that were fitted to a model, as `fitting.reuse.FittedReuse` is."""

    def grid_for(self, lambdas: Sequence[float]) -> tuple[int, ...] | None:
        """Coarse rows of the runs they were fitted to; None where this is another run."""

    def weights_for(
        self, lambdas: Sequence[float], coarse_rows: Sequence[int], guidance_scale: float
    ) -> tuple[RowWeights, ...] | str:
        """Weights of every row, or why there are none for this run."""


def check_reuse(reuse: object, along: object, damping: object) -> None:
    """Refuse what names no extrapolation."""
    if not isinstance(reuse, FittedWeights) and not (isinstance(reuse, str) and reuse in DEGREES):
        remedy = f"use one of {', '.join(DEGREES)}, or weights from thg_engine.fit_reuse."
        raise InvalidArgument("reuse", reuse, remedy)
    if along not in COORDINATES:
        raise InvalidArgument("along", along, f"use one of {', '.join(COORDINATES)}.")
    if isinstance(damping, bool) or not isinstance(damping, (int, float)) or not 0 <= damping <= 1:
        remedy = "give the share of the change that is taken over, in [0, 1]."
        raise InvalidArgument("damping", damping, remedy)


def coordinates(lambdas: Sequence[float], along: str) -> list[float]:
    """Coordinate of each row.

    Args:
        lambdas: half log-SNR of the rows.
        along: "time" is sigma / (alpha + sigma) = 1 / (1 + e^lambda), the time of a flow model and
            finite at both ends; "lambda" is half log-SNR; "row" counts rows, which is the training
            time of evenly spaced timesteps.
    """
    if along == "row":
        return [float(i) for i in range(len(lambdas))]
    if along == "lambda":
        return list(lambdas)
    # exp() of the negative magnitude alone: nothing overflows at pure noise or at the image.
    shares = [math.exp(-abs(value)) / (1.0 + math.exp(-abs(value))) for value in lambdas]
    return [s if value >= 0 else 1.0 - s for s, value in zip(shares, lambdas, strict=True)]


def weights(held: Sequence[float], at: float, degree: int, damping: float) -> tuple[float, ...]:
    """w_k for deltas held at coordinates ``held``, newest first; as many as the degree needs.

    Fewer where there are fewer, and where coordinates are not finite (pure noise has no half
    log-SNR) or coincide.
    """
    points: list[float] = []
    for x in held[: degree + 1]:
        if not math.isfinite(x) or x in points:
            break
        points.append(x)
    if len(points) < 2 or not math.isfinite(at):
        return (1.0,)
    found = []
    for k, x_k in enumerate(points):
        others = [x_j for j, x_j in enumerate(points) if j != k]
        lagrange = math.prod((at - x_j) / (x_k - x_j) for x_j in others)
        found.append((1.0 - damping) * (k == 0) + damping * lagrange)
    return tuple(found)
