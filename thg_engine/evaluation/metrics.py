"""Distances between images, latents and feature sets, in float64, and confidence intervals.

References:
    Heusel et al. 2017, arXiv 1706.08500 (Frechet distance between feature Gaussians).
    Binkowski et al. 2018, arXiv 1801.01401 (kernel distance: unbiased squared MMD, cubic kernel).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

MAX_PSNR = 100.0
"""dB; equal images have no finite PSNR, and JSON no infinity."""

# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom.
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)


def psnr(images: Tensor, references: Tensor) -> list[float]:
    """PSNR in dB of each image ``(B, 3, H, W)`` in [0, 1] to its reference, at most `MAX_PSNR`."""
    error = (images.double() - references.double()).square().flatten(1).mean(dim=1)
    return [min(MAX_PSNR, -10 * math.log10(max(e, 1e-300))) for e in error.tolist()]


def relative_error(latents: Tensor, references: Tensor) -> list[float]:
    """``||x - x*|| / ||x*||`` of each sample, batch first."""
    gap = (latents.double() - references.double()).flatten(1).norm(dim=1)
    return list((gap / references.double().flatten(1).norm(dim=1)).tolist())


def interval95(means: Sequence[float]) -> list[float] | None:
    """Student's 95 % interval of the mean of independent ``means``; None of fewer than two."""
    if len(means) < 2:
        return None
    dof = len(means) - 1
    quantile = _T[dof - 1] if dof <= len(_T) else 1.96 + 2.5 / dof
    half = quantile * statistics.stdev(means) / math.sqrt(len(means))
    middle = statistics.fmean(means)
    return [middle - half, middle + half]


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Frechet distance between the Gaussians of two feature sets ``(n, d)``.

    Biased upwards at small counts: compare at equal counts only, and with the floor.
    """
    first, second = first.double(), second.double()
    gap = (first.mean(0) - second.mean(0)).square().sum()
    one, two = torch.cov(first.T), torch.cov(second.T)
    values, vectors = torch.linalg.eigh(one)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # tr sqrt(one two), by the symmetric matrix that has the same eigenvalues.
    mixed = torch.linalg.eigvalsh(root @ two @ root).clamp(min=0).sqrt().sum()
    return float(gap + one.trace() + two.trace() - 2 * mixed)


def kernel_distance(first: Tensor, second: Tensor) -> float:
    """Unbiased squared MMD of two feature sets ``(n, d)``, kernel ``(x.y / d + 1)^3``."""
    first, second = first.double(), second.double()

    def within(x: Tensor) -> Tensor:
        gram = (x @ x.T / x.shape[1] + 1) ** 3
        return (gram.sum() - gram.diagonal().sum()) / (len(x) * (len(x) - 1))

    across = ((first @ second.T / first.shape[1] + 1) ** 3).mean()
    return float(within(first) + within(second) - 2 * across)
