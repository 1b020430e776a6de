"""The zoo's pipelines run in stock diffusers, alike twice, and guide as their entries say."""

from __future__ import annotations

import pytest
import torch

import zoo_all  # noqa: F401  (it fills the registry)
from zoo import ZOO, Zoo, arguments, build, call

# What "you passed two prompts and one image" says is meant here.
pytestmark = pytest.mark.filterwarnings("ignore:You have passed", "ignore:.*is deprecated")
CALLS = {"concat": 1, "concat-reversed": 1, "calls": 2, "three": 1, "none": 1}
ROWS = {"concat": 2, "concat-reversed": 2, "calls": 1, "three": 3, "none": 1}
HALVES = ("concat", "concat-reversed", "calls")
# c + s (c - u): no scale above 1 leaves the conditional branch alone.
ANCHORED = ("ZImage", "Kandinsky3", "Krea2", "Cosmos")
TWO_SCALES = ("lucy_edit_two_experts",)


def _entries(patterns: tuple[str, ...] = ()) -> list:
    return [
        pytest.param(entry, id=name, marks=[pytest.mark.slow] if entry.slow else [])
        for name, entry in ZOO.items()
        if entry.make.__module__.startswith(("zoo_images", "zoo_calls"))
        and (not patterns or (entry.pattern in patterns and entry.scale))
        and (not patterns or not entry.cls.startswith(ANCHORED))
        and (not patterns or name not in TWO_SCALES)
    ]


def _pipe(entry: Zoo):
    if entry.missing:
        pytest.skip(f"diffusers here has no {', '.join(entry.missing)}")
    return build(entry)


class Calls:
    """Rows of each call of a pipeline's denoisers; with ``spoil`` 0 or 1 it zeroes that half."""

    def __init__(self, entry: Zoo, pipe, spoil: int | None = None) -> None:
        self.rows, self.spoil, self.pattern = [], spoil, entry.pattern
        nets = [getattr(pipe, name) for name in entry.denoiser.split(",")]
        self.handles = [net.register_forward_hook(self._see) for net in nets]

    def __enter__(self) -> Calls:
        return self

    def __exit__(self, *exc) -> None:
        for handle in self.handles:
            handle.remove()

    def _see(self, module, inputs, output) -> None:
        found = output if isinstance(output, torch.Tensor) else output[0]
        self.rows.append(len(found))
        if self.spoil is None:
            return
        if self.pattern == "calls":
            if len(self.rows) % 2 != self.spoil:
                found.zero_()
        else:
            found.chunk(2)[self.spoil].zero_()


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).float().norm() / other.float().norm())


@pytest.mark.parametrize("entry", _entries())
def test_stock_pipeline_runs(entry: Zoo) -> None:
    pipe = _pipe(entry)
    first = call(entry, pipe)
    assert torch.isfinite(first).all()
    assert first.float().std() > 1e-3
    assert torch.equal(call(entry, pipe), first)
    if entry.guided:
        moved = _distance(_less(entry, pipe), first)
        assert moved > 5e-3, f"guidance moves the result by {moved:.1e} only"


def _less(entry: Zoo, pipe) -> torch.Tensor:
    """The result with half of the guidance."""
    if entry.scale is not None:
        return call(entry, pipe, **{entry.scale: arguments(entry)[entry.scale] / 2 + 0.75})
    getattr(pipe, entry.guider).guidance_scale /= 2
    return call(entry, pipe)


@pytest.mark.parametrize("entry", _entries())
def test_entry_takes_what_it_promises(entry: Zoo) -> None:
    """A batch, copies, another size and a callback, where the entry says so."""
    pipe, seen = _pipe(entry), []
    first = call(entry, pipe)
    if entry.other is not None:
        assert call(entry, pipe, **entry.other).shape != first.shape
    if entry.batch is not None:
        assert len(call(entry, pipe, **entry.batch)) == 2 * len(first)
    if entry.copies is not None:
        assert len(call(entry, pipe, **{entry.copies: 2})) == 2 * len(first)
    if entry.callbacks:
        hear = {"callback_on_step_end": lambda pipe, i, t, kwargs: seen.append(i) or kwargs}
        assert torch.equal(call(entry, pipe, **hear), first)
        assert seen == list(range(len(seen)))


@pytest.mark.parametrize("entry", _entries())
def test_calls_are_of_the_pattern(entry: Zoo) -> None:
    pipe = _pipe(entry)
    with Calls(entry, pipe) as calls:
        call(entry, pipe)
    steps = getattr(pipe, "_num_timesteps", None) or len(pipe.scheduler.timesteps)
    regular = [ROWS.get(entry.pattern, 0)] * (steps * CALLS.get(entry.pattern, 0))
    assert calls.rows == (list(entry.rows) or regular)


@pytest.mark.parametrize("entry", _entries(HALVES))
def test_order_of_branches(entry: Zoo) -> None:
    """Just above scale 1 the result hangs on the conditional branch alone."""
    pipe, change = _pipe(entry), []
    near = {entry.scale: 1 + 1e-5}
    stock = call(entry, pipe, **near)
    for half in (0, 1):
        with Calls(entry, pipe, half):
            change.append(_distance(call(entry, pipe, **near), stock))
    cond = 1 if entry.pattern == "concat" else 0
    assert change[cond] > 1e-2 > 10 * change[1 - cond], change
