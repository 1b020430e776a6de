r"""Tortoise and Hare Guidance for pipelines that leave their guidance to a guider.

`TortoiseHareGuidance` takes the place of diffusers' ``ClassifierFreeGuidance``, options and all. On
the steps of its plan that evaluate both branches it is that guider, bit for bit; on the others it
asks for the conditional branch alone and puts, with the held delta,

    u_hat = c - delta_hat

in place of the unconditional output. Formula, rescaling and scheduler stay what they were.
"""

from __future__ import annotations

import math
import os
import weakref
from collections import Counter
from typing import Any

import torch
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.guiders.guider_utils import GuiderOutput
from torch import Tensor

from ...errors import CalibrationError, InvalidArgument
from ...guidance import CFG, THG, Guidance
from ...plan import SamplingPlan
from .guider_config import decode, encode
from .guider_plan import Window, find_levels, plan_run
from .guider_run import GuiderRun
from .resolve import fingerprint, resolve_guidance
from .settings import KILL_SWITCH


class TortoiseHareGuidance(ClassifierFreeGuidance):  # type: ignore[misc]
    """A guider that evaluates the unconditional branch on some steps and holds its delta on others.

    For modular pipelines (``pipe.update_components(guider=...)``) and standard pipelines with a
    guider. It takes the arguments of ``ClassifierFreeGuidance``, which mean the same, and a method.

    A run begins at step 0, or where the step is not the next of the run before; nothing held
    survives into it. Conditioning that changes during a run makes the next step evaluate both.

    Args:
        guidance_scale: w, or w - 1 in the original formulation; finite.
        guidance_rescale: as in ``ClassifierFreeGuidance``.
        use_original_formulation: c + s (c - u) instead of u + s (c - u).
        start: share of the steps before which there is no guidance, in [0, 1).
        stop: share of the steps behind which there is none, in [start, 1].
        enabled: whether there is any.
        guidance: "auto", "thg", "cfg", "cfg-cache", ..., a method such as ``thg_engine.THG(...)``,
            or a finished `SamplingPlan` without solver columns of its own.

    Raises:
        InvalidArgument: a value that makes no sense; names it and its remedy.
        CalibrationError: in a run's first step, where the denoiser is not of the architecture that
            the method's calibration was made for.

    Source: Tortoise and Hare Guidance, arXiv 2511.04117.
    """

    def __init__(
        self,
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.0,
        use_original_formulation: bool = False,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
        guidance: Guidance | SamplingPlan | str | dict[str, Any] = "auto",
    ) -> None:
        _check_number("guidance_scale", guidance_scale)
        _check_number("guidance_rescale", guidance_rescale)
        _check_window(start, stop)
        asked = decode(guidance)
        method, self.notes = _resolve(asked)
        # By name: diffusers takes positional arguments for defaults and does not load them again.
        super().__init__(
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            use_original_formulation=use_original_formulation,
            start=start,
            stop=stop,
            enabled=enabled,
        )
        self.register_to_config(guidance=encode(asked))
        self._asked, self._method = asked, method
        self._source: Any = None
        self._run: GuiderRun | None = None
        self._is_open = False
        self._counts: Counter[str] = Counter()

    @property
    def guidance(self) -> Guidance:
        """The method."""
        return self._method

    def follow(self, source: Any) -> TortoiseHareGuidance:
        """Place the grid by the noise levels of a scheduler instead of by step number.

        Args:
            source: a scheduler, or a pipeline whose ``scheduler`` of the moment is meant; a
                pipeline is referred to weakly. None: by step number again.
        Returns:
            The guider itself.
        Raises:
            InvalidArgument: neither has timesteps nor a scheduler.
        """
        is_pipeline = hasattr(source, "scheduler")
        if not (source is None or is_pipeline or hasattr(source, "timesteps")):
            remedy = "give a scheduler or a pipeline that has one."
            raise InvalidArgument("source", type(source).__name__, remedy)
        self._source = weakref.ref(source) if is_pipeline else source
        return self

    @property
    def scheduler(self) -> Any:
        """The scheduler that the grid is placed by; None where none is followed."""
        if isinstance(self._source, weakref.ref):
            return getattr(self._source(), "scheduler", None)
        return self._source

    @property
    def plan(self) -> SamplingPlan | None:
        """Plan of the last run; None before the first, and where guidance was off."""
        return None if self._run is None else self._run.plan

    @property
    def nfe(self) -> int:
        """Evaluations of the last run, per sample."""
        return 0 if self._run is None else self._run.nfe

    def stats(self) -> dict[str, int]:
        """``runs``, ``evaluations`` and ``refreshes`` so far, ``last_nfe`` and ``last_rows``."""
        totals = {name: self._counts[name] for name in ("runs", "evaluations", "refreshes")}
        last_rows = 0 if self._run is None else self._run.calls
        return {**totals, "last_nfe": self.nfe, "last_rows": last_rows}

    def reset(self) -> None:
        """Forget the run in progress; the next step begins another."""
        self._run, self._is_open = None, False
        self._step = self._num_inference_steps = self._timestep = None

    def new(self, **kwargs: Any) -> Any:
        """A copy with other options; follows the same scheduler and holds nothing."""
        copy = super().new(**{"guidance": self._asked, **kwargs})
        copy._source = self._source
        return copy

    def __getstate__(self) -> dict[str, Any]:
        """Without the run in progress and without the pipeline: copies have their own."""
        kept = {**vars(self), "_run": None, "_is_open": False}
        return {**kept, "_source": None if isinstance(self._source, weakref.ref) else self._source}

    def set_state(self, step: int, num_inference_steps: int, timestep: Any) -> None:
        """Go to a step of the loop; one that does not follow the last begins a run."""
        super().set_state(step, num_inference_steps, timestep)
        if num_inference_steps is None:
            self._run = None
        elif self._run is None or not self._run.follows(step, num_inference_steps):
            self._run = None  # a plan that cannot be made leaves nothing of the run before
            self._run = self._begin(step, num_inference_steps, timestep)
            self._counts["runs"] += 1
        if self._run is not None:
            self._run.open(step)
            if not self._is_cfg_enabled():
                self._run.forget()
        self._is_open = True

    def _begin(self, step: int, num_steps: int, timestep: Any) -> GuiderRun:
        # As in ClassifierFreeGuidance._is_cfg_enabled.
        window = Window(int(self._start * num_steps), int(self._stop * num_steps))
        levels = find_levels(self.scheduler, num_steps, step, timestep)
        method = CFG() if os.environ.get(KILL_SWITCH) == "1" else self._method
        scale = self.guidance_scale + (1.0 if self.use_original_formulation else 0.0)
        if not self._is_ever_guided:
            window = Window(0, 0)
        rows, plan = plan_run(method, levels, window, float(scale))
        return GuiderRun(rows, plan, window, step)

    @property
    def _is_ever_guided(self) -> bool:
        idle = 0.0 if self.use_original_formulation else 1.0
        return bool(self._enabled) and not math.isclose(self.guidance_scale, idle)

    @property
    def num_conditions(self) -> int:
        """Branches of the step at hand, until its first batch goes to the model; then of the run.

        Pipelines ask outside of a step whether they have to encode a negative prompt. A step that
        raised in the model must not answer for the run after it.
        """
        if not self._is_open:
            return 2 if self._is_ever_guided else 1
        if not self._is_cfg_enabled():
            return 1
        return 2 if self._run is None or self._run.needs_both else 1

    def prepare_inputs(self, data: dict[str, Any]) -> list[Any]:
        """The batches of this step: of the conditional branch, or of both."""
        self._watch([value for value in data.values() if isinstance(value, tuple)])
        batches: list[Any] = super().prepare_inputs(data)
        return batches

    def prepare_inputs_from_block_state(self, data: Any, input_fields: dict[str, Any]) -> list[Any]:
        """The batches of this step, by names of the block state's fields."""
        pairs = [names for names in input_fields.values() if isinstance(names, tuple)]
        self._watch([[getattr(data, name, None) for name in names] for names in pairs])
        batches: list[Any] = super().prepare_inputs_from_block_state(data, input_fields)
        return batches

    def _watch(self, pairs: list[Any]) -> None:
        if self._run is not None and self._is_cfg_enabled():
            # One object for both branches is no conditioning: some loops pass the latents so.
            self._run.watch([pair for pair in pairs if len({id(item) for item in pair}) > 1])

    def prepare_models(self, denoiser: torch.nn.Module) -> None:
        """Called ahead of each batch's model call."""
        super().prepare_models(denoiser)
        self._is_open = False
        if self._run is not None and self._run.calls == 0:
            self._check_calibration(denoiser)

    def _check_calibration(self, denoiser: torch.nn.Module) -> None:
        curves = self._method.calibration if isinstance(self._method, THG) else None
        module = getattr(denoiser, "_orig_mod", denoiser)
        if curves is not None and curves.fingerprint not in ("", fingerprint(module)):
            message = f"the calibration is of {curves.model!r}, another architecture"
            remedy = "calibrate this model with `thg-engine calibrate`"
            raise CalibrationError(f"{message}; {remedy}.")

    def __call__(self, data: list[Any]) -> Any:
        """The guided output of this step's batches."""
        self._is_open = True
        try:
            return super().__call__(data)
        finally:
            self._is_open = False

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> Any:
        """The guided output; where ``pred_uncond`` is missing it is c minus the held delta.

        Args:
            pred_cond: c, any shape and floating dtype.
            pred_uncond: u, alike; None on the steps that do without.
        Returns:
            ``GuiderOutput`` in the dtype of c; arithmetic with a held delta is in float32.
        Raises:
            InvalidArgument: u is missing in a step that needs it, or c is no tensor, or c is of
                another shape or device than the held delta.
        """
        if not isinstance(pred_cond, Tensor):
            remedy = "the denoiser's output of one branch is one tensor."
            raise InvalidArgument("pred_cond", type(pred_cond).__name__, remedy)
        run = self._run
        delta = None
        if run is not None and self._is_cfg_enabled():
            before = run.refreshes
            delta = (
                run.held(pred_cond) if pred_uncond is None else run.fresh(pred_cond, pred_uncond)
            )
            self._counts["refreshes"] += run.refreshes - before
        if delta is None:
            output = super().forward(pred_cond, pred_uncond)
        else:
            output = self._with_delta(pred_cond, delta)
        evaluations = 1 if pred_uncond is None else 2
        self._counts["evaluations"] += evaluations
        if run is not None:
            run.count(evaluations)
        return output

    def _with_delta(self, pred_cond: Tensor, delta: Tensor) -> Any:
        """The formula of ``ClassifierFreeGuidance`` on c and c - delta, in float32 or wider."""
        dtype = pred_cond.dtype
        cond = pred_cond.to(torch.promote_types(dtype, delta.dtype))
        output = super().forward(cond, cond - delta)
        return GuiderOutput(
            pred=output.pred.to(dtype),
            pred_cond=pred_cond,
            pred_uncond=output.pred_uncond.to(dtype),
        )


def _resolve(asked: Any) -> tuple[Guidance, tuple[str, ...]]:
    """The method and notes on how it was chosen; its denoiser is not known yet."""
    if isinstance(asked, Guidance) and not isinstance(asked, type):
        return asked, ()
    return resolve_guidance(asked, None, None, torch.nn.Module())


def _check_number(name: str, value: Any) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (is_number and math.isfinite(value)):
        raise InvalidArgument(name, value, "give a finite number.")


def _check_window(start: Any, stop: Any) -> None:
    _check_number("start", start)
    _check_number("stop", stop)
    if not 0.0 <= start < 1.0:
        raise InvalidArgument("start", start, "give a share of the steps in [0, 1).")
    if not start <= stop <= 1.0:
        raise InvalidArgument("stop", stop, f"give a share in [{start!r}, 1], not before start.")
