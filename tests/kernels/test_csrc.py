"""csrc/ and its build: own tests, numbers, house rules, compilation for GPUs, what falls back."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from thg_kernels.step_update import Column, native_op
from thg_kernels.step_update.table import HEAD, MAX_SLOTS

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for path in (ROOT / "csrc").iterdir() if path.suffix in (".h", ".cpp", ".cu"))
MAX_LINE, MAX_FILE, MAX_FUNCTION, MAX_KERNEL = 100, 400, 40, 60


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


@pytest.mark.xdist_group("csrc")
def test_own_test_programs_pass(tmp_path: Path) -> None:
    """One for each set of instructions, every one but those that this CPU lacks."""
    build = str(tmp_path)
    generator = ("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}")
    strict = "-DCMAKE_COMPILE_WARNING_AS_ERROR=ON"
    _run(_tool("cmake"), "-S", str(ROOT), "-B", build, *generator, strict)
    _run(_tool("cmake"), "--build", build, "-j2")
    output = _run(_tool("ctest"), "--test-dir", build, "--output-on-failure")
    assert "100% tests passed" in output
    assert re.search(r"step_update_portable \.+ +Passed", output), output


def _text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_numbers_are_those_of_the_table() -> None:
    """A column that is read under another number is a wrong sample without any error."""
    header = _text("csrc/step_update_args.h")
    found = {name: int(number) for name, number in re.findall(r"k(\w+) = (\d+)", header)}
    camel = {column.name.title().replace("_", ""): int(column) for column in Column}
    assert found == {**camel, "Head": HEAD, "MaxSlots": MAX_SLOTS}


def test_oldest_torch_is_the_same_everywhere() -> None:
    major, minor = native_op.OLDEST_TORCH
    assert f"TORCH_TARGET_VERSION=0x{major:02x}{minor:02x}" + "0" * 12 in _text("CMakeLists.txt")
    assert f"OLDEST_TORCH = ({major}, {minor})" in _text("setup.py")
    assert f'"torch>={major}.{minor}"' in _text("pyproject.toml")


def _functions(source: str) -> list[tuple[str, int]]:
    """(first line, number of lines) of functions, of methods and, which does no harm, of branches.

    A closing brace alone in its line ends what the last line of the same indentation has begun.
    """
    found = []
    lines = source.splitlines()
    for end, line in enumerate(lines):
        if line not in ("}", "  }"):
            continue
        begin = re.compile(line[:-1] + r"[^\s#]")
        start = next(k for k in range(end - 1, -1, -1) if begin.match(lines[k]))
        found.append((lines[start].strip(), end - start + 1))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_file_keeps_the_rules(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()
    assert len(lines) <= MAX_FILE
    assert not [k for k, line in enumerate(lines, 1) if len(line) > MAX_LINE]
    assert not re.search(r"[ \t]$", source, re.MULTILINE)
    for name, size in _functions(source):
        assert size <= (MAX_KERNEL if "__global__" in name else MAX_FUNCTION), (name, size)


def test_functions_are_found() -> None:
    found = dict(_functions(_text("csrc/step_update.cu")))
    (kernel,) = [name for name in found if name.startswith("__global__")]
    assert 20 < found[kernel] <= MAX_KERNEL
    long = "void f(int a,\n       int b) {\n" + "  g();\n" * 40 + "}\n"
    assert _functions(long) == [("void f(int a,", 43)]


# The build ----------------------------------------------------------------------------------------

ARCHITECTURES = {"sm_80", "sm_90", "sm_100", "sm_120"}
TORCH = Path(torch.__file__).parent


@pytest.fixture(scope="module")
def setup() -> ModuleType:
    """setup.py as a module: only as a script it sets up anything."""
    pytest.importorskip("setuptools", "77", reason="setuptools is too old")
    spec = importlib.util.spec_from_file_location("thg_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def cuda_build(setup: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of the CUDA library, and what the compiler said of it."""
    if setup.find_nvcc() is None:
        pytest.skip("nvcc was not found")
    folder = tmp_path_factory.mktemp("cuda")
    command = (
        "import sys; from pathlib import Path; import setup; "
        "torch, folder = map(Path, sys.argv[1:]); "
        "sys.exit(setup.build_library('cuda', torch, folder / 'build', folder) or 0)"
    )
    program = [sys.executable, "-c", command, str(TORCH), str(folder)]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


@pytest.mark.slow
@pytest.mark.xdist_group("csrc")
def test_cuda_kernels_do_not_spill(cuda_build: tuple[Path, str]) -> None:
    """On no architecture, and no kernel takes so many registers that a multiprocessor idles."""
    said = cuda_build[1]
    compiled = re.findall(r"Compiling entry function '(\S+)' for '(sm_\d+)'", said)
    assert {architecture for _, architecture in compiled} == ARCHITECTURES
    # Three dtypes of the denoiser's output, three ways to reach the elements.
    assert len(set(compiled)) == len(compiled) == 9 * len(ARCHITECTURES)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert spills == [("0", "0")] * len(compiled)
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", said)]
    assert len(registers) == len(compiled) and max(registers) <= 128


@pytest.mark.slow
@pytest.mark.xdist_group("csrc")
def test_cuda_library_holds_every_architecture(cuda_build: tuple[Path, str]) -> None:
    spec = importlib.util.find_spec("triton")
    beside = (spec.submodule_search_locations or []) if spec else []
    places = [None, *(Path(folder, "backends/nvidia/bin") for folder in beside)]
    tool = next(filter(None, (shutil.which("cuobjdump", path=place) for place in places)), None)
    if tool is None:
        pytest.skip("cuobjdump was not found")
    listing = _run(tool, "--list-elf", str(cuda_build[0] / "libthg_step_update_cuda.so"))
    assert set(re.findall(r"sm_\d+", listing)) == ARCHITECTURES


@pytest.mark.slow
@pytest.mark.xdist_group("csrc")
def test_cuda_library_says_why_it_does_not_load(
    cuda_build: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a torch without CUDA, even if something claims that there is a device."""
    if torch.version.cuda:
        pytest.skip("this torch has CUDA")
    if reason := native_op.why_unavailable("cpu"):
        pytest.skip(reason)
    monkeypatch.setattr(native_op, "FOLDER", cuda_build[0])
    reason = native_op._why_not_loaded.__wrapped__("cuda")
    assert reason.startswith("its library cannot be loaded: ") and "torch_cuda" in reason


def _script(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    path.chmod(0o755)
    return path


def _torch(folder: Path, version: str = "2.13.0", cuda: str | None = None) -> Path:
    """A folder that looks like an installed torch."""
    folder.mkdir()
    lines = [f"__version__ = {version!r}", "debug = False", f"cuda: Optional[str] = {cuda!r}"]
    (folder / "version.py").write_text("\n".join([*lines, "hip: Optional[str] = None", ""]))
    return folder


def _fallback(setup: ModuleType, folder: Path) -> dict[str, str]:
    """What a build says that must not have built anything, nor have left anything old."""
    (folder / "libthg_step_update_cpu.so").touch()
    reasons = setup.build_libraries(folder / "build", folder)
    assert not list(folder.glob("*.so"))
    assert json.loads((folder / native_op.RECORD).read_text()) == reasons
    return reasons


def test_without_torch(setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THG_TORCH_DIR", str(tmp_path / "nowhere"))
    reason = f"torch was not found in {tmp_path / 'nowhere'}: pip install torch, {setup.AGAIN}"
    assert _fallback(setup, tmp_path) == {"cpu": reason, "cuda": reason}


def test_torch_of_an_isolated_build(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sys.path has no torch there, but the environment that it is built for has."""
    monkeypatch.delenv("THG_TORCH_DIR", raising=False)
    monkeypatch.setattr(setup, "find_spec", lambda name: None)
    monkeypatch.setattr(setup.sysconfig, "get_path", lambda name: str(tmp_path / name))
    assert setup.find_torch() is None
    (tmp_path / "platlib").mkdir()
    folder = _torch(tmp_path / "platlib" / "torch")
    assert setup.find_torch() == folder


def test_torch_is_found_and_read_without_import(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("THG_TORCH_DIR", raising=False)
    assert setup.find_torch() == TORCH
    assert setup.torch_versions(TORCH) == (torch.__version__, torch.version.cuda or "")
    probe = "import sys, setup; setup.find_torch(); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


def test_with_an_old_torch(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THG_TORCH_DIR", str(_torch(tmp_path / "torch", "2.9.1+cu128")))
    assert _fallback(setup, tmp_path)["cpu"].startswith("torch 2.9.1+cu128 is older than 2.10: ")


@pytest.mark.parametrize("compiler", ["/nonexistent", None])
def test_without_a_compiler(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: str | None
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    if compiler is not None:
        monkeypatch.undo()
        monkeypatch.setenv("CXX", compiler)
    else:
        monkeypatch.delenv("CXX", raising=False)
    found = _fallback(setup, tmp_path)
    assert found["cpu"].startswith("no C++ compiler was found: install g++ or clang")
    assert found["cuda"] == found["cpu"]


def test_without_cmake(setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "find_program", lambda name: None)
    assert _fallback(setup, tmp_path)["cpu"].startswith("cmake was not found: pip install cmake")


def test_where_cmake_fails(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first complaint is the reason; later ones follow from it."""
    error = "CMake Error at CMakeLists.txt:2 (project):"
    program = _script(
        tmp_path / "cmake",
        f"echo '-- Configuring'; echo '{error}' >&2; echo '  No compiler works.' >&2",
        "echo 'CMake Error: the rest' >&2; exit 1",
    )
    monkeypatch.setattr(setup, "find_program", lambda name: str(program))
    found = _fallback(setup, tmp_path)
    assert found["cpu"] == f"CMake failed: {error} No compiler works."
    assert found["cuda"] == found["cpu"]


def test_when_cuda_is_built(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default where nvcc and torch are of one CUDA; on request beside any torch."""
    nvcc = _script(tmp_path / "nvcc", "echo 'Cuda compilation tools, release 13.0, V13.0.88'")
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "THG_CUDA"):
        monkeypatch.delenv(name, raising=False)
    torches = {
        cuda: _torch(tmp_path / f"torch-{cuda}", cuda=cuda) for cuda in (None, "13.1", "12.8")
    }
    with monkeypatch.context() as patch:
        patch.setattr(setup.shutil, "which", lambda name, path=None: None)
        assert setup.why_no_cuda(torches["13.1"]).startswith("nvcc was not found: ")
    monkeypatch.setenv("CUDACXX", str(nvcc))
    assert setup.why_no_cuda(torches["13.1"]) == ""
    assert setup.why_no_cuda(torches["12.8"]).startswith(
        "nvcc is of CUDA 13 and torch of CUDA 12.8"
    )
    assert setup.why_no_cuda(torches[None]).startswith("torch 2.13.0 is a build without CUDA")
    monkeypatch.setenv("THG_CUDA", "1")
    assert [setup.why_no_cuda(torch) for torch in torches.values()] == ["", "", ""]
    monkeypatch.setenv("THG_CUDA", "0")
    assert setup.why_no_cuda(torches["13.1"]).startswith("THG_CUDA=0 left it out")
