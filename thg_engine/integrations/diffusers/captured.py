"""A pipeline's denoiser as a function of sample, time and conditioning.

The pipeline itself prepares the conditioning: it is called, and stopped at its first denoiser call,
which costs no evaluation. What the denoiser was given there stands for every later call of the run.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...engine import Engine
from ...errors import InvalidArgument, UnsupportedPipeline
from ...step_buffers import Conditioning
from .adapter_types import AdapterRecord, ArgumentLayout
from .adapters import find_layout, find_record
from .networks import Networks
from .outputs import sample_of
from .run import by_name
from .slicing import CannotSlice, slice_half


class _Stop(BaseException):
    """Ends a pipeline's call at its first denoiser call; nothing in between may swallow it."""


@dataclass(frozen=True)
class Captured:
    """A pipeline's denoiser and how its arguments are arranged.

    Attributes:
        pipe: the pipeline.
        module: the denoiser.
        record, layout: which branch is which, and what carries the batch.
    """

    pipe: Any
    module: Any
    record: AdapterRecord
    layout: ArgumentLayout

    @classmethod
    def of(cls, pipe: Any) -> Captured:
        """The denoiser of a pipeline.

        Raises:
            UnsupportedPipeline: no adapter record, or not one call a step with two branches.
        """
        name = type(pipe).__name__
        record = find_record(type(pipe))
        networks = Networks() if record is None else Networks.of(pipe, record)
        if record is None or networks.why_not(pipe, record):
            raise UnsupportedPipeline(f"{name} has no adapter record.")
        layout = None if record.calls else find_layout(networks.module)
        if "strength" in inspect.signature(type(pipe).__call__).parameters:
            raise UnsupportedPipeline(f"{name}: plans are fitted to runs that start from noise.")
        simple = not (record.experts or networks.companions or record.whole_step or record.anchor)
        if layout is None or record.branches != 2 or not simple or layout.outputs > 1:
            needed = "one call of one denoiser per step, with two branches in the batch"
            raise UnsupportedPipeline(f"{name}: plans are fitted where guidance is {needed}.")
        return cls(pipe, networks.module, record, layout)

    def conditioning(
        self, prompts: Sequence[str], negative_prompt: str, guidance_scale: float, **call: Any
    ) -> tuple[tuple[int, ...], Conditioning, Conditioning]:
        """(shape of the samples, cond, uncond) of some prompts.

        Args:
            prompts: captions.
            negative_prompt: of the unconditional branch.
            guidance_scale: w > 1.
            call: further arguments of the pipeline's call.
        """
        given = self._first_call(
            prompt=list(prompts),
            negative_prompt=[negative_prompt] * len(prompts),
            num_inference_steps=2,
            output_type="latent",
            **{self.record.scale: guidance_scale},
            **call,
        )
        sample = given[self.layout.sample]
        if not isinstance(sample, Tensor) or len(sample) != 2 * len(prompts):
            shape = getattr(sample, "shape", type(sample).__name__)
            message = f"its denoiser is given a sample of {shape} for {len(prompts)} prompts"
            raise UnsupportedPipeline(f"{type(self.pipe).__name__}: {message}.")
        self._check_time(given)
        try:
            halves = [
                slice_half(given, self.layout, half, 2)
                for half in (self.record.cond_half, 1 - self.record.cond_half)
            ]
        except CannotSlice as error:
            raise UnsupportedPipeline(f"{type(self.pipe).__name__}: {error}.") from error
        cond, uncond = (self._without_sample(half) for half in halves)
        return tuple(sample.shape[1:]), cond, uncond

    def _check_time(self, given: dict[str, Any]) -> None:
        """Refuse a denoiser that is told another time than the scheduler's."""
        told, first = given.get("timestep"), self.pipe.scheduler.timesteps[0]
        same = told is not None and torch.as_tensor(told).float().cpu() == first.float().cpu()
        if not torch.as_tensor(same).all():
            name = type(self.pipe).__name__
            message = "its denoiser is told another time than the scheduler's timesteps"
            raise UnsupportedPipeline(f"{name}: {message}.")

    def _without_sample(self, given: dict[str, Any]) -> dict[str, Any]:
        left_out = (self.layout.sample, "timestep", "return_dict")
        return {name: value for name, value in given.items() if name not in left_out}

    def _first_call(self, **arguments: Any) -> dict[str, Any]:
        """What the denoiser is given first, by name."""
        seen: list[dict[str, Any]] = []

        def stop(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(by_name(module, args, kwargs))
            raise _Stop

        # The call of the plain class: no plan runs, and no counter of a compiled pipeline moves.
        call = getattr(type(self.pipe), "plain_call", type(self.pipe).__call__)
        if "generator" in inspect.signature(type(self.pipe).__call__).parameters:
            arguments["generator"] = torch.Generator()  # torch's own stays where it is
        handle = self.module.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with _silent(self.pipe):
                call(self.pipe, **arguments)
        except _Stop:
            pass
        except (TypeError, ValueError) as error:
            remedy = f"{type(self.pipe).__name__} refuses the call: {error}"
            raise InvalidArgument("call", sorted(arguments), remedy) from error
        finally:
            handle.remove()
            free = getattr(self.pipe, "maybe_free_model_hooks", None)
            if free is not None:
                free()
        if not seen:
            raise UnsupportedPipeline(f"{type(self.pipe).__name__} never called its denoiser.")
        return seen[0]

    def engine(self) -> Engine:
        """An `Engine` around the denoiser; its conditioning is a dictionary of arguments."""
        layout, module = self.layout, self.module

        def denoise(model_input: Tensor, timestep: Tensor, conditioning: Any) -> Tensor:
            given = {layout.sample: model_input, "timestep": timestep, **conditioning}
            return sample_of(module(**given, return_dict=False), layout)

        return Engine(denoise, model_dtype=module.dtype, graph=False, watch=module)


@contextmanager
def _silent(pipe: Any) -> Iterator[None]:
    """Without the pipeline's own progress bar, which would stop at its first step."""
    before = vars(pipe).get("_progress_bar_config")
    pipe._progress_bar_config = {**(before or {}), "disable": True}
    try:
        yield
    finally:
        if before is None:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = before


def noise(shape: tuple[int, ...], count: int, seed: int, like: torch.nn.Module) -> Tensor:
    """Unit noise ``(count, *shape)``, drawn on the CPU, on the device of ``like``, float32."""
    generator = torch.Generator().manual_seed(seed)
    device = next(like.parameters()).device
    return torch.randn((count, *shape), generator=generator).to(device)
