"""Two source roots in one distribution, and the native backends where they can be built.

``kernels/`` is a source root and not a package: a top-level package of that name would be imported
in place of Hugging Face's ``kernels``, which diffusers and transformers look up. So the wheel takes
``thg_kernels`` from inside it.

The libraries of ``csrc/`` need a C++ compiler and the headers of an installed torch, that of CUDA
nvcc as well. torch is not imported: its folder is enough, and in an isolated build, where it could
not be imported, its folder is still there. Without any of these the package installs as pure
Python; ``native_build.json`` beside the modules keeps the reason for ``thg-engine doctor``.

Environment: CXX, CUDACXX and CUDA_HOME as usual; THG_TORCH_DIR, the folder of a torch that is
installed elsewhere; THG_CUDA=1 builds the CUDA library beside a torch without CUDA, THG_CUDA=0
never; THG_CUDA_ARCHITECTURES, for example 90-real, builds for fewer GPUs in less time.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
FOLDER = Path("thg_kernels", "step_update")
RECORD = "native_build.json"
OLDEST_TORCH = (2, 10)
AGAIN = "then install this package again (pip install --no-deps --force-reinstall ...)"


def find_program(name: str) -> str | None:
    """A program beside this interpreter (a venv need not be on PATH), else on PATH."""
    return shutil.which(name, path=os.path.dirname(sys.executable)) or shutil.which(name)


def find_compiler() -> str | None:
    """The C++ compiler that CMake will take."""
    named = os.environ.get("CXX", "").split()
    names = named[:1] or ["c++", "g++", "clang++"]
    return next(filter(None, map(shutil.which, names)), None)


def find_nvcc() -> str | None:
    """The CUDA compiler: named, of a named toolkit, on PATH, or where the installer puts it."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    names = [os.environ.get("CUDACXX"), home and os.path.join(home, "bin", "nvcc")]
    names += ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next(filter(None, map(shutil.which, filter(None, names))), None)


def find_torch() -> Path | None:
    """The folder of the installed torch with the headers of its stable ABI."""
    folders = [os.environ["THG_TORCH_DIR"]] if os.environ.get("THG_TORCH_DIR") else []
    spec = None if folders else find_spec("torch")
    if spec is not None:
        folders += spec.submodule_search_locations or []
    if not folders:
        # In an isolated build sys.path has no torch, but sys.prefix is that of the target.
        folders = [os.path.join(sysconfig.get_path(k), "torch") for k in ("purelib", "platlib")]
    found = (Path(folder) for folder in folders)
    return next((p for p in found if Path(p, "version.py").is_file()), None)


def torch_versions(torch: Path) -> tuple[str, str]:
    """Its version and that of the CUDA it was built with ("" for none), from its source text."""
    text = Path(torch, "version.py").read_text(encoding="utf-8")
    version = re.search(r"^__version__\s*=\s*['\"]([^'\"]+)", text, re.MULTILINE)
    cuda = re.search(r"^cuda\b[^=\n]*=\s*['\"]([^'\"]+)", text, re.MULTILINE)
    return version[1] if version else "0", cuda[1] if cuda else ""


def why_no_libraries(torch: Path | None) -> str:
    """What keeps every library from being built, and how to get it; "" if nothing does."""
    if sys.platform == "win32":
        return "the native backends are built on Linux and macOS only"
    if torch is None:
        where = os.environ.get("THG_TORCH_DIR") or sysconfig.get_path("purelib")
        return f"torch was not found in {where}: pip install torch, {AGAIN}"
    version, _ = torch_versions(torch)
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        return f"torch {version} is older than {oldest}: pip install --upgrade torch, {AGAIN}"
    if find_compiler() is None:
        return f"no C++ compiler was found: install g++ or clang, or name one in CXX, {AGAIN}"
    if find_program("cmake") is None:
        return f"cmake was not found: pip install cmake ninja, {AGAIN}"
    return ""


def why_no_cuda(torch: Path) -> str:
    """Why the CUDA library is left out; "" if it is to be built."""
    wanted = os.environ.get("THG_CUDA", "")
    if wanted == "0":
        return f"THG_CUDA=0 left it out: unset it, {AGAIN}"
    nvcc = find_nvcc()
    if nvcc is None:
        return f"nvcc was not found: install the CUDA toolkit or name it in CUDA_HOME, {AGAIN}"
    if wanted:
        return ""
    version, cuda = torch_versions(torch)
    if not cuda:
        return f"torch {version} is a build without CUDA: install one with CUDA, {AGAIN}"
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+)", text)
    if release is None or release[1] != cuda.split(".")[0]:
        # A newer CUDA runtime may ask for a newer driver than torch does.
        found = release[1] if release else "unknown"
        return f"nvcc is of CUDA {found} and torch of CUDA {cuda}: set THG_CUDA=1 or match them"
    return ""


def run_cmake(*arguments: str) -> str:
    """Runs CMake; "" or what it first complains about. All of its output goes to ours."""
    command = [find_program("cmake") or "cmake", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, errors="replace")
    print(done.stdout, done.stderr, sep="\n")
    if done.returncode == 0:
        return ""
    lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    marks = [k for k, line in enumerate(lines) if re.search(r"\berror\b", line, re.IGNORECASE)]
    # CMake puts the place into one line and the matter into the next.
    first = " ".join(lines[marks[0] : marks[0] + 2]) if marks else f"exit status {done.returncode}"
    return f"CMake failed: {first[:300]}"


def build_library(backend: str, torch: Path, temporary: Path, target: Path) -> str:
    """Builds one library into the folder ``target``; "" or why that failed."""
    name = f"thg_step_update_{backend}"
    options = [f"-DTHG_TORCH_DIR={torch}", "-DBUILD_TESTING=OFF"]
    if ninja := find_program("ninja"):
        options += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    if backend == "cuda":
        architectures = os.environ.get("THG_CUDA_ARCHITECTURES", "")
        options += ["-DTHG_CUDA=ON", f"-DTHG_CUDA_ARCHITECTURES={architectures}"]
        options += [f"-DCMAKE_CUDA_COMPILER={find_nvcc()}"]
    # From nothing: a cache of another build names programs of an environment that is gone.
    shutil.rmtree(temporary, ignore_errors=True)
    reason = run_cmake("-S", str(ROOT), "-B", str(temporary), *options)
    reason = reason or run_cmake("--build", str(temporary), "--target", name)
    if not reason:
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy2(Path(temporary, f"lib{name}.so"), target)
    return reason


def build_libraries(temporary: Path, target: Path) -> dict[str, str]:
    """Builds what can be built into ``target``; per backend "" or why it was not, on record."""
    for old in (*target.glob("libthg_step_update_*.so"), Path(target, RECORD)):
        old.unlink(missing_ok=True)  # what an earlier build left would answer for this one
    torch = find_torch()
    reasons = dict.fromkeys(("cpu", "cuda"), why_no_libraries(torch))
    if torch is not None and not reasons["cpu"]:
        reasons["cpu"] = build_library("cpu", torch, temporary / "cpu", target)
        reasons["cuda"] = reasons["cpu"] or why_no_cuda(torch)
        if not reasons["cuda"]:
            reasons["cuda"] = build_library("cuda", torch, temporary / "cuda", target)
    target.mkdir(parents=True, exist_ok=True)
    text = json.dumps(reasons, indent=2) + "\n"
    Path(target, RECORD).write_text(text, encoding="utf-8")
    return reasons


class BuildLibraries(build_ext):
    """Libraries that CMake builds, if it can: an installation never fails for want of them."""

    def run(self) -> None:
        root = ROOT / "kernels" if self._in_place() else Path(self.build_lib)
        reasons = build_libraries(Path(self.build_temp), root / FOLDER)
        for backend, reason in reasons.items():
            status = f"not built, all runs without it: {reason}" if reason else "built"
            print(f"thg-engine: native backend {backend}: {status}", file=sys.stderr)
        if all(reasons.values()):
            self.distribution.ext_modules = []  # nothing here depends on the platform

    def get_outputs(self) -> list[str]:
        """What is in the build folder besides modules."""
        folder = Path(self.build_lib, FOLDER)
        return [str(path) for path in (*folder.glob("*.so"), *folder.glob(RECORD))]

    def get_output_mapping(self) -> dict[str, str]:
        """In an editable installation the libraries are where they are built."""
        return {}

    def _in_place(self) -> bool:
        return bool(self.inplace or getattr(self, "editable_mode", False))


class PlatformWheel(bdist_wheel):
    """py3-none-<platform> with libraries, which no version of Python is tied to; else pure."""

    def run(self) -> None:
        self.run_command("build_ext")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()
        return tag if self.root_is_pure else ("py3", "none", tag[2])


def native_libraries() -> Extension:
    """Names the sources, so that a source distribution has them; CMakeLists.txt builds them."""
    files = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/*.*"))
    sources = [file for file in files if file.endswith((".cpp", ".cu"))]
    others = [file for file in files if file not in sources]
    name = ".".join((*FOLDER.parts, "native"))
    return Extension(name, sources=sources, depends=["CMakeLists.txt", *others])


if __name__ == "__main__":
    setup(
        packages=find_packages(include=["thg_engine*"]) + find_packages("kernels"),
        package_dir={"thg_kernels": "kernels/thg_kernels"},
        ext_modules=[native_libraries()],
        cmdclass={"build_ext": BuildLibraries, "bdist_wheel": PlatformWheel},
    )
