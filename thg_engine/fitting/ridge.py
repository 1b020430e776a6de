r"""Ridge regression on a few features of huge vectors, with cross-validation over prompts.

    min_b  sum_n |y_n - F_n b|^2 + mu sum_k (s_k b_k)^2,     s_k^2 = sum_n |F_n,k|^2

Only inner products enter, k x k of them per sample: they are summed over batches and processes, and
leaving samples out is a difference of sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PENALTIES = (1e-10, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
MAX_FOLDS = 6


@dataclass
class Products:
    """Inner products of some samples, float64.

    Attributes:
        gram: F^T F, shape ``(B, k, k)``.
        moment: F^T y, shape ``(B, k)``.
        energy: y^T y, shape ``(B,)``.
        prompts: index of each sample's prompt, shape ``(B,)``; -1: one of its own.
    """

    gram: Tensor
    moment: Tensor
    energy: Tensor
    prompts: Tensor

    @classmethod
    def of(cls, features: list[Tensor], target: Tensor, prompts: Sequence[int] = ()) -> Products:
        """Of features and target, each ``(B, ...)``; ``prompts`` as in `Batch`."""
        wide = torch.stack([f.flatten(1).double() for f in features], dim=1)
        y = target.flatten(1).double()
        moment = torch.einsum("bkn,bn->bk", wide, y)
        owners = torch.tensor(prompts or [-1] * len(y), dtype=y.dtype, device=y.device)
        return cls(wide @ wide.transpose(1, 2), moment, (y * y).sum(1), owners)

    @classmethod
    def joined(cls, parts: list[Products]) -> Products:
        """Of all samples of ``parts``."""
        return cls(
            torch.cat([part.gram for part in parts]),
            torch.cat([part.moment for part in parts]),
            torch.cat([part.energy for part in parts]),
            torch.cat([part.prompts for part in parts]),
        )

    def packed(self) -> Tensor:
        """All in one tensor ``(B, k * k + k + 2)``, for exchange between processes."""
        last = torch.stack([self.energy, self.prompts], dim=1)
        return torch.cat([self.gram.flatten(1), self.moment, last], dim=1)

    @classmethod
    def unpacked(cls, packed: Tensor, k: int) -> Products:
        """From `packed`."""
        gram, moment, last = torch.split(packed, [k * k, k, 2], dim=1)
        return cls(gram.reshape(-1, k, k), moment, last[:, 0], last[:, 1])

    def folds(self) -> Tensor:
        """The fold of each sample, at most `MAX_FOLDS`; a prompt's samples are in one."""
        own = -1.0 - torch.arange(len(self.prompts), device=self.prompts.device)
        owners = torch.where(self.prompts < 0, own, self.prompts)
        index: Tensor = torch.unique(owners, return_inverse=True)[1]
        return index % MAX_FOLDS


@dataclass(frozen=True)
class Fit:
    """What `cross_validated` found.

    Attributes:
        weights: b, one per feature; all zero where the fit did not help on samples left out.
        penalty: mu; infinite where it was refused.
        gain: squared error on samples left out over that without any correction, at most 1.
    """

    weights: tuple[float, ...]
    penalty: float
    gain: float


def cross_validated(products: Products) -> Fit:
    """The ridge fit with the penalty that predicts prompts left out best."""
    k = products.moment.shape[1]
    refused = Fit((0.0,) * k, float("inf"), 1.0)
    total = products.energy.sum()
    scale = products.gram.sum(0).diagonal().sqrt()
    folds = products.folds()
    if not folds.any() or not float(total) > 0.0:
        return refused
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    gram, moment = products.gram / scale[:, None] / scale, products.moment / scale
    errors = [_left_out(gram, moment, products.energy, folds, mu) for mu in PENALTIES]
    best = min(range(len(errors)), key=errors.__getitem__)
    gain = errors[best] / float(total)
    if not gain < 1.0:
        return refused
    weights = _solve(gram.sum(0), moment.sum(0), PENALTIES[best]) / scale
    return Fit(tuple(weights.tolist()), PENALTIES[best], gain)


def _left_out(gram: Tensor, moment: Tensor, energy: Tensor, folds: Tensor, mu: float) -> float:
    """Squared error on each fold of the fit to all the others."""
    error = 0.0
    for fold in range(int(folds.max()) + 1):
        out = folds == fold
        b = _solve(gram[~out].sum(0), moment[~out].sum(0), mu)
        error += float(energy[out].sum() - 2 * b @ moment[out].sum(0) + b @ gram[out].sum(0) @ b)
    return error


def _solve(gram: Tensor, moment: Tensor, mu: float) -> Tensor:
    # The trace is k where the features are scaled, whatever the number of samples left in.
    penalty = mu * torch.eye(len(moment), dtype=gram.dtype, device=gram.device)
    solution: Tensor = torch.linalg.solve(gram + penalty, moment)
    return solution
