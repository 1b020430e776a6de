"""The loop: runs any plan on any denoiser, one fused launch per step. No formulas here.

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

from thg_kernels.step_update import (
    BackendUnavailable,
    BranchRows,
    InvalidInput,
    StepState,
    resolve_backend,
    step_update,
)
from thg_kernels.step_update.state import MODEL_DTYPES

from .errors import InvalidArgument, ThgError
from .packing import step_table
from .plan import SamplingPlan

Conditioning = Any
"""A tensor, or nested dicts, lists and tuples of tensors, batch first; None entries stay."""


class Denoiser(Protocol):
    """The backbone.

    Args:
        model_input: shape ``(R, ...)``, R = batch, or 2 x batch with the unconditional half first.
            A buffer that the next step overwrites: copy what has to outlive the call.
        timestep: shape ``(R,)``, float32, on the device of the input; such a buffer, too.
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
        state: registers, cursor and buffers on the device.
        cond, uncond: conditioning of the two branches.
        generator: source of the noise of stochastic solvers.
        row: index of the next row; ``plan.num_rows`` when the run is over.
        nfe: denoiser evaluations per sample so far.
    """

    plan: SamplingPlan
    state: StepState
    cond: Conditioning
    uncond: Conditioning
    generator: torch.Generator | None
    row: int = 0
    nfe: int = 0
    _version: int = -1
    _both: Conditioning = None

    @property
    def sample(self) -> Tensor:
        """The current x, shape of x_T, in the register dtype.

        A view of a register, good until the next step; edits in place count from the next row on.
        """
        return self.state.samples()

    @property
    def done(self) -> bool:
        """Whether every row has run."""
        return self.row == self.plan.num_rows

    def both_conditionings(self) -> Conditioning:
        """[uncond, cond] along the batch, made once."""
        if self._both is None:
            self._both = pytree.tree_map(_concatenate, self.uncond, self.cond)
        return self._both


class Engine:
    """Runs sampling plans on one denoiser.

    Args:
        denoiser: see `Denoiser`.
        model_dtype: dtype of the model input; that of x_T if None.
        register_dtype: dtype of samples, outputs and deltas between the calls. float64 runs in
            plain torch.
        backend: of the fused step, see `thg_kernels.step_update`; the fastest there is if None.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        model_dtype: torch.dtype | None = None,
        register_dtype: torch.dtype = torch.float32,
        backend: str | None = None,
    ) -> None:
        if not callable(denoiser):
            raise InvalidArgument(
                "denoiser", denoiser, "give a callable (input, t, cond) -> output."
            )
        if not register_dtype.is_floating_point or register_dtype.itemsize < 4:
            remedy = "differences of outputs need float32 or float64 registers."
            raise InvalidArgument("register_dtype", register_dtype, remedy)
        if model_dtype not in (None, *MODEL_DTYPES):
            remedy = f"use one of {', '.join(map(str, MODEL_DTYPES))}."
            raise InvalidArgument("model_dtype", model_dtype, remedy)
        self.denoiser = denoiser
        self.model_dtype = model_dtype
        self.register_dtype = register_dtype
        self.backend = backend

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
        return self.result(run).to(x_T.dtype, copy=True)  # not a view of all registers

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
        self._check_backend(x_T)
        state = StepState(
            step_table(plan),
            x_T,
            model_dtype=self.model_dtype or x_T.dtype,
            register_dtype=self.register_dtype,
            inputs=BranchRows.both(x_T.shape[0]),
        )
        return Run(plan, state, cond, uncond, generator, _version=state.registers._version)

    def _check_backend(self, x_T: Tensor) -> None:
        wide = torch.float64 in (self.model_dtype or x_T.dtype, self.register_dtype)
        try:
            resolve_backend(self.backend, x_T.device, wide)
        except (InvalidInput, BackendUnavailable) as error:
            raise InvalidArgument("backend", self.backend, str(error)) from error

    @torch.no_grad()
    def step(self, run: Run) -> Tensor:
        """Run the next row, without gradients; returns the new sample in the register dtype.

        A row whose denoiser call raises leaves the run as it was, so it can be stepped again.
        """
        if run.done:
            raise ThgError("the run is over: begin a new one.")
        row, state = run.plan.rows[run.row], run.state
        if state.registers._version != run._version:
            state.refresh_input()  # a callback has edited the sample
        output, outputs = self._evaluate_row(run, row.evaluates_both)
        noise = None
        if row.noise_weight != 0.0:
            x = run.sample
            noise = torch.randn(x.shape, generator=run.generator, device=x.device, dtype=x.dtype)
        step_update(state, output, outputs, noise=noise, backend=self.backend)
        run._version = state.registers._version
        run.row += 1
        run.nfe += row.nfe
        return run.sample

    def _evaluate_row(self, run: Run, both: bool) -> tuple[Tensor, BranchRows]:
        """The denoiser's rows for the next step, and which is which."""
        state = run.state
        if state.inputs is None or state.model_input is None or state.timestep is None:
            raise ThgError("the run keeps no model input: begin it with Engine.begin.")
        if both:
            outputs, first, conditioning = state.inputs, 0, run.both_conditionings()
        else:
            outputs, first = BranchRows.cond_only(state.batch), state.batch
            conditioning = run.cond
        x, t = state.model_input[first:], state.timestep[first:]
        return self._call(x, t, conditioning), outputs

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
        t = torch.full((2 * x.shape[0],), timestep, dtype=torch.float32, device=x.device)
        output_uncond, output_cond = self._call(torch.cat([x, x]), t, both).chunk(2)
        return output_cond, output_uncond

    def _call(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        output = self.denoiser(x, t, conditioning)
        if not isinstance(output, Tensor):
            raise InvalidArgument("denoiser", type(output), "the denoiser must return a tensor.")
        if output.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
            output = output.clone()  # its input, which the next step overwrites
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
