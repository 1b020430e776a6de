"""The wheel as a stranger gets it: built, installed in another venv, run outside the repository."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = ("build", "dist", "__pycache__", "*.egg-info", ".*", "*.log", "*.pt")
LARGEST = 10 * 2**20

# One worker builds for all of these tests.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("wheel")]


def _run(*command: str | Path, cwd: Path) -> str:
    """Run outside any developer's set-up: no PYTHONPATH, no user site, no outer venv."""
    outer = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if name not in outer}
    environment |= {"PYTHONNOUSERSITE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def _ignore(folder: str, names: Iterable[str]) -> set[str]:
    names = list(names)
    large = {
        name
        for name in names
        if (path := Path(folder, name)).is_file() and path.stat().st_size > LARGEST
    }
    return large | shutil.ignore_patterns(*LEFT_OUT)(folder, names)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools would pack whatever an earlier build left in build/."""
    source = tmp_path_factory.mktemp("source") / "thg-engine"
    shutil.copytree(ROOT, source, ignore=_ignore)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    _run(*command, "--wheel-dir", source.parent, source, cwd=source.parent)
    (found,) = source.parent.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def venv(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A venv with the wheel alone; torch and the other dependencies are seen, not copied.

    They come through a .pth that names this interpreter's site-packages. Python does not read the
    .pth files inside a folder that was itself added by one, so an editable thg_engine there stays
    out of sight, and the venv's own packages come first.
    """
    folder = tmp_path_factory.mktemp("installed") / "venv"
    _run(sys.executable, "-m", "venv", folder, cwd=folder.parent)
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--no-deps", "--no-index"]
    _run(*pip, wheel, cwd=folder.parent)
    (site,) = folder.glob("lib/python*/site-packages")
    paths = sysconfig.get_paths()
    dependencies = dict.fromkeys((paths["purelib"], paths["platlib"]))
    (site / "dependencies.pth").write_text("\n".join(dependencies) + "\n")
    return folder


def _names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    names = _names(wheel)
    tops = {name.split("/")[0] for name in names}
    (metadata,) = [top for top in tops if top.endswith(".dist-info")]
    assert tops == {"thg_engine", "thg_kernels", metadata}
    assert not [name for name in names if name.endswith((".pyc", ".pt", ".cpp", ".h"))]


def test_wheel_holds_every_module_and_data_file(wheel: Path) -> None:
    kinds = (".py", ".json", ".safetensors", ".txt", ".md", ".typed")
    want = {
        path.relative_to(base).as_posix()
        for base, package in ((ROOT, "thg_engine"), (ROOT / "kernels", "thg_kernels"))
        for path in (base / package).rglob("*")
        if path.suffix in kinds and "__pycache__" not in path.parts
    }
    assert {"thg_engine/py.typed", "thg_kernels/py.typed"} <= want
    assert want <= set(_names(wheel)), sorted(want - set(_names(wheel)))


def test_wheel_holds_demo_weights_and_grids(wheel: Path) -> None:
    names = _names(wheel)
    assert [name for name in names if name.startswith("thg_engine/data/")]
    weights = [name for name in names if name.endswith(".safetensors")]
    assert any("unet" in name for name in weights), weights
    assert any("vae" in name for name in weights), weights


def test_wheel_has_licence_script_and_version(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        files = {name.split(".dist-info/")[-1]: name for name in archive.namelist()}
        metadata = archive.read(files["METADATA"]).decode()
        script = archive.read(files["entry_points.txt"]).decode()
    assert "licenses/LICENSE" in files
    assert "thg-engine = thg_engine.cli:main" in script
    source = (ROOT / "thg_engine" / "__init__.py").read_text(encoding="utf-8")
    (version,) = [line[9:] for line in metadata.splitlines() if line.startswith("Version: ")]
    assert f'__version__ = "{version}"' in source
    assert f"-{version}-py3-none-" in wheel.name


def test_wheel_says_what_it_was_built_with(wheel: Path) -> None:
    """Libraries and a platform, or a pure wheel and the reason; the record is in either."""
    folder = "thg_kernels/step_update/"
    with zipfile.ZipFile(wheel) as archive:
        reasons = json.loads(archive.read(folder + "native_build.json"))
        libraries = {name for name in archive.namelist() if name.endswith(".so")}
    built = {backend for backend, reason in reasons.items() if not reason}
    assert set(reasons) == {"cpu", "cuda"}
    assert libraries == {f"{folder}libthg_step_update_{backend}.so" for backend in built}
    assert wheel.name.endswith("-none-any.whl") == (not built)


def test_installed_package_is_the_one_imported(venv: Path, tmp_path: Path) -> None:
    code = "import thg_engine, thg_kernels; print(thg_engine.__file__, thg_kernels.__file__)"
    for path in _run(venv / "bin" / "python", "-c", code, cwd=tmp_path).split():
        assert Path(path).is_relative_to(venv), path


def test_demo_runs_outside_the_repository(venv: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _run(venv / "bin" / "thg-engine", "demo", "--quick", "--out", out, cwd=tmp_path)
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    methods = json.loads((out / "demo.json").read_text(encoding="utf-8"))["methods"]
    assert len(methods) >= 2
    for method in methods:
        assert isinstance(method["method"], str)
        for name in ("nfe", "seconds_per_image", "speedup"):
            assert math.isfinite(method[name]) and method[name] > 0, (method["method"], name)
