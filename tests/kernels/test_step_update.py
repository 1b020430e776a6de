"""The reference step against the formulas of its docstring, in NumPy float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thg_engine.plan import Row
from thg_kernels.step_update import Registers, step_update

SIZES = [(0,), (1,), (1025,), (2, 3, 5, 7), (1, 3, 2, 5, 3), (3, 1, 1, 129)]
EMPTY = Row(0.0, 0.0)
NAMES = {"X": "samples", "C": "conds", "D": "deltas", "E": "guided", "H": "hares"}


def numpy_step(row, before, c, u, z, sign=-1.0):
    """(x_next, registers after) for float64 arrays; sign +1 on absolute values bounds the terms."""

    def total(weights, values):
        chosen = [w * v for w, v in zip(weights, values, strict=False) if w != 0.0]
        return sum(chosen, np.zeros_like(c))

    after = {name: list(values) for name, values in before.items()}
    after["C"] = [c, *after["C"]]
    if row.evaluates_both:
        after["D"] = [c + sign * u, *after["D"]]
        delta = after["D"][0]
    else:
        changes = [c + sign * v for v in after["C"][1:]]
        delta = total(row.delta_weights, after["D"]) + total(row.cond_change_weights, changes)
    if row.hare_sample_update or row.hare_delta_update:
        hare = total(row.hare_sample_update, after["H"]) + total(row.hare_delta_update, after["D"])
        after["H"] = [hare, *after["H"]]
    after["E"] = [c + row.guidance_weight * delta if row.guidance_weight else c, *after["E"]]
    x = (
        total(row.sample_weights, after["X"])
        + total(row.guided_weights, after["E"])
        + total(row.cond_weights, after["C"])
        + total(row.step_delta_weights, after["D"])
        + total(row.hare_weights, after["H"])
    )
    if row.noise_weight:
        x = x + row.noise_weight * z
    return x, after


def magnitude(row, before, c, u, z):
    """Sum of the absolute values of all terms: what rounding errors are relative to."""
    columns = {
        name: tuple(map(abs, value)) if isinstance(value, tuple) else value
        for name, value in vars(row).items()
    }
    columns["guidance_weight"] = abs(row.guidance_weight)
    columns["noise_weight"] = abs(row.noise_weight)
    parts = [None if v is None else np.abs(v) for v in (c, u, z)]
    sizes = {name: [np.abs(v) for v in values] for name, values in before.items()}
    return numpy_step(Row(**columns), sizes, *parts, sign=1.0)[0]


weights = st.lists(st.sampled_from([0.0, 0.0, 1.0, -0.5, 1.7, 0.03]), max_size=3).map(tuple)


@st.composite
def rows(draw):
    return Row(
        timestep=1.0,
        lambda_t=0.0,
        evaluates_both=draw(st.booleans()),
        guidance_weight=draw(st.sampled_from([0.0, 6.5, -1.0, 0.3])),
        delta_weights=draw(weights),
        cond_change_weights=draw(weights),
        sample_weights=draw(weights),
        guided_weights=draw(weights),
        cond_weights=draw(weights),
        step_delta_weights=draw(weights),
        hare_weights=draw(weights),
        hare_sample_update=draw(weights),
        hare_delta_update=draw(weights),
        noise_weight=draw(st.sampled_from([0.0, 0.4])),
    )


def entries_read(row) -> set[tuple[str, int]]:
    """(register, age before the step) of every stored entry that the formulas need."""
    shift = {"X": 0, "C": 1, "E": 1, "D": int(row.evaluates_both)}
    shift["H"] = int(bool(row.hare_sample_update or row.hare_delta_update))
    columns = [
        ("X", row.sample_weights, 0),
        ("E", row.guided_weights, 1),
        ("C", row.cond_weights, 1),
        ("D", row.step_delta_weights, shift["D"]),
        ("H", row.hare_weights, shift["H"]),
        ("D", row.hare_delta_update, shift["D"]),
        ("H", row.hare_sample_update, 0),
    ]
    if not row.evaluates_both and row.guidance_weight:
        columns += [("D", row.delta_weights, 0), ("C", row.cond_change_weights, 0)]
    return {
        (name, age - moved)
        for name, values, moved in columns
        for age, weight in enumerate(values)
        if weight != 0.0
    }


def problem(row, shape, seed, dtype, out_dtype):
    """Registers (entries that must not be read are NaN) and outputs, as tensors and as float64."""
    generator = torch.Generator().manual_seed(seed)

    def draw(kind):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(kind)

    read = entries_read(row)
    stored = {
        name: [
            draw(dtype) if (name, age) in read else torch.full(shape, torch.nan, dtype=dtype)
            for age in range(3)
        ]
        for name in NAMES
    }
    registers = Registers(
        samples=list(stored["X"]),
        depths=dict.fromkeys(NAMES, 4),
        conds=list(stored["C"]),
        deltas=list(stored["D"]),
        guided=list(stored["E"]),
        hares=list(stored["H"]),
    )
    cond = draw(out_dtype)
    uncond = draw(out_dtype) if row.evaluates_both else None
    noise = draw(dtype) if row.noise_weight else None
    arrays = {name: [v.double().numpy() for v in values] for name, values in stored.items()}
    outputs = [None if v is None else v.double().numpy() for v in (cond, uncond, noise)]
    return registers, (cond, uncond, noise), arrays, outputs


def check(row, shape, seed, dtype, out_dtype):
    registers, tensors, arrays, outputs = problem(row, shape, seed, dtype, out_dtype)
    kept = [None if v is None else v.clone() for v in tensors]
    found = step_update(registers, row, *tensors)
    expected, after = numpy_step(row, arrays, *outputs)
    assert found.dtype == dtype and found.shape == shape
    assert np.isfinite(expected).all()
    # At most 16 terms, each of at most 4 roundings, and a sum.
    bound = 24 * torch.finfo(dtype).eps * magnitude(row, arrays, *outputs)
    assert (np.abs(found.double().numpy() - expected) <= bound).all()
    after["X"] = [expected, *after["X"]]
    for name, attribute in NAMES.items():
        stack = getattr(registers, attribute)
        assert len(stack) == min(4, len(after[name]))
        for value, wanted in zip(stack, after[name], strict=False):
            np.testing.assert_allclose(
                value.double().numpy(), wanted, rtol=1e-4, atol=1e-4, equal_nan=True
            )
    assert registers.samples[0] is found
    for value, copy in zip(tensors, kept, strict=True):
        assert value is None or torch.equal(value, copy)


@settings(deadline=None, max_examples=150)
@given(rows(), st.integers(0, 10**6))
def test_random_rows_in_float64(row, seed):
    check(row, (2, 3), seed, torch.float64, torch.float64)


@settings(deadline=None, max_examples=40)
@given(rows(), st.integers(0, 10**6), st.sampled_from(SIZES))
@pytest.mark.parametrize("out_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_random_rows_with_half_precision_outputs(out_dtype, row, seed, shape):
    check(row, shape, seed, torch.float32, out_dtype)


FULL = Row(
    1.0,
    0.0,
    guidance_weight=6.5,
    sample_weights=(0.9, 0.0, 0.1),
    guided_weights=(-0.4, 0.2),
    cond_weights=(0.3, 0.1),
    step_delta_weights=(0.2, 0.7),
    hare_weights=(1.0, 0.5),
    hare_sample_update=(0.8,),
    hare_delta_update=(0.6, 0.1),
    noise_weight=0.25,
)
HELD = replace(FULL, evaluates_both=False, delta_weights=(1.4, -0.4), cond_change_weights=(0.2,))


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("row", [FULL, HELD], ids=["fresh", "held"])
@pytest.mark.parametrize("out_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_full_rows_of_every_size(row, shape, out_dtype):
    check(row, shape, 11, torch.float32, out_dtype)


@pytest.mark.parametrize("row", [FULL, HELD], ids=["fresh", "held"])
def test_strided_inputs(row):
    registers, tensors, arrays, outputs = problem(row, (4, 6, 5), 3, torch.float64, torch.float64)
    strided = [None if v is None else v.mT.contiguous().mT for v in tensors]
    assert not strided[0].is_contiguous()
    found = step_update(registers, row, *strided)
    expected, _ = numpy_step(row, arrays, *outputs)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-12)


def registers_of(depths, dtype=torch.float64):
    return Registers([torch.ones(2, 2, dtype=dtype)], {**dict.fromkeys(NAMES, 0), **depths})


def test_registers_keep_what_the_plan_reads():
    registers = registers_of({"X": 2, "E": 3, "D": 1})
    row = replace(EMPTY, guidance_weight=1.0, sample_weights=(1.0,), guided_weights=(1.0,))
    outputs = [torch.full((2, 2), float(k), dtype=torch.float64) for k in range(6)]
    for k in range(5):
        step_update(registers, row, outputs[k + 1], outputs[k])
    # E = c + (c - u) = c + 1; X grows by E.
    assert [float(v[0, 0]) for v in registers.guided] == [6.0, 5.0, 4.0]
    assert [float(v[0, 0]) for v in registers.samples] == [21.0, 15.0]
    assert [len(v) for v in (registers.deltas, registers.conds, registers.hares)] == [1, 0, 0]


def test_guided_output_is_kept_although_its_row_does_not_use_it():
    """E_1 of a later row is the guided output of the row before, whatever that row's step read."""
    registers = registers_of({"X": 1, "E": 2})
    c, u = torch.full((2, 2), 3.0).double(), torch.full((2, 2), 1.0).double()
    silent = replace(EMPTY, guidance_weight=0.5, sample_weights=(1.0,))
    step_update(registers, silent, c, u)
    reader = replace(silent, guided_weights=(0.0, 1.0), sample_weights=())
    found = step_update(registers, reader, 2 * c, u)
    assert torch.equal(found, c + 0.5 * (c - u))


def test_rows_of_zeros_give_zeros():
    registers = registers_of({"X": 1})
    zeros = replace(EMPTY, sample_weights=(0.0,), hare_sample_update=(0.0,))
    out = torch.ones(2, 2, dtype=torch.float64)
    assert torch.equal(step_update(registers, zeros, out, out), torch.zeros_like(out))


def test_registers_hold_copies_of_outputs():
    registers = registers_of({"X": 1, "C": 2, "E": 2, "D": 1})
    c, u = torch.ones(2, 2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
    step_update(registers, replace(EMPTY, guided_weights=(1.0,)), c, u)
    c.fill_(9.0), u.fill_(9.0)
    for value in (registers.conds[0], registers.guided[0], registers.deltas[0]):
        assert torch.equal(value, torch.ones_like(value))


@pytest.mark.parametrize(
    ("changes", "values", "message"),
    [
        ({}, {"uncond": None}, "no uncond for a row with evaluates_both=True"),
        ({"evaluates_both": False}, {}, "uncond for a row with evaluates_both=False"),
        ({"noise_weight": 0.5}, {}, "no noise for a row with noise_weight=0.5"),
        ({}, {"cond": torch.ones(1, 2)}, r"cond of shape \(1, 2\): give \(2, 2\)"),
        ({}, {"uncond": torch.ones(2)}, r"uncond of shape \(2,\): give \(2, 2\)"),
        ({"noise_weight": 0.5}, {"noise": torch.ones(())}, r"noise of shape \(\)"),
    ],
)
def test_refusals_leave_the_registers_alone(changes, values, message):
    registers = registers_of({"X": 1, "C": 1, "D": 1, "E": 1})
    before = registers.samples[0]
    row = replace(EMPTY, sample_weights=(1.0,), guided_weights=(1.0,), **changes)
    arguments = {"cond": torch.ones(2, 2), "uncond": torch.ones(2, 2), "noise": None, **values}
    with pytest.raises(ValueError, match=message):
        step_update(registers, row, **arguments)
    assert registers.samples == [before]
    assert not (registers.conds or registers.deltas or registers.guided)
