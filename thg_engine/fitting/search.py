"""The calibration of plans: converged runs, candidate grids, fitted rows, held-out errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..engine import Engine
from ..errors import CalibrationError, InvalidArgument
from ..guidance import CFG
from ..lowering import plan_from_table
from ..plan import SamplingPlan
from ..schedule import NoiseSchedule, Point
from ..solvers import get_solver, solver_table
from .front import PlanEntry, ScaleFit, StockEntry, base_plan
from .reference import DATA, LAMBDA_LIMITS, Batch, Nodes, Trajectory, converge, make_nodes
from .refine import SHIFTS, Refiner
from .registers import Registers
from .rows import DEPTH, Correction, Gather, corrected, errors, fit_rows, observe
from .spans import Grid, SpanErrors, inner_products
from .store import Store

BUDGETS = (10, 12, 14, 16, 18, 20, 24, 28, 32, 36, 40, 44, 50, 56, 60, 70, 80, 100)
SPREADS = ((0.35, 0.02), (0.6, 0.02), (0.6, 0.005))
"""(share of half log-SNR in the spacing, last time): grids tried beside the optimal ones, which
know single steps from the converged trajectory and not how their errors add up."""
PROBES = 6
PROBE_SIZE = 1e-2
"""Of a perturbation, relative to the sample: small against it, large against rounding."""

MAX_REFINED = 20
"""Rows of the longest grids that are refined: the work grows with their square, gains shrink."""

StockPlan = Callable[[float], SamplingPlan]
"""The plan of an ordinary solver at a guidance scale."""
Measured = dict[float, dict[Grid, ScaleFit]]
"""Fits of every grid, by guidance scale."""


@dataclass
class Task:
    """What is calibrated, and with what.

    Attributes:
        engine: around the denoiser.
        schedule: kind ``vp`` or ``flow``.
        prediction_type: diffusers' string.
        fit, held_out: batches that rows are fitted to, and batches that errors are measured on;
            those of this process.
        guidance_scales: w; grids are made for the first and fitted at all, so that rows can be
            interpolated between them.
        budgets: evaluations per sample for which plans are made.
        c2: cost of a call with both branches, in calls of one.
        solver: of the base rows.
        gather: brings rows of other processes.
        store: keeps what has been done, so that an interrupted calibration goes on.
        progress: whether bars are shown.
        end: where runs end.
        refine: rounds in which nodes of each scale's best grids are moved (`fitting.refine`).
    """

    engine: Engine
    schedule: NoiseSchedule
    prediction_type: str
    fit: Sequence[Batch]
    held_out: Sequence[Batch]
    guidance_scales: tuple[float, ...]
    budgets: tuple[int, ...] = BUDGETS
    c2: float = 2.0
    solver: str = "dpmpp2m"
    gather: Gather = lambda rows: rows
    store: Store = field(default_factory=Store)
    progress: bool = False
    end: Point = DATA
    refine: int = 0
    nodes: Nodes = field(init=False)

    def __post_init__(self) -> None:
        if not self.fit or not self.held_out:
            raise InvalidArgument("prompts", len(self.fit), "give prompts to fit and to hold out.")
        if not self.budgets or min(self.budgets) < 4:
            raise InvalidArgument("budgets", self.budgets, "give budgets of at least 4 each.")
        get_solver(self.solver)
        self.nodes = make_nodes(self.schedule, end=self.end)

    def bar(self, name: str, total: int) -> Any:
        """A progress bar."""
        return tqdm(total=total, desc=name, disable=not self.progress)


def search(task: Task, stock: Mapping[tuple[str, int], StockPlan]) -> Found:
    """Fit and measure plans for every budget.

    Args:
        task: what is calibrated.
        stock: ordinary solvers to be measured beside, by (name, N).
    """
    runs = {scale: Converged.of(task, scale) for scale in task.guidance_scales}
    measured: Measured = {scale: {} for scale in sorted(runs)}
    stable = _measure(
        task, candidate_grids(task, runs[task.guidance_scales[0]].fit), runs, measured
    )
    if not stable:
        raise CalibrationError("on every grid some run overflowed: no plan was made.")
    if task.refine:
        grids = _refined_grids(task, stable, runs, measured)
        stable += _measure(task, grids, runs, measured)
    # What is best at one scale need not be at another: a front holds both, and serves each w.
    kept = dict.fromkeys(grid for fits in measured.values() for grid in undominated(fits, stable))
    entries = [
        entry_of(task, grid, tuple(fits[grid] for fits in measured.values())) for grid in kept
    ]
    return Found(tuple(entries), tuple(_stock(task, runs, stock)))


def _measure(
    task: Task, grids: Sequence[Grid], runs: Mapping[float, Converged], measured: Measured
) -> list[Grid]:
    """Enter fits of ``grids`` at every scale; those of them that may make a plan."""
    with task.bar("fit", len(grids) * len(runs)) as bar:
        for scale in task.guidance_scales:
            for grid in grids:
                measured[scale][grid] = fitted(task, grid, runs[scale])
                bar.update()
    # Base rows run beyond the scales, so that a grid on which they overflow makes no plan.
    return [grid for grid in grids if all(fits[grid].is_finite for fits in measured.values())]


def _refined_grids(
    task: Task, stable: Sequence[Grid], runs: Mapping[float, Converged], measured: Measured
) -> tuple[Grid, ...]:
    """What moving nodes makes of each scale's best grid for each budget, where it is new."""
    found: dict[Grid, None] = {}
    starts = [
        (scale, grid)
        for scale in task.guidance_scales
        for grid in _best_within(task, stable, measured[scale])
    ]
    total = 0
    with task.bar("refine", sum(task.refine * (len(grid.nodes) - 1) for _, grid in starts)) as bar:
        for scale, grid in starts:
            found[_refined(task, grid, runs[scale], bar.update)] = None
            total += task.refine * (len(grid.nodes) - 1)
            bar.update(total - bar.n)  # rounds may end early, or come from the store
    return tuple(grid for grid in found if grid not in measured[task.guidance_scales[0]])


def _best_within(
    task: Task, stable: Sequence[Grid], fits: Mapping[Grid, ScaleFit]
) -> tuple[Grid, ...]:
    """The most accurate grid within each budget, of those short enough to be refined, each once."""
    found: dict[Grid, None] = {}
    short = [grid for grid in stable if len(grid.nodes) <= MAX_REFINED]
    for budget in task.budgets:
        most = budget / 2 * task.c2 + 1e-6
        within = [grid for grid in short if grid.cost(task.c2) <= most]
        if within:
            found[min(within, key=lambda grid: fits[grid].error)] = None
    return tuple(found)


def _refined(task: Task, grid: Grid, runs: Converged, on_node: Callable[[], None]) -> Grid:
    shifts = "".join(map("{:+d}".format, SHIFTS))
    key = f"refined-{task.refine}-{shifts}-{runs.guidance_scale:g}-{grid}"
    nodes = task.store.json(key)
    if nodes is None:
        given = (task.schedule, task.prediction_type, runs.guidance_scale)
        refiner = Refiner(
            task.engine,
            lambda each: base_plan(entry_of(task, each, ()), *given),
            runs.fit,
            task.nodes.last,
            task.gather,
            on_node,
        )
        nodes = refiner.refined(grid, task.refine).nodes
        task.store.put_json(key, nodes)
    return Grid(tuple(nodes), tuple(nodes[i] for i in grid.coarse_rows))


@dataclass(frozen=True)
class Found:
    """What `search` found."""

    plans: tuple[PlanEntry, ...]
    stock: tuple[StockEntry, ...]


@dataclass
class Converged:
    """Converged runs at one guidance scale."""

    guidance_scale: float
    fit: list[Trajectory]
    held_out: list[Trajectory]

    @classmethod
    def of(cls, task: Task, guidance_scale: float) -> Converged:
        """Integrated, or read from the store."""
        parts = []
        batches = [("fit", b) for b in task.fit] + [("held-out", b) for b in task.held_out]
        with task.bar(f"converge w={guidance_scale:g}", task.nodes.num_steps * len(batches)) as bar:
            for i, (_, batch) in enumerate(batches):
                key = f"converged-{guidance_scale:g}-{i}"
                found = task.store.tensors(key)
                if found is None:
                    run = converge(
                        *(task.engine, task.schedule, task.nodes, batch, guidance_scale),
                        *(task.prediction_type, bar.update),
                    )
                    found = {"samples": run.samples, "conds": run.conds, "deltas": run.deltas}
                    task.store.put_tensors(key, found)
                parts.append(Trajectory(batch, **found))
        return cls(guidance_scale, parts[: len(task.fit)], parts[len(task.fit) :])


def candidate_grids(task: Task, trajectories: Sequence[Trajectory]) -> tuple[Grid, ...]:
    """Grids worth fitting for each budget, each once."""
    spans = SpanErrors(task.nodes, _summed(task, trajectories), sensitivities(task, trajectories))
    found: dict[Grid, None] = {}
    for budget in task.budgets:
        found[spans.best_full(budget // 2)] = None
        # A budget of calls with both branches, in the time that they take here.
        found[spans.best(budget / 2 * task.c2, task.c2)] = None
        for share, last in SPREADS:
            found[spread(task, budget // 2, share, last)] = None
    return tuple(found)


def _summed(task: Task, trajectories: Sequence[Trajectory]) -> Any:
    """Inner products over all batches of all processes."""
    local = sum(inner_products(trajectory) for trajectory in trajectories)
    return task.gather(torch.as_tensor(local)[None]).sum(0).cpu().numpy()


def spread(task: Task, num_rows: int, share: float, last: float) -> Grid:
    """Rows spaced evenly by time and half log-SNR, all with both branches, at the nearest nodes.

    Args:
        task: whose nodes.
        num_rows: N.
        share: weight of half log-SNR in the spacing.
        last: sigma_t / (alpha_t + sigma_t) of the last row, about.
    """
    points = task.nodes.points[:-1]
    times = np.array([p.sigma_t / (p.alpha_t + p.sigma_t) for p in points])
    lambdas = np.clip([p.lambda_t for p in points], *LAMBDA_LIMITS)
    raw = np.array([p.timestep for p in points])
    stop = int(np.argmin(np.abs(times - last)))
    by_time, by_lambda = (raw[0] - raw), (lambdas - lambdas[0])
    mixed = (1 - share) * by_time / by_time[stop] + share * by_lambda / by_lambda[stop]
    wanted = np.linspace(0.0, 1.0, num_rows)
    nodes = tuple(sorted({int(np.argmin(np.abs(mixed - each))) for each in wanted}))
    return Grid(nodes, nodes)


def sensitivities(task: Task, trajectories: Sequence[Trajectory]) -> list[float]:
    """Growth of a small error from each node to the end, measured at a few and interpolated.

    The perturbation is the change of the conditional output over the last nodes: what a step that
    extrapolates gets wrong.
    """
    last = task.nodes.last
    probes = sorted({int(j) for j in np.linspace(1, last - 1, PROBES)})
    key = f"sensitivities-{task.guidance_scales[0]:g}"
    found = task.store.json(key)
    if found is None:
        local = [[_growth(task, run, j) for j in probes] for run in trajectories[:1]]
        rows = torch.tensor(local, dtype=torch.float64)
        found = task.gather(rows)[0].tolist()  # of the first process, however many there are
        task.store.put_json(key, found)
    values: list[float] = np.interp(range(last + 1), [*probes, last], [*found, 1.0]).tolist()
    return values


def _growth(task: Task, run: Trajectory, node: int) -> float:
    """|change of x_0| / |change of x at ``node``|."""
    indices = [*range(node, task.nodes.last, 3), task.nodes.last]
    points = [task.nodes.points[j] for j in indices]
    table = solver_table(get_solver("dpmpp2m"), points, task.prediction_type)
    plan = plan_from_table(table, CFG(), task.guidance_scales[0])
    device = run.batch.noise.device
    base = run.samples[node].to(device)
    direction = (run.conds[node] - run.conds[max(0, node - 3)]).to(device)
    size = PROBE_SIZE * base.norm() / direction.norm().clamp_min(1e-12)
    ends = []
    for x in (base, base + size * direction):
        registers = Registers([x])
        for row in plan.rows:
            observe(task.engine, registers, row, run.batch)
            registers.push(registers.following(row), DEPTH)
        ends.append(registers.samples[0])
    return float((ends[1] - ends[0]).norm() / (size * direction).norm())


def entry_of(task: Task, grid: Grid, fits: tuple[ScaleFit, ...]) -> PlanEntry:
    """A plan of the front."""
    timesteps = tuple(task.nodes.points[j].timestep for j in grid.nodes)
    end = (task.end.alpha_t, task.end.sigma_t)
    return PlanEntry(task.solver, timesteps, grid.coarse_rows, fits, end)


def fitted(task: Task, grid: Grid, runs: Converged) -> ScaleFit:
    """Rows fitted on a grid, and their errors on samples held out; the base where they are less."""
    scale = runs.guidance_scale
    key = f"fit-{scale:g}-{grid}"
    found = task.store.json(key)
    if found is not None:
        rows = [
            Correction(tuple(x), tuple(c), tuple(d), gain)
            for x, c, d, gain in found.pop("corrections")
        ]
        return ScaleFit(**found, corrections=tuple(rows))
    entry = entry_of(task, grid, ())
    base = base_plan(entry, task.schedule, task.prediction_type, scale)
    nodes = [*grid.nodes, task.nodes.last]
    corrections = fit_rows(task.engine, base, nodes, runs.fit, task.gather)
    plain = errors(task.engine, base, runs.held_out, task.gather)
    better = errors(task.engine, corrected(base, corrections), runs.held_out, task.gather)
    if not float(better.mean()) < float(plain.mean()):
        better, corrections = plain, ()
    fit = ScaleFit(
        scale, float(better.mean()), half_width(better), float(plain.mean()), corrections
    )
    rows_as_lists = [[c.samples, c.conds, c.deltas, c.gain] for c in corrections]
    task.store.put_json(key, {**_numbers(fit), "corrections": rows_as_lists})
    return fit


def _numbers(fit: ScaleFit) -> dict[str, float]:
    names = ("guidance_scale", "error", "ci95", "base_error")
    return {name: getattr(fit, name) for name in names}


def half_width(values: Tensor) -> float:
    """Half width of the 95 % confidence interval of the mean, normal approximation."""
    if len(values) < 2:
        return math.inf
    return float(1.96 * values.std() / math.sqrt(len(values)))


def undominated(measured: Mapping[Grid, ScaleFit], grids: Sequence[Grid]) -> tuple[Grid, ...]:
    """Those of ``grids`` that no other beats in rows, in rows with both branches, and in error."""

    def beats(one: Grid, other: Grid) -> bool:
        a = (len(one.nodes), len(one.both), measured[one].error)
        b = (len(other.nodes), len(other.both), measured[other].error)
        return a != b and all(x <= y for x, y in zip(a, b, strict=True))

    return tuple(grid for grid in grids if not any(beats(each, grid) for each in grids))


def _stock(
    task: Task, runs: Mapping[float, Converged], stock: Mapping[tuple[str, int], StockPlan]
) -> Iterable[StockEntry]:
    """Errors of ordinary solvers on the samples held out."""
    with task.bar("stock solvers", len(stock) * len(runs)) as bar:
        for scale, run in runs.items():
            for (name, num_steps), make in stock.items():
                key = f"stock-{scale:g}-{name}-{num_steps}"
                error = task.store.json(key)
                if error is None:
                    found = errors(task.engine, make(scale), run.held_out, task.gather)
                    error = float(found.mean())
                    task.store.put_json(key, error)
                yield StockEntry(name, num_steps, scale, error)
                bar.update()
