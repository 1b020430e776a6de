"""Methods that decide inside the denoiser's call what becomes of the unconditional branch.

The pipelines call their denoiser once per step on the batch ``(uncond; cond)``. A policy stands in
for its ``forward``, runs as many rows as it needs and hands back both halves, so that the
pipeline's own combination and scheduler go on unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

Run = Callable[[Tensor], Tensor]
"""Runs the denoiser on the chosen rows (indices into the batch ``(uncond; cond)``)."""


class Policy(Protocol):
    """Both halves of the output for one call."""

    def begin(self) -> None:
        """A new run of the pipeline begins."""

    def step(self, run: Run, pairs: int, timestep: float) -> Tensor:
        """Output ``(2 * pairs, ...)``, unconditional half first."""


@contextmanager
def installed(denoiser: Any, policy: Policy) -> Iterator[None]:
    """``denoiser`` under ``policy``; its ``forward`` is as before afterwards."""
    before = vars(denoiser).get("forward")
    original = denoiser.forward
    last = -1.0

    def forward(*args: Any, **kwargs: Any) -> tuple[Tensor]:
        nonlocal last
        sample = args[0] if args else kwargs["hidden_states"]
        rows = sample.shape[0]
        timestep = float(_timestep(args, kwargs))
        if timestep > last:  # time only falls within a run; Heun and PNDM repeat some
            policy.begin()
        last = timestep

        def run(index: Tensor) -> Tensor:
            chosen = [_rows(value, index, rows) for value in args]
            named = {key: _rows(value, index, rows) for key, value in kwargs.items()}
            output: Tensor = original(*chosen, **{**named, "return_dict": False})[0]
            return output

        return (policy.step(run, rows // 2, timestep),)

    # A new run is also one that starts at the same timestep as a run of one step ended at.
    denoiser.forward = forward
    try:
        yield
    finally:
        del denoiser.forward
        if before is not None:
            denoiser.forward = before


def _timestep(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    value = kwargs["timestep"] if "timestep" in kwargs else args[1]
    return torch.as_tensor(value).reshape(-1)[0]


def _rows(value: Any, index: Tensor, rows: int) -> Any:
    """The chosen rows of whatever has one per sample."""
    if isinstance(value, Tensor) and value.ndim and value.shape[0] == rows:
        return value[index]
    if isinstance(value, dict):
        return {key: _rows(inner, index, rows) for key, inner in value.items()}
    return value


@dataclass
class AdaptiveGuidance:
    """Full guidance until a step's cosine between both outputs exceeds ``gamma``; then none.

    From the step after, the conditional output alone is taken. Each image is decided by itself, as
    in the paper, where one is drawn at a time: of a batch, the unconditional rows of the images
    that are through are left out.

    Attributes:
        gamma: the paper's threshold, 0.991.

    Source: Castillo et al. 2023, arXiv 2312.12487, section 5 (AG).
    """

    gamma: float = 0.991
    cosines: list[Tensor] = field(default_factory=list)
    _guided: Tensor | None = None

    def begin(self) -> None:
        """All images guided."""
        self._guided = None
        self.cosines.clear()

    def step(self, run: Run, pairs: int, timestep: float) -> Tensor:
        """See `Policy.step`."""
        guided = torch.ones(pairs, dtype=torch.bool) if self._guided is None else self._guided
        wanted = guided.nonzero()[:, 0]
        output = run(torch.cat([wanted, pairs + torch.arange(pairs)]).to(guided.device))
        cond = output[len(wanted) :]
        uncond = cond.clone()
        uncond[wanted] = output[: len(wanted)]
        cosine = torch.cosine_similarity(cond.flatten(1), uncond.flatten(1), dim=1)
        self.cosines.append(cosine)
        self._guided = guided & ~(cosine.cpu() > self.gamma)
        return torch.cat([uncond, cond])


@dataclass
class FrequencyCache:
    """CFG-Cache with FFT: the low and high frequencies of ``uncond - cond`` are kept and amplified.

    Both branches run in the first ``start`` share of the calls and every ``interval``-th after it,
    as in `thg_engine.CFGCache`; in between the unconditional output is the conditional one plus the
    kept differences. Each skipped step multiplies the low ones by ``alpha`` while
    99 < t < 901 and the high ones while -1 < t < 301: weights and ranges of diffusers' FasterCache.

    Attributes:
        num_calls: model calls of a run.

    Source: Lv et al. 2024, arXiv 2410.19355, equations 9 to 11; ``diffusers.hooks.faster_cache``.
    """

    num_calls: int
    interval: int = 5
    start: float = 0.25
    alpha: float = 1.1
    low_range: tuple[float, float] = (99, 901)
    high_range: tuple[float, float] = (-1, 301)
    _call: int = 0
    _low: Tensor | None = None
    _high: Tensor | None = None

    def begin(self) -> None:
        """Nothing kept."""
        self._call, self._low, self._high = 0, None, None

    def step(self, run: Run, pairs: int, timestep: float) -> Tensor:
        """See `Policy.step`."""
        first = int(self.start * self.num_calls + 1e-9)
        fresh = self._call < first or (self._call - first) % self.interval == 0
        self._call += 1
        if fresh or self._low is None or self._high is None:
            output = run(torch.arange(2 * pairs))
            uncond, cond = output.chunk(2)
            low, high = split_frequencies(uncond - cond)
            self._low, self._high = low, high
            return output
        cond = run(pairs + torch.arange(pairs))
        if self.low_range[0] < timestep < self.low_range[1]:
            self._low = self._low * self.alpha
        if self.high_range[0] < timestep < self.high_range[1]:
            self._high = self._high * self.alpha
        spectrum = torch.fft.ifftshift(self._low + self._high, dim=(-2, -1))
        return torch.cat([cond + torch.fft.ifft2(spectrum).real.to(cond.dtype), cond])


def split_frequencies(x: Tensor) -> tuple[Tensor, Tensor]:
    """Shifted spectra of ``(B, C, H, W)`` inside and outside a circle of a fifth of the size."""
    spectrum = torch.fft.fftshift(torch.fft.fft2(x.float()), dim=(-2, -1))
    height, width = x.shape[-2:]
    down = torch.arange(height)[:, None] - height // 2
    across = torch.arange(width)[None, :] - width // 2
    inside = (down**2 + across**2 <= (min(height, width) // 5) ** 2).to(x.device)
    return spectrum * inside, spectrum * ~inside
