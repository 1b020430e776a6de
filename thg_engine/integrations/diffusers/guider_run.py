"""What a guider keeps of the run in progress: deltas, conditioning and counters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, equal

from ...errors import InvalidArgument
from ...guidance import FRESH, GuidanceRow
from ...plan import SamplingPlan
from .guider_plan import Window
from .held import HeldGuidance


class GuiderRun:
    """One run of a guider.

    Args:
        rows: of every step.
        plan: the same with timesteps, for display.
        window: steps that the plan guides; a guider that is switched on outside evaluates both.
        step: number of the first step.

    Attributes:
        row: of the step at hand.
        nfe: evaluations so far, per sample.
        calls: steps so far.
        refreshes: steps that evaluated both branches although the plan holds there.
    """

    def __init__(
        self, rows: tuple[GuidanceRow, ...], plan: SamplingPlan, window: Window, step: int
    ) -> None:
        self.rows, self.plan, self._window = rows, plan, window
        self.nfe = self.calls = self.refreshes = 0
        self._held = HeldGuidance(rows)
        self._holds = any(not row.evaluates_both and row.delta_weights for row in rows)
        self._inputs = Watched()
        self._like: tuple[Any, ...] = ()
        self._step = step - 1
        self.row: GuidanceRow = rows[0]

    def follows(self, step: int, num_steps: int) -> bool:
        """Whether ``step`` is the next one of this run."""
        return step == self._step + 1 and num_steps == len(self.rows)

    def open(self, step: int) -> None:
        """Go to ``step``."""
        self._step = step
        planned = self._window.first <= step < self._window.end
        self.row = self.rows[step] if planned else FRESH

    def forget(self) -> None:
        """Drop what is held: the next guided step evaluates both branches."""
        self._held.clear()

    def watch(self, inputs: Iterable[Any]) -> None:
        """Drop what is held if the conditioning is another than in the step before."""
        if not self._inputs.unchanged(inputs):
            self.forget()

    @property
    def needs_both(self) -> bool:
        """Whether this step needs the unconditional branch."""
        return self.row.evaluates_both or self._held.is_short(self.row)

    def fresh(self, cond: Tensor, uncond: Tensor) -> Tensor | None:
        """The boosted delta of a step with both branches, float32; None where it is just c - u."""
        self.refreshes += not self.row.evaluates_both
        self._like = (cond.shape, cond.device)
        if not self._holds and self.row.boost == 1.0:
            return None
        delta = self._held.fresh(self.row, cond.detach(), uncond.detach())
        return None if self.row.boost == 1.0 else delta

    def held(self, cond: Tensor) -> Tensor:
        """The boosted delta of a step without the unconditional branch, float32.

        Raises:
            InvalidArgument: nothing fits: the branch was left out of a step that needs it, or the
                outputs have changed their shape or device.
        """
        if self.needs_both:
            remedy = "this step needs both branches; run every batch that prepare_inputs gives."
            raise InvalidArgument("pred_uncond", None, remedy)
        like = (cond.shape, cond.device)
        if self.row.delta_weights and like != self._like:
            remedy = f"the held delta is of {self._like}; a run keeps its shape, begin at step 0."
            raise InvalidArgument("pred_cond", like, remedy)
        return self._held.held(self.row, cond.detach())

    def count(self, evaluations: int) -> None:
        """Close the step; the last one gives its tensors back."""
        self.nfe += evaluations
        self.calls += 1
        if self._step >= len(self.rows) - 1:
            self.forget()
            self._inputs = Watched()


class Watched:
    """Tensors of the step before, to tell whether they are still the same."""

    def __init__(self) -> None:
        self._seen: list[tuple[Tensor, int]] | None = None

    def unchanged(self, values: Iterable[Any]) -> bool:
        """Whether ``values`` hold what they held in the last call; True in the first.

        Waits for the device only where another tensor has come in place of one: loops that cast
        or slice at every step.
        """
        found = [(tensor, _version(tensor)) for value in values for tensor in _tensors(value)]
        known, self._seen = self._seen, found
        if known is None:
            return True
        return len(known) == len(found) and all(map(_is_same, known, found))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _version(tensor: Tensor) -> int:
    """How often the tensor was written to; inference tensors do not count that."""
    return 0 if tensor.is_inference() else tensor._version


def _is_same(one: tuple[Tensor, int], other: tuple[Tensor, int]) -> bool:
    (a, version_a), (b, version_b) = one, other
    if a is b:
        return version_a == version_b
    if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
        return False
    if _version(a) != version_a:
        return False  # written to since: what it held is gone
    is_view = a.data_ptr() == b.data_ptr() and a.stride() == b.stride()
    return (is_view and version_a == version_b) or equal(a, b)
