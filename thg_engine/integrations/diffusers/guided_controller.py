"""``pipe.thg`` of a pipeline whose guider we have replaced."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ...guidance import Guidance
from ...plan import SamplingPlan
from .guided import GuiderSwap, denoiser_of_guided, swap_guider
from .guider import TortoiseHareGuidance
from .report import guidance_line, switch_lines, tuning_lines
from .settings import Settings
from .tuning import Undo, tune
from .twins import Twins


class GuidedController:
    """Report, plan and counters of a pipeline with guiders of ours.

    The loop is diffusers' own: no step is fused and nothing is captured.

    Args:
        settings: what was asked for.
        swap: the guiders.
        pipe: the pipeline.

    Attributes:
        guidance: the method that was resolved.
        notes: how it was chosen.
        inactive: why the pipeline runs as before, "" where it does not.
    """

    def __init__(self, settings: Settings, swap: GuiderSwap, pipe: Any) -> None:
        self.settings, self.swap = settings, swap
        self.guidance: Guidance = swap.guidance
        self.notes = swap.notes
        self._scheduler = getattr(pipe, "scheduler", None)
        self.inactive = ""
        self._counts: Counter[str] = Counter()
        self._last: Counter[str] = Counter()
        self._twins = Twins()
        module = denoiser_of_guided(pipe)
        self._undo: Undo | None = None
        if module is not None:
            try:
                self._undo = tune(module, settings.denoiser, settings.attention)
            except BaseException:
                swap.undo(pipe)
                raise

    @property
    def plan(self) -> SamplingPlan | None:
        """Plan of the last call; before the first one that for 50 steps, if there is a scheduler.

        None where guidance was off.
        """
        if self._counts["runs"] or self._scheduler is None:
            return self.swap.plan
        return self.preview(self._scheduler)

    def preview(
        self, scheduler: Any, num_inference_steps: int = 50, guidance_scale: float | None = None
    ) -> SamplingPlan:
        """See `GuiderSwap.preview`."""
        return self.swap.preview(scheduler, num_inference_steps, guidance_scale)

    def stats(self) -> dict[str, Any]:
        """Counters since `compile`, and of the last call; as `Controller.stats`."""
        names = ("runs", "failed_runs", "evaluations", "refreshes")
        return {
            **{name: self._counts[name] for name in names},
            "last_nfe": self._last["evaluations"],
            "last_rows": self._last["last_rows"],
            "last_extras": 0,
            "fused_steps": 0,
            "fallbacks": {},
            "graphs": {},
        }

    def report(self) -> str:
        """What runs, how, and what does not with its reason; readable text."""
        if self.inactive:
            return f"thg_engine: not active, {self.inactive}."
        lines = [guidance_line(self.guidance)]
        lines += [f"  {note}" for note in self.notes]
        lines += self.swap.report_lines()
        lines += ["  fused step and graphs: none; the guider's loop steps by itself"]
        return "\n".join([*lines, *tuning_lines(self.settings), *switch_lines()])

    @contextmanager
    def apart(self, pipe: Any) -> Iterator[Any]:
        """``pipe`` for one call, or a twin of it while another call is in progress."""
        with self._twins.one(pipe) as mine:
            if mine is pipe:
                self._follow(pipe)
            else:
                self.swap.lend(mine)
            yield mine

    def _follow(self, pipe: Any) -> None:
        """Replace the guiders again where the user has given the pipeline others."""
        own = self.swap.guiders
        if not self.inactive and all(getattr(pipe, name) is own[name] for name in own):
            return
        self.swap.undo(pipe)
        found = swap_guider(pipe, self.guidance, self.notes)
        self.inactive = found if isinstance(found, str) else ""
        self.swap = self.swap if isinstance(found, str) else found

    def call(
        self,
        original: Callable[..., Any],
        pipe: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """A call of the pipeline under the plan."""
        found = [getattr(pipe, name) for name in self.swap.guiders]
        guiders = [guider for guider in found if isinstance(guider, TortoiseHareGuidance)]
        for guider in guiders:
            guider.reset()
        before = _sum(guiders)
        self._counts["runs"] += 1
        try:
            return original(pipe, *args, **kwargs)
        except BaseException:
            self._counts["failed_runs"] += 1
            raise
        finally:
            last = _sum(guiders)
            rows = last["last_rows"]
            last.subtract(before)
            self._counts.update({name: last[name] for name in ("evaluations", "refreshes")})
            last["last_rows"] = rows
            self._last = last

    def release(self, pipe: Any) -> None:
        """The original guiders and networks."""
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()
        self.swap.undo(pipe)

    @contextmanager
    def aside(self, pipe: Any) -> Iterator[None]:
        """The original guiders for a while, for copies."""
        self.swap.undo(pipe)
        try:
            yield
        finally:
            self.swap.redo(pipe)


def _sum(guiders: list[TortoiseHareGuidance]) -> Counter[str]:
    total: Counter[str] = Counter()
    for guider in guiders:
        total.update(guider.stats())
    return total
