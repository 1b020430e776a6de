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
from functools import cache
from importlib.util import find_spec
from math import prod

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


BLOCKS: dict[str, tuple[int, int]] = {
    "large": (1024, 4),
    "small": (256, 2),
}
"""(elements per program, warps). Eight elements a thread: two 16-byte loads per float32 register,
one per half-precision output; in the small block four, and half of each. A latent of fewer than
`SMALL` elements takes the smaller block, so that the card has more programs than multiprocessors.
"""
SMALL = 1 << 18


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


@cache
def triton_backend() -> Backend:
    """The Triton operator, registered on first use: ImportError where Triton is missing."""
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
    block, warps = BLOCKS["small" if batch * numel < SMALL else "large"]
    # At least one program, so that cursors move on also where there are no elements.
    blocks = max(1, (numel + block - 1) // block)
    n1, n2, s0, s1, s2 = layout
    torch.library.wrap_triton(step_update_kernel)[(blocks, batch)](
        registers_ptr=registers, cursor_ptr=cursor, table_ptr=table, output_ptr=model_output,
        output_rows_ptr=output_rows, input_ptr=model_input, timestep_ptr=timestep,
        input_rows_ptr=input_rows, sample_ptr=sample, noise_ptr=noise, num_rows=table.shape[0],
        batch=batch, numel=numel, slot_stride=batch * numel, blocks=blocks,
        output_stride=model_output.stride(0), n1=n1, n2=n2, s0=s0, s1=s1, s2=s2,
        SLOTS=num_slots, USES=uses, STRIDED=tuple(layout) != FLAT, BLOCK=block, num_warps=warps,
    )  # fmt: skip
