"""Builds csrc/ with cmake, runs its own test and compares the library with NumPy in float64."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

ROOT = Path(__file__).resolve().parents[2]
SIZES = (0, 1, 2, 1023, 1024, 1025, 3 * 7 * 11 * 13, 2 * 4 * 65 * 63)
EPS32, EPS64 = np.finfo(np.float32).eps, np.finfo(np.float64).eps
FloatArray = npt.NDArray[np.float32]

pytestmark = pytest.mark.xdist_group("csrc")


def _tool(name: str) -> str:
    """The program beside this interpreter (a venv need not be on PATH), else the one on PATH."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.fail(f"{name} is missing: pip install {name} (the test extra has it)")
    return found


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def build_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    build = tmp_path_factory.mktemp("csrc")
    generator = ("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}")
    strict = "-DCMAKE_COMPILE_WARNING_AS_ERROR=ON"
    _run(_tool("cmake"), "-S", str(ROOT), "-B", str(build), *generator, strict)
    _run(_tool("cmake"), "--build", str(build))
    return build


@pytest.fixture(scope="module")
def library(build_dir: Path) -> ctypes.CDLL:
    (path,) = [p for p in build_dir.glob("libthg_step_update.*") if p.suffix in (".so", ".dylib")]
    library = ctypes.CDLL(str(path))
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    library.thg_linear_combination.argtypes = [pointer, pointer, size, size, pointer]
    library.thg_guided_output.argtypes = [pointer, pointer, ctypes.c_float, size, pointer, pointer]
    return library


def _combine(
    library: ctypes.CDLL,
    terms: Sequence[FloatArray | None],
    weights: Sequence[float],
    out: FloatArray,
) -> int:
    addresses = [None if term is None else term.ctypes.data for term in terms]
    pointers = (ctypes.c_void_p * len(terms))(*addresses)
    row = np.asarray(weights, dtype=np.float32)
    status = library.thg_linear_combination(
        pointers, row.ctypes.data, len(terms), out.size, out.ctypes.data
    )
    return int(status)


def _nan_filled(size: int) -> FloatArray:
    return np.full(size, np.nan, dtype=np.float32)


def _check(got: FloatArray, want: npt.NDArray[np.float64], magnitude: object) -> None:
    """One rounding to float32, plus what a double sum over terms of this magnitude may lose."""
    bound = 0.501 * EPS32 * np.abs(want) + 16 * EPS64 * np.asarray(magnitude)
    assert np.all(np.abs(got.astype(np.float64) - want) <= bound)  # False where NaN is left


def test_own_test_program_passes(build_dir: Path) -> None:
    output = _run(_tool("ctest"), "--test-dir", str(build_dir), "--output-on-failure")
    assert "100% tests passed" in output
    assert "No tests were found" not in output


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_linear_combination(library: ctypes.CDLL, size: int, count: int) -> None:
    rng = np.random.default_rng(size + count)
    terms = [rng.standard_normal(size).astype(np.float32) for _ in range(count)]
    weights = rng.standard_normal(count).astype(np.float32)
    out = _nan_filled(size)
    assert _combine(library, terms, weights.tolist(), out) == 0
    parts = weights.astype(np.float64)[:, None] * np.stack(terms).astype(np.float64)
    _check(out, parts.sum(0), np.abs(parts).sum(0))


@pytest.mark.parametrize("size", SIZES)
def test_zero_weight_is_never_read(library: ctypes.CDLL, size: int) -> None:
    """Registers that no row has written hold anything, or do not exist yet."""
    x = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    out = _nan_filled(size)
    assert _combine(library, [_nan_filled(size), x, None], [0.0, -1.5, -0.0], out) == 0
    np.testing.assert_array_equal(out, np.float32(-1.5) * x)


@pytest.mark.parametrize("weights", [[], [0.0, 0.0]])
def test_nothing_to_sum_gives_zero(library: ctypes.CDLL, weights: list[float]) -> None:
    out = _nan_filled(1025)
    assert _combine(library, [None] * len(weights), weights, out) == 0
    np.testing.assert_array_equal(out, np.zeros(1025, dtype=np.float32))


def test_update_in_place(library: ctypes.CDLL) -> None:
    rng = np.random.default_rng(3)
    x, e = (rng.standard_normal(4099).astype(np.float32) for _ in range(2))
    want = 0.75 * x.astype(np.float64) - 0.5 * e.astype(np.float64)
    assert _combine(library, [x, e], [0.75, -0.5], x) == 0
    _check(x, want, 4.0)


def test_cancelling_weights_keep_their_digits(library: ctypes.CDLL) -> None:
    """The reason for double sums: a float32 sum loses 1 beside 1e8."""
    big, one = np.full(1025, 1e8, dtype=np.float32), np.ones(1025, dtype=np.float32)
    out = _nan_filled(1025)
    assert _combine(library, [big, one, big], [1.0, 1.0, -1.0], out) == 0
    np.testing.assert_array_equal(out, one)


def test_nan_in_a_read_term_propagates(library: ctypes.CDLL) -> None:
    x = np.zeros(1025, dtype=np.float32)
    x[1024] = np.nan
    out = np.zeros(1025, dtype=np.float32)
    assert _combine(library, [x], [1.0], out) == 0
    assert np.isnan(out[1024]) and not np.isnan(out[:1024]).any()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("gain", [0.0, 6.5, -1.0])
def test_guided_output(library: ctypes.CDLL, size: int, gain: float) -> None:
    rng = np.random.default_rng(size)
    cond, uncond = (rng.standard_normal(size).astype(np.float32) for _ in range(2))
    delta, out = _nan_filled(size), _nan_filled(size)
    inputs = (cond.ctypes.data, uncond.ctypes.data, gain, size)
    assert library.thg_guided_output(*inputs, delta.ctypes.data, out.ctypes.data) == 0
    difference = cond.astype(np.float64) - uncond
    magnitude = np.abs(cond) + abs(gain) * np.abs(difference)
    _check(delta, difference, magnitude)
    _check(out, cond + gain * difference, magnitude)
    without = _nan_filled(size)
    assert library.thg_guided_output(*inputs, None, without.ctypes.data) == 0
    np.testing.assert_array_equal(without, out)


def test_bad_calls_are_refused(library: ctypes.CDLL) -> None:
    out = _nan_filled(4)
    assert _combine(library, [None], [1.0], out) == 2
    assert library.thg_linear_combination(None, None, -1, 4, out.ctypes.data) == 1
    assert library.thg_guided_output(None, None, 1.0, 4, None, out.ctypes.data) == 2
    assert library.thg_guided_output(None, None, 1.0, -4, None, out.ctypes.data) == 1
    assert np.isnan(out).all()
