"""One sampling run in progress."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from thg_kernels.step_update import StepState

from .graph_cache import Lease
from .plan import SamplingPlan
from .step_buffers import Conditioning, concatenate


@dataclass
class Run:
    """State of one sampling run.

    Attributes:
        plan: what is being run.
        state: registers, cursor and buffers on the device.
        cond, uncond: conditioning of the two branches.
        generator: source of the noise of stochastic solvers.
        row: index of the next row; ``plan.num_rows`` when the run is over.
        nfe: denoiser evaluations per sample so far.
        lease: the graphs that it runs on; None: eagerly.
    """

    plan: SamplingPlan
    state: StepState
    cond: Conditioning
    uncond: Conditioning
    generator: torch.Generator | None
    row: int = 0
    nfe: int = 0
    lease: Lease | None = None
    _kept: Tensor | None = None
    _noise: tuple[int, Tensor] | None = None
    _version: int = -1
    _both: Conditioning = None

    @property
    def sample(self) -> Tensor:
        """The current x, shape of x_T, in the register dtype.

        A view of a register, good until the next step; edits in place count from the next row on.
        """
        return self.state.samples() if self._kept is None else self._kept

    def noise(self, row: int) -> Tensor:
        """Unit noise of a row from the run's generator, the same when the row is tried again."""
        if self._noise is None or self._noise[0] != row:
            x = self.sample
            drawn = torch.randn(x.shape, generator=self.generator, device=x.device, dtype=x.dtype)
            self._noise = row, drawn
        return self._noise[1]

    def release(self) -> None:
        """Let go of the graphs, which another run may use from now on; the sample is kept."""
        lease, self.lease = self.lease, None
        if lease is not None:
            try:
                self._kept = self.state.samples().clone()
            finally:
                lease.release()

    @property
    def is_released(self) -> bool:
        """Whether somebody else may have what the run ran on."""
        return self._kept is not None

    @property
    def done(self) -> bool:
        """Whether every row has run."""
        return self.row == self.plan.num_rows

    def both_conditionings(self) -> Conditioning:
        """[uncond, cond] along the batch, made once."""
        if self._both is None:
            self._both = pytree.tree_map(concatenate, self.uncond, self.cond)
        return self._both
