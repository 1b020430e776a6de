"""The C++ and CUDA backends: two libraries built from ``csrc/``, loaded on first use."""

from __future__ import annotations

from .op import Backend


def why_unavailable(backend: str) -> str:
    """Why the library of ``backend`` ("cpu" or "cuda") cannot be used; "" where it can."""
    return "not built"


def native_backend(backend: str) -> Backend:
    """The operator of ``backend``, which must be available."""
    raise NotImplementedError
