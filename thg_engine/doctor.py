"""What this machine has: versions, devices, tools, and for what is missing, why and how to get it.

Versions are read from package metadata: asking must not import what it asks about. Nothing here
raises when something is absent or broken, because that is when the answer is wanted.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

PACKAGES, HARDWARE, FUSED_STEP, TOOLS = "packages", "hardware", "fused step", "tools"

# distribution -> how to get it; the first five are dependencies, the rest are optional.
_REMEDIES = {
    "torch": "pip install torch",
    "diffusers": "pip install diffusers",
    "transformers": "pip install transformers",
    "accelerate": "pip install accelerate",
    "safetensors": "pip install safetensors",
    "triton": "pip install 'thg-engine[gpu]' (Linux with a CUDA device: fused kernels)",
    "xformers": "pip install 'thg-engine[xformers]' (memory-efficient attention on CUDA)",
    "nvidia-ml-py": "pip install 'thg-engine[gpu]' (driver, power and clock readings)",
}


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        section: `PACKAGES`, `HARDWARE`, `FUSED_STEP` or `TOOLS`.
        available: whether it is there and usable.
        detail: the version or description; where not available, why not.
        remedy: how to get it; empty where it is available or nothing can be done.
    """

    section: str
    available: bool
    detail: str
    remedy: str = ""


def collect() -> dict[str, Finding]:
    """Everything `print_report` shows, by name, in the order of the report.

    Returns:
        JSON-able through `dataclasses.asdict`. Names: ``python``, ``thg-engine``, distributions,
        ``os``, ``cpu``, ``cuda`` (there is none) or ``cuda:0``, ..., ``reference backend`` and the
        other backends of the fused step, ``c++``, ``cmake``, ``nvcc``.
    """
    findings = {
        "python": Finding(PACKAGES, True, f"{platform.python_version()} at {sys.executable}"),
        "thg-engine": Finding(PACKAGES, True, _own_version()),
    }
    findings.update({name: _distribution(name) for name in _REMEDIES})
    findings["os"] = Finding(HARDWARE, True, platform.platform())
    findings["cpu"] = Finding(HARDWARE, True, f"{_cpu_model()}, {_cpu_count()} cores usable")
    findings.update(_guarded("cuda", _cuda_devices))
    findings.update(_guarded("backends", _backends))
    findings["c++"] = _compiler()
    findings["cmake"] = _tool("cmake", "pip install cmake (only to build csrc/)")
    findings["nvcc"] = _tool("nvcc", "install the CUDA toolkit (only to build CUDA sources)")
    return findings


def machine_line() -> str:
    """The machine in one line, to stand beside every number measured on it."""
    findings = collect()
    devices = [finding.detail for name, finding in findings.items() if name.startswith("cuda:")]
    versions = [
        f"{name} {findings[name].detail}"
        for name in ("torch", "diffusers")
        if findings[name].available
    ]
    python = f"Python {platform.python_version()}"
    return "; ".join([findings["cpu"].detail, *devices, ", ".join([python, *versions])])


def print_report(console: Console) -> None:
    """Print the findings as one table per section on a rich ``console``."""
    from rich.table import Table
    from rich.text import Text

    findings = collect()
    for section in (PACKAGES, HARDWARE, FUSED_STEP, TOOLS):
        table = Table(title=section, title_justify="left", show_header=False)
        for column, ratio in (("name", 1), ("status", 1), ("detail", 5)):
            table.add_column(column, ratio=ratio, overflow="fold")
        for name, finding in findings.items():
            if finding.section != section:
                continue
            status = Text("yes", "green") if finding.available else Text("no", "yellow")
            remedy = f"\nto get it: {finding.remedy}" if finding.remedy else ""
            table.add_row(Text(name), status, Text(finding.detail + remedy))
        console.print(table)


def _own_version() -> str:
    """The version of the code that runs, which in a bare checkout has no metadata."""
    from . import __version__

    return __version__


def _distribution(name: str) -> Finding:
    try:
        return Finding(PACKAGES, True, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(PACKAGES, False, "not installed", _REMEDIES[name])
    except Exception as error:  # metadata that a broken installation left behind
        detail = f"unreadable metadata: {_describe(error)}"
        return Finding(PACKAGES, False, detail, _REMEDIES[name])


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ")


def _guarded(name: str, probe: Callable[[], dict[str, Finding]]) -> dict[str, Finding]:
    try:
        return probe()
    except Exception as error:  # a broken driver or library raises anything at all
        return {name: Finding(HARDWARE, False, _describe(error))}


def _cuda_devices() -> dict[str, Finding]:
    import torch

    if torch.version.cuda is None:
        detail = f"torch {torch.__version__} is a build without CUDA"
        remedy = "install a CUDA build: https://pytorch.org/get-started/locally/"
        return {"cuda": Finding(HARDWARE, False, detail, remedy)}
    if not torch.cuda.is_available():
        detail = f"torch {torch.__version__} (CUDA {torch.version.cuda}) sees no device"
        remedy = "check that nvidia-smi lists one and that CUDA_VISIBLE_DEVICES shows it"
        return {"cuda": Finding(HARDWARE, False, detail, remedy)}
    found = {}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        detail = (
            f"{properties.name}, sm_{properties.major}{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
        )
        details = [detail, *_nvml_details(str(properties.uuid))]
        found[f"cuda:{index}"] = Finding(HARDWARE, True, ", ".join(details))
    return found


def _nvml_details(uuid: str) -> Iterator[str]:
    """Driver and power limit, by UUID: NVML does not renumber devices as CUDA_VISIBLE_DEVICES does.

    Yields nothing where nvidia-ml-py or the driver's library is missing.
    """
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception as error:
        if not isinstance(error, ImportError):
            yield f"NVML: {_describe(error)}"
        return
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        yield f"driver {pynvml.nvmlSystemGetDriverVersion()}"
        yield f"power limit {pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000:.0f} W"
    except pynvml.NVMLError as error:
        yield f"NVML: {_describe(error)}"
    finally:
        pynvml.nvmlShutdown()


def _backends() -> dict[str, Finding]:
    """What the fused step can run on, and why not on the rest; a reason says how to get it."""
    import torch

    from thg_kernels.step_update import BACKENDS, choose_backend, why_unavailable

    device = "cuda" if torch.cuda.is_available() else "cpu"
    default = choose_backend(torch.device(device))
    found = {}
    for name in BACKENDS:
        reason = why_unavailable(name)
        detail = reason or (f"ready, taken on {device}" if name == default else "ready")
        found[f"{name} backend"] = Finding(FUSED_STEP, not reason, detail)
    return found


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, models), platform.processor() or platform.machine())


def _cpu_count() -> int:
    """Cores this process may use, which under a container or taskset are fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _compiler() -> Finding:
    names = [name for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name]
    remedy = "install g++ or clang (only to build csrc/)"
    findings = [_tool(name, remedy) for name in names]
    return next((finding for finding in findings if finding.available), findings[0])


def _tool(name: str, remedy: str) -> Finding:
    """The first version line of a program, from this interpreter's folder or PATH."""
    path = shutil.which(name, path=os.path.dirname(sys.executable)) or shutil.which(name)
    if path is None:
        return Finding(TOOLS, False, f"{name} is not on PATH", remedy)
    try:
        command = [path, "--version"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError) as error:
        return Finding(TOOLS, False, f"{path} does not run: {_describe(error)}", remedy)
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    # nvcc opens with its copyright; every other tool's first line holds the version.
    versions = [line for line in lines if "release" in line] or lines or ["version unknown"]
    return Finding(TOOLS, True, f"{versions[0]} at {path}")
