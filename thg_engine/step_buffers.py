"""Static tensors of a sampling run, and the steps on them that a graph can record.

Everything that differs between two runs of a shape is a value in here: samples, tables, cursors,
conditioning, noise. So what was captured for one run serves all others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from thg_kernels.step_update import BranchRows, StepState, StepTable, Uses, blank_rows, launch

from .graphs import Step

Conditioning = Any
"""A tensor, or nested dicts, lists and tuples of tensors, batch first; None entries stay."""
ROOM = 64 * 2**20
"""Bytes of registers that every shape may take, so that a change of solver needs no capture."""
COMMON_SLOTS = 10  # no scheduler of diffusers asks for more, whatever the guidance
COMMON_ROWS = 128
COMMON_USES = Uses(sum(Uses)) & ~Uses.CHANGE
"""Changes of the conditional output take twice the registers of a thread, for few plans."""


@dataclass(frozen=True)
class Shape:
    """What the buffers of a run are made for.

    Attributes:
        model_dtype, register_dtype: as in `Engine`.
        backend: of the fused step.
        num_rows, num_slots: of the table.
        evaluates_both: whether any row evaluates both branches.
        uses: what the kernel is to be able to do.
    """

    model_dtype: torch.dtype
    register_dtype: torch.dtype
    backend: str
    num_rows: int
    num_slots: int
    evaluates_both: bool
    uses: Uses

    @classmethod
    def of(
        cls,
        table: StepTable,
        model_dtype: torch.dtype,
        register_dtype: torch.dtype,
        backend: str,
        evaluates_both: bool,
    ) -> Shape:
        """The shape of runs of one table."""
        size = (table.num_rows, table.num_slots)
        return cls(model_dtype, register_dtype, backend, *size, evaluates_both, table.uses)

    def roomy(self, numel: int) -> Shape:
        """The same with room for longer runs and other solvers of samples of ``numel`` elements."""
        room = ROOM // max(1, numel * self.register_dtype.itemsize)
        return Shape(
            self.model_dtype,
            self.register_dtype,
            self.backend,
            max(COMMON_ROWS, 2 ** math.ceil(math.log2(self.num_rows))),
            max(self.num_slots, min(COMMON_SLOTS, room)),
            self.evaluates_both,
            self.uses | COMMON_USES,
        )


class StepBuffers:
    """State, conditioning and noise on fixed addresses.

    Args:
        denoiser: see `Engine`.
        x: a sample of the shape, stride, dtype and device to come, shape ``(B, *latent)``.
        cond, uncond: likewise the conditioning.
        shape: everything else.
        pattern: per row of a whole run whether it evaluates both branches and whether it adds
            noise; for one graph of it all.
    """

    def __init__(
        self,
        denoiser: Callable[[Tensor, Tensor, Any], Tensor],
        x: Tensor,
        cond: Conditioning,
        uncond: Conditioning,
        shape: Shape,
        pattern: Sequence[tuple[bool, bool]] = (),
    ) -> None:
        self.denoiser, self.shape, self.pattern = denoiser, shape, tuple(pattern)
        blank = StepTable(blank_rows(shape.num_rows, shape.num_slots), (0,) * shape.num_rows)
        self.state = StepState(
            blank,
            x,
            model_dtype=shape.model_dtype,
            register_dtype=shape.register_dtype,
            inputs=BranchRows.both(x.shape[0]),
        )
        self.state.uses = shape.uses  # of the tables to come
        self._cond_rows = BranchRows.cond_only(x.shape[0])  # kept: graphs read its tensor
        sample = self.state.samples()
        self._noises = [torch.zeros_like(sample) for _ in range(max(1, len(self.pattern)))]
        self.both: Conditioning = None
        if shape.evaluates_both:
            self.both = pytree.tree_map(concatenate, uncond, cond)
            self.cond = _second_half(self.both)
        else:
            self.cond = pytree.tree_map_only(Tensor, torch.clone, cond)

    def load(self, table: StepTable, x: Tensor, cond: Conditioning, uncond: Conditioning) -> None:
        """Begin another run."""
        self.state.restart(table.resized(self.shape.num_rows, self.shape.num_slots), x)
        batch = x.shape[0]
        if self.both is not None:
            _copy(self.both, uncond, slice(None, batch))
        _copy(self.cond, cond, slice(None))

    def set_noise(self, noise: Tensor, row: int = 0) -> None:
        """What the next step adds; ``row`` of the run where one graph holds it all."""
        self._noises[row if self.pattern else 0].copy_(noise)

    def steps(self) -> Mapping[str, Step]:
        """What to capture, by name; the largest first."""
        if self.pattern:
            return {"trajectory": self._trajectory}
        variants = {"cond": lambda: self._step(False, 0)}
        if self.both is not None:
            variants = {"both": lambda: self._step(True, 0), **variants}
        return variants

    def _trajectory(self) -> None:
        for row, (both, _) in enumerate(self.pattern):
            self._step(both, row)

    def _step(self, both: bool, row: int) -> None:
        state = self.state
        if state.inputs is None or state.model_input is None or state.timestep is None:
            raise RuntimeError("a state without model input.")  # made with one above
        first = 0 if both else state.batch
        outputs = state.inputs if both else self._cond_rows
        conditioning = self.both if both else self.cond
        output = self.denoiser(state.model_input[first:], state.timestep[first:], conditioning)
        noise = self._noises[row if self.pattern else 0]
        launch(state, output, outputs, noise=noise, backend=self.shape.backend)


def signature_of(value: Any) -> Hashable:
    """What a capture bakes in of an argument: structure, layouts, and all that is no tensor.

    None where something in it may change unseen: it is neither a tensor nor hashable.
    """
    leaves, structure = pytree.tree_flatten(value)
    found = (str(structure), *map(_leaf, leaves))
    try:
        hash(found)
    except TypeError:
        return None
    return found


def _leaf(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.stride(), value.dtype, value.device)
    return (type(value), value)


def concatenate(uncond: Any, cond: Any) -> Any:
    """[uncond, cond] along the batch; entries that are no tensors are shared."""
    return torch.cat([uncond, cond]) if isinstance(cond, Tensor) else cond


def _second_half(both: Conditioning) -> Conditioning:
    return pytree.tree_map_only(Tensor, lambda value: value[value.shape[0] // 2 :], both)


def _copy(target: Conditioning, source: Conditioning, rows: slice) -> None:
    """Tensors of ``source`` into those rows of ``target``."""
    pairs = zip(pytree.tree_leaves(target), pytree.tree_leaves(source), strict=True)
    for into, value in pairs:
        if isinstance(into, Tensor):
            into[rows].copy_(value)
