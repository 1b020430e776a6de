"""The fused step once more, in NumPy float64, and the bound that the kernels are held to.

Written from the docstrings of `thg_kernels.step_update.table` and `.op`; nothing of the package but
its column names is used, so an error there is not repeated here.

The bound. Each result is a sum; let M be the largest term or partial sum behind an element (through
e and delta, scaled as they are used) and R the largest error of `natural`, the same arithmetic in
torch's float32, in ulps of M. A register may be off by (2 R + 1) ulp(M): twice torch's own error,
and one ulp because another order of summation rounds elsewhere. R is taken over at least `ENOUGH`
elements, so that one lucky element does not decide. A value that is then cast to half precision has
half an ulp of that type on top, which is what rounding to nearest may cost; Triton's interpreter
truncates float32 to bfloat16, so there, and only there, one ulp more is allowed. Conditional
outputs, timesteps and cursors are copies: they must be exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from thg_kernels.step_update import Column, StepState
from thg_kernels.step_update.table import HEAD

Array = npt.NDArray[np.float64]
Sized = tuple[Array, Array]
"""A value, and the largest term or partial sum behind it."""

MUTATED = ("registers", "cursor", "model_input", "timestep", "sample")
RESULTS = {
    "sample": Column.SLOT_SAMPLE,
    "guided": Column.SLOT_GUIDED,
    "cond": Column.SLOT_COND,
    "delta": Column.SLOT_DELTA,
    "state": Column.SLOT_STATE,
}
DIGITS = {  # significant bits and least exponent
    torch.float16: (11, -14),
    torch.bfloat16: (8, -126),
    torch.float32: (24, -126),
    torch.float64: (53, -1022),
}
ENOUGH = 512


@dataclass
class Call:
    """What a backend is given, under the names of `thg_kernels.step_update.op`.

    Here latents have the caller's order of dimensions; None stands for what was left out.
    """

    registers: Tensor
    cursor: Tensor
    table: Tensor
    model_output: Tensor
    output_rows: Tensor
    model_input: Tensor | None = None
    timestep: Tensor | None = None
    input_rows: Tensor | None = None
    sample: Tensor | None = None
    noise: Tensor | None = None

    @classmethod
    def of(
        cls,
        state: StepState,
        model_output: Tensor,
        outputs: object,
        noise: Tensor | None = None,
        sample: Tensor | None = None,
    ) -> Call:
        """The call that ``step_update(state, ...)`` stands for; registers and buffers are views."""
        inverse = sorted(range(len(state.order)), key=state.order.__getitem__)
        registers = state.registers.permute(0, 1, *(k + 2 for k in inverse))
        inputs = None if state.inputs is None else _rows(state.inputs)
        return cls(
            registers,
            state.cursor,
            state.device_table,
            model_output,
            _rows(outputs),
            state.model_input,
            state.timestep,
            inputs,
            sample,
            noise,
        )

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What is there."""
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                yield field.name, value

    def copy(self) -> Call:
        """The same values in memory of their own."""
        return replace(self, **{name: value.detach().clone() for name, value in self.tensors()})

    @property
    def slots(self) -> int:
        """Registers per sample."""
        return len(self.registers)


@dataclass
class Wanted:
    """Exact values of one tensor, the error they may have, and where they stand."""

    value: Array
    bound: Array
    written: npt.NDArray[np.bool_]

    @classmethod
    def like(cls, value: Tensor) -> Wanted:
        shape = tuple(value.shape)
        return cls(np.zeros(shape), np.zeros(shape), np.zeros(shape, dtype=bool))

    def put(self, where: tuple[int, ...], value: Array | float, bound: Array | float) -> None:
        """Expect ``value`` there."""
        shape = self.value[where].shape
        self.value[where] = np.reshape(value, shape) if np.ndim(value) else value
        self.bound[where] = np.reshape(bound, shape) if np.ndim(bound) else bound
        self.written[where] = True


def ulp(value: Array, dtype: torch.dtype) -> Array:
    """Distance of neighbouring numbers of ``dtype`` at ``value``."""
    digits, least = DIGITS[dtype]
    with np.errstate(divide="ignore"):
        exponent = np.floor(np.log2(np.abs(value)))
    return np.asarray(np.exp2(np.maximum(exponent, least) - digits + 1))


def weights(line: Array, name: str, slots: int) -> Array:
    """The weights ``name`` in a row of the table."""
    begin = HEAD + ("to_sample", "to_state", "to_delta", "to_change").index(name) * slots
    return line[begin : begin + slots]


def reads(line: Array, slots: int) -> list[int]:
    """Slots that a row may read; all others may hold anything."""
    names = ["to_sample", "to_state"]
    if not line[Column.BOTH]:
        names += ["to_delta", "to_change"]
    return [s for s in range(slots) if any(weights(line, name, slots)[s] != 0 for name in names)]


def is_active(call: Call, b: int) -> bool:
    """Whether sample ``b`` has a row to run and the outputs that the row needs."""
    row = int(call.cursor[0, b])
    if not 0 <= row < len(call.table) - 1 or call.table[row, Column.ACTIVE] == 0:
        return False
    cond, uncond = call.output_rows[:, b].tolist()
    return cond >= 0 and (uncond >= 0 or call.table[row, Column.BOTH] == 0)


def expected(call: Call, ulps_of_bfloat16: float = 0.0) -> dict[str, Wanted]:
    """What the mutated arguments must hold after the call, and where they must be untouched."""
    wanted = {name: Wanted.like(value) for name, value in call.tensors() if name in MUTATED}
    table = array(call.table)
    running = [b for b in range(call.cursor.shape[1]) if is_active(call, b)]
    exact, worst = {}, 0.0
    for b in running:
        row = int(call.cursor[0, b])
        given = _given(call, b, table[row])
        exact[b] = formula(table[row], table[row + 1], call.slots, *given)
        worst = max(worst, own_error(table[row], table[row + 1], call.slots, given))
    for b in running:
        row = int(call.cursor[0, b])
        wanted["cursor"].put((0, b), row + 1, 0.0)
        for name, column in RESULTS.items():
            slot = int(table[row, column])
            if slot >= 0:
                value, size = exact[b][name]
                bound = _bound(value, size, worst, call.registers.dtype, None, 0.0)
                if name == "cond":
                    value, bound = array(torch.from_numpy(value).to(call.registers.dtype)), 0.0
                wanted["registers"].put((slot, b), value, bound)
        _put_outputs(call, wanted, b, table[row + 1], exact[b], worst, ulps_of_bfloat16)
    return wanted


def _put_outputs(
    call: Call,
    wanted: dict[str, Wanted],
    b: int,
    following: Array,
    exact: dict[str, Sized],
    worst: float,
    more: float,
) -> None:
    unit = call.registers.dtype
    if call.sample is not None:
        bound = _bound(*exact["sample"], worst, unit, call.sample.dtype, more)
        wanted["sample"].put((b,), exact["sample"][0], bound)
    if call.input_rows is None:
        return
    cond, uncond = call.input_rows[:, b].tolist()
    for row in (cond, uncond if following[Column.BOTH] else -1):
        if row >= 0 and call.model_input is not None:
            bound = _bound(*exact["input"], worst, unit, call.model_input.dtype, more)
            wanted["model_input"].put((row,), exact["input"][0], bound)
        if row >= 0 and call.timestep is not None:
            # A float64 table is rounded once on its way into a float32 timestep.
            timestep = float(np.float32(following[Column.TIMESTEP]))
            wanted["timestep"].put((row,), timestep, 0.0)


def _bound(
    value: Array,
    size: Array,
    worst: float,
    unit: torch.dtype,
    cast: torch.dtype | None,
    more: float,
) -> Array:
    """See the module's docstring; ``unit`` is the registers' dtype, ``cast`` the output's."""
    bound = (2.0 * worst + 1.0) * ulp(size, unit)
    if cast in (torch.float16, torch.bfloat16, torch.float32) and cast != unit:
        share = 0.5 + (more if cast is torch.bfloat16 else 0.0)
        bound = bound + share * ulp(np.abs(value) + bound, cast)
    return bound


def formula(
    line: Array, following: Array, slots: int, R: Array, c: Array, u: Array, z: Array
) -> dict[str, Sized]:
    """One row of one sample; ``R`` has shape ``(slots, n)``, the others ``(n,)``."""
    past = [(R[s], np.abs(R[s])) for s in range(slots)]
    cond: Sized = (c, np.abs(c))
    if line[Column.BOTH]:
        delta = _sum(c, (1.0, cond), (-1.0, (u, np.abs(u))))
    else:
        change = [(c - R[s], np.maximum(np.abs(c), np.abs(R[s]))) for s in range(slots)]
        delta = _sum(
            c,
            *zip(weights(line, "to_delta", slots), past, strict=True),
            *zip(weights(line, "to_change", slots), change, strict=True),
        )
    guided = _sum(c, (1.0, cond), (line[Column.GUIDANCE], delta))
    state = _sum(
        c,
        *zip(weights(line, "to_state", slots), past, strict=True),
        (line[Column.STATE_FROM_GUIDED], guided),
        (line[Column.STATE_FROM_DELTA], delta),
    )
    sample = _sum(
        c,
        *zip(weights(line, "to_sample", slots), past, strict=True),
        (line[Column.FROM_GUIDED], guided),
        (line[Column.FROM_COND], cond),
        (line[Column.FROM_DELTA], delta),
        (line[Column.FROM_STATE], state),
        (line[Column.NOISE], (z, np.abs(z))),
    )
    scaled = _sum(c, (following[Column.INPUT_SCALE], sample))
    named = {"sample": sample, "guided": guided, "cond": cond, "delta": delta, "state": state}
    return {**named, "input": scaled}


def _sum(like: Array, *terms: tuple[float, Sized]) -> Sized:
    """Terms of weight 0 are not read: they may be NaN."""
    total, size = np.zeros_like(like), np.zeros_like(like)
    for weight, (value, of_value) in terms:
        if weight != 0.0:
            total = total + weight * value
            size = np.maximum(np.maximum(size, np.abs(weight) * of_value), np.abs(total))
    return total, size


def natural(
    line: list[float],
    following: list[float],
    slots: int,
    R: Tensor,
    c: Tensor,
    u: Tensor,
    z: Tensor,
) -> dict[str, Tensor]:
    """`formula` as one would write it in torch, in the dtype of its arguments."""
    at = [HEAD + k * slots for k in range(4)]

    def add(total: Tensor, weight: float, value: Tensor) -> Tensor:
        return total if weight == 0.0 else total + weight * value

    delta = c - u if line[Column.BOTH] else torch.zeros_like(c)
    state, sample = torch.zeros_like(c), torch.zeros_like(c)
    for s in range(slots):
        if not line[Column.BOTH]:
            delta = add(delta, line[at[2] + s], R[s])
            delta = add(delta, line[at[3] + s], c - R[s])
        state = add(state, line[at[1] + s], R[s])
        sample = add(sample, line[at[0] + s], R[s])
    guided = add(c, line[Column.GUIDANCE], delta)
    state = add(state, line[Column.STATE_FROM_GUIDED], guided)
    state = add(state, line[Column.STATE_FROM_DELTA], delta)
    sample = add(sample, line[Column.FROM_GUIDED], guided)
    sample = add(sample, line[Column.FROM_COND], c)
    sample = add(sample, line[Column.FROM_DELTA], delta)
    sample = add(sample, line[Column.FROM_STATE], state)
    sample = add(sample, line[Column.NOISE], z)
    scaled = following[Column.INPUT_SCALE] * sample
    return {"sample": sample, "guided": guided, "delta": delta, "state": state, "input": scaled}


def own_error(
    line: Array, following: Array, slots: int, given: tuple[Array, Array, Array, Array]
) -> float:
    """Largest error of `natural` in float32, in ulps of the largest term behind each element."""
    rng = np.random.default_rng(0)
    wide = [
        np.concatenate([v, rng.standard_normal((*v.shape[:-1], max(0, ENOUGH - v.shape[-1])))], -1)
        for v in given
    ]
    single = [v.astype(np.float32) for v in wide]
    exact = formula(line, following, slots, *(v.astype(np.float64) for v in single))
    found = natural(line.tolist(), following.tolist(), slots, *map(torch.from_numpy, single))
    errors = [
        np.abs(array(found[name]) - exact[name][0]) / ulp(exact[name][1], torch.float32)
        for name in found
    ]
    # What a row does not compute may be NaN: its state, say, in a slot nobody filled.
    return float(np.nanmax(np.stack(errors), initial=0.0))


def check(before: Call, after: Call, ulps_of_bfloat16: float = 0.0) -> None:
    """Hold ``after`` to the expectation: within the bound where written, else bit-identical."""
    wanted = expected(before, ulps_of_bfloat16)
    old = dict(before.tensors())
    for name, value in after.tensors():
        same = bits(value) == bits(old[name])
        if name not in wanted:
            assert same.all(), f"{name} was changed"
            continue
        want, found = wanted[name], array(value)
        assert np.isfinite(want.value[want.written]).all(), f"{name}: the test itself is not finite"
        stray = np.argwhere(~same & ~want.written)
        assert not len(stray), f"{name}: written where it must not be, first at {stray[:1]}"
        wrong = np.argwhere(want.written & ~(np.abs(found - want.value) <= want.bound))
        first = tuple(wrong[0]) if len(wrong) else ()
        assert not len(wrong), (
            f"{name}: {len(wrong)} wrong, first at {first}: found {found[first]!r}, "
            f"wanted {want.value[first]!r} within {want.bound[first]:.3g}"
        )


def array(value: Tensor) -> Array:
    """float64 on the CPU."""
    return value.detach().cpu().to(torch.float64).contiguous().numpy()


def bits(value: Tensor) -> npt.NDArray[np.generic]:
    """The bytes of each element as an integer, so that NaN equals itself."""
    names = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return value.detach().cpu().contiguous().view(names[value.element_size()]).numpy()


def _given(call: Call, b: int, line: Array) -> tuple[Array, Array, Array, Array]:
    """Registers, conditional and unconditional output and noise of one sample, flat."""
    cond, uncond = call.output_rows[:, b].tolist()
    c = array(call.model_output[cond]).reshape(-1)
    u = array(call.model_output[uncond]).reshape(-1) if line[Column.BOTH] else c
    z = array(call.noise[b]).reshape(-1) if call.noise is not None else np.full_like(c, np.nan)
    return array(call.registers[:, b]).reshape(call.slots, -1), c, u, z


def _rows(branches: object) -> Tensor:
    """int32, shape ``(2, B)``, from the two public attributes alone."""
    return torch.tensor([branches.cond, branches.uncond], dtype=torch.int32)
