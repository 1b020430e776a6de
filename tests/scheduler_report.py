"""Writes docs/schedulers.md: `PYTHONPATH=.:kernels:tests python tests/scheduler_report.py`."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import diffusers
import torch

from scheduler_cases import CLASSES, MATRIX, build, real_run, table_error
from thg_engine.errors import ThgError
from thg_engine.trace import trace

HEAD = """# Schedulers

`thg_engine.trace.trace(scheduler, num_steps)` turns a run of a scheduler into a `SolverTable` by
running the scheduler itself on basis vectors. This page lists every scheduler class that diffusers
exports and what tracing makes of it. `tests/scheduler_report.py` writes it; `tests/test_trace.py`
checks it, and fails when diffusers exports a class that is not listed. Measured with diffusers
{diffusers} and torch {torch} on a CPU.

- **window**: past model outputs and past samples that a step reads, the current ones included, in
  the class's own configuration: the smallest in which every row of a run can be written. Other
  orders and prediction types can need more; the column after next lists what occurs.
- **error**: largest relative error over a run of the table against the scheduler, {count}
  configurations in all: float64 latents for deterministic schedulers; float32 latents, and the same
  noise, for stochastic ones.
- **float32**: what the scheduler keeps or computes in float32. The table holds the coefficients
  that come out of that arithmetic, so that it gives the scheduler's samples. Where samples
  themselves are cast inside `step`, the cast is what the error column shows (1e-7, not 1e-15).
  `trace(..., upcast=True)` computes the coefficients in float64 from the same tables instead; the
  two differ by 1e-7 to 1e-6 as a rule, and by up to 2e-3 where points almost coincide (third-order
  DEIS on beta sigmas), where the float32 scheduler cancels digits.

With float32 latents, as in a pipeline, the rounding of each step adds to that: 1e-6 at most over 7
to 50 steps, 1e-5 over one or two steps from a sigma of 80 straight to 0.

Not traced, whatever the class, with a message that names class, cause and remedy: clipping
(`clip_sample`, `clip_denoised`) and `thresholding` where they are on and have an effect, a learned
variance, coefficients that are not finite (the scheduler itself gives NaN there, e.g. UniPC with
`predict_x0=False` or `solver_type="bh1"` down to sigma 0), noise that one noise column cannot hold,
and every step that does not survive the check against the real scheduler on numbers of size 1 and
1000. A refused scheduler still runs; it keeps its own step.

A table is cached by class, config, timesteps, sigmas, start and arguments. SA-Solver is not cached:
its `tau_func` is a function, which has no canonical form. LMS is the slow one (its coefficients are
numerical integrals): about a second for 20 steps.

## Deterministic

| class | window | error | all tested windows | float32 |
|---|---|---|---|---|
"""


def _runs(name: str) -> list[tuple[tuple[int, int], float]]:
    """(window, error) of the class's own configuration first, then of the tested variations."""
    case, found = CLASSES[name], []
    for config in [{}, *MATRIX.get(name, [])]:
        steps = case.steps if not config else 9
        table = trace(build(name, **config), steps, set_timesteps_kwargs=case.set_kwargs)
        scheduler = build(name, **config)
        scheduler.set_timesteps(num_inference_steps=steps, **case.set_kwargs)
        if hasattr(scheduler, "noise_sampler"):  # its noise is checked in tests/test_trace.py
            error = table.residual
        else:
            dtype = torch.float64 if case.kind == "deterministic" else torch.float32
            error = table_error(table, real_run(scheduler, dtype=dtype))
        found.append((table.window, error))
    return found


def _row(name: str, runs: list[tuple[tuple[int, int], float]]) -> str:
    windows = sorted({window for window, _ in runs})
    worst = max(error for _, error in runs)
    kept = CLASSES[name].float32 or "nothing"
    shown = ", ".join(map(str, windows)) if len(windows) > 1 else ""
    return f"| {name} | {runs[0][0]} | {worst:.0e} | {shown} | {kept} |\n"


def _refusal(name: str) -> str:
    if "SDE" in name and importlib.util.find_spec("torchsde") is None:
        raise SystemExit("install torchsde first: two classes need it")
    try:
        trace(build(name), CLASSES[name].steps)
    except ThgError as error:
        return f"| {name} | {str(error).split(': ', 1)[1].rsplit(';', 1)[0]} |\n"
    raise SystemExit(f"{name} was traced; its case says refused")


def main() -> None:
    """Measure every class and write the page."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    measured = {n: _runs(n) for n, c in sorted(CLASSES.items()) if c.kind != "refused"}
    text = HEAD.format(
        diffusers=diffusers.__version__,
        torch=torch.__version__.split("+")[0],
        count=sum(map(len, measured.values())),
    )
    for kind in ("deterministic", "stochastic"):
        if kind == "stochastic":
            text += "\n## With a noise column\n\n" + "\n".join(HEAD.splitlines()[-2:]) + "\n"
        text += "".join(_row(n, r) for n, r in measured.items() if CLASSES[n].kind == kind)
    text += "\n## Refused\n\n| class | cause |\n|---|---|\n"
    text += "".join(_refusal(n) for n, c in sorted(CLASSES.items()) if c.kind == "refused")
    Path(__file__).parents[1].joinpath("docs", "schedulers.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
