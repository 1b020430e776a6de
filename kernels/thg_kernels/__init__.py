"""Kernels of thg_engine, one sub-package per operation; none knows of thg_engine.

Each operation stands beside a plain reference that says what it must compute. Importing this
package compiles no kernel and imports no Triton.
"""

from .errors import BackendUnavailable, InvalidInput
from .step_update import step_update

__all__ = ["BackendUnavailable", "InvalidInput", "step_update"]
