"""The solvers under comparison, set up so that all of them approximate one and the same ODE path.

Noise models start at timestep 999 ("trailing" spacing) and end at the first training noise level
(``final_sigmas_type="sigma_min"``, ``set_alpha_to_one=False``), as Stable Diffusion's own DDIM
does. Flow models start at sigma = 0.999 (shifted) and end at zero. Numbers of steps must divide
1,000: DDIM and PNDM step by ``1000 // N`` whatever the next timestep is.

Some diffusers classes cannot be configured to that grid, and get it from a subclass that edits
their tables after ``set_timesteps`` and nothing else. Heun always ends at zero noise. A flow's
Euler and Heun space sigma between 1 and 0.001, with a short last step. The multistep solvers round
a flow's timesteps to whole numbers, an error of their own at any number of steps; UniPC begins a
flow elsewhere than the rest; DEIS cannot end one at zero, where its log-SNR is infinite, and ends
at sigma = 1e-4.

Karras' samplers (Euler, Heun) scale samples by ``sqrt(1 + sigma^2)``, which `frame` gives; with
trailing spacing their own start would be ``sigma`` instead, another point.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from ..errors import InvalidArgument

NOISE, FLOW = "noise", "flow"
TRAIN_STEPS = 1000
FLOW_END = 1e-4
"""Where DEIS ends a flow."""

_VP: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"set_alpha_to_one": False, "clip_sample": False}),
    "euler": ("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min"}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpmpp2m": (
        "DPMSolverMultistepScheduler",
        {"solver_order": 2, "final_sigmas_type": "sigma_min"},
    ),
    "dpmpp3m": (
        "DPMSolverMultistepScheduler",
        {"solver_order": 3, "final_sigmas_type": "sigma_min"},
    ),
    "unipc": ("UniPCMultistepScheduler", {"solver_order": 2, "final_sigmas_type": "sigma_min"}),
    "deis": ("DEISMultistepScheduler", {"solver_order": 2}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False}),
}
_FLOW: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "dpmpp2m": ("DPMSolverMultistepScheduler", {"solver_order": 2}),
    "dpmpp3m": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "unipc": ("UniPCMultistepScheduler", {"solver_order": 2}),
    "deis": ("DEISMultistepScheduler", {"solver_order": 2}),
}
SOLVERS = {NOISE: tuple(_VP), FLOW: tuple(_FLOW)}


def check_steps(argument: str, num_steps: int) -> None:
    """Refuse numbers of steps at which DDIM and PNDM would miss their own grid."""
    if num_steps < 2 or TRAIN_STEPS % num_steps:
        remedy = "numbers of steps divide 1000: 10, 20, 25, 40, 50, 100, ..."
        raise InvalidArgument(argument, num_steps, remedy)


def build(family: str, solver: str, config: Any) -> Any:
    """The scheduler ``solver`` for a pipeline whose own scheduler has ``config``."""
    import diffusers

    table = _VP if family == NOISE else _FLOW
    if solver not in table:
        raise InvalidArgument("solver", solver, f"use one of {', '.join(table)}.")
    name, options = table[solver]
    base = getattr(diffusers, name)
    if family == NOISE:
        made = base if solver != "heun" else _edited(base, _end_at_sigma_min)
        return made.from_config(config, timestep_spacing="trailing", **options)
    shift = float(config.get("shift", 1.0))
    if solver in ("euler", "heun"):
        edit = _exact_timesteps if solver == "euler" else _heun_grid
        return _edited(base, edit).from_config(config)
    options = {**options, "prediction_type": "flow_prediction", "use_flow_sigmas": True}
    if solver != "deis":
        options["final_sigmas_type"] = "zero"
    edit = _end_near_zero if solver == "deis" else _exact_timesteps
    return _edited(base, edit)(num_train_timesteps=TRAIN_STEPS, flow_shift=shift, **options)


@functools.cache
def _edited(base: type[Any], edit: Callable[[Any], None]) -> type[Any]:
    """A scheduler class whose tables ``edit`` puts right after ``set_timesteps``."""

    @functools.wraps(base.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        base.set_timesteps(self, *args, **kwargs)
        edit(self)

    body = {"set_timesteps": set_timesteps, "__module__": base.__module__, "__doc__": base.__doc__}
    return type(base.__name__, (base,), body)


def _end_at_sigma_min(scheduler: Any) -> None:
    first = scheduler.alphas_cumprod[0]
    scheduler.sigmas[-1] = ((1 - first) / first) ** 0.5


def _exact_timesteps(scheduler: Any, end: float = 0.0) -> None:
    """The common grid, not rounded; UniPC's own begins at 1 - 1e-6, the others' at 0.999."""
    config = scheduler.config
    shift = config.flow_shift if "flow_shift" in config else config.shift
    grid = _shifted(scheduler.num_inference_steps, shift).to(scheduler.timesteps.device)
    scheduler.timesteps = grid * TRAIN_STEPS
    scheduler.sigmas = torch.cat([grid, grid.new_tensor([end])])


def _end_near_zero(scheduler: Any) -> None:
    _exact_timesteps(scheduler, FLOW_END)


def _shifted(num_steps: int, shift: float) -> torch.Tensor:
    """The common grid of flows: from 0.999 in equal steps of sigma to zero, then shifted."""
    top = 1 - 1 / TRAIN_STEPS
    grid = torch.tensor([top * (1 - i / num_steps) for i in range(num_steps)], dtype=torch.float64)
    return (shift * grid / (1 + (shift - 1) * grid)).float()


def _heun_grid(scheduler: Any) -> None:
    """Every point but the first twice."""
    grid = _shifted(scheduler.num_inference_steps, scheduler.config.shift)
    grid = grid.to(scheduler.timesteps.device)
    doubled = grid[1:].repeat_interleave(2)
    scheduler.timesteps = torch.cat([grid[:1], doubled]) * TRAIN_STEPS
    scheduler.sigmas = torch.cat([grid[:1], doubled, grid.new_zeros(1)])


def frame(scheduler: Any, num_steps: int) -> tuple[float, float]:
    """Factors on the noise handed in and on the latents handed out; (1, 1) but for Karras' form."""
    if float(getattr(scheduler, "init_noise_sigma", 1.0)) == 1.0:
        return 1.0, 1.0
    scheduler.set_timesteps(num_steps)
    first, last = float(scheduler.sigmas[0]), float(scheduler.sigmas[-1])
    start = math.sqrt(first**2 + 1) / float(scheduler.init_noise_sigma)
    return start, 1 / math.sqrt(last**2 + 1)
