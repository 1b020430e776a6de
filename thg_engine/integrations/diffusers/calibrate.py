"""Algorithm 3 on a diffusers pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tqdm import tqdm

from ...calibration import Batch, calibrate_denoiser, check_scale, fine_points
from ...curves import Calibration
from ...engine import Engine
from ...errors import InvalidArgument, UnsupportedPipeline
from ...schedule import NoiseSchedule, model_timesteps, prediction_type
from ...solvers import get_solver
from .adapters import find_record
from .networks import Networks
from .resolve import fingerprint, model_name

CALIBRATED = (
    *("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"),
    "StableDiffusionInpaintPipeline",
)
"""Pipelines whose denoiser takes nothing but the text besides sample and timestep."""


def calibrate(
    pipe: Any,
    prompts: Sequence[str],
    *,
    negative_prompt: str = "",
    guidance_scale: float = 7.5,
    num_inference_steps: int = 50,
    solver: str = "ddim",
    batch_size: int = 8,
    seed: int = 0,
    model: str = "",
    progress: bool = True,
) -> Calibration:
    """Measure the error curves of a pipeline on a few prompts.

    Args:
        pipe: a supported text-to-image pipeline, compiled or not; it is not changed.
        prompts: captions like those it will see; the more, the less the grid depends on them.
        negative_prompt, guidance_scale, num_inference_steps: of the measured trajectories.
        solver: name in `thg_engine.solvers.SOLVERS`; its order is the p of Algorithm 2.
        batch_size, seed, progress: prompts at a time; of the initial noise; show a tqdm bar.
        model: name to record; the pipeline's own if empty.
    Raises:
        UnsupportedPipeline: no adapter record, or a denoiser that takes an image as well.
        InvalidArgument: no prompts, w <= 1, or a step or batch count below 1.
    """
    module = _checked(pipe, prompts, guidance_scale, num_inference_steps, solver, batch_size)
    schedule, timesteps, kind = _fine_grid(pipe.scheduler, num_inference_steps)
    with _bar(schedule, timesteps, prompts, batch_size, progress) as bar, torch.no_grad():
        return calibrate_denoiser(
            Engine(_denoiser(module), model_dtype=module.dtype),
            schedule,
            timesteps,
            _batches(pipe, module, prompts, negative_prompt, batch_size, seed),
            guidance_scale=guidance_scale,
            prediction_type=kind,
            solver=solver,
            **_origin(pipe, module, prompts, model),
            on_step=bar.update,
        )


def _bar(
    schedule: NoiseSchedule, timesteps: list[float], prompts: Sequence[str], batch: int, show: bool
) -> tqdm[Any]:
    """A progress bar over the steps of all batches."""
    steps = (len(fine_points(schedule, timesteps)) - 1) * -(-len(prompts) // batch)
    return tqdm(total=steps, desc="calibrate", disable=not show)


def _origin(pipe: Any, module: Any, prompts: Sequence[str], model: str) -> dict[str, Any]:
    """Where the curves come from, as the file records it."""
    name = model or model_name(pipe)
    return {"model": name, "fingerprint": fingerprint(module), "prompts": prompts}


def _supported(pipe: Any) -> Any:
    """The denoiser of a pipeline that an adapter record describes."""
    record = find_record(type(pipe))
    known = record is not None and record.pipeline in CALIBRATED
    networks = Networks.of(pipe, record) if known and record is not None else Networks()
    if not networks.denoisers:
        names = ", ".join(CALIBRATED)
        raise UnsupportedPipeline(f"{type(pipe).__name__} has no adapter record ({names}).")
    return networks.module


def _fine_grid(given: Any, num_inference_steps: int) -> tuple[NoiseSchedule, list[float], str]:
    """Noise schedule, timesteps and prediction type; the pipeline's scheduler is not touched."""
    scheduler = type(given).from_config(given.config)
    scheduler.set_timesteps(num_inference_steps)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    if schedule.kind == "ve":
        # Karras' schedulers rescale the samples themselves; the model is the same VP model.
        schedule = NoiseSchedule.from_alphas_cumprod(scheduler.alphas_cumprod)
    return schedule, [float(t) for t in model_timesteps(scheduler)], prediction_type(scheduler)


def _checked(
    pipe: Any, prompts: Sequence[str], scale: float, steps: int, solver: str, batch_size: int
) -> Any:
    """The denoiser, once every argument makes sense."""
    module = _supported(pipe)
    if isinstance(prompts, str) or not prompts or not all(isinstance(p, str) for p in prompts):
        raise InvalidArgument("prompts", prompts, "give a non-empty list of captions.")
    get_solver(solver)
    check_scale(scale)
    if steps < 1:
        remedy = "give at least one step; 50 is usual."
        raise InvalidArgument("num_inference_steps", steps, remedy)
    if batch_size < 1:
        raise InvalidArgument("batch_size", batch_size, "give at least one prompt at a time.")
    channels = (pipe.unet.config.in_channels, pipe.vae.config.latent_channels)
    if channels[0] != channels[1]:
        message = f"its denoiser takes {channels[0]} channels, {channels[1]} of them noise"
        raise UnsupportedPipeline(f"{type(pipe).__name__}: {message}; calibrate the base model.")
    return module


def _denoiser(module: torch.nn.Module) -> Any:
    def denoise(model_input: torch.Tensor, timestep: torch.Tensor, conditioning: Any) -> Any:
        given = {"encoder_hidden_states": conditioning, "return_dict": False}
        return module(model_input, timestep, **given)[0]

    return denoise


def _batches(
    pipe: Any, module: Any, prompts: Sequence[str], negative: str, batch_size: int, seed: int
) -> Iterator[Batch]:
    """Noise and embeddings, a batch of prompts at a time; noise is always drawn on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    size = module.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    device = module.device
    for start in range(0, len(prompts), batch_size):
        part = list(prompts[start : start + batch_size])
        cond, uncond = pipe.encode_prompt(part, device, 1, True, [negative] * len(part))[:2]
        shape = (len(part), module.config.in_channels, height, width)
        noise = torch.randn(shape, generator=generator).to(device=device, dtype=module.dtype)
        yield noise, cond, uncond
