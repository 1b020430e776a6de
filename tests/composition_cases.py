"""What the tests of composition share: held guidance, and how close values must be."""

from __future__ import annotations

import torch

from thg_engine import THG

HELD, STEPS = THG(grid=2), 8


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-5) -> bool:
    return float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())
