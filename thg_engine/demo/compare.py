"""The demo's comparison: full guidance against what the same images cost otherwise, in one run.

All methods share prompts, initial noise and guidance scale, and all but the fitted plans DDIM with
trailing timesteps: runs of every length start at the same noise level, and fewer steps means
nothing but fewer steps. Plans bring their own grid, and rows that were fitted to this very model on
other noise; a third of the captions were among those that they were made with. They begin and end
where the others do.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio
from tqdm import tqdm

from .. import compile, uncompile
from ..errors import CalibrationError, InvalidArgument
from ..fitting.shipped import shipped_front
from ..guidance import THG, CFGCache, Guidance
from .classifier import CLASSES, COLOURS, load_classifier
from .pipeline_loader import load_pipeline

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

NUM_STEPS = 50
BUDGET = 0.7
"""Share of full guidance that THG and what it is compared with may spend."""
PLANS = (40, 24)
"""Evaluations of the fitted plans, which need fewer."""


@dataclass(frozen=True)
class Settings:
    """What the demo runs.

    Attributes:
        images: how many prompts, one image each.
        batch_size: images at a time.
        guidance_scale: w.
        repeats: timed passes per method, interleaved; the median counts.
        seed: of the initial noise.
        reference_steps: steps of the converged solution.
    """

    images: int = 30
    batch_size: int = 30
    guidance_scale: float = 5.0
    repeats: int = 3
    seed: int = 0
    reference_steps: int = 200

    def __post_init__(self) -> None:
        for name in ("images", "batch_size", "repeats", "reference_steps"):
            if getattr(self, name) < 1:
                raise InvalidArgument(name, getattr(self, name), "give at least 1.")
        if not self.guidance_scale > 1:
            remedy = "there is nothing to compare without guidance; use a scale above 1."
            raise InvalidArgument("guidance_scale", self.guidance_scale, remedy)


@dataclass(frozen=True)
class Method:
    """A column of the picture.

    Attributes:
        label: its heading.
        num_steps: asked for.
        guidance: method; None: the stock pipeline, or a plan.
        plan_nfe: evaluations of the fitted plan that runs, which has steps of its own; 0: none.
    """

    label: str
    num_steps: int
    guidance: Guidance | None = None
    plan_nfe: int = 0


@dataclass
class Outcome:
    """What one method produced; images ``(B, 3, H, W)`` in [0, 1], latents ``(B, 4, h, w)``."""

    method: Method
    num_steps: int
    images: Tensor
    latents: Tensor
    nfe: int
    seconds: list[float] = field(default_factory=list)


def methods() -> tuple[Method, ...]:
    """The columns: full guidance, four ways to spend 70 % of its evaluations, fitted plans."""
    fewer = round(BUDGET * NUM_STEPS)
    return (
        Method("CFG", NUM_STEPS),
        Method("CFG, fewer steps", fewer),
        Method("CFG-Cache", NUM_STEPS, CFGCache()),
        Method("THG (b, i_hi)", NUM_STEPS, THG(nfe=BUDGET, boost=1.1, cutoff=0.76)),
        Method("THG", NUM_STEPS, THG(nfe=BUDGET)),
        *(Method(f"plan, nfe={nfe}", NUM_STEPS, plan_nfe=nfe) for nfe in PLANS),
    )


def prompts(count: int) -> tuple[list[str], Tensor, Tensor]:
    """Captions over all classes and colours, with their class and colour indices ``(count,)``."""
    classes = [i % len(CLASSES) for i in range(count)]
    colours = [(3 * i + i // len(CLASSES)) % len(COLOURS) for i in range(count)]
    words = [f"{COLOURS[c]} {CLASSES[k]}" for k, c in zip(classes, colours, strict=True)]
    captions = [f"a photo of {'an' if w[0] in 'aeiou' else 'a'} {w}" for w in words]
    return captions, torch.tensor(classes), torch.tensor(colours)


def compare(settings: Settings, progress: bool = True) -> dict[str, Any]:
    """Run every method; returns rows for the table under ``methods`` and images under ``sheet``.

    Each row has ``method``, ``num_steps``, ``nfe``, ``seconds_per_image`` (median), ``speedup``,
    ``c2``, ``psnr_to_cfg`` (dB, mean over images), ``rel_error_to_converged`` (of the latents, mean
    over images), ``accuracy`` (class), ``joint_accuracy`` (class and colour).
    """
    pipe = load_pipeline()
    pipe.scheduler = type(pipe.scheduler).from_config(
        pipe.scheduler.config, timestep_spacing="trailing"
    )
    captions, classes, colours = prompts(settings.images)
    runner = _Runner(pipe, captions, settings)
    # Beyond the scales that they were fitted at, plans would run unfitted rows.
    fitted = runner.plans.plans[0].covers(settings.guidance_scale)
    columns = [method for method in methods() if fitted or not method.plan_nfe]
    total = (len(columns) * settings.repeats + 1) * len(runner.batches)
    with tqdm(total=total, desc="demo", unit="batch", disable=not progress) as bar:
        runner.on_batch = bar.update
        converged = runner.converged()
        outcomes: dict[str, Outcome] = {}
        for _ in range(settings.repeats):
            for method in columns:
                outcome = runner.run(method)
                earlier = outcomes.get(method.label)
                outcome.seconds[:0] = [] if earlier is None else earlier.seconds
                outcomes[method.label] = outcome
    c2 = runner.measure_c2()
    rows = _score(list(outcomes.values()), converged, classes, colours, c2)
    return {"methods": rows, "sheet": _sheet(captions, outcomes), "c2": c2}


class _Runner:
    """Runs methods on one pipeline with the same prompts and noise."""

    def __init__(
        self, pipe: StableDiffusionPipeline, captions: Sequence[str], settings: Settings
    ) -> None:
        from ..integrations.diffusers.resolve import fingerprint

        self.pipe, self.settings = pipe, settings
        front = shipped_front(fingerprint(pipe.unet))
        if front is None:
            raise CalibrationError("the plans of the pipeline in the box are not there.")
        self.plans = front
        size = pipe.unet.config.sample_size
        generator = torch.Generator().manual_seed(settings.seed)
        noise = torch.randn(len(captions), 4, size, size, generator=generator)
        cuts = range(0, len(captions), settings.batch_size)
        step = settings.batch_size
        self.batches = [(list(captions[i : i + step]), noise[i : i + step]) for i in cuts]
        self.on_batch: Callable[[], Any] = lambda: None
        self.rows = 0
        # NFE is counted where the network begins, whatever the methods say of themselves.
        pipe.unet.conv_in.register_forward_hook(self._count)

    def _count(self, module: torch.nn.Module, inputs: Any, output: Tensor) -> None:
        self.rows += output.shape[0]

    def run(self, method: Method) -> Outcome:
        """All batches under ``method``, timed from prompt to pixels."""
        if method.plan_nfe:
            compile(self.pipe, calibration=self.plans, nfe=method.plan_nfe)
        elif method.guidance is not None:
            compile(self.pipe, method.guidance)
        try:
            parts, seconds, before = [], 0.0, self.rows
            for captions, noise in self.batches:
                start = time.perf_counter()
                parts.append(self._call(captions, noise, method.num_steps))
                seconds += time.perf_counter() - start
                self.on_batch()
            own = vars(self.pipe)["thg"].stats()["last_rows"] if method.plan_nfe else 0
        finally:
            uncompile(self.pipe)
        images, latents = (torch.cat(part) for part in zip(*parts, strict=True))
        nfe = (self.rows - before) // len(images)
        return Outcome(
            method, own or method.num_steps, images, latents, nfe, [seconds / len(images)]
        )

    def converged(self) -> Tensor:
        """Latents of many-step full guidance, DPM-Solver++ 2M over the same noise levels."""
        from diffusers import DPMSolverMultistepScheduler

        ddim = self.pipe.scheduler
        # sigma_min: DDIM ends at the first training noise level, not at zero noise.
        self.pipe.scheduler = DPMSolverMultistepScheduler.from_config(
            ddim.config, timestep_spacing="trailing", final_sigmas_type="sigma_min"
        )
        try:
            steps = self.settings.reference_steps
            parts = []
            for captions, noise in self.batches:
                parts.append(self._call(captions, noise, steps)[1])
                self.on_batch()
            return torch.cat(parts)
        finally:
            self.pipe.scheduler = ddim

    def measure_c2(self, repeats: int = 15) -> float:
        """Time of the UNet on a doubled batch over its time on a single one, median of each."""
        captions, noise = self.batches[0]
        embeds = self.pipe.encode_prompt(captions, "cpu", 1, False)[0]
        times: dict[int, list[float]] = {1: [], 2: []}
        with torch.no_grad():
            for i, copies in _alternating(repeats):
                x, context = torch.cat([noise] * copies), torch.cat([embeds] * copies)
                start = time.perf_counter()
                self.pipe.unet(x, 500, encoder_hidden_states=context)
                if i:  # the first round warms up
                    times[copies].append(time.perf_counter() - start)
        return statistics.median(times[2]) / statistics.median(times[1])

    def _call(self, captions: list[str], noise: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
        """(images, latents) of one batch."""
        kept: list[Tensor] = []

        def keep(_pipe: Any, _step: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            kept[:] = [tensors["latents"]]
            return {}

        images = self.pipe(
            captions,
            num_inference_steps=num_steps,
            guidance_scale=self.settings.guidance_scale,
            latents=noise.clone(),
            output_type="pt",
            callback_on_step_end=keep,
        ).images
        return images, kept[0]


def _alternating(repeats: int) -> Iterator[tuple[int, int]]:
    for i in range(repeats + 1):
        yield from ((i, 1), (i, 2))


def _score(
    outcomes: list[Outcome], converged: Tensor, classes: Tensor, colours: Tensor, c2: float
) -> list[dict[str, Any]]:
    """The table's rows; the first outcome is the one to compare with."""
    classifier = load_classifier()
    baseline = outcomes[0]
    rows = []
    for outcome in outcomes:
        with torch.no_grad():
            found_class, found_colour = (z.argmax(1) for z in classifier(outcome.images))
        gap = (outcome.latents - converged).flatten(1).norm(dim=1)
        psnr = None
        if outcome is not baseline:
            psnr = peak_signal_noise_ratio(
                outcome.images, baseline.images, data_range=(0.0, 1.0), dim=(1, 2, 3)
            ).item()
        right = found_class == classes
        seconds = statistics.median(outcome.seconds)
        rows.append(
            {
                "method": outcome.method.label,
                "num_steps": outcome.num_steps,
                "nfe": outcome.nfe,
                "seconds_per_image": seconds,
                "speedup": statistics.median(baseline.seconds) / seconds,
                "c2": c2,
                "psnr_to_cfg": psnr,
                "rel_error_to_converged": (gap / converged.flatten(1).norm(dim=1)).mean().item(),
                "accuracy": right.float().mean().item(),
                "joint_accuracy": (right & (found_colour == colours)).float().mean().item(),
            }
        )
    return rows


def _sheet(captions: list[str], outcomes: dict[str, Outcome]) -> dict[str, Any]:
    """What the contact sheet shows: labels, captions, images per method."""
    columns = [f"{outcome.method.label}\nNFE {outcome.nfe}" for outcome in outcomes.values()]
    return {
        "columns": columns,
        "rows": captions,
        "images": [outcome.images for outcome in outcomes.values()],
    }
