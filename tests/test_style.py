"""Budgets and habits that CONTRIBUTING.md promises, read from the source with `ast`."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from test_layers import CORE, RUNTIME

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"thg_engine": ROOT / "thg_engine", "thg_kernels": ROOT / "kernels" / "thg_kernels"}
MAX_FUNCTION, MAX_KERNEL, MAX_FILE, MAX_CORE, MAX_RUNTIME = 40, 60, 400, 2500, 1000
FILES = sorted(path for package in PACKAGES.values() for path in package.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def _code_lines(source: str) -> int:
    """Lines that hold code: the core's budget is on code, so the rest is free."""
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in layout | {tokenize.ENDMARKER}:
            lines.update(range(token.start[0], token.end[0] + 1))
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            first = node.body[0]
            lines.difference_update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return len(lines)


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def _budget(node: ast.FunctionDef | ast.AsyncFunctionDef, in_kernels: bool) -> int:
    """A kernel is a ``_<op>_kernel`` or what Triton compiles, and only in thg_kernels."""
    decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
    kernel = node.name.endswith("_kernel") or "triton.jit" in decorators
    return MAX_KERNEL if in_kernels and kernel else MAX_FUNCTION


def _length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from ``def`` to the end, docstring included."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def _does_nothing(body: list[ast.stmt]) -> bool:
    return all(
        isinstance(statement, ast.Pass)
        or (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))
        for statement in body
    )


def _catches_everything(kind: ast.expr) -> bool:
    names = {node.id for node in ast.walk(kind) if isinstance(node, ast.Name)}
    return bool({"Exception", "BaseException"} & names)


def _faults(source: str, in_kernels: bool = False) -> list[str]:
    """What the house rules forbid in one file, as ``line: what``."""
    tree = ast.parse(source)
    faults = [
        f"{node.lineno}: {node.name} has {_length(node)} lines of {_budget(node, in_kernels)}"
        for node in _functions(tree)
        if _length(node) > _budget(node, in_kernels)
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            faults.append(f"{node.lineno}: assert vanishes under python -O: raise a typed error")
        if isinstance(node, ast.ExceptHandler):
            if node.type is None:
                faults.append(f"{node.lineno}: bare except: name the exception")
            elif _catches_everything(node.type) and _does_nothing(node.body):
                faults.append(f"{node.lineno}: an exception of any kind is swallowed in silence")
    return faults


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_file_keeps_the_rules(path: Path) -> None:
    in_kernels = PACKAGES["thg_kernels"] in path.parents
    faults = _faults(path.read_text(encoding="utf-8"), in_kernels)
    if _lines(path) > MAX_FILE:
        faults.append(f"1: the file has {_lines(path)} lines, the budget is {MAX_FILE}")
    assert not faults, "\n".join(f"{_name(path)}:{fault}" for fault in faults)


@pytest.mark.parametrize("path", TESTS, ids=_name)
def test_file_of_tests_is_short(path: Path) -> None:
    assert _lines(path) <= MAX_FILE, f"{_name(path)}: {_lines(path)} lines of {MAX_FILE}"


def test_core_stays_small() -> None:
    """What decides (plans, grids, tracing, calibration) and what runs (engine, graphs), each."""
    paths = {module: PACKAGES["thg_engine"] / f"{module}.py" for module in CORE}
    sizes = {m: _code_lines(path.read_text(encoding="utf-8")) for m, path in paths.items()}
    assert sum(size for m, size in sizes.items() if m not in RUNTIME) < MAX_CORE, sizes
    assert sum(sizes[m] for m in RUNTIME) < MAX_RUNTIME, sizes


def test_code_lines_are_counted_without_documentation() -> None:
    header = '"""Module.\n\nMore.\n"""\n\n# why\n'
    source = header + 'x = """two\nlines"""\n\n\ndef f():\n    "doc"\n    g()\n'
    assert _code_lines(source) == 4


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("def f(x):\n    assert x\n", "2: assert"),
        ("try:\n    f()\nexcept:\n    raise\n", "3: bare except"),
        ("try:\n    f()\nexcept Exception:\n    pass\n", "3: an exception"),
        ("try:\n    f()\nexcept (OSError, BaseException):\n    ...\n", "3: an exception"),
        ("def f():\n" + "    g()\n" * 40, "1: f has 41 lines of 40"),
        ("def _step_kernel():\n" + "    g()\n" * 40, "1: _step_kernel has 41 lines of 40"),
    ],
)
def test_rules_have_teeth(source: str, fault: str) -> None:
    (found,) = _faults(source)
    assert found.startswith(fault)


@pytest.mark.parametrize(
    "source",
    [
        "try:\n    f()\nexcept ValueError:\n    pass\n",
        "try:\n    f()\nexcept Exception as error:\n    log(error)\n",
        "def f():\n" + "    g()\n" * 39,
        "def _step_kernel():\n" + "    g()\n" * 59,
        "@triton.jit\ndef f():\n" + "    g()\n" * 59,
    ],
)
def test_what_the_rules_allow(source: str) -> None:
    assert not _faults(source, in_kernels=True)
