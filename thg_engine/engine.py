"""The loop: runs any plan on any denoiser, one fused launch per step. No formulas here.

    engine = Engine(denoiser)
    x_0 = engine.sample(x_T, cond, uncond, plan)

For a loop of one's own, ``begin`` gives a `Run`, ``step`` advances it by one row, ``result`` reads
it. On CUDA a step is one replay of a graph (`graphs`), denoiser and row together.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
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

from .checks import check_generator, check_inputs
from .errors import InvalidArgument, ThgError
from .fingerprint import autocast, module_fingerprint, why_not_captured
from .graph_cache import GraphCache, Lease
from .packing import step_table
from .plan import SamplingPlan
from .run import Run
from .step_buffers import Conditioning, Shape, StepBuffers, concatenate, signature_of


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


class Engine:
    """Runs sampling plans on one denoiser.

    Args:
        denoiser: see `Denoiser`.
        model_dtype: dtype of the model input; that of x_T if None.
        register_dtype: dtype of samples, outputs and deltas between the calls. float64 runs in
            plain torch.
        backend: of the fused step, see `thg_kernels.step_update`; the fastest there is if None.
        graph: whether a step is one replay of a captured CUDA graph. None: where that is faster;
            True: wherever it is possible; False: never. "trajectory": the whole of `sample` is one
            graph, for tiny models, where nobody watches its steps.
        captures_late: capture a shape when it is first run; if not, in `warm_up` alone.
        watch: the network behind ``denoiser``: its weights and modes decide how long graphs hold.
            The denoiser itself if it is a module.
        max_shapes: shapes that may have graphs at a time.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        model_dtype: torch.dtype | None = None,
        register_dtype: torch.dtype = torch.float32,
        backend: str | None = None,
        graph: bool | str | None = None,
        captures_late: bool = True,
        watch: torch.nn.Module | None = None,
        max_shapes: int = 4,
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
        if not (graph is None or isinstance(graph, bool) or graph == "trajectory"):
            raise InvalidArgument("graph", graph, 'give True, False, None or "trajectory".')
        self.graph = graph
        if not (watch is None or isinstance(watch, torch.nn.Module)):
            raise InvalidArgument("watch", watch, "give the network behind denoiser, or None.")
        self._watch: Any = denoiser if watch is None else watch
        self._graphs = GraphCache(max_shapes, choose=graph is None, captures_late=captures_late)

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
        whole = self.graph == "trajectory" and callback is None
        run = self._begin(x_T, cond, uncond, plan, generator, whole)
        try:
            with tqdm(total=plan.num_rows, disable=not progress) as bar:
                while not run.done:
                    done = run.row
                    self._step_all(run) if whole and run.lease else self.step(run)
                    bar.update(run.row - done)
                    if callback is not None:
                        callback(run)
            return self.result(run).to(x_T.dtype, copy=True)  # not a view of all registers
        finally:
            run.release()

    def begin(
        self,
        x_T: Tensor,
        cond: Conditioning,
        uncond: Conditioning,
        plan: SamplingPlan,
        *,
        generator: torch.Generator | None = None,
    ) -> Run:
        """Check the arguments and set up a run; no row is evaluated.

        On CUDA the first run of a shape captures its graphs, which takes some denoiser calls.
        """
        return self._begin(x_T, cond, uncond, plan, generator, whole=False)

    def warm_up(
        self, x_T: Tensor, cond: Conditioning, uncond: Conditioning, plan: SamplingPlan
    ) -> str:
        """Capture the graphs of a shape ahead of its first run.

        Returns:
            Why there are none; "" where they are ready.
        """
        self._check(x_T, cond, uncond, plan, None)
        whole = self.graph == "trajectory"
        found = self._acquire(x_T, cond, uncond, plan, whole, warms_up=True)
        if isinstance(found, str):
            return found
        found.release()
        return ""

    def flush(self) -> None:
        """Drop all graphs and their memory; those in use go when their run ends."""
        self._graphs.flush()

    def stats(self) -> dict[str, Any]:
        """Counters of graphs: captures, replays, eager_calls, refusals (reason -> runs),
        pool_bytes, capture_seconds, leaked_bytes, and per captured shape ms of a step,
        (eager, graphed), where they were compared.
        """
        return self._graphs.report()

    def _check(
        self,
        x_T: Tensor,
        cond: Conditioning,
        uncond: Conditioning,
        plan: SamplingPlan,
        generator: torch.Generator | None,
    ) -> None:
        """Refuse what cannot be run."""
        if not isinstance(plan, SamplingPlan):
            raise InvalidArgument("plan", plan, "give a SamplingPlan.")
        if not plan.steps_itself:
            remedy = "it has guidance columns alone; make one with plan_from_table or a solver."
            raise InvalidArgument("plan", f"<{plan.method} on {plan.solver}>", remedy)
        check_inputs(x_T, cond, uncond, both=any(row.evaluates_both for row in plan.rows))
        check_generator(generator, x_T.device)
        self._backend_for(x_T)

    def _backend_for(self, x_T: Tensor) -> str:
        wide = torch.float64 in (self.model_dtype or x_T.dtype, self.register_dtype)
        try:
            return resolve_backend(self.backend, x_T.device, wide)
        except (InvalidInput, BackendUnavailable) as error:
            raise InvalidArgument("backend", self.backend, str(error)) from error

    def _begin(
        self,
        x_T: Tensor,
        cond: Conditioning,
        uncond: Conditioning,
        plan: SamplingPlan,
        generator: torch.Generator | None,
        whole: bool,
    ) -> Run:
        """A run on graphs, of single steps or the ``whole`` of it, or an eager one."""
        self._check(x_T, cond, uncond, plan, generator)
        found = self._acquire(x_T, cond, uncond, plan, whole)
        if isinstance(found, Lease):
            state = found.buffers.state
            run = Run(plan, state, cond, uncond, generator, lease=found)
            # An abandoned run must not keep them.
            weakref.finalize(run, found.abandon).atexit = False
            try:
                found.buffers.load(step_table(plan), x_T, cond, uncond)
            except BaseException:
                found.release()
                raise
        else:
            state = StepState(
                step_table(plan),
                x_T,
                model_dtype=self.model_dtype or x_T.dtype,
                register_dtype=self.register_dtype,
                inputs=BranchRows.both(x_T.shape[0]),
            )
            run = Run(plan, state, cond, uncond, generator)
        run._version = state.registers._version
        return run

    def _acquire(
        self,
        x_T: Tensor,
        cond: Conditioning,
        uncond: Conditioning,
        plan: SamplingPlan,
        whole: bool,
        warms_up: bool = False,
    ) -> Lease | str:
        """Graphs and static buffers for a run, or why it goes without."""
        if self.graph is False:
            return "graphs are turned off"
        backend, table = self._backend_for(x_T), step_table(plan)
        both, model_dtype = any(row.evaluates_both for row in plan.rows), self.model_dtype
        shape = Shape.of(table, model_dtype or x_T.dtype, self.register_dtype, backend, both)
        shape = shape.roomy(x_T.numel())
        if not shape.evaluates_both:
            uncond = None
        pattern = [(row.evaluates_both, row.noise_weight != 0.0) for row in plan.rows]
        pattern = pattern if whole else []
        signature = signature_of((x_T, cond, uncond, shape, tuple(pattern), autocast()))
        reason = why_not_captured(self._watch)
        if signature is None:
            reason = "the conditioning holds what is neither tensor nor value"
        if backend == "reference" or reason:
            return self._graphs.refuse(reason or "the reference backend asks the device")
        return self._graphs.acquire(
            signature,
            lambda: module_fingerprint(self._watch),
            x_T.device,
            lambda: StepBuffers(self._call, x_T, cond, uncond, shape, pattern),
            warms_up=warms_up,
        )

    @torch.no_grad()
    def step(self, run: Run) -> Tensor:
        """Run the next row, without gradients; returns the new sample in the register dtype.

        A row whose denoiser call raises leaves the run as it was, so it can be stepped again.
        """
        if run.done:
            raise ThgError("the run is over: begin a new one.")
        if run.is_released:
            raise ThgError("the run has been released: begin a new one.")
        row, state = run.plan.rows[run.row], run.state
        if state.registers._version != run._version:
            state.refresh_input()  # a callback has edited the sample
        if run.lease is not None:
            self._draw_into(run, run.row)
            run.lease.replay("both" if row.evaluates_both else "cond")
            state.advance(range(state.batch))
        else:
            output, outputs = self._evaluate_row(run, row.evaluates_both)
            noise = run.noise(run.row) if row.noise_weight != 0.0 else None
            step_update(state, output, outputs, noise=noise, backend=self.backend)
            self._graphs.count(eager_calls=int(self.graph is not False))
        run._version = state.registers._version
        run.row += 1
        run.nfe += row.nfe
        return run.sample

    @torch.no_grad()
    def _step_all(self, run: Run) -> None:
        """The whole of a run in one replay."""
        if run.lease is None:
            raise ThgError("the run has no graph.")
        for i in range(run.plan.num_rows):
            self._draw_into(run, i)
        run.lease.replay("trajectory")
        for row in run.plan.rows:
            run.state.advance(range(run.state.batch))
            run.nfe += row.nfe
        run.row = run.plan.num_rows

    def _draw_into(self, run: Run, row: int) -> None:
        """Noise of a row, where its graph reads it."""
        if run.lease is not None and run.plan.rows[row].noise_weight != 0.0:
            run.lease.buffers.set_noise(run.noise(row), row)

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
        """The final sample in the register dtype; `ThgError` if rows are left.

        Lets go of the run's graphs.
        """
        if not run.done:
            raise ThgError(f"the run is at row {run.row} of {run.plan.num_rows}: step it further.")
        run.release()
        return run.sample

    @torch.no_grad()
    def evaluate_both(
        self, x: Tensor, timestep: float, cond: Conditioning, uncond: Conditioning
    ) -> tuple[Tensor, Tensor]:
        """(conditional, unconditional) outputs at ``x`` from one call with a doubled batch."""
        both = pytree.tree_map(concatenate, uncond, cond)
        t = torch.full((2 * x.shape[0],), timestep, dtype=torch.float32, device=x.device)
        output_uncond, output_cond = self._call(torch.cat([x, x]), t, both).chunk(2)
        return output_cond, output_uncond

    @torch.no_grad()
    def evaluate(self, x: Tensor, timestep: float, conditioning: Conditioning) -> Tensor:
        """The output of one branch at ``x``."""
        t = torch.full((x.shape[0],), timestep, dtype=torch.float32, device=x.device)
        return self._call(x, t, conditioning)

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
