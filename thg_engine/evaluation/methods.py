"""Every method under comparison: how it changes a real pipeline, and how it is undone.

References: docs/evaluation.md lists each baseline with its source and what was set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import InvalidArgument
from ..guidance import FRESH, HELD, Guidance, GuidanceRow, resolve_row
from .box import Box
from .branches import AdaptiveGuidance, FrequencyCache, installed
from .solvers import build, frame

Change = Callable[[Box, int], AbstractContextManager[Any]]
"""Changes the box's pipeline, whose scheduler is set, for runs of that many steps."""


@dataclass(frozen=True)
class Method:
    """A point of a work-precision curve.

    Attributes:
        name: of the method, without solver and steps.
        solver: name in `solvers.SOLVERS`.
        num_steps: ``num_inference_steps`` of the call.
        change: what is done to the pipeline.
        ours: whether this package proposes it; a baseline otherwise.
        budget: NFE asked for, of a method that chooses its own steps; None of any other.
    """

    name: str
    solver: str
    num_steps: int
    change: Change
    ours: bool = False
    budget: int | None = None

    @property
    def key(self) -> str:
        """Identifies the point among those of one pipeline and guidance scale."""
        point = f"{self.name}/{self.solver}/{self.num_steps}"
        return point if self.budget is None else f"{point}/{self.budget}"

    @property
    def full_guidance(self) -> bool:
        """Whether this is plain CFG, the reference of its own solver and number of steps."""
        return self.name == CFG_NAME

    @contextmanager
    def prepared(self, box: Box) -> Iterator[Callable[..., torch.Tensor]]:
        """The pipeline under this method, as a function of prompts, noise and scale.

        Yields:
            ``call(prompts, noise, guidance_scale) -> latents``, all float32 of one shape.
        """
        with box.as_before(), torch.no_grad():
            box.pipe.scheduler = build(box.family, self.solver, box.pipe.scheduler.config)
            start, end = frame(box.pipe.scheduler, self.num_steps)
            with self.change(box, self.num_steps):

                def call(prompts: Sequence[str], noise: torch.Tensor, scale: float) -> torch.Tensor:
                    latents: torch.Tensor = box.pipe(
                        list(prompts),
                        num_inference_steps=self.num_steps,
                        guidance_scale=scale,
                        latents=noise * start,
                        output_type="latent",
                        **box.options,
                    ).images
                    return latents * end

                yield call


CFG_NAME = "CFG"


@dataclass(frozen=True)
class OneGate:
    """Both branches up to a gate; from there on the last delta is kept for all further rows.

    Attributes:
        gate: share (float in [0, 1]) or row (int) from which delta is kept; at least 1 row is
            fresh.

    Source: hao-ai-lab/FastVideo pull request 1372 (``FASTVIDEO_CFG_GATE_STEP``), taken over by
    sgl-project/sglang pull request 25848 (``SGLANG_DIFFUSION_CFG_GATE_STEP``).
    """

    gate: int | float = 0.5
    name: str = "one-gate"

    def __post_init__(self) -> None:
        resolve_row("gate", self.gate, 1)

    def rows(self, lambdas: Sequence[float], guidance_scale: float) -> tuple[GuidanceRow, ...]:
        """Fresh before the gate, held after it."""
        fresh = max(1, resolve_row("gate", self.gate, len(lambdas)))
        return (FRESH,) * fresh + (HELD,) * (len(lambdas) - fresh)


def plain(_box: Box, _num_steps: int) -> AbstractContextManager[None]:
    """The stock pipeline."""
    return nullcontext()


def guided(guidance: Guidance) -> Change:
    """Under `thg_engine.compile`; undone by the box."""

    def change(box: Box, _num_steps: int) -> AbstractContextManager[None]:
        from .. import compile

        compile(box.pipe, guidance)
        return nullcontext()

    return change


def adaptive(gamma: float = 0.991) -> Change:
    """Adaptive Guidance; see `branches.AdaptiveGuidance`."""

    def change(box: Box, _num_steps: int) -> AbstractContextManager[None]:
        return installed(box.denoiser, AdaptiveGuidance(gamma))

    return change


def frequency_cache(interval: int = 5, start: float = 0.25) -> Change:
    """CFG-Cache with FFT; see `branches.FrequencyCache`."""

    def change(box: Box, num_steps: int) -> AbstractContextManager[None]:
        return installed(box.denoiser, FrequencyCache(num_steps, interval, start))

    return change


def unique(methods: Sequence[Method]) -> list[Method]:
    """The methods, each once.

    Raises:
        InvalidArgument: two different ones share a key, and rows could not be told apart.
    """
    found: dict[str, Method] = {}
    for method in methods:
        earlier = found.setdefault(method.key, method)
        if earlier is not method:
            raise InvalidArgument("methods", method.key, "give methods names of their own.")
    return list(found.values())
