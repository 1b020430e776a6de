"""Distance between two sets of features, and what the features of the box are.

References:
    Jayasumana et al. 2024, arXiv 2401.09603 (CMMD: this distance on CLIP embeddings);
    Gretton et al. 2012, JMLR 13, eq. 5 (the biased estimate of the squared MMD).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..demo.classifier import DemoClassifier

SIGMA, SCALE = 10.0, 1000.0


def kernel_mean(x: Tensor, y: Tensor, sigma: float = SIGMA, block: int = 2048) -> float:
    """Mean of exp(-|x_i - y_j|^2 / (2 sigma^2)) over all pairs.

    Args:
        x, y: features ``(n, d)`` and ``(m, d)``.
        sigma: width of the Gaussian kernel.
        block: rows of ``x`` at a time: 30,000 against 30,000 would take gigabytes.
    """
    x, y = x.double(), y.double()
    squares, total = y.square().sum(1), 0.0
    for rows in torch.split(x, block):
        gaps = rows.square().sum(1, keepdim=True) + squares - 2 * rows @ y.T
        total += torch.exp(-gaps / (2 * sigma**2)).sum().item()
    return total / (len(x) * len(y))


def mmd(x: Tensor, y: Tensor, sigma: float = SIGMA, scale: float = SCALE) -> float:
    """Squared maximum mean discrepancy of ``x`` ``(n, d)`` and ``y`` ``(m, d)``, times ``scale``.

    The biased estimate, as CMMD takes it: at least 0, and 0 for equal sets.
    """
    cross = kernel_mean(x, y, sigma)
    return scale * (kernel_mean(x, x, sigma) + kernel_mean(y, y, sigma) - 2 * cross)


class ClassifierFeatures(torch.nn.Module):
    """The boxed classifier's features in the form that torchmetrics asks for."""

    def __init__(self, judge: DemoClassifier) -> None:
        super().__init__()
        self.judge = judge
        self.num_features: int = judge.class_head.in_features

    def forward(self, images: Tensor) -> Tensor:
        """Features ``(B, 64)`` of images ``(B, 3, 32, 32)``, uint8."""
        return self.judge.features(images.float() / 255)
