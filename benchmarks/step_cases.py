"""What `bench_step_update` times: cases, and one provider per way to run a sampling step.

A case is a steady-state row of a 50-step run of one diffusers scheduler under one guidance, on one
latent size. A provider runs rows `BEGIN` to `END` of it, one ``step()`` each; ``reset()`` puts it
back to `BEGIN` with its first registers, and is never timed. Model outputs are given: no denoiser
runs. Every provider is fed the same numbers and forms the same next model input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from thg_engine.guidance import CFG, THG, Guidance
from thg_engine.lowering import plan_from_table
from thg_engine.packing import step_table
from thg_engine.trace import trace
from thg_kernels.step_update import (
    BranchRows,
    Column,
    StepState,
    StepTable,
    op,
    step_update,
    why_unavailable,
)
from thg_kernels.step_update.table import WEIGHTS

NUM_STEPS = 50
BEGIN, END = 10, 40
"""Rows that are timed: past the warm-up of multistep solvers, ahead of their last steps."""
GUIDANCE_SCALE = 7.5
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULERS: dict[str, Callable[[], Any]] = {
    "ddim": lambda: DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
    "dpmpp_2m": lambda: DPMSolverMultistepScheduler(**SD),
    "unipc": lambda: UniPCMultistepScheduler(**SD),
    "flow_euler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
}
# One coarse point, at row 0: every later row holds its delta and runs one branch.
GUIDANCE: dict[str, Guidance] = {"cfg": CFG(), "thg-held": THG(grid=[0])}
CASES = tuple(f"{scheduler}/{guidance}" for scheduler in SCHEDULERS for guidance in GUIDANCE)
SIZES: dict[str, tuple[int, ...]] = {
    "tiny": (1, 4, 8, 8),
    "sd15": (1, 4, 64, 64),
    "audioldm2": (1, 8, 256, 16),
    "sdxl": (1, 4, 128, 128),
    "sd35": (1, 16, 128, 128),
    "video-2m": (1, 16, 21, 60, 104),
    "video-16m": (1, 16, 65, 120, 128),
}
"""Latents; "tiny" is for tests. Video: Wan 2.1 at 480p, 81 frames; and eight times as much."""
VIDEO = ("video-2m", "video-16m")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FUSED = ("triton", "cuda", "cpu")
PROVIDERS = ("diffusers", "torch", "compile", *FUSED)


@dataclass(frozen=True)
class Case:
    """One scheduler, guidance, latent size, dtype and device."""

    name: str
    size: str
    dtype: str = "fp32"
    device: str = "cpu"

    @property
    def scheduler(self) -> str:
        """A key of `SCHEDULERS`."""
        return self.name.partition("/")[0]

    @property
    def held(self) -> bool:
        """Whether the rows hold their delta: one branch in, one out."""
        return self.name.endswith("held")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the latent, batch 1."""
        return SIZES[self.size]

    @property
    def elements(self) -> int:
        """Of the latent."""
        return math.prod(self.shape)

    @property
    def table(self) -> StepTable:
        """Rows of the whole run."""
        return _table(self.name)

    @property
    def bytes(self) -> int:
        """Bytes that a step has to move, the mean over the rows timed; see `StepTable`."""
        itemsize = DTYPES[self.dtype].itemsize
        rows = [self.table.bytes_per_element(row, itemsize) for row in range(BEGIN, END)]
        return round(sum(rows) / len(rows) * self.elements)


@lru_cache
def _table(name: str) -> StepTable:
    scheduler, guidance = name.split("/")
    solver = trace(SCHEDULERS[scheduler](), NUM_STEPS)
    return step_table(plan_from_table(solver, GUIDANCE[guidance], GUIDANCE_SCALE))


@dataclass(frozen=True)
class Inputs:
    """Seeded data of a case: registers at `BEGIN`, float32; model output of both branches."""

    registers: Tensor
    output: Tensor

    @classmethod
    def of(cls, case: Case) -> Inputs:
        """On the device of ``case``."""
        generator = torch.Generator().manual_seed(0)
        shape = (case.table.num_slots, *case.shape)
        registers = torch.randn(shape, generator=generator)
        output = torch.randn((2, *case.shape[1:]), generator=generator)
        return cls(registers.to(case.device), output.to(case.device, DTYPES[case.dtype]))


class Provider(Protocol):
    """One way to run the steps of a case."""

    branches: str
    """ "both" or "cond": what the denoiser has to evaluate for this provider's step."""
    launches: int | None
    """Kernels per step where they cannot be seen from outside."""
    model_input: Tensor | None

    def reset(self, row: int = BEGIN) -> None:
        """Back to ``row`` with the first registers."""

    def step(self) -> None:
        """Run the next row."""


class DiffusersStep:
    """What a pipeline runs between two denoiser calls, in its own dtype and its own order.

    Always classifier-free guidance, in a held case too: that is what a held row replaces.
    """

    branches = "both"
    launches = None

    def __init__(self, case: Case, inputs: Inputs) -> None:
        self.scheduler = SCHEDULERS[case.scheduler]()
        self.scheduler.set_timesteps(NUM_STEPS, device=case.device)
        if hasattr(self.scheduler, "set_begin_index"):  # as pipelines do: no look-up by value
            self.scheduler.set_begin_index(0)
        self.timesteps = self.scheduler.timesteps
        self.output = inputs.output
        self.latents = inputs.registers[0].to(DTYPES[case.dtype])
        self.row, self.model_input = 0, None
        while self.row < BEGIN:  # multistep schedulers fill their lists
            self.step()
        self.kept = (_copied(vars(self.scheduler)), self.latents)

    def reset(self, row: int = BEGIN) -> None:
        """Only to `BEGIN`, where the scheduler's state was kept."""
        state, self.latents = self.kept
        vars(self.scheduler).update(_copied(state))
        self.row = BEGIN

    def step(self) -> None:
        """Guidance, ``scheduler.step``, next input: `StableDiffusionPipeline`'s loop body."""
        uncond, cond = self.output.chunk(2)
        guided = uncond + GUIDANCE_SCALE * (cond - uncond)
        t = self.timesteps[self.row]
        self.latents = self.scheduler.step(guided, t, self.latents, return_dict=False)[0]
        self.row += 1
        model_input = torch.cat([self.latents] * 2)
        if hasattr(self.scheduler, "scale_model_input"):  # flow schedulers have none
            t = self.timesteps[self.row]
            model_input = self.scheduler.scale_model_input(model_input, t)
        self.model_input = model_input


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """A scheduler's own state; what it changes in place are its lists."""
    return {k: list(v) if isinstance(v, list) else v for k, v in state.items()}


@dataclass(frozen=True)
class TorchRow:
    """A table row for plain torch: which registers it reads (slots), with what weights.

    Weights are Python numbers, or one tensor for a compiled row.
    """

    to_sample: tuple[int, ...]
    to_state: tuple[int, ...]
    held: int | None
    """Slot of the held delta; None where both branches run."""
    weights: Sequence[float] | Tensor
    """Guidance, of the guided output, of the state, guided output in the state, then registers."""
    stores_state: bool
    scale: float | None
    """Of the next model input; None where it is 1."""
    twice: bool
    """Whether the next row evaluates both branches."""
    stores: tuple[tuple[int, int], ...]
    """(index into `torch_row`'s results, slot)."""

    @classmethod
    def of(cls, table: StepTable, row: int) -> TorchRow:
        """Row ``row``; ValueError where it does what none of the cases' rows do."""
        line, following = table.rows[row].tolist(), table.rows[row + 1].tolist()
        weights = {name: table.weights(name)[row] for name in WEIGHTS}
        slots = {name: tuple(w.nonzero().flatten().tolist()) for name, w in weights.items()}
        strange = (Column.FROM_COND, Column.FROM_DELTA, Column.STATE_FROM_DELTA, Column.NOISE)
        held = None if line[Column.BOTH] else slots["to_delta"][0]
        plain = held is None or (len(slots["to_delta"]) == 1 and weights["to_delta"][held] == 1.0)
        if not plain or slots["to_change"] or any(line[column] for column in strange):
            raise ValueError(f"row {row} of the table has terms that torch_row does not know")
        heads = (Column.GUIDANCE, Column.FROM_GUIDED, Column.FROM_STATE, Column.STATE_FROM_GUIDED)
        numbers = [line[column] for column in heads]
        for name in ("to_sample", "to_state"):
            numbers += weights[name][list(slots[name])].tolist()
        kept = (Column.SLOT_SAMPLE, Column.SLOT_GUIDED, Column.SLOT_DELTA, Column.SLOT_STATE)
        scale = following[Column.INPUT_SCALE]
        return cls(
            slots["to_sample"],
            slots["to_state"],
            held,
            numbers,
            line[Column.SLOT_STATE] >= 0,
            None if scale == 1.0 else scale,
            following[Column.BOTH] != 0.0,
            tuple((k, int(line[column])) for k, column in enumerate(kept) if line[column] >= 0),
        )


def torch_row(
    output: Tensor,
    delta: Tensor | None,
    samples: Sequence[Tensor],
    states: Sequence[Tensor] | None,
    weights: Sequence[float] | Tensor,
    scale: float | None,
    twice: bool,
    dtype: torch.dtype,
) -> tuple[Tensor | None, ...]:
    """One row in plain float32 torch: x_next, guided output, delta, state, next model input.

    ``samples`` and ``states`` are the registers that x_next and the state are sums of, ``states``
    None where the row keeps no state; the rest is as in `TorchRow`.
    """
    guidance, from_guided, from_state, state_from_guided, *rest = weights
    if delta is None:
        uncond, cond = output.float().chunk(2)
        delta = cond - uncond
    else:
        cond = output.float()
    guided = cond + guidance * delta
    x_next, state = from_guided * guided, None
    for weight, value in zip(rest, samples):  # noqa: B905 - the rest of ``rest`` is for the state
        x_next = x_next + weight * value
    if states is not None:
        state = state_from_guided * guided
        for weight, value in zip(rest[len(samples) :], states, strict=True):
            state = state + weight * value
        x_next = x_next + from_state * state
    model_input = (x_next if scale is None else scale * x_next).to(dtype)
    model_input = torch.cat([model_input] * 2) if twice else model_input
    return x_next, guided, delta, state, model_input


class TorchStep:
    """The row in eager float32 torch, no fused operator; or `torch_row` under torch.compile.

    Compiled, the weights are a tensor: as Python numbers they would be constants of the graph, and
    every row would compile anew.
    """

    launches = None

    def __init__(self, case: Case, inputs: Inputs, compiled: bool = False) -> None:
        self.branches = "cond" if case.held else "both"
        self.first = list(inputs.registers.unbind())
        self.output = inputs.output[1:] if case.held else inputs.output
        self.dtype = DTYPES[case.dtype]
        self.rows = {row: TorchRow.of(case.table, row) for row in range(BEGIN, END)}
        self.function: Callable[..., Any] = torch_row
        self.model_input: Tensor | None = None
        if compiled:
            for name, row in self.rows.items():
                weights = torch.tensor(row.weights, device=case.device)
                self.rows[name] = replace(row, weights=weights)
            self._compile()
        self.reset()

    def _compile(self) -> None:
        """For this very shape, as a user would; the first call, which compiles, is made here."""
        from torch._inductor import metrics  # loads the compiler: only where it is asked for

        torch.compiler.reset()
        metrics.reset()
        self.function = torch.compile(torch_row, dynamic=False, fullgraph=True)
        self.reset()
        self.step()
        self.launches = metrics.generated_kernel_count

    def reset(self, row: int = BEGIN) -> None:
        """Nothing here is changed in place: the first registers are taken up again."""
        self.registers, self.row = list(self.first), row

    def step(self) -> None:
        """One row; what it stores replaces a register."""
        row, registers = self.rows[self.row], self.registers
        results = self.function(
            self.output,
            None if row.held is None else registers[row.held],
            [registers[slot] for slot in row.to_sample],
            [registers[slot] for slot in row.to_state] if row.stores_state else None,
            row.weights,
            row.scale,
            row.twice,
            self.dtype,
        )
        for result, slot in row.stores:
            registers[slot] = results[result]
        self.model_input = results[-1]
        self.row += 1


class FusedStep:
    """`step_update`: the whole Python call with its checks, which is what a user pays."""

    launches = None

    def __init__(
        self, case: Case, inputs: Inputs, backend: str, wide: torch.dtype = torch.float32
    ) -> None:
        self.branches = "cond" if case.held else "both"
        self.first, self.backend = inputs.registers, backend
        self.output = inputs.output[1:] if case.held else inputs.output
        self.outputs = BranchRows.cond_only(1) if case.held else BranchRows.both(1)
        self.state = StepState(
            case.table,
            self.first[0],
            BEGIN,
            model_dtype=DTYPES[case.dtype],
            register_dtype=wide,
            inputs=BranchRows.both(1),
        )
        self.reset()

    @property
    def model_input(self) -> Tensor | None:
        """What the next denoiser call reads."""
        return self.state.model_input[1:] if self.branches == "cond" else self.state.model_input

    def reset(self, row: int = BEGIN) -> None:
        """Registers too: a row that runs a thousand times over would leave float32's range."""
        self.state.registers.copy_(self.first)
        self.state.seek(row)

    def step(self) -> None:
        """One launch."""
        step_update(self.state, self.output, self.outputs, backend=self.backend)


def why_absent(provider: str, device: str) -> str:
    """Why a provider cannot be timed on ``device``; "" where it can."""
    if provider not in FUSED:
        return ""
    if (provider == "cpu") != (device == "cpu"):
        return f"it does not run on {device}"
    if provider == "triton" and op.interpreted():
        return "TRITON_INTERPRET is set: the interpreter's times say nothing"
    return why_unavailable(provider)


def make(provider: str, case: Case, inputs: Inputs) -> Provider:
    """One of `PROVIDERS`, ready at row `BEGIN`."""
    if provider == "diffusers":
        return DiffusersStep(case, inputs)
    if provider in ("torch", "compile"):
        return TorchStep(case, inputs, compiled=provider == "compile")
    return FusedStep(case, inputs, provider)
