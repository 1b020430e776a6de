"""``thg-engine calibrate``: error curves of Algorithm 3, or fitted plans."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .cli_checks import processes, writable_file
from .errors import InvalidArgument, ThgError

if TYPE_CHECKING:
    from rich.table import Table

    from .curves import Calibration
    from .fitting.front import PlanFront

BOXES: dict[str, Literal["sd", "flow"]] = {"demo": "sd", "demo-flow": "flow"}
"""Pipelines of the package by their name on the command line."""
DESCRIPTION = """\
Measures the local errors of tortoise and hare (Algorithm 3 of the paper) on your prompts and saves
them; one file serves every number of steps and budget. Costs 4 evaluations per step and prompt. The
prompts are measured in two halves, and how well their grids agree is printed.

With --plans: fits whole plans, solver and guidance, to the model's converged solution, for a range
of budgets, and measures them on a third of the prompts that is held out. Costs some 3,700
evaluations per prompt and scale with all budgets. Runs on several processes under
`accelerate launch -m thg_engine.cli`.
"""


def add_parser(commands: Any) -> None:
    """Add ``calibrate`` to the commands."""
    calibrate = commands.add_parser(
        "calibrate",
        help="measure a model's error curves, or fit plans to it",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    calibrate.add_argument("model", metavar="MODEL", help="folder, hub name, 'demo' or 'demo-flow'")
    calibrate.add_argument(
        "--prompts", type=Path, required=True, metavar="FILE", help="one per line"
    )
    calibrate.add_argument("--out", type=Path, metavar="FILE", help="(calibration.json)")
    calibrate.add_argument(
        *("--guidance-scale", "--guidance-scales"),
        type=float,
        nargs="+",
        default=[7.5],
        metavar="W",
        help="w (7.5); with --plans also several, and rows are interpolated between them",
    )
    calibrate.add_argument("--steps", type=int, help="fine steps of the curves (50)")
    calibrate.add_argument(
        "--solver", help="ddim, dpm2, dpmpp2m, lms2, flow_euler (curves: ddim; plans: dpmpp2m)"
    )
    calibrate.add_argument("--negative-prompt", default="", metavar="TEXT", help="(none)")
    calibrate.add_argument("--batch-size", type=int, default=8, help="samples at a time (8)")
    calibrate.add_argument("--seed", type=int, default=0, help="of the noises (0)")
    _add_plans(calibrate)
    calibrate.set_defaults(run=_calibrate)


def _add_plans(calibrate: argparse.ArgumentParser) -> None:
    """Flags of fitted plans."""
    calibrate.add_argument("--plans", action="store_true", help="fit plans for a range of budgets")
    calibrate.add_argument(
        "--budgets",
        type=int,
        nargs="+",
        metavar="NFE",
        help="--plans: evaluations per image (18 of them, 10 to 100)",
    )
    calibrate.add_argument("--refine", type=int, help="--plans: rounds of moving points (0)")
    calibrate.add_argument("--samples", type=int, help="--plans: noises per prompt (1)")
    calibrate.add_argument(
        "--work-dir", type=Path, metavar="DIR", help="--plans: to go on after an interruption"
    )
    calibrate.add_argument(
        "--max-sequence-length", type=int, help="--plans: of text encoders that pad to it"
    )


def _calibrate(args: argparse.Namespace) -> None:
    """``thg-engine calibrate``."""
    from rich.console import Console

    from .calibration import merge
    from .integrations.diffusers import calibrate

    out = args.out or Path("plans.json" if args.plans else "calibration.json")
    _refuse_flags_of_the_other(args)
    if args.plans:
        _calibrate_plans(args, out)
        return
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ThgError("error curves are measured by one process; --plans shares its work.")
    prompts = _read_prompts(args.prompts)
    if len(args.guidance_scale) > 1:
        remedy = "error curves are measured at one scale; --plans takes several."
        raise InvalidArgument("--guidance-scale", args.guidance_scale, remedy)
    writable_file(out)
    pipe = _load(args.model)
    halves = [prompts[0::2], prompts[1::2]]
    curves = [
        calibrate(
            pipe,
            half,
            negative_prompt=args.negative_prompt,
            guidance_scale=args.guidance_scale[0],
            num_inference_steps=50 if args.steps is None else args.steps,
            solver=args.solver or "ddim",
            batch_size=args.batch_size,
            seed=args.seed + i,
            model=args.model,
        )
        for i, half in enumerate(halves)
    ]
    whole = merge(curves, prompts)
    whole.save(out)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(calibration_table(whole, curves))
    console.print(f"wrote {out}; use it with thg_engine.compile(pipe, calibration={str(out)!r})")


def _refuse_flags_of_the_other(args: argparse.Namespace) -> None:
    """Flags that this kind of calibration would ignore."""
    of_plans = ("budgets", "refine", "samples", "work_dir", "max_sequence_length")
    names = ("steps",) if args.plans else of_plans
    for name in names:
        if getattr(args, name) is not None:
            flag = f"--{name.replace('_', '-')}"
            remedy = f"{flag} is for error curves." if args.plans else f"{flag} needs --plans."
            raise InvalidArgument(flag, getattr(args, name), remedy)


def _calibrate_plans(args: argparse.Namespace, out: Path) -> None:
    """``thg-engine calibrate --plans``."""
    from .fitting.search import BUDGETS
    from .integrations.diffusers import calibrate_plans

    prompts = _read_prompts(args.prompts)
    writable_file(out)
    # Before a pipeline is loaded: it goes to this process's device.
    state = processes()
    pipe = _load(args.model)
    length = args.max_sequence_length
    extra = {} if length is None else {"max_sequence_length": length}
    front = calibrate_plans(
        pipe,
        prompts,
        guidance_scales=args.guidance_scale,
        budgets=args.budgets or BUDGETS,
        negative_prompt=args.negative_prompt,
        solver=args.solver,
        batch_size=args.batch_size,
        samples=1 if args.samples is None else args.samples,
        seed=args.seed,
        refine=args.refine or 0,
        model=args.model,
        work_dir=args.work_dir,
        **extra,
    )
    if state.is_main_process:
        front.save(out)
        _show_plans(front, args.guidance_scale[0], out)
    if state.num_processes > 1:
        state.destroy_process_group()


def _show_plans(front: PlanFront, guidance_scale: float, out: Path) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(front_table(front, guidance_scale))
    console.print(
        f"wrote {out}; use it with thg_engine.compile(pipe, calibration={str(out)!r}, nfe=40)"
    )


def front_table(front: PlanFront, guidance_scale: float) -> Table:
    """Plans by cost, and ordinary solvers beside them."""
    from rich.table import Table

    title = f"{front.model}: error to the converged solution at w = {guidance_scale:g}, "
    table = Table(title=title + f"{front.num_held_out} prompts held out")
    for head in ("plan", "NFE", "time of 50 steps", "error", "not fitted"):
        table.add_column(head, justify="left" if head == "plan" else "right")
    full = 50 * front.c2
    rows: list[tuple[float, tuple[str, ...]]] = []
    for entry in front.pareto(guidance_scale, front.c2):
        fit = next(f for f in entry.fits if f.guidance_scale == guidance_scale)
        cost = entry.cost(front.c2)
        error = f"{100 * fit.error:.2f} +- {100 * fit.ci95:.2f} %"
        cells = (entry.name, str(entry.nfe), f"{100 * cost / full:.0f} %", error)
        rows.append((cost, (*cells, f"{100 * fit.base_error:.2f} %")))
    for stock in front.stock:
        if stock.guidance_scale == guidance_scale:
            cost, nfe = stock.num_steps * front.c2, str(2 * stock.num_steps)
            name, share = f"cfg, {stock.solver}@{stock.num_steps}", f"{100 * cost / full:.0f} %"
            rows.append((cost, (name, nfe, share, f"{100 * stock.error:.2f} %", "")))
    for _, row in sorted(rows, key=lambda row: row[0]):
        table.add_row(*row)
    return table


def calibration_table(whole: Calibration, halves: Sequence[Calibration]) -> Table:
    """Grids for several budgets, and how well two disjoint halves of the prompts agree on them."""
    from rich.table import Table

    from .grid import grid_for_nfe, grid_iou

    scale, lambdas = whole.guidance_scale, whole.lambdas
    table = Table(title=f"{whole.model}: N = {whole.num_steps}, w = {scale:g}")
    for head in ("share", "NFE", "both branches at rows", "IoU of halves"):
        table.add_column(head)
    for share in (0.6, 0.7, 0.8):
        budget = round(2 * share * len(lambdas))
        grid, first, second = (
            grid_for_nfe(curves, lambdas, scale, budget) for curves in (whole, *halves)
        )
        nfe = str(len(lambdas) + len(grid))
        agreement = f"{100 * grid_iou(first, second):.0f} %"
        table.add_row(f"{100 * share:.0f} %", nfe, " ".join(map(str, grid)), agreement)
    return table


def _load(model: str) -> Any:
    if model in BOXES:
        from .demo import load_pipeline

        return load_pipeline(BOXES[model])
    from .integrations.diffusers.loading import load

    return load(model)


def _read_prompts(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        remedy = f"give a readable text file, one caption per line ({error})."
        raise InvalidArgument("--prompts", str(path), remedy) from error
    captions = [line.strip() for line in lines if line.strip()]
    if len(captions) < 2:
        remedy = f"give at least two captions, one per line; it has {len(captions)}."
        raise InvalidArgument("--prompts", str(path), remedy)
    return captions
