"""Error curves with chosen shapes, for tests that need a calibration but no model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from thg_engine.curves import Calibration


def calibration(
    lambdas: Sequence[float], tortoise: Sequence[float], hare: Sequence[float], order: int = 1
) -> Calibration:
    """A calibration with these curves and plausible provenance."""
    return Calibration(
        model="test",
        fingerprint="0123456789abcdef",
        scheduler_family="vp/epsilon",
        solver="ddim" if order == 1 else "dpmpp2m",
        order=order,
        guidance_scale=7.5,
        num_steps=len(lambdas),
        num_prompts=3,
        prompts_sha256="0" * 64,
        date="2025-01-31",
        lambdas=tuple(lambdas),
        tortoise=tuple(tortoise),
        hare=tuple(hare),
    )


def random_calibration(seed: int, points: int = 12, order: int = 1) -> Calibration:
    """Rough curves over lambda in [-4, 4]; ratios from about 1 to about 100."""
    rng = np.random.default_rng(seed)
    lambdas = np.sort(rng.uniform(-4, 4, points))
    tortoise, hare = np.exp(rng.normal(2.5, 1, points)), np.exp(rng.normal(0, 0.7, points))
    return calibration(lambdas.tolist(), tortoise.tolist(), hare.tolist(), order)
