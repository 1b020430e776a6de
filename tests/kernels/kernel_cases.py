"""Random tables, states and denoiser outputs for the tests of the kernels.

Whatever a step must not read is NaN: slots without weight, rows of no active branch, what a view
leaves out of its storage, noise where none is added. So is whatever it writes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import nan

import numpy as np
import pytest
import torch
from step_rows import Call, check, reads
from torch import Tensor

from thg_kernels.step_update import (
    BranchRows,
    Column,
    StepState,
    StepTable,
    blank_rows,
    native_op,
    op,
    step_update,
    why_unavailable,
)
from thg_kernels.step_update.table import HEAD, WEIGHTS

Shape = Sequence[int]
SLOTS = [c for c in Column if c.name.startswith("SLOT_")]
FACTORS = [c for c in Column if c.name.startswith(("FROM_", "STATE_FROM_", "GUIDANCE", "NOISE"))]


@dataclass(frozen=True)
class Backend:
    """A backend on one device."""

    name: str
    device: str

    @property
    def truncates(self) -> bool:
        """Triton's interpreter casts float32 to bfloat16 without rounding."""
        return self.name == "triton" and self.device == "cpu"

    def require(self) -> None:
        """Skip where it cannot run."""
        if self.device == "cuda" and not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        if self.name == "triton" and op.interpreted() != (self.device == "cpu"):
            pytest.skip(f"TRITON_INTERPRET is {'set' if op.interpreted() else 'not set'}")
        if reason := why_unavailable(self.name):
            pytest.skip(f"{self.name}: {reason}")

    def function(self) -> Callable[..., None]:
        """The operator itself, without the checks of `step_update`."""
        if self.name == "reference":
            return op.reference
        return op.triton_backend() if self.name == "triton" else native_op.native_backend(self.name)


CPU = [Backend("reference", "cpu"), Backend("triton", "cpu"), Backend("cpu", "cpu")]
GPU = [Backend("reference", "cuda"), Backend("triton", "cuda"), Backend("cuda", "cuda")]
BACKENDS = [
    *(pytest.param(b, id=f"{b.name}-{b.device}") for b in CPU),
    *(
        pytest.param(b, id=f"{b.name}-{b.device}", marks=pytest.mark.gpu)
        for b in (GPU if torch.cuda.is_available() else GPU[-1:])
    ),
]


def random_row(
    rng: np.random.Generator,
    num_slots: int,
    *,
    both: bool,
    density: float = 0.7,
    writes: Sequence[int] | None = None,
    noise: bool = True,
) -> Tensor:
    """An active row of random weights, of which ``density`` are not 0.

    ``writes`` are five different slots or -1 for the results, the sample's first.
    """
    row = blank_rows(1, num_slots)[0]
    row[Column.ACTIVE], row[Column.BOTH] = 1.0, float(both)
    row[Column.TIMESTEP] = rng.integers(1, 1000) + 0.5
    row[Column.INPUT_SCALE] = rng.uniform(0.25, 2.0)
    for column in FACTORS:
        row[column] = rng.normal() if rng.random() < density else 0.0
    if not noise:
        row[Column.NOISE] = 0.0
    count = len(WEIGHTS) * num_slots
    row[-count:] = torch.from_numpy(rng.normal(size=count) * (rng.random(count) < density))
    if writes is None:
        order = rng.permutation(num_slots).tolist() + [-1] * 4
        writes = [order[0], *rng.permutation(order[1:5]).tolist()]
    row[Column.SLOT_SAMPLE : Column.SLOT_STATE + 1] = torch.tensor(writes, dtype=torch.float64)
    return row


def table_of(rows: Sequence[Tensor], first_slot: int = 0) -> StepTable:
    """The rows and a terminal one; the sample stands where the row before has put it."""
    lines = torch.stack([*rows, blank_rows(1, (len(rows[0]) - HEAD) // 4)[0]])
    lines[-1, Column.INPUT_SCALE], lines[-1, Column.TIMESTEP] = 0.75, 3.25
    slots = [first_slot, *(int(row[Column.SLOT_SAMPLE]) for row in rows)]
    return StepTable(lines, tuple(slots))


def random_table(
    seed: int, num_rows: int = 4, num_slots: int = 6, *, density: float = 0.7, noise: bool = True
) -> StepTable:
    """Rows that evaluate both branches and one, in turn."""
    rng = np.random.default_rng(seed)
    rows = [
        random_row(rng, num_slots, both=k % 2 == 0, density=density, noise=noise)
        for k in range(num_rows)
    ]
    return table_of(rows)


def make_state(
    table: StepTable,
    latent: Shape,
    rows: int | Sequence[int],
    backend: Backend,
    *,
    batch: int | None = None,
    x: Tensor | None = None,
    **options: object,
) -> StepState:
    """A state whose buffers are NaN but for what the next rows read."""
    torch.manual_seed(0)
    if x is None:
        x = torch.randn(batch if isinstance(rows, int) else len(rows), *latent)
    state = StepState(table, x.to(backend.device), rows, **options)
    for buffer in (state.model_input, state.timestep):
        if buffer is not None:
            buffer.fill_(nan)
    prepare(state)
    return state


def prepare(state: StepState, *, keep: bool = False) -> None:
    """Random values in the slots that the next rows read, where there are none yet; NaN elsewhere.

    ``keep`` leaves slots alone that earlier rows have filled.
    """
    table = state.device_table.double().cpu().numpy()
    for b, row in enumerate(state.positions):
        used = reads(table[row], len(state.registers))
        for slot in range(len(state.registers)):
            register = state.registers[slot, b]
            if slot not in used:
                if not keep:
                    register.fill_(nan)
            elif register.isnan().any():
                register.normal_()


def _dense(shape: Shape, **kind: object) -> tuple[Tensor, Tensor]:
    value = torch.full(tuple(shape), nan, **kind)
    return value, value


def _channels_last(shape: Shape, **kind: object) -> tuple[Tensor, Tensor]:
    last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    value = torch.full(tuple(shape), nan, **kind).to(memory_format=last)
    return value, value


def _narrowed(shape: Shape, **kind: object) -> tuple[Tensor, Tensor]:
    value = torch.full((shape[0], 2 * shape[1], *shape[2:]), nan, **kind)[:, : shape[1]]
    return value, value


def _transposed(shape: Shape, **kind: object) -> tuple[Tensor, Tensor]:
    value = torch.full((*shape[:-2], shape[-1], shape[-2]), nan, **kind).transpose(-1, -2)
    return value, value


def _every_second(shape: Shape, **kind: object) -> tuple[Tensor, Tensor]:
    value = torch.full((*shape[:-1], 2 * shape[-1]), nan, **kind)[..., ::2]
    return value, value


def _expanded(shape: Shape, **kind: object) -> tuple[Tensor, Tensor]:
    value = torch.full((shape[0], 1, *shape[2:]), nan, **kind)
    return value, value.expand(tuple(shape))


def _one_row(shape: Shape, **kind: object) -> tuple[Tensor, Tensor]:
    value = torch.full((1, *shape[1:]), nan, **kind)
    return value.expand(tuple(shape)), value.expand(tuple(shape))


def _unmergeable(shape: Shape, **kind: object) -> tuple[Tensor, Tensor]:
    value = torch.full((shape[0], *(n + 1 for n in shape[1:])), nan, **kind)
    value = value[(slice(None), *(slice(n) for n in shape[1:]))]
    return value, value


LAYOUTS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "contiguous": _dense,
    "channels_last": _channels_last,
    "narrowed": _narrowed,
    "transposed": _transposed,
    "every_second": _every_second,
    "expanded": _expanded,
    "one_row": _one_row,
    "unmergeable": _unmergeable,
}
"""(what to write to, what to hand over); a row of the first is one of the second."""


def make_output(
    state: StepState, outputs: BranchRows, dtype: torch.dtype, layout: str = "contiguous"
) -> Tensor:
    """Random denoiser rows where the next rows read them, NaN elsewhere and in one more row."""
    shape = (outputs.num_rows + 1, *state.latent)
    base, value = LAYOUTS[layout](shape, dtype=dtype, device=state.device)
    for b, row in enumerate(state.positions):
        if outputs.cond[b] >= 0 and state.table.flag(row, Column.ACTIVE):
            base[outputs.cond[b]].normal_()
            if state.table.flag(row, Column.BOTH):
                base[outputs.uncond[b]].normal_()
    return value


def make_noise(state: StepState, outputs: BranchRows, dtype: torch.dtype) -> Tensor:
    """Random where the next rows add noise, NaN elsewhere."""
    noise = torch.full((state.batch, *state.latent), nan, dtype=dtype, device=state.device)
    for b, row in enumerate(state.positions):
        if outputs.cond[b] >= 0 and state.table.rows[row, Column.NOISE] != 0:
            noise[b].normal_()
    return noise


def make_sample(state: StepState, dtype: torch.dtype = torch.float32) -> Tensor:
    """NaN, to receive x_next."""
    return torch.full((state.batch, *state.latent), nan, dtype=dtype, device=state.device)


def run_and_check(
    backend: Backend,
    state: StepState,
    model_output: Tensor,
    outputs: BranchRows,
    *,
    noise: Tensor | None = None,
    sample: Tensor | None = None,
) -> None:
    """One `step_update`, held to the NumPy step."""
    call = Call.of(state, model_output, outputs, noise, sample)
    before = call.copy()
    step_update(state, model_output, outputs, noise=noise, sample=sample, backend=backend.name)
    check(before, call, float(backend.truncates))
    moved = call.cursor[0].tolist()
    assert state.positions == moved, f"the host has {state.positions}, the device {moved}"


def step(
    backend: Backend,
    state: StepState,
    outputs: BranchRows,
    *,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    noise: torch.dtype | None = torch.float32,
    sample: torch.dtype | None = torch.float32,
) -> None:
    """One step on random outputs; ``noise`` and ``sample`` are dtypes, or None for left out."""
    run_and_check(
        backend,
        state,
        make_output(state, outputs, dtype, layout),
        outputs,
        noise=None if noise is None else make_noise(state, outputs, noise),
        sample=None if sample is None else make_sample(state, sample),
    )
