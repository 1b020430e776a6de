"""Kernels of thg_engine, one sub-package per operation; none knows of thg_engine.

Each operation stands beside a plain reference that says what it must compute. Importing this
package compiles no kernel and imports no Triton.

`step_update` here is the function, and so it is after ``import thg_kernels.step_update as name``,
which asks this package for it. What else the sub-package has is imported from it by name:
``from thg_kernels.step_update import StepState``.
"""

from .errors import BackendUnavailable, InvalidInput
from .step_update import step_update

__all__ = ["BackendUnavailable", "InvalidInput", "step_update"]
