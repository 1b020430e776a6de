"""Malformed calls: each is refused by the name of its argument, and nothing has been touched."""

from __future__ import annotations

from collections.abc import Callable
from math import inf, nan
from typing import NamedTuple

import numpy as np
import pytest
import torch
from kernel_cases import CPU, make_state, random_row, random_table, table_of
from step_rows import Call, bits
from torch import Tensor

from thg_kernels.step_update import (
    BackendUnavailable,
    BranchRows,
    Column,
    InvalidInput,
    StepState,
    StepTable,
    choose_backend,
    native_op,
    op,
    stack,
    step_update,
    why_unavailable,
)

BOTH = BranchRows.both(2)
LATENT = (4, 5)
QUIET = random_table(31, num_slots=6, noise=False)
LINES = random_table(31, num_slots=6).rows
LINES[2, Column.NOISE] = 1.0
TABLE = StepTable(LINES.clone(), random_table(31, num_slots=6).sample_slots)
SAMPLES = torch.zeros(2, *LATENT)


class Setting(NamedTuple):
    """A sound call: two samples, the first of which evaluates both branches and adds noise."""

    state: StepState
    output: Tensor
    noise: Tensor
    sample: Tensor

    @classmethod
    def sound(cls) -> Setting:
        state = make_state(TABLE, LATENT, [2, 1], CPU[0], inputs=BOTH)
        x = torch.randn(4, *LATENT)
        return cls(state, x, torch.randn(2, *LATENT), torch.full((2, *LATENT), nan))

    def call(self, *, outputs: object = BOTH, **changed: object) -> None:
        """The sound call but for what is ``changed``."""
        given = {"noise": self.noise, "sample": self.sample, "backend": "reference", **changed}
        step_update(self.state, given.pop("model_output", self.output), outputs, **given)


def _view(base: Tensor, shape: tuple[int, ...]) -> Tensor:
    """``shape`` within the memory of ``base``."""
    return base.as_strided(shape, (0, *torch.zeros(shape[1:]).stride()), base.storage_offset())


def _foreign(base: Tensor, rows: int, shift: int) -> Tensor:
    """``rows`` rows of a latent in the memory of ``base`` from element ``shift`` on; as of another
    library, in a storage of its own."""
    whole = base.detach().numpy().reshape(-1)
    size = rows * LATENT[0] * LATENT[1]
    value = torch.from_numpy(whole[shift : shift + size]).view(rows, *LATENT)
    assert value.untyped_storage().data_ptr() != base.untyped_storage().data_ptr()
    return value


def _changed(name: str, change: Callable[[Setting], object]) -> Callable[[Setting], None]:
    return lambda s: s.call(**{name: change(s)})


def _float64(s: Setting) -> None:
    state = make_state(QUIET, LATENT, 0, CPU[0], batch=2, register_dtype=torch.float64)
    step_update(state, s.output, BOTH, backend="triton")


def _of_another_device(s: Setting) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_op, "why_unavailable", lambda backend: "")
        s.call(backend="cuda")


def _unavailable(s: Setting) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_op, "why_unavailable", lambda backend: "no compiler was found")
        s.call(backend="cpu")


# name of the argument in the message: calls
CALLS: dict[str, dict[str, Callable[[Setting], object]]] = {
    "model_output": {
        "fewer dimensions": _changed("model_output", lambda s: s.output[0]),
        "more dimensions": _changed("model_output", lambda s: s.output[None]),
        "another latent": _changed("model_output", lambda s: s.output[..., :4]),
        "learned variance": _changed("model_output", lambda s: s.output.repeat(1, 2, 1)),
        "integers": _changed("model_output", lambda s: s.output.int()),
        "booleans": _changed("model_output", lambda s: s.output > 0),
        "complex": _changed("model_output", lambda s: s.output + 0j),
        "float8": _changed("model_output", lambda s: s.output.to(torch.float8_e4m3fn)),
        "another device": _changed("model_output", lambda s: s.output.to("meta")),
        "sparse": _changed("model_output", lambda s: s.output.to_sparse()),
        "a tuple": _changed("model_output", lambda s: (s.output,)),
        "None": _changed("model_output", lambda s: None),
        "a register": _changed("model_output", lambda s: _view(s.state.registers, (4, *LATENT))),
        "the model input": _changed("model_output", lambda s: s.state.model_input),
        "the timestep": _changed("model_output", lambda s: s.state.timestep[:1].expand(4, *LATENT)),
        "the table": _changed("model_output", lambda s: _view(s.state.device_table, (4, *LATENT))),
        "the sample": lambda s: s.call(model_output=s.output, sample=s.output[:2]),
        "foreign memory of a register": _changed(
            "model_output", lambda s: _foreign(s.state.registers, 4, 1)
        ),
        "foreign memory of the sample": lambda s: s.call(
            model_output=s.output, sample=_foreign(s.output, 2, 3)
        ),
    },
    "outputs": {
        "more samples": lambda s: s.call(outputs=BranchRows.both(3)),
        "fewer samples": lambda s: s.call(outputs=BranchRows.both(1)),
        "a row too far": lambda s: s.call(outputs=BranchRows((2, 4), (0, 1))),
        "None": lambda s: s.call(outputs=None),
        "two tuples": lambda s: s.call(outputs=((2, 3), (0, 1))),
    },
    "outputs.uncond": {
        "no unconditional row": lambda s: s.call(outputs=BranchRows.cond_only(2)),
        "none for one": lambda s: s.call(outputs=BranchRows((2, 3), (-1, 1))),
    },
    "noise": {
        "missing": _changed("noise", lambda s: None),
        "for one sample": _changed("noise", lambda s: s.noise[:1]),
        "for the denoiser's rows": _changed("noise", lambda s: torch.randn(4, *LATENT)),
        "another latent": _changed("noise", lambda s: s.noise[..., :1]),
        "integers": _changed("noise", lambda s: s.noise.int()),
        "another device": _changed("noise", lambda s: s.noise.to("meta")),
        "a number": _changed("noise", lambda s: 1.0),
        "a register": _changed("noise", lambda s: s.state.registers[0]),
        "the model input": _changed("noise", lambda s: s.state.model_input[:2]),
        "the sample": lambda s: s.call(noise=s.sample),
    },
    "sample": {
        "one sample": _changed("sample", lambda s: s.sample[:1]),
        "another latent": _changed("sample", lambda s: s.sample.repeat(1, 1, 2)),
        "integers": _changed("sample", lambda s: s.sample.nan_to_num().int()),
        "another device": _changed("sample", lambda s: s.sample.to("meta")),
        "expanded": _changed("sample", lambda s: s.sample[:1].expand(2, *LATENT)),
        "expanded within": _changed("sample", lambda s: s.sample[..., :1].expand(2, *LATENT)),
        "windows": _changed("sample", lambda s: s.sample.as_strided((2, *LATENT), (20, 1, 1))),
        "a register": _changed("sample", lambda s: s.state.registers[1]),
        "the model input": _changed("sample", lambda s: s.state.model_input[:2]),
        "the table": _changed("sample", lambda s: s.state.device_table.view(-1)[:40].view(2, 4, 5)),
    },
    "backend": {
        "unknown": lambda s: s.call(backend="cudnn"),
        "another device's": _of_another_device,
        "float64 registers": _float64,
        "float64 output": lambda s: s.call(model_output=s.output.double(), backend="triton"),
    },
}


@pytest.mark.parametrize(
    ("argument", "case"), [(name, case) for name, cases in CALLS.items() for case in cases]
)
def test_refused_and_untouched(argument: str, case: str) -> None:
    if argument == "backend" and why_unavailable("triton"):
        pytest.skip(why_unavailable("triton"))
    setting = Setting.sound()
    call = Call.of(setting.state, setting.output, BOTH, setting.noise, setting.sample)
    before, positions = call.copy(), list(setting.state.positions)
    with pytest.raises(InvalidInput, match=rf"^{argument}=") as caught:
        CALLS[argument][case](setting)
    assert caught.value.argument == argument
    assert caught.value.remedy and isinstance(caught.value, ValueError)
    _assert_untouched(before, call)
    assert setting.state.positions == positions == [2, 1]
    setting.call()
    assert setting.state.positions == [3, 2], "the sound call runs"


def _assert_untouched(before: Call, after: Call) -> None:
    for (name, old), (_, new) in zip(before.tensors(), after.tensors(), strict=True):
        assert (bits(old) == bits(new)).all(), f"{name} was changed"


def test_backend_that_is_not_there() -> None:
    setting = Setting.sound()
    call = Call.of(setting.state, setting.output, BOTH, setting.noise, setting.sample)
    before = call.copy()
    with pytest.raises(BackendUnavailable, match="backend 'cpu' cannot run: no compiler was found"):
        _unavailable(setting)
    _assert_untouched(before, call)
    assert setting.state.positions == [2, 1]


def test_backends_say_why() -> None:
    with pytest.raises(InvalidInput, match=r"^backend='opencl': use one of reference"):
        why_unavailable("opencl")
    assert why_unavailable("reference") == ""
    if not torch.cuda.is_available():
        assert "CUDA" in why_unavailable("cuda")
    assert choose_backend(torch.device("cpu"), wide=True) == "reference"
    assert choose_backend(torch.device("cpu")) in ("cpu", "reference")


@pytest.mark.parametrize(
    ("device", "backend"),
    [("cpu", "cpu"), ("cuda", "cuda"), ("cuda:1", "cuda"), ("mps", "reference")]
    + [(device, "reference") for device in ("xpu", "meta", "hpu")],
)
def test_a_backend_is_taken_where_it_runs(
    monkeypatch: pytest.MonkeyPatch, device: str, backend: str
) -> None:
    """With every backend there is; what serves no such device is not taken for it."""
    monkeypatch.setattr(native_op, "why_unavailable", lambda backend: "")
    monkeypatch.setattr(op, "why_no_triton", lambda: "")
    assert choose_backend(torch.device(device)) == backend
    assert choose_backend(torch.device(device), wide=True) == "reference"


def test_triton_is_taken_where_cuda_was_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_op, "why_unavailable", lambda backend: "not built")
    monkeypatch.setattr(op, "why_no_triton", lambda: "")
    assert choose_backend(torch.device("cuda")) == "triton"
    assert choose_backend(torch.device("cpu")) == choose_backend(torch.device("mps")) == "reference"


def _with(row: int, column: int, value: float) -> Tensor:
    rows = LINES.clone()
    rows[row, column] = value
    return rows


def _twice(row: int) -> Tensor:
    rows = LINES.clone()
    rows[row, Column.SLOT_SAMPLE : Column.SLOT_STATE + 1] = torch.tensor([1.0, -1, 2, -1, 2])
    return rows


ROWS: dict[str, tuple[str, Callable[[], object]]] = {
    "NaN": (r"rows\[1, 9\]=nan", lambda: _with(1, Column.NOISE, nan)),
    "inf": (r"rows\[0, 21\]=-inf", lambda: _with(0, 21, -inf)),
    "1e39": (r"rows\[2, 2\]=1e\+39", lambda: _with(2, Column.TIMESTEP, 1e39)),
    "NaN in a terminal row": (r"rows\[4, 3\]=nan", lambda: _with(4, Column.INPUT_SCALE, nan)),
    "ACTIVE 0.5": (r"rows\[1\].ACTIVE=0.5", lambda: _with(1, Column.ACTIVE, 0.5)),
    "BOTH 2": (r"rows\[1\].BOTH=2.0", lambda: _with(1, Column.BOTH, 2.0)),
    "BOTH -1": (r"rows\[3\].BOTH=-1.0", lambda: _with(3, Column.BOTH, -1.0)),
    "slot 6 of 6": (r"rows\[0\].SLOT_\*=6.0", lambda: _with(0, Column.SLOT_DELTA, 6.0)),
    "slot -2": (r"rows\[0\].SLOT_\*=-2.0", lambda: _with(0, Column.SLOT_COND, -2.0)),
    "slot 1.5": (r"rows\[0\].SLOT_\*=1.5", lambda: _with(0, Column.SLOT_STATE, 1.5)),
    "two results": (r"rows\[1\].SLOT_\*=.*two results", lambda: _twice(1)),
    "no sample": (r"rows\[2\].SLOT_SAMPLE=-1", lambda: _with(2, Column.SLOT_SAMPLE, -1.0)),
    "no terminal row": (r"^rows=.*terminal", lambda: LINES[:-1].clone()),
    "no row at all": (r"^rows=.*terminal", lambda: LINES[:0].clone()),
    "float32": (r"^rows=.*float64", lambda: LINES.float()),
    "another device": (r"^rows=.*CPU", lambda: LINES.to("meta")),
    "a vector": (r"^rows=.*matrix", lambda: LINES[0].clone()),
    "a list": (r"^rows='list'", lambda: LINES.tolist()),
    "too narrow": (r"^rows=.*columns", lambda: LINES[:, :20].clone()),
    "odd width": (r"^rows=.*columns", lambda: LINES[:, :-1].clone()),
    "too wide": (r"^rows=.*1 to 64 slots", lambda: torch.zeros(1, 20 + 4 * 65).double()),
}


@pytest.mark.parametrize("case", ROWS)
def test_refused_tables(case: str) -> None:
    match, rows = ROWS[case]
    given = rows()
    slots = (0,) * (len(given) if isinstance(given, list) or given.ndim else 0)
    with pytest.raises(InvalidInput, match=match):
        StepTable(given, slots)


@pytest.mark.parametrize("slots", [(0,) * 4, (0,) * 6, (0, 1, 2, 3, 6), (-1,) * 5, (0.0,) * 5])
def test_refused_sample_slots(slots: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInput, match=r"^sample_slots="):
        StepTable(LINES.clone(), slots)


@pytest.mark.parametrize("row", range(1, 5))
def test_sample_slots_are_those_that_the_rows_write(row: int) -> None:
    """Row 0 alone may name any: what it reads was put there by hand."""
    slots = list(TABLE.sample_slots)
    slots[0] = (slots[0] + 1) % 6
    StepTable(LINES.clone(), tuple(slots))
    slots[row] = (slots[row] + 1) % 6
    with pytest.raises(InvalidInput, match=rf"^sample_slots\[{row}\]={slots[row]}: row {row - 1} "):
        StepTable(LINES.clone(), tuple(slots))


BRANCHES = {
    "cond": [((-2,), (0,)), ((0.0,), (1,)), ((True,), (0,)), (3, (1,))],
    "uncond": [((0, 1), (2,)), ((0,), ()), ((0,), (-5,)), ((0,), None)],
    "cond [+] uncond": [((0, 0), (-1, -1)), ((0, 1), (1, 2)), ((2,), (2,))],
}


@pytest.mark.parametrize(
    ("argument", "rows"), [(name, rows) for name, cases in BRANCHES.items() for rows in cases]
)
def test_refused_branches(argument: str, rows: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(InvalidInput, match=rf"^{argument}="):
        BranchRows(*rows)


STATES: dict[str, list[Callable[[], StepState]]] = {
    "table": [lambda: StepState(LINES, SAMPLES)],
    "x": [
        lambda: StepState(TABLE, [0.0]),
        lambda: StepState(TABLE, SAMPLES.int()),
        lambda: StepState(TABLE, torch.zeros(3)),
    ],
    "rows": [
        lambda: StepState(TABLE, SAMPLES, 5),
        lambda: StepState(TABLE, SAMPLES, -1),
        lambda: StepState(TABLE, SAMPLES, [0, 1, 2]),
        lambda: StepState(TABLE, SAMPLES, [0, 7]),
        lambda: StepState(TABLE, SAMPLES, [0, 1.0]),
        lambda: StepState(TABLE, SAMPLES, True),
        lambda: StepState(TABLE, SAMPLES, None),
        lambda: StepState(TABLE, SAMPLES, 1.0),
    ],
    "register_dtype": [
        lambda: StepState(TABLE, SAMPLES, register_dtype=torch.float16),
        lambda: StepState(TABLE, SAMPLES, register_dtype=torch.int32),
    ],
    "model_dtype": [
        lambda: StepState(TABLE, SAMPLES, model_dtype=torch.float8_e5m2),
        lambda: StepState(TABLE, SAMPLES, model_dtype=torch.int8),
        lambda: StepState(TABLE, SAMPLES, model_dtype="float16"),
    ],
    "inputs": [
        lambda: StepState(TABLE, SAMPLES, inputs=BranchRows.both(3)),
        lambda: StepState(TABLE, SAMPLES, inputs=((0, 1), (2, 3))),
    ],
}


@pytest.mark.parametrize(
    ("argument", "case"), [(name, k) for name, cases in STATES.items() for k in range(len(cases))]
)
def test_refused_states(argument: str, case: int) -> None:
    with pytest.raises(InvalidInput, match=rf"^{argument}="):
        STATES[argument][case]()


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("rows", lambda state: state.seek(5)),
        ("rows", lambda state: state.seek([0, -1])),
        ("rows", lambda state: state.seek([0])),
        ("x", lambda state: state.set_samples(torch.zeros(2, 4, 1))),
        ("x", lambda state: state.set_samples(torch.zeros(1, *LATENT))),
        ("table", lambda state: state.replace_table(random_table(1, num_rows=3))),
        ("table", lambda state: state.replace_table(random_table(1, num_slots=5))),
    ],
)
def test_refused_changes(argument: str, change: Callable[[StepState], None]) -> None:
    setting = Setting.sound()
    call = Call.of(setting.state, setting.output, BOTH)
    before = call.copy()
    with pytest.raises(InvalidInput, match=f"^{argument}="):
        change(setting.state)
    _assert_untouched(before, call)
    assert setting.state.positions == [2, 1]


def test_no_table_to_stack() -> None:
    with pytest.raises(InvalidInput, match=r"^tables="):
        stack([])


def test_active_row_of_one_slot() -> None:
    """The narrowest table there is."""
    row = random_row(np.random.default_rng(0), 1, both=True, writes=[0, -1, -1, -1, -1])
    assert table_of([row]).num_slots == 1
