"""The loop: runs any plan on any denoiser, eagerly. No formulas here; a row holds them.

    engine = Engine(denoiser)
    x_0 = engine.sample(x_T, cond, uncond, plan)

For a loop of one's own, ``begin`` gives a `Run`, ``step`` advances it by one row, ``result`` reads
it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from tqdm import tqdm

from thg_kernels.step_update import Registers, step_update

from .errors import InvalidArgument, ThgError
from .plan import SamplingPlan

Conditioning = Any
"""A tensor, or nested dicts, lists and tuples of tensors, batch first; None entries stay."""


class Denoiser(Protocol):
    """The backbone.

    Args:
        model_input: shape ``(R, ...)``, R = batch, or 2 x batch with the unconditional half first.
        timestep: shape ``(R,)``, float32, on the device of the input.
        conditioning: the condition of each of the R rows.
    Returns:
        The prediction, shape of ``model_input``.
    """

    def __call__(self, model_input: Tensor, timestep: Tensor, conditioning: Any) -> Tensor: ...


StepCallback = Callable[["Run"], None]


@dataclass
class Run:
    """State of one sampling run.

    Attributes:
        plan: what is being run.
        registers: past samples, outputs and deltas in the register dtype.
        model_dtype: what the denoiser is fed in.
        cond, uncond: conditioning of the two branches.
        generator: source of the noise of stochastic solvers.
        row: index of the next row; ``plan.num_rows`` when the run is over.
        nfe: denoiser evaluations per sample so far.
    """

    plan: SamplingPlan
    registers: Registers
    model_dtype: torch.dtype
    cond: Conditioning
    uncond: Conditioning
    generator: torch.Generator | None
    row: int = 0
    nfe: int = 0

    @property
    def sample(self) -> Tensor:
        """The current x, shape of x_T, in the register dtype."""
        return self.registers.samples[0]

    @property
    def done(self) -> bool:
        """Whether every row has run."""
        return self.row == self.plan.num_rows


class Engine:
    """Runs sampling plans on one denoiser.

    Args:
        denoiser: see `Denoiser`.
        model_dtype: dtype of the model input; that of x_T if None.
        register_dtype: dtype of samples, outputs and deltas between the calls.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        model_dtype: torch.dtype | None = None,
        register_dtype: torch.dtype = torch.float32,
    ) -> None:
        if not callable(denoiser):
            raise InvalidArgument(
                "denoiser", denoiser, "give a callable (input, t, cond) -> output."
            )
        if not register_dtype.is_floating_point or register_dtype.itemsize < 4:
            remedy = "differences of outputs need float32 or float64 registers."
            raise InvalidArgument("register_dtype", register_dtype, remedy)
        if model_dtype is not None and not model_dtype.is_floating_point:
            raise InvalidArgument("model_dtype", model_dtype, "give a floating-point dtype.")
        self.denoiser = denoiser
        self.model_dtype = model_dtype
        self.register_dtype = register_dtype

    def sample(
        self,
        x_T: Tensor,
        cond: Conditioning,
        uncond: Conditioning,
        plan: SamplingPlan,
        *,
        generator: torch.Generator | None = None,
        progress: bool = False,
        callback: StepCallback | None = None,
    ) -> Tensor:
        """Run the whole plan from the noise ``x_T``.

        Args:
            x_T: initial noise, scaled by ``plan.initial_scale``, shape ``(B, ...)``, floating.
            cond: conditioning of the guided branch, batch B.
            uncond: the same structure for the unconditional branch; None if no row evaluates it.
            plan: the rows.
            generator: source of the noise of stochastic solvers.
            progress: show a tqdm bar.
            callback: called with the `Run` after every row.
        Returns:
            x_0, shape and dtype of ``x_T``.
        Raises:
            InvalidArgument: before any denoiser call.
        """
        run = self.begin(x_T, cond, uncond, plan, generator=generator)
        with tqdm(total=plan.num_rows, disable=not progress) as bar:
            while not run.done:
                self.step(run)
                bar.update()
                if callback is not None:
                    callback(run)
        return self.result(run).to(x_T.dtype)

    def begin(
        self,
        x_T: Tensor,
        cond: Conditioning,
        uncond: Conditioning,
        plan: SamplingPlan,
        *,
        generator: torch.Generator | None = None,
    ) -> Run:
        """Check the arguments and set up a run; evaluates nothing."""
        if not isinstance(plan, SamplingPlan):
            raise InvalidArgument("plan", plan, "give a SamplingPlan.")
        if not plan.steps_itself:
            remedy = "it has guidance columns alone; make one with plan_from_table or a solver."
            raise InvalidArgument("plan", f"<{plan.method} on {plan.solver}>", remedy)
        check_inputs(x_T, cond, uncond, both=any(row.evaluates_both for row in plan.rows))
        _check_generator(generator, x_T.device)
        # A copy: what a callback writes into the sample must not reach the caller's noise.
        start = x_T.detach().to(self.register_dtype, copy=True)
        registers = Registers([start], plan.register_depths())
        model_dtype = self.model_dtype or x_T.dtype
        return Run(plan, registers, model_dtype, cond, uncond, generator)

    @torch.no_grad()
    def step(self, run: Run) -> Tensor:
        """Run the next row, without gradients; returns the new sample in the register dtype.

        A row whose denoiser call raises leaves the run as it was, so it can be stepped again.
        """
        if run.done:
            raise ThgError("the run is over: begin a new one.")
        row = run.plan.rows[run.row]
        x = (row.input_scale * run.sample).to(run.model_dtype)
        uncond: Tensor | None = None
        if row.evaluates_both:
            cond, uncond = self.evaluate_both(x, row.timestep, run.cond, run.uncond)
        else:
            cond = self._evaluate(x, row.timestep, run.cond)
        noise = None
        if row.noise_weight != 0.0:
            noise = torch.randn(
                x.shape, generator=run.generator, device=x.device, dtype=run.sample.dtype
            )
        x_next = step_update(run.registers, row, cond, uncond, noise)
        run.row += 1
        run.nfe += row.nfe
        return x_next

    def result(self, run: Run) -> Tensor:
        """The final sample in the register dtype; `ThgError` if rows are left."""
        if not run.done:
            raise ThgError(f"the run is at row {run.row} of {run.plan.num_rows}: step it further.")
        return run.sample

    @torch.no_grad()
    def evaluate_both(
        self, x: Tensor, timestep: float, cond: Conditioning, uncond: Conditioning
    ) -> tuple[Tensor, Tensor]:
        """(conditional, unconditional) outputs at ``x`` from one call with a doubled batch."""
        both = pytree.tree_map(_concatenate, uncond, cond)
        output_uncond, output_cond = self._evaluate(torch.cat([x, x]), timestep, both).chunk(2)
        return output_cond, output_uncond

    def _evaluate(self, x: Tensor, timestep: float, conditioning: Conditioning) -> Tensor:
        t = torch.full((x.shape[0],), timestep, dtype=torch.float32, device=x.device)
        output = self.denoiser(x, t, conditioning)
        if output.shape != x.shape:
            remedy = f"the denoiser must return the shape of its input, {tuple(x.shape)}."
            raise InvalidArgument("denoiser", tuple(output.shape), remedy)
        return output


def _concatenate(uncond: Any, cond: Any) -> Any:
    """[uncond, cond] along the batch; entries that are no tensors are shared."""
    return torch.cat([uncond, cond]) if isinstance(cond, Tensor) else cond


def check_inputs(x_T: Tensor, cond: Conditioning, uncond: Conditioning, both: bool = True) -> None:
    """Refuse noise or conditioning that do not fit each other; ``uncond`` counts where ``both``."""
    _check_sample(x_T)
    _check_conditioning("cond", cond, x_T.shape[0])
    if not both:
        return
    _check_conditioning("uncond", uncond, x_T.shape[0])
    leaves, structure = pytree.tree_flatten(cond)
    others, found = pytree.tree_flatten(uncond)
    if structure != found:
        raise InvalidArgument("uncond", found, "give the same nesting of tensors as in cond.")
    for leaf, other in zip(leaves, others, strict=True):
        shapes = [tuple(v.shape) if isinstance(v, Tensor) else None for v in (leaf, other)]
        if shapes[0] != shapes[1]:
            remedy = f"cond has shape {shapes[0]} in this place (None: no tensor); give the same."
            raise InvalidArgument("uncond", shapes[1], remedy)


def _check_generator(generator: torch.Generator | None, device: torch.device) -> None:
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise InvalidArgument("generator", generator, "give one torch.Generator.")
    if generator.device.type != device.type:
        remedy = f"noise is drawn where x_T is: give a generator on {device}."
        raise InvalidArgument("generator", generator.device, remedy)


def _check_sample(x_T: Tensor) -> None:
    if not isinstance(x_T, Tensor) or not x_T.is_floating_point():
        kind = x_T.dtype if isinstance(x_T, Tensor) else type(x_T)
        raise InvalidArgument("x_T", kind, "give a floating-point tensor of shape (B, ...).")
    if x_T.ndim < 2:
        raise InvalidArgument("x_T", tuple(x_T.shape), "give a batch dimension first: (B, ...).")


def _check_conditioning(argument: str, conditioning: Conditioning, batch: int) -> None:
    tensors = [leaf for leaf in pytree.tree_leaves(conditioning) if isinstance(leaf, Tensor)]
    if not tensors:
        remedy = "give at least one tensor, batch first; this plan evaluates that branch."
        raise InvalidArgument(argument, conditioning, remedy)
    for tensor in tensors:
        if tensor.ndim == 0 or tensor.shape[0] != batch:
            remedy = f"dim 0 of every tensor must be the batch of x_T, {batch}."
            raise InvalidArgument(argument, tuple(tensor.shape), remedy)
