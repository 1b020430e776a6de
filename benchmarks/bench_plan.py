"""What planning costs, once per (scheduler, number of steps): `make bench`.

None of it is in the sampling loop. It is paid before the first denoiser call, and tables are
cached, so the number to compare with is the time of one image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

from thg_engine.calibration import fine_points
from thg_engine.doctor import machine_line
from thg_engine.guidance import THG
from thg_engine.lowering import plan_from_solver
from thg_engine.schedule import NoiseSchedule
from thg_engine.solvers import get_solver
from thg_engine.trace import trace, trace_cache_clear

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

NUM_STEPS = 50
SCHEDULERS = {
    "ddim": DDIMScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
}
STABLE_DIFFUSION: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}


def _scheduler(name: str) -> Any:
    settings = dict(STABLE_DIFFUSION)
    if name == "ddim":
        settings.update(clip_sample=False, set_alpha_to_one=False)
    return SCHEDULERS[name](**settings)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_trace(benchmark: BenchmarkFixture, name: str) -> None:
    """Tracing a fresh scheduler; `setup` empties the cache before each round."""
    benchmark.extra_info["machine"] = machine_line()

    def fresh() -> tuple[tuple[Any, int], dict[str, Any]]:
        trace_cache_clear()
        return (_scheduler(name), NUM_STEPS), {}

    table = benchmark.pedantic(trace, setup=fresh, rounds=10, warmup_rounds=1)
    assert len(table.rows) == NUM_STEPS


@pytest.mark.parametrize("form", ["combined", "two_state"])
def test_lowering(benchmark: BenchmarkFixture, form: str) -> None:
    """A plan of DPM-Solver++ 2M under THG, in both forms of Algorithm 1."""
    benchmark.extra_info["machine"] = machine_line()
    scheduler = _scheduler("ddim")
    schedule = NoiseSchedule.from_scheduler(scheduler)
    points = fine_points(schedule, [float(t) for t in range(981, 0, -20)])
    solver = get_solver("dpmpp2m")
    plan = benchmark(plan_from_solver, solver, points, THG(grid=3), 7.5, form=form)
    assert plan.nfe == NUM_STEPS + len(plan.coarse_grid)
