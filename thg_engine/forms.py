r"""Linear forms of a scheduler's samples, and the rows that explain them.

A run in which the initial sample, every model output, every noise draw and every edit between two
steps is its own unit vector shows each sample as an explicit linear form of all of them. Row i is
then a least-squares fit of sample i + 1 by the outputs and the samples of the last few rows; the
shortest window that reproduces every form is the table.

The edits matter where a scheduler remembers more than it is told: the corrected sample of a
predictor-corrector is no combination of a few samples that have been edited since. It is found
among the scheduler's own attributes and becomes a state S of the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .schedule import model_timesteps
from .scheduler_run import NoiseMode, NotLinear, SchedulerRun, on_cpu
from .table import SolverRow

FIT_TOLERANCE = 1e-10  # misfit of a linear form, relative to its norm, that counts as reproduced
MAX_WINDOW = 16  # outputs or samples; PNDM's Runge-Kutta warm-up needs most of it
_DRAWS_PER_ROW = 3  # room in the basis; CogVideoX' DPM draws twice and uses one

Float64s = NDArray[np.float64]


@dataclass
class Forms:
    """Linear forms in the basis [x_T, E_0 .. E_{R-1}, noise draws, edits], host float64.

    Attributes:
        given: sample that each row is given, shape ``(R, D)``.
        made: sample that it makes, shape ``(R, D)``.
        states: by name, what the scheduler keeps after each row, shape ``(R, D)``.
        noises: basis indices of the noise drawn in each row, and ``noise_dtypes``: "model" where
            it is drawn in the dtype of the model output; empty for noise of another source.
        scales: input scale of each row.
    """

    given: Float64s
    made: Float64s
    states: dict[str, Float64s] = field(default_factory=dict)
    noises: list[tuple[int, ...]] = field(default_factory=list)
    noise_dtypes: list[tuple[str, ...]] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)


def unroll(scheduler: Any, start: int, step_kwargs: Mapping[str, Any], edits: bool) -> Forms:
    """Forms of all samples: a run in float64 with every input a unit vector.

    Args:
        scheduler: a copy that may be run; its timesteps are set.
        start: first model call.
        step_kwargs: further arguments of ``step``.
        edits: whether something is added to every sample between two steps.
    Raises:
        NotLinear: the reason why there are none.
    """
    rows = len(model_timesteps(scheduler)) - start
    edited_from = 1 + rows * (1 + _DRAWS_PER_ROW)
    size = edited_from + rows * edits
    noise = _Draws(1 + rows, rows * _DRAWS_PER_ROW, size)
    run = SchedulerRun(scheduler, start, step_kwargs)
    x = _unit(0, size)
    given, made, kept = [], [], []
    forms = Forms(np.empty(0), np.empty(0))
    with torch.no_grad(), on_cpu(), NoiseMode(noise, wide=True):
        for i in range(rows):
            if edits and i:
                x = x + _unit(edited_from + i, size)
            given.append(x)
            forms.scales.append(_ratio(run.scaled(i, x), x))
            x = run.step(i, _unit(1 + i, size), x)
            drawn, dtypes = noise.taken()
            forms.noises.append(drawn)
            forms.noise_dtypes.append(() if run.intervals else dtypes)
            if x.shape != given[0].shape:
                raise NotLinear("it changes the shape of the sample")
            if not torch.isfinite(x).all():
                raise NotLinear(f"row {start + i} has coefficients that are not finite")
            made.append(x)
            kept.append(_attributes(scheduler, x.shape))
    forms.given, forms.made = _matrix(given), _matrix(made)
    common = set.intersection(*map(set, kept)) if edits else set()
    forms.states = {name: _matrix([state[name] for state in kept]) for name in sorted(common)}
    return forms


class _Draws:
    """Unit vectors in place of noise, from basis index ``first`` on, at most ``most``."""

    def __init__(self, first: int, most: int, size: int) -> None:
        self.following, self.end, self.size = first, first + most, size
        self._indices: list[int] = []
        self._dtypes: list[str] = []

    def __call__(self, shape: Sequence[int], dtype: torch.dtype | None) -> torch.Tensor:
        if tuple(shape) != (1, 1, 1, self.size):
            raise NotLinear(f"it draws noise of shape {tuple(shape)}, not of its sample")
        if self.following == self.end:
            raise NotLinear(f"it draws more than {_DRAWS_PER_ROW} noises a step")
        self._indices.append(self.following)
        self._dtypes.append("float32" if dtype is torch.float32 else "model")
        self.following += 1
        return _unit(self._indices[-1], self.size)

    def taken(self) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Indices and dtypes drawn since the last time."""
        taken = tuple(self._indices), tuple(self._dtypes)
        self._indices.clear()
        self._dtypes.clear()
        return taken


def _unit(index: int, size: int) -> torch.Tensor:
    vector = torch.zeros((1, 1, 1, size), dtype=torch.float64)
    vector[..., index] = 1.0
    return vector


def _matrix(forms: Sequence[torch.Tensor]) -> Float64s:
    matrix: Float64s = torch.stack([form.double() for form in forms]).flatten(1).numpy()
    return matrix


def _attributes(scheduler: Any, shape: torch.Size) -> dict[str, torch.Tensor]:
    """What the scheduler keeps that looks like a sample."""
    return {
        name: value.clone()
        for name, value in vars(scheduler).items()
        if isinstance(value, torch.Tensor) and value.shape == shape
    }


def _ratio(scaled: torch.Tensor, sample: torch.Tensor) -> float:
    """The c with ``scaled == c * sample``."""
    scale = float((scaled * sample).sum() / (sample * sample).sum())
    if not torch.allclose(scaled, scale * sample, rtol=1e-9, atol=0.0):
        raise NotLinear("its scale_model_input does more than scale the sample")
    return scale


def fit_rows(forms: Forms, timesteps: Iterable[float]) -> tuple[SolverRow, ...]:
    """Rows of the smallest common window, with a state where that saves more than it takes.

    The window of the whole run is chosen first, because it is what a run keeps in memory; within it
    each row takes the fewest terms.
    """
    targets, noises = _without_noise(forms)
    found, most = None, 2 * MAX_WINDOW
    for state in (None, *forms.states.values()):
        window = _window(forms.given, targets, state, most)
        if window is not None:
            found, most = (window, state), sum(window) - 2
    if found is None:
        noisy = " (it may reuse the noise of earlier steps)" if any(map(len, forms.noises)) else ""
        raise NotLinear(f"no window of {MAX_WINDOW} past samples and outputs explains it{noisy}")
    weights = _fit(forms.given, targets, found[1], found[0])
    rows = zip(timesteps, forms.scales, noises, weights, strict=True)
    return tuple(SolverRow(float(t), scale, **z, **w) for t, scale, z, w in rows)


def _without_noise(forms: Forms) -> tuple[Float64s, list[dict[str, Any]]]:
    """The samples without the noise of their own row, and what `SolverRow` holds of that."""
    targets, noises = forms.made.copy(), []
    for i, drawn in enumerate(forms.noises):
        used = [d for d in drawn if targets[i, d] != 0.0]
        if len(used) > 1:
            raise NotLinear("it adds more than one noise in a step")
        weight = float(targets[i, used[0]]) if used else 0.0
        index = drawn.index(used[0]) if used else 0
        dtypes = forms.noise_dtypes[i]
        noises.append({"noise_weight": weight, "noise_draw": index, "noise_draws": dtypes})
        targets[i, used] = 0.0
    return targets, noises


Weights = dict[str, Any]
"""Columns of a `SolverRow` by name."""
Window = tuple[int, int]
"""Numbers of past outputs and of past samples."""
Solve = Callable[[int, int, int], Weights | None]


def _solves(given: Float64s, targets: Float64s, state: Float64s | None) -> tuple[Solve, ...]:
    """What has to be explained of a row, given its number and the window: the state, the sample."""

    def step(i: int, e: int, x: int) -> Weights | None:
        extra = [] if state is None else [state[i]]
        names = ("state_weights", "sample_weights", "output_weights")
        return _named(names, _solve(given, extra, targets[i], i, e, x))

    def update(i: int, e: int, x: int) -> Weights | None:
        if state is None:
            return {}
        extra = [state[i - 1]] if i else []
        names = ("state_update", "state_sample_update", "state_output_update")
        return _named(names, _solve(given, extra, state[i], i, e, x))

    return update, step


def _window(given: Float64s, targets: Float64s, state: Float64s | None, most: int) -> Window | None:
    """The smallest window, of at most ``most`` values, that explains every row."""
    sizes = range(1, min(MAX_WINDOW, len(targets)) + 1)
    windows = ((e, x) for e in sizes for x in sizes if e + x <= most)
    solves = _solves(given, targets, state)
    for window in sorted(windows, key=lambda w: (max(w), sum(w), w[1])):
        if all(solve(i, *window) is not None for i in range(len(targets)) for solve in solves):
            return window
    return None


def _fit(
    given: Float64s, targets: Float64s, state: Float64s | None, window: Window
) -> list[Weights]:
    """Weights of every row by the names of `SolverRow`, as few as explain it."""
    solves = _solves(given, targets, state)
    smaller = sorted(
        ((e, x) for e in range(window[0] + 1) for x in range(window[1] + 1)),
        key=lambda w: (sum(w), w[1]),
    )

    def best(solve: Solve, i: int) -> Weights:
        return next(found for w in smaller if (found := solve(i, *w)) is not None)

    return [
        {name: w for solve in solves for name, w in best(solve, i).items()}
        for i in range(len(targets))
    ]


def _named(names: Sequence[str], values: Any) -> Weights | None:
    return None if values is None else dict(zip(names, values, strict=True))


def _solve(
    given: Float64s, extra: Sequence[Float64s], target: Float64s, i: int, outputs: int, samples: int
) -> tuple[tuple[float, ...], ...] | None:
    """Weights of (extra, samples, outputs) in row i; None if they do not reproduce ``target``.

    Output k is the unit vector 1 + i - k, so its weight is read off after the others have been
    fitted on all other coordinates.
    """
    outputs, samples = min(outputs, i + 1), min(samples, i + 1)
    free = np.ones(len(target), dtype=bool)
    taken = [1 + i - k for k in range(outputs)]
    free[taken] = False
    past = np.array([*extra, *(given[i - k] for k in range(samples))])
    a = np.zeros(len(past))
    size = float(np.linalg.norm(target))
    if len(past):
        scale = np.linalg.norm(past, axis=1)
        columns = (past / scale[:, None]).T[free]
        a = np.linalg.lstsq(columns, target[free], rcond=1e-14)[0] / scale
        a[np.abs(a) * scale < 1e-15 * size] = 0.0  # rounding of an exact zero
    rest = target - a @ past if len(past) else target
    if np.linalg.norm(rest[free]) > FIT_TOLERANCE * size:
        return None
    b = rest[taken]
    b[np.abs(b) < 1e-15 * size] = 0.0
    first = tuple(a[: len(extra)].tolist())
    return first, tuple(a[len(extra) :].tolist()) or (0.0,), tuple(b.tolist()) or (0.0,)
