"""Pipelines with guiders: ours in the place of diffusers' ``ClassifierFreeGuidance``, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.guiders.guider_utils import BaseGuidance

from ...errors import InvalidArgument
from ...guidance import Guidance
from ...plan import SamplingPlan
from ...schedule import model_timesteps
from .guider import TortoiseHareGuidance
from .guider_plan import Window, find_levels, plan_run
from .report import branches_line

DENOISERS = ("transformer", "unet", "dit", "prior", "decoder")
OPTIONS = ("guidance_scale", "guidance_rescale", "use_original_formulation")


@dataclass(frozen=True)
class Replaced:
    """One guider and what stands in its place."""

    name: str
    original: Any
    ours: TortoiseHareGuidance


class GuiderSwap:
    """Our guiders in a pipeline; `undo` puts the original objects back.

    Args:
        pipe: the pipeline.
        replaced: its guiders and ours.
        left: component -> why its guider stays.
        notes: how the method was chosen.
    """

    def __init__(
        self,
        pipe: Any,
        replaced: tuple[Replaced, ...],
        left: dict[str, str],
        notes: tuple[str, ...] = (),
    ) -> None:
        self.replaced, self.left, self.notes = replaced, left, notes
        source = pipe if hasattr(pipe, "scheduler") else None
        for one in replaced:
            _put(pipe, one.name, one.ours.follow(source))

    @property
    def guiders(self) -> dict[str, TortoiseHareGuidance]:
        """Component -> our guider."""
        return {one.name: one.ours for one in self.replaced}

    @property
    def guidance(self) -> Guidance:
        """The method that all of them run."""
        return self.replaced[0].ours.guidance

    @property
    def plan(self) -> SamplingPlan | None:
        """Plan of the last run of the first guider that has run."""
        return next((one.ours.plan for one in self.replaced if one.ours.plan is not None), None)

    @property
    def nfe(self) -> int:
        """Evaluations of the last run of every guider, per sample."""
        return sum(one.ours.nfe for one in self.replaced)

    def stats(self) -> dict[str, int]:
        """Counters of all guiders together; see `TortoiseHareGuidance.stats`."""
        found = [one.ours.stats() for one in self.replaced]
        return {name: sum(stats[name] for stats in found) for name in found[0]}

    def begin(self) -> None:
        """A call of the pipeline starts: whatever the last one left, nothing of it is held."""
        for one in self.replaced:
            one.ours.reset()

    def lend(self, twin: Any) -> None:
        """Give another pipeline over the same networks guiders of its own, for a second thread."""
        source = twin if hasattr(twin, "scheduler") else None
        for one in self.replaced:
            _put(twin, one.name, one.ours.new().follow(source))

    def preview(
        self, scheduler: Any, num_inference_steps: int = 50, guidance_scale: float | None = None
    ) -> SamplingPlan:
        """The plan that a full-length call would run; changes no scheduler.

        Args:
            scheduler: a copy of it is asked for its timesteps.
            num_inference_steps: as in the call, at least 1.
            guidance_scale: w; None: the guider's.
        """
        if num_inference_steps < 1:
            remedy = "give at least one step."
            raise InvalidArgument("num_inference_steps", num_inference_steps, remedy)
        ours = self.replaced[0].ours
        fresh = type(scheduler).from_config(scheduler.config)
        fresh.set_timesteps(num_inference_steps)
        timesteps = model_timesteps(fresh)
        levels = find_levels(fresh, len(timesteps), 0, timesteps[0])
        scale = guidance_scale
        if scale is None:
            scale = ours.guidance_scale + (1.0 if ours.use_original_formulation else 0.0)
        return plan_run(self.guidance, levels, Window(0, len(timesteps)), scale)[1]

    def report_lines(self) -> list[str]:
        """Lines for the report."""
        names = ", ".join(self.guiders)
        lines = [f"  guider: {names} replaced"]
        lines += [f"  {name} left alone: {why}" for name, why in self.left.items()]
        plan = self.plan
        if plan is None:
            return [*lines, "  no call yet"]
        share = f"NFE {self.nfe} of {2 * plan.num_rows} on {plan.solver}"
        lines.append(f"  last call: {share}, w = {plan.guidance_scale:g}")
        return [*lines, branches_line(plan.coarse_grid), *(f"  {note}" for note in plan.notes)]

    def undo(self, pipe: Any) -> None:
        """The original objects again; a guider that the user has put in since stays."""
        for one in self.replaced:
            if getattr(pipe, one.name, None) is one.ours:
                _put(pipe, one.name, one.original)
            one.ours.reset()

    def redo(self, pipe: Any) -> None:
        """Our guiders again, after `undo`."""
        for one in self.replaced:
            if getattr(pipe, one.name, None) is one.original:
                _put(pipe, one.name, one.ours)


def _put(pipe: Any, name: str, guider: Any) -> None:
    # Past the pipeline's own __setattr__, which would write the class into its saved description.
    vars(pipe)[name] = guider


def guiders_of(pipe: Any) -> dict[str, Any]:
    """Guiders among the components, by name; None where a pipeline has the place and no guider."""
    components = dict(pipe.components)
    return {
        name: part
        for name, part in components.items()
        if isinstance(part, BaseGuidance) or (part is None and name.endswith("guider"))
    }


def denoiser_of_guided(pipe: Any) -> torch.nn.Module | None:
    """The network that the guiders guide, to match a calibration with."""
    found = (getattr(pipe, name, None) for name in DENOISERS)
    modules = (getattr(part, "_orig_mod", part) for part in found)
    return next((part for part in modules if isinstance(part, torch.nn.Module)), None)


def why_not(guider: Any) -> str:
    """Why a guider stays as it is; "" where ours can take its place."""
    if guider is None:
        return "it is not set, as in a distilled model"
    if type(guider) in (ClassifierFreeGuidance, TortoiseHareGuidance):
        return ""
    name = type(guider).__name__
    if isinstance(guider, ClassifierFreeGuidance):
        return f"{name} changes the formula of ClassifierFreeGuidance"
    return f"{name} is another guidance than ClassifierFreeGuidance"


def swap_guider(pipe: Any, guidance: Guidance, notes: tuple[str, ...] = ()) -> GuiderSwap | str:
    """Replace every ``ClassifierFreeGuidance`` among the components by ours with its options.

    Args:
        pipe: a modular or standard pipeline.
        guidance: the method of all of them.
        notes: how it was chosen, for the report.
    Returns:
        What undoes it and answers for plan and counts; or why nothing was replaced.
    """
    found = guiders_of(pipe)
    if not found:
        return f"{type(pipe).__name__} has no guider"
    left = {name: why for name, guider in found.items() if (why := why_not(guider))}
    replaced = tuple(
        Replaced(name, guider, _ours(guider, guidance))
        for name, guider in found.items()
        if name not in left
    )
    if not replaced:
        return "; ".join(f"{name}: {why}" for name, why in left.items())
    return GuiderSwap(pipe, replaced, left, notes)


def _ours(guider: Any, guidance: Guidance) -> TortoiseHareGuidance:
    """A guider of ours with what ``guider`` is set to now; its configuration may be older."""
    options = {name: getattr(guider, name) for name in OPTIONS}
    window = {"start": guider._start, "stop": guider._stop, "enabled": guider._enabled}
    return TortoiseHareGuidance(**options, **window, guidance=guidance)
