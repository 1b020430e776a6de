"""Every scheduler that diffusers exports, what tracing must do with it, and a reference run.

The reference steps the real scheduler as pipelines do, and rolls a table out with plain sums; it
shares no code with `thg_engine.trace`.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from diffusers import schedulers

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
UNCLIPPED = {"clip_sample": False}


@dataclass(frozen=True)
class Case:
    """``kind``: deterministic, stochastic or refused (then ``reason`` is in the message)."""

    kind: str
    config: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    steps: int = 20
    set_kwargs: dict[str, Any] = field(default_factory=dict)
    step_kwargs: dict[str, Any] = field(default_factory=dict)
    float32: str = ""  # what it keeps or computes in float32


def _sure(config: dict[str, Any] | None = None, **kwargs: Any) -> Case:
    return Case("deterministic", config or {}, **kwargs)


def _noisy(config: dict[str, Any] | None = None, **kwargs: Any) -> Case:
    return Case("stochastic", config or {}, **kwargs)


def _refused(reason: str, config: dict[str, Any] | None = None) -> Case:
    return Case("refused", config or {}, reason)


TABLES = "alphas_cumprod"
SIGMAS = "sigmas"
SAMPLES = "sigmas; casts samples to float32"
CLASSES: dict[str, Case] = {
    "AmusedScheduler": _refused("discrete tokens", {"mask_token_id": 5}),
    "BlockRefinementScheduler": _refused("discrete tokens"),
    "CMStochasticIterativeScheduler": _noisy({"clip_denoised": False}, float32=SIGMAS),
    "CogVideoXDDIMScheduler": _sure(),
    "CogVideoXDPMScheduler": _noisy(),
    "ConsistencyDecoderScheduler": _noisy(steps=2, float32="c_skip, c_out, sqrt_alphas_cumprod"),
    "CosineDPMSolverMultistepScheduler": _noisy(float32=SIGMAS),
    "DDIMInverseScheduler": _sure(UNCLIPPED, float32=TABLES),
    "DDIMParallelScheduler": _sure(UNCLIPPED, float32=TABLES),
    "DDIMScheduler": _sure({**SD, **UNCLIPPED}, float32=TABLES),
    "DDPMParallelScheduler": _noisy(UNCLIPPED, float32=TABLES),
    "DDPMScheduler": _noisy(UNCLIPPED, float32=TABLES),
    "DDPMWuerstchenScheduler": _refused("its step raises IndexError"),
    "DEISMultistepScheduler": _sure(SD, float32=SIGMAS),
    "DPMSolverMultistepInverseScheduler": _sure(SD, float32=SIGMAS),
    "DPMSolverMultistepScheduler": _sure(SD, float32=SAMPLES),
    "DPMSolverSDEScheduler": _refused("Brownian"),
    "DPMSolverSinglestepScheduler": _sure({**SD, "lower_order_final": True}, float32=SIGMAS),
    "DiscreteDDIMScheduler": _refused("discrete tokens"),
    "EDMDPMSolverMultistepScheduler": _sure(float32=SIGMAS),
    "EDMEulerScheduler": _sure(float32=SAMPLES),
    "EntropyBoundScheduler": _refused("discrete tokens"),
    "EulerAncestralDiscreteScheduler": _noisy(SD, float32=SAMPLES),
    "EulerDiscreteScheduler": _sure(SD, float32=SAMPLES),
    "FlowMapEulerDiscreteScheduler": _sure(),
    "FlowMatchEulerDiscreteScheduler": _sure({"shift": 3.0}, float32=SAMPLES),
    "FlowMatchHeunDiscreteScheduler": _sure({"shift": 3.0}, float32=SAMPLES),
    "FlowMatchLCMScheduler": _noisy({"shift": 3.0}, steps=8, float32=SAMPLES),
    "HeliosDMDScheduler": Case("refused", {"stages": 1}, "its step raises"),
    "HeliosScheduler": Case("deterministic", {"stages": 1}, float32=SIGMAS),
    "HeunDiscreteScheduler": _sure(SD, float32=SIGMAS),
    "IPNDMScheduler": _sure(float32="betas, alphas"),
    "KDPM2AncestralDiscreteScheduler": _noisy(SD, float32=SIGMAS),
    "KDPM2DiscreteScheduler": _sure(SD, float32=SIGMAS),
    "KarrasVeScheduler": _refused("sample_hat"),
    "LCMScheduler": _noisy(steps=8, float32=TABLES),
    "LMSDiscreteScheduler": _sure(SD, float32=SIGMAS),
    "LTXEulerAncestralRFScheduler": _noisy(float32=SAMPLES),
    "MiniMaxH3Scheduler": _sure(float32=SIGMAS),
    "PNDMScheduler": _sure({**SD, "skip_prk_steps": True}, float32=TABLES),
    "PiflowScheduler": _refused("its step raises ValueError"),
    "RFD4ProteinaScheduler": _refused(
        "emit_mask",
        {"schedule_mode": "log", "noise_mode": "tan", "tsr_k": 1.0, "tsr_sigma": 1.0},
    ),
    "RePaintScheduler": _refused("original_image, mask"),
    "SASolverScheduler": _noisy(SD, float32=SIGMAS),
    "SCMScheduler": _noisy(set_kwargs={"intermediate_timesteps": None}, float32="timesteps"),
    "ScoreSdeVeScheduler": _refused("no method `step`"),
    "ScoreSdeVpScheduler": _refused("no method `step`"),
    "TCDScheduler": _noisy(steps=8, float32=TABLES),
    "UnCLIPScheduler": _noisy(UNCLIPPED, float32=TABLES),
    "UniPCMultistepScheduler": _sure(SD, float32=SIGMAS),
    "VQDiffusionScheduler": _refused("discrete tokens", {"num_vec_classes": 7}),
}

_SPACINGS = ("linspace", "leading", "trailing")
_PREDICTIONS = ("epsilon", "sample", "v_prediction")
_GRIDS = ("", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
_FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}


def _product(**choices: tuple[Any, ...]) -> list[dict[str, Any]]:
    keys = list(choices)
    configs = [dict(zip(keys, v, strict=True)) for v in itertools.product(*choices.values())]
    for config in configs:
        if grid := config.pop("grid", ""):
            config[grid] = True
    return configs


def _zero_snr(**more: Any) -> dict[str, Any]:
    return {
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "prediction_type": "v_prediction",
        **more,
    }


def _dpm(orders: tuple[int, ...] = (1, 2, 3), **more: Any) -> list[dict[str, Any]]:
    solvers = _product(solver_order=orders, solver_type=("midpoint", "heun"))
    first = {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
    return [
        *_product(grid=_GRIDS, solver_order=orders),
        *_product(prediction_type=_PREDICTIONS, solver_order=orders[-1:]),
        *solvers,
        *({**solver, **first, **more} for solver in solvers),
        *({**_FLOW, "solver_order": order} for order in orders),
    ]


_KARRAS = [*_product(grid=_GRIDS, prediction_type=("epsilon", "v_prediction"))]
MATRIX: dict[str, list[dict[str, Any]]] = {
    "CogVideoXDDIMScheduler": [
        *_product(timestep_spacing=_SPACINGS, prediction_type=_PREDICTIONS),
        _zero_snr(),
    ],
    "DDIMInverseScheduler": _product(timestep_spacing=("leading", "trailing")),
    "DDIMScheduler": [
        *_product(
            timestep_spacing=_SPACINGS,
            prediction_type=_PREDICTIONS,
            set_alpha_to_one=(True, False),
        ),
        _zero_snr(),
    ],
    "DEISMultistepScheduler": [
        *_product(grid=_GRIDS, solver_order=(1, 2, 3)),
        *_product(timestep_spacing=_SPACINGS, prediction_type=_PREDICTIONS),
        _FLOW,
    ],
    "DPMSolverMultistepInverseScheduler": _product(
        prediction_type=_PREDICTIONS, solver_order=(1, 2, 3)
    ),
    "DPMSolverMultistepScheduler": [
        *_dpm(),
        *_product(
            timestep_spacing=_SPACINGS,
            lower_order_final=(True, False),
            euler_at_final=(True, False),
        ),
        {"use_lu_lambdas": True},
        _zero_snr(euler_at_final=True),
    ],
    "DPMSolverSinglestepScheduler": _dpm(),
    "EDMDPMSolverMultistepScheduler": _product(
        sigma_schedule=("karras", "exponential"),
        prediction_type=("epsilon", "v_prediction"),
        solver_order=(1, 2, 3),
    ),
    "EDMEulerScheduler": _product(
        sigma_schedule=("karras", "exponential"),
        prediction_type=("epsilon", "v_prediction"),
        final_sigmas_type=("zero", "sigma_min"),
    ),
    "EulerDiscreteScheduler": [
        *_product(grid=_GRIDS, prediction_type=_PREDICTIONS),
        *_product(timestep_spacing=_SPACINGS, final_sigmas_type=("zero", "sigma_min")),
        {"interpolation_type": "log_linear"},
        {
            "timestep_type": "continuous",
            "prediction_type": "v_prediction",
            "use_karras_sigmas": True,
            "sigma_min": 0.002,
            "sigma_max": 700.0,
        },
        _zero_snr(),
    ],
    "FlowMatchEulerDiscreteScheduler": [
        *_product(grid=_GRIDS, shift=(1.0, 3.0)),
        {"invert_sigmas": True},
        {"shift_terminal": 0.1},
    ],
    "FlowMatchHeunDiscreteScheduler": _product(shift=(1.0,)),
    "HeunDiscreteScheduler": _KARRAS,
    "KDPM2DiscreteScheduler": [
        *_product(grid=_GRIDS),
        *_product(timestep_spacing=("leading", "trailing"), prediction_type=("v_prediction",)),
    ],
    "LMSDiscreteScheduler": _KARRAS,
    "PNDMScheduler": _product(
        skip_prk_steps=(True, False),
        timestep_spacing=_SPACINGS,
        prediction_type=("epsilon", "v_prediction"),
        set_alpha_to_one=(True, False),
    ),
    "SASolverScheduler": _product(
        predictor_order=(1, 2, 3), corrector_order=(1, 2), tau_func=(lambda t: 0,)
    ),
    "UniPCMultistepScheduler": [
        *_product(grid=_GRIDS, solver_order=(1, 2, 3)),
        *_product(prediction_type=_PREDICTIONS),
        *_product(solver_type=("bh1",), final_sigmas_type=("sigma_min",), solver_order=(2, 3)),
        *_product(predict_x0=(False,), solver_order=(2, 3), final_sigmas_type=("sigma_min",)),
        {"disable_corrector": [0, 2]},
        _FLOW,
        _zero_snr(),
    ],
}


def exported() -> set[str]:
    """Names of all scheduler classes that diffusers exports."""
    return {name for name in dir(schedulers) if name.endswith("Scheduler")}


def build(name: str, **config: Any) -> Any:
    """A scheduler of class ``name`` with its case's config and ``config`` on top."""
    merged = {**CLASSES[name].config, **config}
    key = (name, repr(merged))
    if key not in _built:  # some constructors take half a second
        _built[key] = _class(name)(**merged)
    return copy.deepcopy(_built[key])


_built: dict[tuple[str, str], Any] = {}


def _class(name: str) -> Any:
    return getattr(schedulers, name, None) or getattr(schedulers.deprecated, name)


def names(*kinds: str) -> list[str]:
    """Classes whose case is one of ``kinds``."""
    return sorted(name for name, case in CLASSES.items() if case.kind in kinds)


def available(name: str) -> Case:
    """The case of ``name``; skips the test where an optional dependency of the class is missing."""
    brownian = name in ("CosineDPMSolverMultistepScheduler", "DPMSolverSDEScheduler")
    if brownian and importlib.util.find_spec("torchsde") is None:
        pytest.skip(f"{name} needs torchsde, which is not installed")
    return CLASSES[name]


def prepared(name: str, num_steps: int, **config: Any) -> Any:
    """A scheduler whose timesteps are set."""
    scheduler = build(name, **config)
    scheduler.set_timesteps(num_inference_steps=num_steps, **CLASSES[name].set_kwargs)
    return scheduler


def name_of(name: str, config: dict[str, Any]) -> str:
    """A readable test id."""
    words = [k if v is True else f"{k}={v}" for k, v in config.items() if not callable(v)]
    return "-".join([name.removesuffix("Scheduler"), *words])


@dataclass
class Reference:
    """A real run: R + 1 samples, and per row the denoiser's input and output, and the noise."""

    samples: list[torch.Tensor]
    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]
    noises: list[torch.Tensor | None]
    edits: list[torch.Tensor] = field(default_factory=list)


def real_run(
    scheduler: Any,
    *,
    seed: int = 0,
    start: int = 0,
    shape: tuple[int, ...] = (1, 4, 3, 5),
    dtype: torch.dtype = torch.float64,
    step_kwargs: dict[str, Any] | None = None,
    edits: float = 0.0,
) -> Reference:
    """Step ``scheduler``, whose timesteps are set, on random latents and model outputs.

    With ``edits`` every sample but the first is changed by so much before the scheduler sees it.
    """
    generator = torch.Generator().manual_seed(seed)
    kwargs = {"return_dict": False, **(step_kwargs or {})}
    noise = torch.Generator().manual_seed(seed + 1)
    names = scheduler.step.__code__.co_varnames[: scheduler.step.__code__.co_argcount]
    wrapped = getattr(scheduler.step, "__wrapped__", None)
    if "generator" in (wrapped.__code__.co_varnames if wrapped else names):
        kwargs["generator"] = noise
    scale = float(getattr(scheduler, "init_noise_sigma", 1.0))
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) * scale
    run, denoised = Reference([x], [], [], []), None
    timesteps = scheduler.timesteps[start:]
    if type(scheduler).__name__ == "SCMScheduler":
        timesteps = timesteps[:-1]
    for i, t in enumerate(timesteps):
        if edits and i:
            edit = edits * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            run.edits.append(edit)
            x = x + edit
        fed = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        output = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        before = noise.get_state()
        if type(scheduler).__name__ == "CogVideoXDPMScheduler":
            back = timesteps[i - 1] if i else None
            x, denoised = scheduler.step(output, denoised, t, back, x, **kwargs)
        elif type(scheduler).__name__ == "UnCLIPScheduler":
            ahead = timesteps[i + 1] if i + 1 < len(timesteps) else None
            x = scheduler.step(output, t, x, prev_timestep=ahead, **kwargs)[0]
        else:
            x = scheduler.step(output, t, x, **kwargs)[0]
        run.samples.append(x)
        run.inputs.append(fed)
        run.outputs.append(output)
        run.noises.append(_drawn(before, noise.get_state(), shape, dtype))
    return run


def _drawn(
    before: torch.Tensor, after: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor | None:
    """The last noise drawn between two states of a generator; None if nothing was drawn."""
    replay, drawn = torch.Generator(), None
    replay.set_state(before)
    for _ in range(4):
        if torch.equal(replay.get_state(), after):
            return drawn
        drawn = torch.randn(shape, generator=replay, dtype=dtype)
    raise AssertionError("the step drew its noise in another dtype or shape than its sample's")


def table_error(table: Any, run: Reference) -> float:
    """Largest relative error over a run: of every sample, and of what the denoiser is fed."""
    samples, states, worst = [run.samples[0].double()], [], 0.0
    assert len(table.rows) == len(run.outputs)

    def total(sample_weights: Any, output_weights: Any, state_weights: Any) -> torch.Tensor:
        x = torch.zeros_like(samples[0])
        for k, weight in enumerate(sample_weights):
            x += weight * samples[i - k]
        for k, weight in enumerate(output_weights):
            x += weight * run.outputs[i - k].double()
        for weight in state_weights:
            x += weight * states[-1]
        return x

    for i, row in enumerate(table.rows):
        if run.edits and i:
            samples[i] = samples[i] + run.edits[i - 1].double()
        worst = max(worst, _relative(row.input_scale * samples[i], run.inputs[i]))
        if row.state_weights:
            update = (row.state_sample_update, row.state_output_update, row.state_update)
            states.append(total(*update))
        x = total(row.sample_weights, row.output_weights, row.state_weights)
        if row.noise_weight:
            assert run.noises[i] is not None, f"row {i} has a noise weight but drew no noise"
            x += row.noise_weight * run.noises[i].double()
        samples.append(x)
        worst = max(worst, _relative(x, run.samples[i + 1]))
    return worst


def _relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    reference = reference.double()
    return float((value - reference).norm() / reference.norm().clamp_min(1e-300))
