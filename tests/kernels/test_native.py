"""The native backends beyond what all backends share: threads, instructions, direct calls, loading.

That the CPU library computes the right numbers over dtypes, sizes and layouts is also tested in
test_step_update*, with every other backend.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import Backend, make_noise, make_output, make_sample, make_state, random_table
from step_rows import MUTATED, Call, bits, check
from torch import Tensor

from thg_kernels.step_update import BranchRows, native_op, op
from thg_kernels.step_update.op import FLAT

ROOT = Path(__file__).resolve().parents[2]
CPU = Backend("cpu", "cpu")
ROWS = BranchRows((2, 3, 1), (4, -1, 0))
OPTIONAL = ("model_input", "timestep", "input_rows", "sample", "noise")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def native() -> Callable[..., None]:
    CPU.require()
    return native_op.native_backend("cpu")


def arguments(latent: tuple[int, ...] = (3, 7), seed: int = 21) -> tuple[Call, dict[str, Any]]:
    """A call of three samples, the last one at its end, and the operator's arguments by name."""
    table = random_table(seed, num_rows=2, num_slots=5)
    inputs = BranchRows.both(3)
    state = make_state(table, latent, [0, 1, 2], CPU, model_dtype=torch.float16, inputs=inputs)
    output = make_output(state, ROWS, torch.float16)
    call = Call.of(state, output, ROWS, make_noise(state, ROWS, torch.float32), make_sample(state))
    given = {**dict(call.tensors()), "uses": int(table.uses), "layout": list(FLAT)}
    return call, {name: given[name] for name in NAMES}


NAMES = (
    *("registers", "cursor", "table", "model_output", "output_rows"),
    *(*OPTIONAL, "uses", "layout"),
)


# Over the grain, so that threads share samples; from 2**20 elements on stores are streamed, where
# rows stand on cache lines (the even size) and where they do not.
@pytest.mark.parametrize("latent", [(7, 8191), (2**19,), (2**19 + 3,)], ids=str)
def test_threads_agree_with_one_and_with_the_formula(
    native: Callable[..., None], latent: tuple[int, ...]
) -> None:
    call, given = arguments(latent)
    before, alone = call.copy(), call.copy()
    torch.set_num_threads(2)
    native(*given.values())
    check(before, call)
    torch.set_num_threads(1)
    native(*{**given, **dict(alone.tensors())}.values())
    for (name, one), (_, two) in zip(alone.tensors(), call.tensors(), strict=True):
        assert (bits(one) == bits(two)).all(), name


PROBE = """
import torch
from thg_kernels.step_update import *
from thg_kernels.step_update.table import HEAD
torch.manual_seed(0)
rows = blank_rows(2, 3)
rows[0, :8] = torch.tensor([1, 1, 5, 0.9, 6.5, 0.3, 0.7, -0.2])
rows[0, HEAD:HEAD + 3] = torch.tensor([0.4, -0.6, 0.2])
rows[0, Column.SLOT_SAMPLE] = 2
state = StepState(StepTable(rows, (0, 2)), torch.randn(1, 4099))
state.registers.normal_()
outputs = torch.randn(2, 4099)
exact = state.registers[:, 0].double()
c, u = outputs[1].double(), outputs[0].double()
want = (torch.tensor([0.4, -0.6, 0.2], dtype=torch.float32).double()[:, None] * exact).sum(0)
want += 0.3 * (c + 6.5 * (c - u)) + 0.7 * c - 0.2 * (c - u)
step_update(state, outputs, BranchRows.both(1), backend="cpu")
print((state.samples()[0].double() - want).abs().max().item())
print(hash(state.samples().numpy().tobytes()))
"""


def test_instructions_are_chosen(native: Callable[..., None]) -> None:
    """Without fused multiply-add the last bits differ, so the bits tell what has run."""
    found = {}
    for variant in ("portable", ""):
        environment = {k: v for k, v in os.environ.items() if k != "THG_CPU_VARIANT"}
        environment |= {"PYTHONPATH": str(ROOT / "kernels"), "PYTHONHASHSEED": "0"}
        if variant:
            environment["THG_CPU_VARIANT"] = variant
        command = [sys.executable, "-c", PROBE]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        error, found[variant] = done.stdout.split()
        assert float(error) < 3e-5
    has_fma = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    assert (found[""] != found["portable"]) == has_fma


PATTERNS = [OPTIONAL, (), ("model_input", "input_rows"), ("timestep", "input_rows"), ("sample",)]


@pytest.mark.parametrize("kept", PATTERNS, ids=lambda kept: "-".join(kept) or "none")
def test_opcheck(native: Callable[..., None], kept: tuple[str, ...]) -> None:
    _, given = arguments()
    given |= dict.fromkeys(set(OPTIONAL) - set(kept))
    torch.library.opcheck(
        torch.ops.thg_engine.step_update.default,
        tuple(given.values()),
        test_utils=(
            *("test_schema", "test_faketensor"),
            *("test_autograd_registration", "test_aot_dispatch_dynamic"),
        ),
    )


def test_compiled_equals_eager(native: Callable[..., None]) -> None:
    """What is mutated is seen by the code behind the operator, also through functionalisation."""
    call, given = arguments()
    traced = call.copy()

    def body(registers: Tensor, *rest: object) -> Tensor:
        doubled = registers * 2.0
        native(doubled, *rest)
        return doubled + 1.0

    wanted = body(*given.values())
    compiled = torch.compile(body, backend="aot_eager", fullgraph=True)
    found = compiled(*{**given, **dict(traced.tensors())}.values())
    assert (bits(found) == bits(wanted)).all()
    for (name, old), (_, new) in zip(call.tensors(), traced.tensors(), strict=True):
        assert (bits(old) == bits(new)).all(), name
    assert traced.cursor[0].tolist() == [1, 2, 2]


def strided(value: Tensor) -> Tensor:
    """The same values, with the dimensions of the latent the other way round in memory."""
    return value.transpose(1, 2).contiguous().transpose(1, 2)


# argument -> (what it becomes, what is said about it); the call has 3 samples of (3, 7), 5 slots.
REFUSED: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "float64 registers": ("registers", Tensor.double, "registers must be Float"),
    "strided registers": ("registers", lambda t: t.transpose(2, 3), "registers must be contiguous"),
    "flat registers": ("registers", lambda t: t.reshape(-1), r"shape \(slots, batch"),
    "no slots": ("registers", lambda t: t[:0], "1 to 64 slots"),
    "65 slots": ("registers", lambda t: t[:1].expand(65, -1, -1, -1).clone(), "1 to 64 slots"),
    "fewer samples": ("registers", lambda t: t[:, :2].clone(), r"cursor must have shape \(2, 2\)"),
    "other latent": ("registers", lambda t: t[..., :3].clone(), "latent shape of the registers"),
    "int64 cursor": ("cursor", Tensor.long, "cursor must be Int"),
    "one cursor": ("cursor", lambda t: t[:1], r"cursor must have shape \(2, 3\)"),
    "strided cursor": ("cursor", lambda t: t.t().contiguous().t(), "cursor must be contiguous"),
    "float64 table": ("table", Tensor.double, "table must be Float"),
    "narrow table": ("table", lambda t: t[:, :36].clone(), "40 columns for 5 slots"),
    "empty table": ("table", lambda t: t[:0], "at least one row"),
    "float64 output": ("model_output", Tensor.double, "model_output must be float32, float16"),
    "integer output": ("model_output", Tensor.int, "model_output must be float32, float16"),
    "short output": ("model_output", lambda t: t[..., :6], "model_output must have the latent"),
    "flat output": ("model_output", lambda t: t.flatten(1), "model_output must have the latent"),
    "int64 rows": ("output_rows", Tensor.long, "output_rows must be Int"),
    "three rows": ("output_rows", lambda t: t[[0, 1, 1]], r"output_rows must have shape \(2, 3\)"),
    "float64 input": ("model_input", Tensor.double, "model_input must be float32, float16"),
    "strided input": ("model_input", strided, "contig"),
    "flat input": ("model_input", lambda t: t.flatten(1), "model_input must have the latent"),
    "half timestep": ("timestep", Tensor.half, "timestep must be Float"),
    "timesteps in a square": ("timestep", lambda t: t.reshape(2, 3), "timestep must have one"),
    "int64 input rows": ("input_rows", Tensor.long, "input_rows must be Int"),
    "short sample": ("sample", lambda t: t[:2], "sample must have 3 rows"),
    "integer sample": ("sample", Tensor.int, "sample must be float32, .*float64, not Int"),
    "strided sample": ("sample", strided, "contiguous"),
    "short noise": ("noise", lambda t: t[:2], "noise must have 3 rows"),
    "float8 noise": ("noise", lambda t: t.to(torch.float8_e5m2), "noise must be float32"),
    "no layout": ("layout", lambda v: [], "layout must have 5 numbers"),
    "size 0": ("layout", lambda v: [1, 0, 1, 0, 0], "positive sizes"),
    "stride below 0": ("layout", lambda v: [1, 21, 0, 0, -1], "no negative stride"),
    "size that does not divide": ("layout", lambda v: [1, 2, 1, 0, 0], "must divide the 21"),
    "sizes too large": ("layout", lambda v: [2**32, 2**32, 1, 0, 0], "must divide the 21"),
    "reach too far": ("layout", lambda v: [3, 7, 0, 7, 2], "beyond a row of model_output"),
    "reach overflows": ("layout", lambda v: [3, 7, 0, 2**62, 2**62], "beyond a row"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_written(native: Callable[..., None], case: str) -> None:
    argument, change, message = REFUSED[case]
    call, given = arguments()
    before = call.copy()
    given[argument] = change(given[argument])
    with pytest.raises(RuntimeError, match=message):
        native(*given.values())
    for (name, old), (_, new) in zip(before.tensors(), call.tensors(), strict=True):
        assert (bits(old) == bits(new)).all(), name


# What stands in the tensors: (tensor, index, value, message).
CONTENTS = {
    "output row": ("output_rows", (0, 1), 6, "output_rows names row 6 for sample 1.*there are 6"),
    "output row far off": ("output_rows", (0, 0), 2**31 - 1, "output_rows names row 2147483647"),
    "uncond row": ("output_rows", (1, 0), 6, "output_rows names row 6 for sample 0"),
    "input row": ("input_rows", (0, 0), 6, "input_rows names row 6 for sample 0.*there are 6"),
    "slot": ("table", (0, 12), 5.0, "row 0 of the table stores into slot 5.*there are 5"),
    "slot of the state": ("table", (1, 16), 1e9, "row 1 of the table stores into slot"),
}


@pytest.mark.parametrize("case", CONTENTS)
def test_numbers_of_rows_that_do_not_exist(native: Callable[..., None], case: str) -> None:
    """The CPU can look before it writes; a GPU takes such a branch for absent."""
    argument, index, value, message = CONTENTS[case]
    call, given = arguments()
    given[argument][index] = value
    before = call.copy()
    with pytest.raises(RuntimeError, match=message):
        native(*given.values())
    for (name, old), (_, new) in zip(before.tensors(), call.tensors(), strict=True):
        assert (bits(old) == bits(new)).all(), name


def test_messages_name_no_machine(native: Callable[..., None]) -> None:
    _, given = arguments()
    with pytest.raises(RuntimeError, match=r"csrc/arguments\.cpp") as caught:
        native(*{**given, "layout": []}.values())
    assert "/csrc" not in str(caught.value)


def test_mutations_are_declared(native: Callable[..., None]) -> None:
    schema = torch.ops.thg_engine.step_update.default._schema
    written = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
    assert sorted(written) == sorted(MUTATED) == sorted(op.MUTATES)
    assert [a.name for a in schema.arguments] == list(NAMES)


# Loading ------------------------------------------------------------------------------------------

why_not_loaded = native_op._why_not_loaded.__wrapped__


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where libraries are looked for, empty."""
    monkeypatch.setattr(native_op, "FOLDER", tmp_path)
    native_op._why_not_loaded.cache_clear()
    yield tmp_path
    native_op._why_not_loaded.cache_clear()


def test_never_built(folder: Path) -> None:
    assert why_not_loaded("cpu") == f"its library was not built: {native_op.TO_BUILD}."


@pytest.mark.parametrize("record", ["", "[]", "{", '{"cpu": 3}', '{"cuda": "nvcc"}', '{"cpu": ""}'])
def test_unreadable_record(folder: Path, record: str) -> None:
    (folder / native_op.RECORD).write_text(record)
    assert why_not_loaded("cpu") == f"its library was not built: {native_op.TO_BUILD}."


def test_recorded_reason(folder: Path) -> None:
    (folder / native_op.RECORD).write_text('{"cpu": "no C++ compiler", "cuda": "no nvcc"}')
    assert why_not_loaded("cpu") == "its library was not built: no C++ compiler."
    assert why_not_loaded("cuda") == (
        "it needs the cpu library, and its library was not built: no C++ compiler."
    )


def test_broken_library(folder: Path) -> None:
    native_op.library("cpu").write_bytes(b"no library")
    reason = why_not_loaded("cpu")
    assert reason.startswith("its library cannot be loaded: ") and "\n" not in reason


def test_old_torch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native_op.library("cpu").touch()
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    assert why_not_loaded("cpu") == "its library needs torch 2.10 or newer, this is 2.9.1+cpu."


def test_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert native_op.why_unavailable("cuda") == "there is no CUDA device."
    with pytest.raises(ImportError, match="'cuda' cannot run: there is no CUDA device"):
        native_op.native_backend.__wrapped__("cuda")
