"""The zoo's pipelines run in stock diffusers, alike twice, and guidance shows."""

from __future__ import annotations

import pytest
import torch

import zoo_images  # noqa: F401  (they fill the registry)
import zoo_images2  # noqa: F401
import zoo_images3  # noqa: F401
from zoo import ZOO, arguments, build, call


def _entries() -> list:
    return [
        pytest.param(entry, id=name, marks=[pytest.mark.slow] if entry.slow else [])
        for name, entry in ZOO.items()
    ]


def _skip(entry) -> None:
    if entry.missing:
        pytest.skip(f"diffusers here has no {', '.join(entry.missing)}")


class Calls:
    """Counts the calls of a pipeline's denoisers."""

    def __init__(self, entry, pipe) -> None:
        self.count = 0
        nets = [getattr(pipe, name) for name in entry.denoiser.split(",")]
        self.handles = [net.register_forward_pre_hook(self._tick) for net in nets]

    def _tick(self, module, inputs) -> None:
        self.count += 1


@pytest.mark.parametrize("entry", _entries())
def test_stock_pipeline_runs(entry) -> None:
    _skip(entry)
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


@pytest.mark.parametrize("entry", _entries())
def test_entry_takes_what_it_promises(entry) -> None:
    """A batch, copies, another size and a callback, where the entry says so."""
    _skip(entry)
    pipe, seen = build(entry), []
    first = call(entry, pipe)
    if entry.other is not None:
        assert call(entry, pipe, **entry.other).shape != first.shape
    if entry.batch is not None:
        assert len(call(entry, pipe, **entry.batch)) == 2 * len(first)
    if entry.copies is not None:
        assert len(call(entry, pipe, **{entry.copies: 2})) == 2 * len(first)
    if entry.callbacks:
        hear = {"callback_on_step_end": lambda pipe, i, t, kwargs: seen.append(i) or kwargs}
        calls = Calls(entry, pipe)
        assert torch.equal(call(entry, pipe, **hear), first)
        assert seen == list(range(len(seen)))
        steps = len(seen) * (2 if entry.pattern == "calls" else 1)
        assert calls.count > steps if entry.pattern == "skip-layer" else calls.count == steps
