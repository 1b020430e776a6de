"""Measures methods: errors to the converged solution, to full guidance's images, NFE, seconds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from .box import Box
from .methods import CFG_NAME, Method, plain
from .metrics import psnr, relative_error

REFERENCE_SOLVER = "dpmpp2m"


@dataclass(frozen=True)
class Measurement:
    """One method on one seed: means over its prompts.

    Attributes:
        key: of the method.
        scale: w.
        seed: of the noise.
        nfe: rows through the denoiser per image.
        seconds: of the pipeline call per image, from prompts to latents.
        psnr_to_converged, psnr_to_same_n: dB, mean over images; the latter None of CFG itself.
        rel_error: of the latents.
    """

    key: str
    scale: float
    seed: int
    nfe: float
    seconds: float
    psnr_to_converged: float
    psnr_to_same_n: float | None
    rel_error: float

    def document(self) -> dict[str, object]:
        """JSON-able."""
        return asdict(self)


@dataclass(frozen=True)
class Output:
    """What one run of a method gave."""

    latents: Tensor
    nfe: float
    seconds: float


def run(
    box: Box, method: Method, prompts: Sequence[str], noise: Tensor, guidance_scale: float
) -> Output:
    """Prepare the pipeline, call it once, count and time the call, and undo everything.

    A compiled pipeline makes its plan in the first call of a length and keeps it; the user who
    compiles once pays that once, so that a call with one image goes before the clock starts.
    """
    with method.prepared(box) as call, box.counted() as rows:
        if "thg" in vars(box.pipe):
            call(prompts[:1], noise[:1], guidance_scale)
            rows[0] = 0
        start = time.perf_counter()
        latents = call(prompts, noise, guidance_scale)
        seconds = time.perf_counter() - start
    return Output(latents, rows[0] / len(noise), seconds / len(noise))


class Bench:
    """One pipeline, scale, and seed: the same prompts and noise for every method."""

    def __init__(
        self, box: Box, prompts: Sequence[str], scale: float, seed: int, reference_steps: int
    ) -> None:
        self.box, self.prompts, self.scale, self.seed = box, list(prompts), scale, seed
        self.noise = box.noise(len(prompts), seed)
        self.reference_steps = reference_steps
        self._reference: tuple[Tensor, Tensor] | None = None
        self._stock: dict[tuple[str, int], Tensor] = {}

    @property
    def reference(self) -> tuple[Tensor, Tensor]:
        """Latents and images of the converged solution; computed when first asked for."""
        if self._reference is None:
            method = Method(CFG_NAME, REFERENCE_SOLVER, self.reference_steps, plain)
            latents = self._run(method).latents
            self._reference = latents, self.box.decode(latents)
        return self._reference

    def measure(self, method: Method) -> Measurement:
        """Run ``method`` once and compare."""
        converged, pictures = self.reference
        same_n = None if method.full_guidance else self._stock_images(method)
        output = self._run(method)
        images = self.box.decode(output.latents)
        if method.full_guidance:
            self._stock[method.solver, method.num_steps] = images
        return Measurement(
            key=method.key,
            scale=self.scale,
            seed=self.seed,
            nfe=output.nfe,
            seconds=output.seconds,
            psnr_to_converged=statistics.fmean(psnr(images, pictures)),
            psnr_to_same_n=None if same_n is None else statistics.fmean(psnr(images, same_n)),
            rel_error=statistics.fmean(relative_error(output.latents, converged)),
        )

    def _run(self, method: Method) -> Output:
        return run(self.box, method, self.prompts, self.noise, self.scale)

    def _stock_images(self, method: Method) -> Tensor:
        """Full guidance's images with the same solver and N; run again if resumed without them."""
        key = method.solver, method.num_steps
        if key not in self._stock:
            latents = self._run(Method(CFG_NAME, *key, plain)).latents
            self._stock[key] = self.box.decode(latents)
        return self._stock[key]


@torch.no_grad()
def measure_c2(box: Box, prompts: Sequence[str], repeats: int = 15) -> float:
    """Time of the denoiser on a doubled batch over that on a single one; medians, alternating.

    What the pipeline gives it at the first step of a short run is what it is timed on.
    """
    given: list[tuple[tuple[object, ...], dict[str, object]]] = []
    handle = box.denoiser.register_forward_pre_hook(
        lambda _module, args, kwargs: given.append((args, kwargs)), with_kwargs=True
    )
    try:
        run(box, Method("c2", REFERENCE_SOLVER, 2, plain), prompts, box.noise(len(prompts), 0), 2.0)
    finally:
        handle.remove()
    args, kwargs = given[0]
    rows = 2 * len(prompts)

    def half(value: object) -> object:
        batched = isinstance(value, Tensor) and value.ndim and value.shape[0] == rows
        return value[: len(prompts)] if batched and isinstance(value, Tensor) else value

    halves = tuple(map(half, args)), {key: half(value) for key, value in kwargs.items()}
    times: dict[bool, list[float]] = {True: [], False: []}
    for i in range(repeats + 1):
        for doubled, (positional, named) in ((True, (args, kwargs)), (False, halves)):
            start = time.perf_counter()
            box.denoiser(*positional, **named)
            if i:  # the first round warms up
                times[doubled].append(time.perf_counter() - start)
    return statistics.median(times[True]) / statistics.median(times[False])


Progress = Callable[[str], None]
"""Told what is done next, once per unit of work."""
