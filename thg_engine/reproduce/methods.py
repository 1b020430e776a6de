"""How a row is run: its scheduler, and its guidance method by name.

A method that is not here yet is plugged in with `register_guidance`, or by its name among
`guidance.GUIDANCE_NAMES`. Until then its row says that it is not available: another method in its
place would be a number under a wrong name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..curves import Calibration
from ..errors import ThgError
from ..guidance import GUIDANCE_NAMES, THG, Guidance
from ..published import published
from .tables import Row


class NotAvailable(ThgError):
    """A row that cannot be run here; the message says why."""


@dataclass(frozen=True)
class Context:
    """What a method may depend on besides its row.

    Attributes:
        model: key of the model in `published.published`.
        calibration: error curves, where there are any.
    """

    model: str
    calibration: Calibration | None = None


Factory = Callable[[Row, Context], Guidance | None]
"""Makes a row's method; None is the stock pipeline. Raises `NotAvailable`."""

_FACTORIES: dict[str, Factory] = {}


def register_guidance(name: str, factory: Factory) -> None:
    """Let rows of method ``name`` be made by ``factory``; the latest one counts."""
    _FACTORIES[name] = factory


def guidance_of(row: Row, context: Context) -> Guidance | None:
    """The method of ``row``; None for plain guidance, which the stock pipeline does itself.

    Raises:
        NotAvailable: nobody registered the method, or it lacks what it depends on.
    """
    if row.method in _FACTORIES:
        return _FACTORIES[row.method](row, context)
    if row.method in GUIDANCE_NAMES:
        return GUIDANCE_NAMES[row.method](**row.options)
    raise NotAvailable(f"this version has no method {row.method!r}")


def _cfg(row: Row, context: Context) -> None:
    """The pipeline as it is."""


def _thg(row: Row, context: Context) -> THG:
    """The published grid to the letter, or one of the given calibration for the published rho."""
    shared = {"boost": row.options["boost"], "cutoff": row.options["cutoff"]}
    rho = row.options["rho"]
    if row.options["grid"] == "published":
        return THG(grid=published(context.model, rho).grid.indices, **shared)
    if context.calibration is None:
        raise NotAvailable(
            f"the published grid for rho = {rho:g} at N = {row.num_steps} is not known; "
            "give --calibration"
        )
    return THG(rho=rho, calibration=context.calibration, **shared)


register_guidance("cfg", _cfg)
register_guidance("thg", _thg)


def _ddim(config: Any) -> Any:
    """DDIM, eta = 0: `DDIMScheduler`. Source: Song et al. 2021, arXiv 2010.02502."""
    from diffusers import DDIMScheduler

    return DDIMScheduler.from_config(config)


def _dpm2(config: Any) -> Any:
    """DPM-Solver-2: `DPMSolverMultistepScheduler` of the noise-prediction form, order 2.

    Multistep, one evaluation a step, as the published cost of 100 evaluations at N = 50 and a hare
    that jumps without evaluations ask for; it ends at the last noise level of the model, since its
    noise prediction has no limit at none.

    Source: Lu et al. 2022, arXiv 2206.00927.
    """
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler.from_config(
        config,
        algorithm_type="dpmsolver",
        solver_order=2,
        solver_type="midpoint",
        final_sigmas_type="sigma_min",
    )


def _lms2(config: Any) -> Any:
    """Linear multistep, order 2: `LMSDiscreteScheduler` with two steps, not its default of four.

    The order is an argument of ``step``, which pipelines do not pass: a subclass does.

    Source: Karras et al. 2022, arXiv 2206.00364 (the sigma variable).
    """
    from diffusers import LMSDiscreteScheduler

    class TwoStepLMSScheduler(LMSDiscreteScheduler):  # type: ignore[misc]
        """`LMSDiscreteScheduler` whose steps read two outputs."""

        def step(
            self,
            model_output: Any,
            timestep: Any,
            sample: Any,
            order: int = 2,
            return_dict: bool = True,
        ) -> Any:
            return super().step(model_output, timestep, sample, order, return_dict)

    return TwoStepLMSScheduler.from_config(config)


def _flow_euler(config: Any) -> Any:
    """Euler along the flow with the model's own shift: `FlowMatchEulerDiscreteScheduler`."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler.from_config(config)


SOLVERS: dict[str, Callable[[Any], Any]] = {
    "ddim": _ddim,
    "dpm2": _dpm2,
    "lms2": _lms2,
    "flow-euler": _flow_euler,
}
"""Solver of a row -> its scheduler from the config of the model's own."""
