"""The C++ and CUDA backends: two libraries built from ``csrc/``, loaded on first use.

Both serve one operator, ``thg_engine::step_update``. The CPU library holds its schema; that of CUDA
is apart, because one that needs CUDA does not load beside a torch without it. ``setup.py`` puts the
libraries into this folder, with a record of why one was not built.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch

from .op import REGISTRATION, Backend

FOLDER = Path(__file__).parent
RECORD = "native_build.json"
OLDEST_TORCH = (2, 10)
"""The stable ABI that the libraries are compiled for (TORCH_TARGET_VERSION in CMakeLists.txt)."""
TO_BUILD = "to build it, run `pip install --no-deps -e .` in a checkout, beside an installed torch"


def why_unavailable(backend: str) -> str:
    """Why the library of ``backend`` ("cpu" or "cuda") cannot be used; "" where it can."""
    if backend == "cuda" and not torch.cuda.is_available():
        return "there is no CUDA device."
    with REGISTRATION:
        return _why_not_loaded(backend)


@cache
def native_backend(backend: str) -> Backend:
    """The operator of ``backend``, which must be available: it dispatches on its tensors."""
    reason = why_unavailable(backend)
    if reason:
        raise ImportError(f"backend {backend!r} cannot run: {reason}")
    return cast(Backend, torch.ops.thg_engine.step_update.default)


def library(backend: str) -> Path:
    """Where the library of ``backend`` stands if it was built."""
    return FOLDER / f"libthg_step_update_{backend}.so"


@cache
def _why_not_loaded(backend: str) -> str:
    """Loads the library; why that is impossible, else ""."""
    if backend == "cuda":
        # The schema is in the other library.
        reason = _why_not_loaded("cpu")
        if reason:
            return f"it needs the cpu library, and {reason}"
    path = library(backend)
    if not path.exists():
        return _why_not_built(backend)
    if _torch_version() < OLDEST_TORCH:
        wanted = ".".join(map(str, OLDEST_TORCH))
        return f"its library needs torch {wanted} or newer, this is {torch.__version__}."
    try:
        cast(Any, torch.ops).load_library(str(path))  # untyped in torch
        if backend == "cpu":
            torch.library.register_fake("thg_engine::step_update", _nothing_returned)
    except (OSError, RuntimeError) as error:
        # torch says which library it was, its cause what that lacks.
        first = str(error.__cause__ or error).strip().partition("\n")[0]
        return f"its library cannot be loaded: {first}"
    return ""


def _nothing_returned(*args: object, **kwargs: object) -> None:
    """The fake: all results are in the arguments."""


def _why_not_built(backend: str) -> str:
    """What the build left on record."""
    try:
        reason = json.loads((FOLDER / RECORD).read_text(encoding="utf-8"))[backend]
    except (OSError, ValueError, KeyError, TypeError):
        reason = None
    if not reason or not isinstance(reason, str):
        reason = TO_BUILD
    return f"its library was not built: {reason}."


def _torch_version() -> tuple[int, ...]:
    numbers = torch.__version__.partition("+")[0].split(".")[:2]
    return tuple(int(number) for number in numbers)
