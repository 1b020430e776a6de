"""The denoiser's answer before guidance has been formed: a tensor that waits to see what for.

Pipelines form ``u + w (c - u)`` by three small kernels and hand the result to ``scheduler.step``.
The fused step does that itself, so it needs c and u, and w as the pipeline used it. A `BranchSum`
follows the pipeline's arithmetic on paper: ``chunk(2)`` gives the branches, sums and multiples of
them stay symbolic. Anything else (a rescaling, a norm, a print) turns it into the very tensor that
the pipeline would have had, by the same operations in the same order. An edit in place ends the
waiting for all sums of the call.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_METADATA = {
    vars(Tensor.__base__)[name].__get__
    for name in ("shape", "dtype", "device", "ndim", "requires_grad", "layout", "is_cuda")
}
_QUESTIONS = {Tensor.size, Tensor.dim, Tensor.is_floating_point, Tensor.ndimension, Tensor.numel}
_CHUNKS = {torch.chunk, Tensor.chunk}
_ADD = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__}
_SUBTRACT = {torch.sub, Tensor.sub, Tensor.__sub__}
_MULTIPLY = {torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__}
Weights = tuple[float, float]


class Family:
    """All live sums of one denoiser call.

    Attributes:
        is_exposed: whether one of them has been edited in place, or may be through a view that is
            out: none of them is what its weights say any more.
    """

    def __init__(self) -> None:
        self.is_exposed = False
        self._members: list[weakref.ref[BranchSum]] = []

    def add(self, member: BranchSum) -> None:
        """Count ``member`` in."""
        self._members.append(weakref.ref(member))

    def expose(self) -> None:
        """Give every sum its value, before an edit of another reaches what it is computed from."""
        self.is_exposed = True
        for reference in self._members:
            member = reference()
            if member is not None:
                member.value()


class BranchSum(Tensor):
    """``weights[0] * uncond + weights[1] * cond`` of one denoiser call, or the pair of them.

    Attributes:
        source: identifies the call; branches of different calls do not mix.
        weights: None for the pair, whose batch holds both branches.
        cond_half: which half of the pair is the conditional one.
        family: all sums of the call; a new one for the pair.
    """

    source: object
    family: Family
    weights: Weights | None
    cond_half: int
    _make: Callable[[], Tensor] | None
    _value: Tensor | None

    @staticmethod
    def __new__(
        cls: type[BranchSum],
        shape: torch.Size,
        like: Tensor,
        source: object,
        weights: Weights | None,
        cond_half: int,
        make: Callable[[], Tensor],
        family: Family | None = None,
    ) -> BranchSum:
        """A sum or pair of ``shape``, dtype and device of ``like``.

        ``make`` computes its value, a tensor of its own or a view of the pair's.
        """
        made: BranchSum = Tensor._make_wrapper_subclass(
            cls, shape, dtype=like.dtype, device=like.device
        )
        made.source, made.weights, made.cond_half = source, weights, cond_half
        made._make, made._value = make, None
        made.family = family or Family()
        made.family.add(made)
        return made

    def value(self) -> Tensor:
        """The tensor itself, computed once."""
        if self._value is None and self._make is not None:
            self._value, self._make = self._make(), None
        if self._value is None:
            raise RuntimeError("a BranchSum without value: its computation raised before.")
        return self._value

    @property
    def guidance_scale(self) -> float | None:
        """w if this is u + w (c - u); None if it is another sum, the pair, or edited."""
        if self.weights is None or self.family.is_exposed:
            return None
        uncond, cond = self.weights
        return cond if math.isclose(uncond + cond, 1.0, abs_tol=1e-6) else None

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Stay on paper where that is possible, else compute."""
        kwargs = kwargs or {}
        if func in _METADATA or func in _QUESTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        symbolic = None if kwargs else _symbolic(func, args)
        if symbolic is not None:
            return symbolic
        sums = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, BranchSum)]
        if _edits(func, kwargs):
            _expose(sums)
        args, kwargs = pytree.tree_map_only(BranchSum, BranchSum.value, (args, kwargs))
        result = func(*args, **kwargs)
        if _is_view(result, sums):
            _expose(sums)
        return result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Below the level of functions there is only the value (a C++ caller, say)."""
        args, kwargs = pytree.tree_map_only(BranchSum, BranchSum.value, (args, kwargs or {}))
        return func(*args, **kwargs)


def _expose(sums: Sequence[BranchSum]) -> None:
    for each in sums:
        each.family.expose()


def _is_view(result: Any, sums: Sequence[BranchSum]) -> bool:
    """Whether an edit of ``result`` would be one of a sum's value."""
    if isinstance(result, np.ndarray):
        return True
    views = [v for v in pytree.tree_leaves(result) if isinstance(v, Tensor)]
    places = {view.untyped_storage().data_ptr() for view in views}
    return any(each.value().untyped_storage().data_ptr() in places for each in sums)


def _edits(func: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a function changes one of its arguments; ``x += y`` arrives as ``add_``."""
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    named = kwargs.get("out") is not None or bool(kwargs.get("inplace"))
    return in_place or named or func is Tensor.__setitem__


def _symbolic(func: Any, args: tuple[Any, ...]) -> Any:
    """The result of ``func`` as sums, None where it is not one."""
    if any(isinstance(value, BranchSum) and value.family.is_exposed for value in args):
        return None
    if func in _CHUNKS:
        return _halves(*args) if args[1:] == (2,) else None
    if len(args) != 2:
        return None
    a, b = args
    if func in _MULTIPLY:
        term, factor = (a, b) if isinstance(a, BranchSum) else (b, a)
        weights = _weights(term)
        if weights is None or not _is_number(factor):
            return None
        return _combined(func, args, term, (factor * weights[0], factor * weights[1]))
    sign = 1.0 if func in _ADD else -1.0 if func in _SUBTRACT else 0.0
    first, second = _weights(a), _weights(b)
    if not sign or first is None or second is None or a.source is not b.source:
        return None
    total = (first[0] + sign * second[0], first[1] + sign * second[1])
    return _combined(func, args, a, total)


def _halves(pair: BranchSum, chunks: int) -> tuple[BranchSum, ...] | None:
    if pair.weights is not None:
        return None
    shape = torch.Size((pair.shape[0] // 2, *pair.shape[1:]))

    def half(k: int) -> BranchSum:
        weights = (0.0, 1.0) if k == pair.cond_half else (1.0, 0.0)
        make = lambda: pair.value().chunk(2)[k]  # noqa: E731
        return BranchSum(shape, pair, pair.source, weights, pair.cond_half, make, pair.family)

    return half(0), half(1)


def _combined(func: Any, args: tuple[Any, ...], like: BranchSum, weights: Weights) -> BranchSum:
    def make() -> Tensor:
        plain = pytree.tree_map_only(BranchSum, BranchSum.value, args)
        result: Tensor = func(*plain)
        return result

    return BranchSum(like.shape, like, like.source, weights, like.cond_half, make, like.family)


def _weights(value: Any) -> Weights | None:
    """Of a sum; None for anything else, the pair included."""
    return value.weights if isinstance(value, BranchSum) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
