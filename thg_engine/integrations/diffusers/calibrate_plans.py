"""Fitted plans of a diffusers pipeline: a calibration of a few minutes on one's own prompts.

Under ``accelerate launch`` every process takes its share of the prompts; all return the same front.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch

from ...curves import Calibration
from ...doctor import machine_line
from ...errors import InvalidArgument
from ...fitting.front import PlanFront
from ...fitting.reference import Batch
from ...fitting.ridge import MAX_FOLDS, PENALTIES
from ...fitting.rows import WINDOW
from ...fitting.search import BUDGETS, StockPlan, Task, search
from ...fitting.store import Store
from ...guidance import CFG
from ...lowering import plan_from_table
from ...plan import SamplingPlan
from ...trace import trace
from .captured import Captured
from .planned import end_of, native_schedule, schedule_digest, time_denoiser
from .resolve import fingerprint, model_name
from .sampling import Noises, batches_of, check_given, gather, rank

HELD_OUT = 1 / 3
"""Share of the prompts that errors are measured on."""
STOCK = {
    "ddim": "DDIMScheduler",
    "dpm++2m": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "euler": "FlowMatchEulerDiscreteScheduler",
}
NATIVE = {
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"),
    *("rescale_betas_zero_snr", "prediction_type", "steps_offset"),
}
"""Configuration of a scheduler that is the model's; the rest is of a solver, and not taken over."""
STOCK_BY_KIND = {"vp": ("ddim", "dpm++2m", "unipc"), "flow": ("euler", "dpm++2m", "unipc")}
STOCK_STEPS = (8, 12, 20, 35, 50)


def calibrate_plans(
    pipe: Any,
    prompts: Sequence[str],
    *,
    guidance_scales: Sequence[float] = (7.5,),
    budgets: Sequence[int] = BUDGETS,
    negative_prompt: str = "",
    solver: str | None = None,
    batch_size: int = 8,
    samples: int = 1,
    seed: int = 0,
    refine: int = 0,
    model: str = "",
    curves: Calibration | None = None,
    work_dir: str | Path | None = None,
    progress: bool = True,
    **call: Any,
) -> PlanFront:
    """Fit plans for a range of budgets to a pipeline, and measure them on prompts held out.

    Args:
        pipe: one denoiser call per step for both branches; compiled or not, it is not changed.
        prompts: captions like those it will see, at least six; every third is held out.
        guidance_scales: w; grids are made for the first. Rows are interpolated between them.
        budgets: evaluations per sample for which plans are made.
        negative_prompt: of the unconditional branch.
        solver: of the base rows, one of `thg_engine.solvers.SOLVERS`; None: DPM-Solver++ 2M.
        batch_size, samples, seed: prompts at a time; noises per prompt; of the noise.
        refine: rounds of moving the points of short grids one by one: better, twice the work each.
        model, curves: name to record, the pipeline's own if empty; error curves for the same file.
        work_dir: where an interrupted calibration finds what it has done; all processes share it.
        progress: show tqdm bars.
        call: further arguments of the pipeline's call: height, width, max_sequence_length, ...
    Raises:
        UnsupportedPipeline, InvalidArgument: the message says what plans cannot be fitted to.
    """
    noises = Noises(samples, seed, batch_size)
    _check(prompts, guidance_scales, budgets, refine)
    job = _Job(pipe, tuple(prompts), tuple(guidance_scales), negative_prompt, noises, call)
    return job.front(tuple(budgets), solver, refine, work_dir, progress, model, curves)


@dataclass
class _Job:
    """What is calibrated: a pipeline on prompts; arguments as of `calibrate_plans`."""

    pipe: Any
    prompts: tuple[str, ...]
    scales: tuple[float, ...]
    negative_prompt: str
    noises: Noises
    call: Mapping[str, Any]

    def __post_init__(self) -> None:
        self.scales = tuple(map(float, self.scales))
        if not isinstance(self.negative_prompt, str):
            raise InvalidArgument("negative_prompt", self.negative_prompt, "give one text.")
        self.captured = Captured.of(self.pipe)
        self.schedule, self.predicts = native_schedule(self.pipe.scheduler)

    @torch.no_grad()
    def front(
        self,
        budgets: tuple[int, ...],
        solver: str | None,
        refine: int,
        work_dir: str | Path | None,
        progress: bool,
        model: str,
        curves: Calibration | None,
    ) -> PlanFront:
        """Fit, measure, and say where it comes from."""
        task, count = self._task(budgets, solver, progress)
        task.refine = refine
        task.store = _store(work_dir, self.prompts, self._settings(task))
        seconds = _seconds(self.captured, task.store, self.call)
        task.c2 = seconds[1] / seconds[0]
        found = search(task, _stock(self.pipe.scheduler, self.schedule.kind, self.predicts))
        return PlanFront(
            model=model or model_name(self.pipe),
            fingerprint=fingerprint(self.captured.module),
            scheduler_family=f"{self.schedule.kind}/{self.predicts}",
            schedule_digest=schedule_digest(self.schedule),
            prompts_sha256=_digest(self.prompts),
            num_prompts=count[0],
            num_held_out=count[1],
            reference_steps=task.nodes.num_steps,
            date=datetime.date.today().isoformat(),
            machine=machine_line(),
            seconds=seconds,
            shape=tuple(task.fit[0][0].shape[1:]),
            plans=found.plans,
            stock=found.stock,
            curves=curves,
        )

    def _settings(self, task: Task) -> list[str]:
        """All that converged runs and fits depend on, besides the prompts and w."""
        made = [*map(str, (self.predicts, schedule_digest(self.schedule), self.negative_prompt))]
        made += [str(dict(self.call)), str(self.noises), task.solver]
        made += [str([round(p.timestep, 6) for p in task.nodes.points]), str(task.nodes.substeps)]
        made += [str(task.end), str((WINDOW, PENALTIES, MAX_FOLDS, "by prompt"))]
        return [*made, fingerprint(self.captured.module), _weights_digest(self.pipe)]

    def _task(
        self, budgets: tuple[int, ...], solver: str | None, progress: bool
    ) -> tuple[Task, tuple[int, int]]:
        """The task, and how many prompts there are to fit and to hold out."""
        fit, held_out, count = self._batches()
        task = Task(
            self.captured.engine(),
            self.schedule,
            self.predicts,
            fit,
            held_out,
            self.scales,
            tuple(sorted(set(budgets))),
            solver=solver or "dpmpp2m",
            gather=gather,
            progress=progress and rank()[0] == 0,
            end=end_of(self.pipe.scheduler, self.schedule),
        )
        return task, count

    def _batches(self) -> tuple[list[Batch], list[Batch], tuple[int, int]]:
        """This process's batches to fit and to hold out, and how many prompts there are of each."""
        groups: list[list[Batch]] = []
        counts = []
        prompts = self.prompts
        held = [i for i in range(len(prompts)) if i % round(1 / HELD_OUT) == 2]
        for kept in (sorted(set(range(len(prompts))) - set(held)), held):
            counts.append(len(kept))
            groups.append(self._sampled(kept))
        return groups[0], groups[1], (counts[0], counts[1])

    def _sampled(self, kept: Sequence[int]) -> list[Batch]:
        """This process's batches of the prompts with these indices."""
        given = (self.captured, self.prompts, kept, self.negative_prompt, self.scales[0])
        return batches_of(*given, self.noises, self.call)


def _check(
    prompts: Sequence[str], scales: Sequence[float], budgets: Sequence[int], refine: object
) -> None:
    check_given(prompts, 6, scales)
    if isinstance(refine, bool) or not isinstance(refine, int) or refine < 0:
        raise InvalidArgument("refine", refine, "give how many rounds, 0 for none.")
    for budget in budgets:
        if isinstance(budget, bool) or not isinstance(budget, int) or budget < 4:
            raise InvalidArgument("budgets", budget, "a budget is a whole number of at least 4.")


def _store(work_dir: str | Path | None, prompts: Sequence[str], settings: Sequence[str]) -> Store:
    if work_dir is None:
        return Store()
    index, size = rank()
    folder = Path(work_dir) / _digest([*settings, *prompts])[:16]
    suffix = "" if size == 1 else f"-{index}-of-{size}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidArgument("work_dir", str(work_dir), f"cannot be made ({error}).") from error
    return Store(folder, writes=index == 0, suffix=suffix)


def _seconds(captured: Captured, store: Store, call: Mapping[str, Any]) -> tuple[float, float]:
    """(one branch, both branches) of a denoiser call, the same in all processes.

    Grids follow from it: a calibration that goes on, and every process, must find the same ones.
    """
    key = f"seconds-{_digest([machine_line()])[:16]}"
    own = store.json(key) or time_denoiser(captured, **call)
    one, both = gather(torch.tensor([own], dtype=torch.float64)).mean(0).tolist()
    store.put_json(key, [one, both])
    return one, both


def _weights_digest(pipe: Any) -> str:
    """Hash of a few values of every parameter: other weights make other converged runs."""
    found = hashlib.sha256()
    for name, part in sorted(pipe.components.items()):
        if isinstance(part, torch.nn.Module):
            found.update(f"{name} {type(part).__name__}".encode())
            for weight in part.parameters():
                if weight.is_meta:
                    continue  # offloaded to disk
                few = weight.detach().flatten()[:: max(1, weight.numel() // 8)][:9]
                found.update(few.double().cpu().numpy().tobytes())
    return found.hexdigest()


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()


def _stock(scheduler: Any, kind: str, prediction_type: str) -> dict[tuple[str, int], StockPlan]:
    """Plans of ordinary solvers under full guidance."""
    found: dict[tuple[str, int], StockPlan] = {}
    if getattr(scheduler.config, "use_dynamic_shifting", False):
        return found  # their grid would be another at every size
    for name in STOCK_BY_KIND[kind]:
        for num_steps in STOCK_STEPS:
            found[name, num_steps] = _stock_plan(scheduler, kind, name, num_steps)
    return found


def _stock_plan(scheduler: Any, kind: str, name: str, num_steps: int) -> StockPlan:
    def make(guidance_scale: float) -> SamplingPlan:
        made = stock_scheduler(scheduler, kind, name)
        return plan_from_table(trace(made, num_steps), CFG(), guidance_scale)

    return make


def stock_scheduler(scheduler: Any, kind: str, name: str) -> Any:
    """An ordinary solver on the noise schedule of ``scheduler``, which begins and ends like it."""
    class_name, config = STOCK[name], dict(scheduler.config)
    kept = {key: value for key, value in config.items() if key in NATIVE}
    if kind == "flow":
        more = {"num_train_timesteps": config.get("num_train_timesteps", 1000)}
        if class_name != "FlowMatchEulerDiscreteScheduler":
            more |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
            more["flow_shift"] = config.get("shift", 1.0) or 1.0
        else:
            more["shift"] = config.get("shift", 1.0) or 1.0
        return getattr(diffusers, class_name)(**more)
    clean = end_of(scheduler, native_schedule(scheduler)[0]).sigma_t == 0.0
    more = {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": clean}
    more["final_sigmas_type"] = "zero" if clean else "sigma_min"
    return getattr(diffusers, class_name).from_config(kept, **more)
