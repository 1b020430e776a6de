"""The operator behind every backend: one schema, its fakes, and how the Triton kernel is launched.

    step_update(registers(a!), cursor(b!), table, model_output, output_rows, model_input(c!)?,
                timestep(d!)?, input_rows?, sample(e!)?, noise?, uses, layout) -> ()

With B samples, S slots, R table rows and M, M' denoiser rows:

    registers     (S, B, *latent) float32, contiguous
    cursor        (2, B) int32: the row each sample runs next; a counter, 0 between launches
    table         (R, HEAD + 4 S) float32, see `table`
    model_output  (M, *latent) in the model's dtype, any strides that ``layout`` describes
    output_rows   (2, B) int32: rows of the conditional and the unconditional output, -1: none
    model_input   (M', *latent) in the model's dtype, contiguous
    timestep      (M',) float32
    input_rows    (2, B) int32: where the next inputs of the branches go, -1: nowhere
    sample        (B, *latent) in any float dtype, contiguous: x_next unscaled
    noise         (B, *latent) in any float dtype, contiguous
    uses          `table.Uses` of the rows
    layout        (n1, n2, s0, s1, s2): element n of a sample stands at
                  n // (n1 n2) s0 + n // n2 % n1 s1 + n % n2 s2 in its row of the model output

A sample whose row is terminal, whose cursor is outside the table, or whose row needs an output that
``output_rows`` does not have is left untouched, its cursor too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from math import prod
from threading import RLock
from typing import NamedTuple

import torch
from torch import Tensor

from .reference import step_update_reference

Backend = Callable[..., None]
MUTATES = ("registers", "cursor", "model_input", "timestep", "sample")
FLAT = (1, 1, 1, 0, 0)
"""Layout of a model output whose rows lie like the registers."""

_reference = torch.library.custom_op(
    "thg_engine::step_update_reference", step_update_reference, mutates_args=MUTATES
)


def _nothing_returned(*args: object, **kwargs: object) -> None:
    """The fake of every backend: all results are in its arguments."""


_reference.register_fake(_nothing_returned)


def reference(*args: object) -> None:
    """Plain torch in float64, on any device and with float64 registers too."""
    _reference(*args)


class Launch(NamedTuple):
    """How a latent is cut into programs."""

    elements: int
    """Of one sample per program; a power of two."""
    warps: int


class Launches(NamedTuple):
    """What one architecture is launched with, by size."""

    below: int
    """Elements of the batch from which on ``large`` is taken."""
    small: Launch
    large: Launch

    def of(self, elements: int) -> Launch:
        """For a batch of so many elements."""
        return self.small if elements < self.below else self.large


# Large: eight elements a thread, which is two 16-byte accesses per float32 register and one per
# half-precision output. Small: four, and half of each, so that a small latent too has programs for
# many multiprocessors.
_SMALL, _LARGE = Launch(256, 2), Launch(1024, 4)
_DEFAULT = Launches(1 << 18, _SMALL, _LARGE)
LAUNCHES: dict[int, Launches] = {
    8: Launches(1 << 18, _SMALL, _LARGE),
    9: Launches(1 << 18, _SMALL, _LARGE),
    10: Launches(1 << 19, _SMALL, _LARGE),
    12: Launches(1 << 19, _SMALL, _LARGE),
}
"""By major compute capability; others take the default. Reasoned, not measured.

The bound between the sizes is about two large programs per multiprocessor, the fewest that hide one
another's latency: 108 multiprocessors on an A100 and 132 on an H100 make 2**18 elements; 148 on a
B200, with more than twice an H100's bandwidth to keep busy, and 170 on an RTX 5090 make 2**19. The
programs are the same everywhere, because the width of an access is; test_triton_aot holds that.
There is no autotuner: it would time launches that move cursors, and no graph could be captured.
"""


@cache
def architecture(device: torch.device) -> int:
    """Major compute capability; 0 where there is none: on a CPU, on AMD's, in a trace without GPU.

    Asked once per device, of the driver's table: nothing waits for the GPU.
    """
    if device.type != "cuda" or torch.version.hip or not torch.cuda.is_available():
        return 0
    return torch.cuda.get_device_capability(device)[0]


def launch_of(device: torch.device, elements: int) -> Launch:
    """Block and warps for a batch of ``elements``."""
    return LAUNCHES.get(architecture(device), _DEFAULT).of(elements)


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


@cache
def why_no_triton() -> str:
    """Why Triton kernels cannot run here; "" where they can."""
    if find_spec("triton") is None:
        return "Triton is not installed (pip install thg-engine[gpu])."
    if not interpreted() and not torch.cuda.is_available():
        return "there is no CUDA device (TRITON_INTERPRET=1 runs Triton's interpreter)."
    return ""


REGISTRATION = RLock()
"""Held while an operator is registered: two threads may ask for their first step at once."""


def triton_backend() -> Backend:
    """The Triton operator, registered on first use: ImportError where Triton is missing."""
    with REGISTRATION:
        return _triton_operator()


@cache
def _triton_operator() -> Backend:
    name = "thg_engine::step_update_triton"
    if interpreted():
        # The interpreter computes on the spot and cannot be traced into: opaque to torch.compile.
        opaque = torch.library.custom_op(name, step_update_triton, mutates_args=MUTATES)
        opaque.register_fake(_nothing_returned)
        return opaque
    return torch.library.triton_op(name, step_update_triton, mutates_args=MUTATES)


def step_update_triton(
    registers: Tensor, cursor: Tensor, table: Tensor, model_output: Tensor, output_rows: Tensor,
    model_input: Tensor | None, timestep: Tensor | None, input_rows: Tensor | None,
    sample: Tensor | None, noise: Tensor | None, uses: int, layout: Sequence[int],
) -> None:  # fmt: skip
    """Launch the Triton kernel; arguments as above."""
    from .triton_kernel import step_update_kernel

    num_slots, batch = registers.shape[:2]
    numel = prod(registers.shape[2:])
    block, warps = launch_of(registers.device, batch * numel)
    # At least one program, so that cursors move on also where there are no elements.
    blocks = max(1, (numel + block - 1) // block)
    n1, n2, s0, s1, s2 = layout
    kernel = torch.library.wrap_triton(step_update_kernel)
    with _current(registers.device):
        kernel[(blocks, batch)](
            registers_ptr=registers, cursor_ptr=cursor, table_ptr=table, output_ptr=model_output,
            output_rows_ptr=output_rows, input_ptr=model_input, timestep_ptr=timestep,
            input_rows_ptr=input_rows, sample_ptr=sample, noise_ptr=noise, num_rows=table.shape[0],
            batch=batch, numel=numel, slot_stride=batch * numel, blocks=blocks,
            output_stride=model_output.stride(0), n1=n1, n2=n2, s0=s0, s1=s1, s2=s2,
            SLOTS=num_slots, USES=uses, STRIDED=tuple(layout) != FLAT, BLOCK=block, num_warps=warps,
        )  # fmt: skip


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, whichever its tensors are on: makes that theirs.

    Nothing on a CPU, nor in a trace with a GPU's tensors where there is no GPU.
    """
    is_real = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.device(device) if is_real else nullcontext()
