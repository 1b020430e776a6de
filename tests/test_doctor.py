"""The doctor answers on any machine: what is there, what is not, why, and how to get it."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

import thg_engine
from thg_engine import doctor
from thg_engine.doctor import Finding


def _printed(width: int = 120) -> str:
    stream = io.StringIO()
    doctor.print_report(Console(file=stream, width=width, color_system=None))
    return stream.getvalue()


def test_versions_are_those_of_the_packages() -> None:
    findings = doctor.collect()
    assert findings["thg-engine"].detail == thg_engine.__version__
    for name in ("torch", "diffusers", "transformers", "safetensors"):
        assert findings[name] == Finding(doctor.PACKAGES, True, importlib.metadata.version(name))
    assert sys.executable in findings["python"].detail


def test_findings_are_json() -> None:
    findings = {name: dataclasses.asdict(each) for name, each in doctor.collect().items()}
    assert json.loads(json.dumps(findings)) == findings


def test_whatever_is_missing_says_why() -> None:
    for name, finding in doctor.collect().items():
        assert finding.detail, name


def test_missing_distribution_has_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    findings = doctor.collect()
    assert findings["xformers"].detail == "not installed"
    assert "thg-engine[xformers]" in findings["xformers"].remedy
    assert "thg-engine[gpu]" in findings["nvidia-ml-py"].remedy
    assert "to get it: pip install 'thg-engine[xformers]'" in _printed()


def test_broken_metadata_is_told_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> str:
        raise KeyError("Version")

    monkeypatch.setattr(importlib.metadata, "version", broken)
    finding = doctor.collect()["torch"]
    assert not finding.available and "KeyError" in finding.detail


def test_torch_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    finding = doctor.collect()["cuda"]
    assert not finding.available and "without CUDA" in finding.detail and finding.remedy


def test_cuda_build_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    finding = doctor.collect()["cuda"]
    assert not finding.available and "sees no device" in finding.detail


def test_a_driver_that_raises_is_told_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> bool:
        raise RuntimeError("driver mismatch")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", broken)
    finding = doctor.collect()["cuda"]
    assert finding == Finding(doctor.HARDWARE, False, "RuntimeError: driver mismatch")


@pytest.fixture
def two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="NVIDIA X", major=9, minor=0, total_memory=80 << 30, uuid="u")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)


@pytest.mark.usefixtures("two_devices")
def test_devices_without_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # makes the import fail
    findings = doctor.collect()
    assert findings["cuda:1"].detail == "NVIDIA X, sm_90, 80 GiB, CUDA 13.0"
    assert "cuda" not in findings
    assert "NVIDIA X" in doctor.machine_line()


@pytest.mark.usefixtures("two_devices")
def test_devices_with_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlSystemGetDriverVersion=lambda: "580.1",
        nvmlDeviceGetEnforcedPowerLimit=lambda handle: 700_000,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert doctor.collect()["cuda:0"].detail.endswith("driver 580.1, power limit 700 W")

    def refuse(uuid: str) -> str:
        raise RuntimeError("not found")

    nvml.nvmlDeviceGetHandleByUUID = refuse
    assert doctor.collect()["cuda:0"].detail.endswith("NVML: RuntimeError: not found")


def test_backends_of_the_fused_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which are ready, which one is taken, and of the others what is missing."""
    reasons = {"reference": "", "triton": "no device", "cuda": "nvcc was not found", "cpu": ""}
    module = importlib.import_module("thg_kernels.step_update")
    monkeypatch.setattr(module, "why_unavailable", reasons.__getitem__)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = doctor.collect()
    assert found["cpu backend"] == Finding(doctor.FUSED_STEP, True, "ready, taken on cpu")
    assert found["reference backend"] == Finding(doctor.FUSED_STEP, True, "ready")
    assert found["cuda backend"] == Finding(doctor.FUSED_STEP, False, "nvcc was not found")
    assert found["triton backend"] == Finding(doctor.FUSED_STEP, False, "no device")


def test_no_tools_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name, path=None: None)
    findings = doctor.collect()
    for name in ("c++", "cmake", "nvcc"):
        assert not findings[name].available and findings[name].remedy


def test_a_tool_that_fails_or_hangs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "nvcc"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    finding = doctor.collect()["nvcc"]
    assert not finding.available and "exit status 3" in finding.detail

    def hang(*args: object, **kwargs: object) -> None:
        raise subprocess.TimeoutExpired("nvcc", 20)

    monkeypatch.setattr(doctor.subprocess, "run", hang)
    assert "TimeoutExpired" in doctor.collect()["nvcc"].detail


def test_nvcc_copyright_is_not_its_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvcc"
    tool.write_text("#!/bin/sh\necho 'Copyright (c)'\necho 'Cuda tools, release 13.0, V13.0.1'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert doctor.collect()["nvcc"].detail.startswith("Cuda tools, release 13.0")


@pytest.mark.parametrize("width", [60, 120])
def test_report_names_everything(width: int) -> None:
    printed = _printed(width)
    for name in doctor.collect():
        assert name in printed


def test_asking_imports_nothing_heavy() -> None:
    probe = (
        "import sys; from thg_engine import doctor; doctor.collect(); "
        "print({'diffusers', 'transformers', 'xformers', 'triton'} & sys.modules.keys())"
    )
    root = Path(thg_engine.__file__).parents[1]
    command = [sys.executable, "-c", probe]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
