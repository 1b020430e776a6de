"""The zoo's pipelines run in stock diffusers, alike twice, and guidance shows."""

from __future__ import annotations

import pytest
import torch

import zoo_images  # noqa: F401  (fills the registry)
from zoo import ZOO, arguments, build, call


def _entries() -> list:
    return [
        pytest.param(entry, id=name, marks=[pytest.mark.slow] if entry.slow else [])
        for name, entry in ZOO.items()
    ]


@pytest.mark.parametrize("entry", _entries())
def test_stock_pipeline_runs(entry) -> None:
    if entry.missing:
        pytest.skip(f"this diffusers has no {', '.join(entry.missing)}")
    pipe = build(entry)
    first = call(entry, pipe)
    assert torch.isfinite(first).all()
    assert first.float().std() > 1e-3
    assert torch.equal(call(entry, pipe), first)
    if entry.guided and entry.scale is not None:
        scale = arguments(entry)[entry.scale]
        other = call(entry, pipe, **{entry.scale: scale / 2 + 0.75})
        moved = (other - first).float().norm() / first.float().norm()
        assert moved > 1e-3, f"guidance moves the result by {float(moved):.1e} only"
