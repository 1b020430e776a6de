"""Imports go one way: the table below is the architecture, and `ast` reads whether it holds.

Each module of thg_engine lists what else of thg_engine it may import, and whether it may import
diffusers or thg_kernels. A module that is not in the table fails the test: say where it belongs.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "kernels"
DIFFUSERS = "integrations.diffusers"

# module -> modules of thg_engine it may import, at any level of nesting; lowest layer first.
CORE: dict[str, set[str]] = {
    "errors": set(),
    "table": {"errors"},
    "schedule": {"errors"},
    "documents": {"errors"},
    "curves": {"errors", "documents"},
    "scheduler_run": {"errors"},
    "forms": {"table", "schedule", "scheduler_run"},
    "trace": {"errors", "table", "schedule", "scheduler_run", "forms"},
    "solvers": {"errors", "table", "schedule"},
    "grid": {"errors", "schedule", "curves"},
    "published": {"errors", "curves", "grid"},
    "reuse": {"errors"},
    "guidance": {"errors", "schedule", "curves", "grid", "published", "reuse"},
    "plan": {"errors", "table"},
    "lowering": {"errors", "table", "schedule", "solvers", "guidance", "plan"},
    "packing": {"plan"},
    "fingerprint": set(),
    "graphs": {"errors"},
    "graph_cache": {"errors", "graphs"},
    "step_buffers": {"graphs"},
    "checks": {"errors", "step_buffers"},
    "run": {"plan", "graph_cache", "step_buffers"},
    "engine": {
        *("errors", "plan", "packing", "fingerprint", "graph_cache", "step_buffers"),
        *("checks", "run"),
    },
    "calibration": {
        *("errors", "table", "schedule", "curves", "solvers", "grid", "guidance"),
        *("plan", "lowering", "step_buffers", "checks", "engine"),
    },
}
# Of the core, what runs a plan on a device.
RUNTIME = {"fingerprint", "graphs", "graph_cache", "step_buffers", "checks", "run", "engine"}
# "" is the package's own __init__.
ALLOWED: dict[str, set[str]] = {
    **CORE,
    "integrations": set(),
    # What is fitted to a model: knows the engine, and nothing of diffusers.
    "fitting": {*CORE},
    DIFFUSERS: {*CORE, "fitting", "doctor"},
    "doctor": {"", "errors"},
    "demo": {*CORE, "", DIFFUSERS, "fitting", "doctor"},
    "evaluation": {*CORE, "", DIFFUSERS, "fitting", "demo", "doctor", "cli_checks"},
    "reproduce": {*CORE, "", DIFFUSERS, "demo", "doctor", "cli_checks"},
    "cli_checks": {"errors"},
    "cli_calibrate": {*CORE, "", DIFFUSERS, "fitting", "demo", "cli_checks"},
    "cli": {
        *(*CORE, "", DIFFUSERS, "demo", "doctor", "evaluation", "reproduce"),
        *("cli_calibrate", "cli_checks"),
    },
    "adapters": {DIFFUSERS},
    "": {*CORE, DIFFUSERS, "fitting", "demo", "adapters"},
}
# Only these know diffusers or transformers at all; only integrations.diffusers at module level.
KNOW_DIFFUSERS = {DIFFUSERS, "demo", "evaluation", "reproduce"}
# Only these may import the integration, and only inside a function.
LAZY_INTEGRATION = {"", "cli", "cli_calibrate", "demo", "evaluation", "reproduce"}
# "adapters" is the integration's own face: whoever imports it wants the integration.
MAY_USE_KERNELS = {"packing", "step_buffers", "run", "engine", "doctor", DIFFUSERS}
HEAVY = {"diffusers", "transformers"}


@dataclass(frozen=True)
class Import:
    """One import: the dotted module, its line, and whether importing the file runs it."""

    target: str
    line: int
    at_module_level: bool


def _module_name(path: Path, root: Path) -> str:
    parts = list(path.relative_to(root).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _nodes(tree: ast.AST, at_module_level: bool = True) -> Iterator[tuple[ast.AST, bool]]:
    for node in ast.iter_child_nodes(tree):
        yield node, at_module_level
        deferred = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from _nodes(node, at_module_level and not deferred and not _is_type_checking(node))


def _exists(module: str) -> bool:
    """Whether a dotted name under thg_engine or thg_kernels is a module and not an attribute."""
    base = KERNELS if module.startswith("thg_kernels") else ROOT
    path = base.joinpath(*module.split("."))
    return path.is_dir() or path.with_suffix(".py").exists()


def read_imports(source: str, module: str, is_package: bool) -> list[Import]:
    """Every import in ``source``; ``from package import submodule`` counts as the submodule."""
    found: list[Import] = []
    for node, level in _nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, node.lineno, level) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            # One dot means the module's own package; a package's __init__ is in its own already.
            up = node.level - is_package
            stem = parts[: len(parts) - up] if node.level else []
            base = ".".join([*stem, *filter(None, [node.module])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                found.append(Import(full if _exists(full) else base, node.lineno, level))
    return found


def _unit(module: str) -> str:
    """The row of the table: packages count whole, integrations one by one."""
    parts = module.split(".")[1:]
    return ".".join(parts[: 2 if parts[:1] == ["integrations"] else 1])


def _faults_inside(unit: str, target: str, item: Import) -> Iterator[str]:
    used = _unit(target)
    if used != unit and used not in ALLOWED[unit]:
        yield f"{unit or 'thg_engine'} may not import {used or 'thg_engine'}"
    if used == DIFFUSERS != unit and item.at_module_level and unit in LAZY_INTEGRATION:
        yield "import the integration inside a function"


def faults(source: str, module: str, is_package: bool = False) -> list[str]:
    """What the layer table forbids among the imports of one file, as ``line: what``."""
    package, unit = module.split(".")[0], _unit(module)
    if package == "thg_engine" and unit not in ALLOWED:
        return [f"1: {module} is not in the layer table: add it with what it may import"]
    found: list[str] = []
    for item in read_imports(source, module, is_package):
        top = item.target.split(".")[0]
        said: list[str] = []
        if top in ("tests", "benchmarks", "training", "conftest"):
            said.append(f"nothing imports {top}")
        if package == "thg_kernels":
            said += [f"thg_kernels may not import {top}"] if top in {"thg_engine", *HEAVY} else []
        elif top == "thg_engine":
            said += _faults_inside(unit, item.target, item)
        elif top == "thg_kernels" and unit not in MAY_USE_KERNELS:
            said.append(f"{unit} may not import thg_kernels")
        elif top in HEAVY and unit not in KNOW_DIFFUSERS:
            said.append(f"{unit} may not import {top}")
        elif top in HEAVY and unit != DIFFUSERS and item.at_module_level:
            said.append(f"import {top} inside a function")
        elif top == "triton":
            said.append("only thg_kernels imports triton")
        found += [f"{item.line}: {what}" for what in said]
    return found


FILES = [
    (path, _module_name(path, root))
    for root, package in ((ROOT, "thg_engine"), (KERNELS, "thg_kernels"))
    for path in sorted((root / package).rglob("*.py"))
]


@pytest.mark.parametrize(("path", "module"), FILES, ids=[module for _, module in FILES])
def test_imports_keep_the_layers(path: Path, module: str) -> None:
    found = faults(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
    assert not found, "\n".join(f"{path.relative_to(ROOT)}:{fault}" for fault in found)


def test_the_core_table_goes_one_way() -> None:
    above: set[str] = set()
    for unit, allowed in CORE.items():
        assert allowed <= above, f"{unit} reaches up to {sorted(allowed - above)}"
        above.add(unit)


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("thg_engine.table", "from .engine import Engine", "1: table may not import engine"),
        ("thg_engine.table", "def f():\n    import thg_engine.plan", "2: table may not"),
        ("thg_engine.solvers", "import diffusers", "1: solvers may not import diffusers"),
        ("thg_engine.plan", "from thg_kernels import x", "1: plan may not import thg_kernels"),
        ("thg_engine.engine", "import triton.language", "1: only thg_kernels imports triton"),
        ("thg_engine.cli", "from .integrations import diffusers", "1: import the integration"),
        ("thg_engine.demo.run", "import transformers", "1: import transformers inside"),
        ("thg_engine.grid", "from benchmarks import x", "1: nothing imports benchmarks"),
        ("thg_engine.shiny", "", "1: thg_engine.shiny is not in the layer table"),
        ("thg_kernels.step_update", "from thg_engine import x", "1: thg_kernels may not import"),
    ],
)
def test_the_reader_has_teeth(module: str, source: str, fault: str) -> None:
    (found,) = faults(source, module)
    assert found.startswith(fault)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("thg_engine.table", "from .errors import InvalidArgument\nimport math"),
        ("thg_engine.cli", "def f():\n    from .integrations import diffusers"),
        ("thg_engine.demo.run", "def f():\n    import diffusers"),
        ("thg_engine.engine", "from thg_kernels.step_update import step_update"),
        ("thg_engine.integrations.diffusers.hook", "import diffusers\nfrom ...plan import x"),
    ],
)
def test_what_the_table_allows(module: str, source: str) -> None:
    assert not faults(source, module)


IMPORT_PROBE = """
import json, sys, time
import torch
started = time.process_time()
import thg_engine
seconds = time.process_time() - started
heavy = [name for name in ("diffusers", "transformers", "triton", "rich", "matplotlib", "scipy")
         if name in sys.modules]
print(json.dumps({"seconds": seconds, "heavy": heavy, "file": thg_engine.__file__}))
"""


def test_importing_the_package_is_light() -> None:
    """Processor time, not wall time: a busy machine must not fail a test of what is imported."""
    command = [sys.executable, "-c", IMPORT_PROBE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    probe = json.loads(done.stdout.splitlines()[-1])
    assert Path(probe["file"]).is_relative_to(ROOT)
    assert probe["heavy"] == []
    assert probe["seconds"] < 1.0
