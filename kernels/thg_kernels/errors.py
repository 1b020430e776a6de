"""What the kernels raise at their public edge."""

from __future__ import annotations


class InvalidInput(ValueError):
    """An argument that no backend may be launched with; names it, its value and the remedy."""

    def __init__(self, argument: str, value: object, remedy: str) -> None:
        super().__init__(f"{argument}={value!r}: {remedy}")
        self.argument, self.value, self.remedy = argument, value, remedy


class BackendUnavailable(RuntimeError):
    """A backend that was asked for by name cannot run here; the message says why."""
