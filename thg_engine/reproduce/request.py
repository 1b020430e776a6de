"""From the command line to a checked request: everything is refused here, before anything runs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..cli_checks import writable
from ..curves import Calibration
from ..errors import InvalidArgument, MissingWeights
from ..guidance import Guidance
from ..published import shipped_calibrations
from .checks import check_metrics, parse_weights
from .generation import DEMO, MAX_SEED, Job
from .methods import Context, NotAvailable, guidance_of
from .metrics import BOXED, METRICS, caption_labels
from .report import RESULTS, read_results
from .samples import reference_files
from .tables import Row, Table, table

DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32")}
DEMO_SAMPLES = 40
BOXED_CURVES = "thg_engine boxed pipeline"


@dataclass(frozen=True)
class Request:
    """What to run and what to measure.

    Attributes:
        job: what decides the samples.
        rows: the chosen ones with their methods; None is the stock pipeline.
        unavailable: the chosen ones that cannot be run, with the reason.
        metrics: names of the scores.
        reference: files of the reference set; empty where none is needed or it is generated.
        generate_reference: whether full guidance at other seeds is the reference set.
        weights: metric -> local file or folder.
    """

    job: Job
    rows: tuple[tuple[Row, Guidance | None], ...]
    unavailable: tuple[tuple[Row, str], ...]
    metrics: tuple[str, ...]
    reference: tuple[Path, ...]
    generate_reference: bool
    weights: dict[str, Path]

    @property
    def boxed(self) -> bool:
        """Whether the pipeline in the box is asked for."""
        return self.job.model == DEMO


def check(args: argparse.Namespace) -> Request:
    """The request behind parsed arguments.

    Raises:
        InvalidArgument: an argument makes no sense; the message names it, its value, the remedy.
        MissingPackage, MissingWeights, CalibrationError: something it needs is not there.
    """
    if args.table is None:
        raise InvalidArgument("TABLE", None, "name a table; --list shows them.")
    chosen = table(args.table)
    _at_least("--limit", args.limit, 2)
    _at_least("--batch-size", args.batch_size, 1)
    _at_least("--seed", args.seed, 0)
    if args.seed >= MAX_SEED:
        raise InvalidArgument("--seed", args.seed, f"give a number below {MAX_SEED}.")
    boxed = _check_model(chosen, args.model) == DEMO
    rows = chosen.select(_names(args.rows))
    weights = parse_weights(args.weights)
    metrics = _metrics(args, chosen, rows, boxed)
    check_metrics(metrics, chosen.modality, weights, boxed)
    prompts = _prompts(args, boxed)
    if any(name.endswith("accuracy") for name in metrics):
        for prompt in prompts:
            caption_labels(prompt)
    reference, generated = _reference(args, chosen, metrics, boxed)
    curves = _calibration(args, boxed)
    model = DEMO if boxed else str(Path(args.model).resolve())
    dtype = DTYPES[args.dtype or _default_dtype(boxed)]
    out = _out(args.out)
    job = Job(chosen, model, prompts, args.seed, dtype, curves, out, args.batch_size)
    runnable, unavailable = _methods(rows, Context(chosen.model, curves))
    return Request(job, runnable, unavailable, metrics, reference, generated, weights)


def _at_least(argument: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise InvalidArgument(argument, value, f"give at least {least}.")


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _default_dtype(boxed: bool) -> str:
    return "float16" if torch.cuda.is_available() and not boxed else "float32"


def _check_model(chosen: Table, model: str | None) -> str:
    """The model's name if it is a pipeline that this table is about."""
    wanted = " or ".join(chosen.pipelines)
    if model is None:
        remedy = f"give the folder of a {wanted} ({chosen.model}), or 'demo'."
        raise InvalidArgument("--model", None, remedy)
    if model == DEMO:
        _check_box(chosen)
        return DEMO
    index = Path(model) / "model_index.json"
    try:
        kind = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        remedy = f"give a pipeline folder in diffusers' format, or 'demo' ({error})."
        raise InvalidArgument("--model", model, remedy) from error
    if kind not in chosen.pipelines:
        remedy = f"it holds a {kind}; table {chosen.key} is about {chosen.model}, a {wanted}."
        raise InvalidArgument("--model", model, remedy)
    return model


def _check_box(chosen: Table) -> None:
    """Refuse a table that no pipeline in the box can stand in for."""
    from ..demo.pipeline_loader import FOLDERS

    kinds = {"StableDiffusionPipeline": "sd", "StableDiffusion3Pipeline": "flow"}
    name = kinds.get(chosen.pipelines[0])
    if name is None:
        remedy = f"the box holds no sound; give the folder of a {chosen.pipelines[0]}."
        raise InvalidArgument("--model", DEMO, remedy)
    if not (FOLDERS[name] / "model_index.json").is_file():
        remedy = (
            f"give --model the folder of a {chosen.pipelines[0]}, or train one: training/README.md"
        )
        raise MissingWeights(f"this package came without its {name!r} pipeline; {remedy}.")


def _metrics(
    args: argparse.Namespace, chosen: Table, rows: Sequence[Row], boxed: bool
) -> tuple[str, ...]:
    """Names of the scores: those asked for, or the table's; "none" is none."""
    asked = _names(args.metrics)
    if asked == ["none"]:
        return ()
    standing = any(row.name == chosen.psnr_to for row in rows)
    if asked is None:
        names = BOXED + (("psnr",) if chosen.psnr_to else ()) if boxed else chosen.metrics
        return tuple(name for name in names if name != "psnr" or standing)
    if not asked:
        raise InvalidArgument("--metrics", args.metrics, f"name some of {', '.join(METRICS)}.")
    if "psnr" in asked and not standing:
        remedy = f"is measured to row {chosen.psnr_to}: add it to --rows."
        if not chosen.psnr_to:
            remedy = f"table {chosen.key} has no row to measure it to; same-budget has."
        raise InvalidArgument("--metrics", "psnr", remedy)
    return tuple(dict.fromkeys(asked))


def _prompts(args: argparse.Namespace, boxed: bool) -> tuple[str, ...]:
    """The captions, one per sample."""
    if args.prompts is None:
        if not boxed:
            raise InvalidArgument("--prompts", None, "give a text file, one caption per line.")
        from ..demo.compare import prompts

        return tuple(prompts(args.limit or DEMO_SAMPLES)[0])
    try:
        lines = args.prompts.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        remedy = f"give a readable text file, one caption per line ({error})."
        raise InvalidArgument("--prompts", str(args.prompts), remedy) from error
    captions = [line.strip() for line in lines if line.strip()][: args.limit]
    if len(captions) < 2:
        remedy = f"give at least two captions, one per line; it has {len(captions)}."
        raise InvalidArgument("--prompts", str(args.prompts), remedy)
    return tuple(captions)


def _reference(
    args: argparse.Namespace, chosen: Table, metrics: Sequence[str], boxed: bool
) -> tuple[tuple[Path, ...], bool]:
    """Files of the reference set, and whether it has to be generated."""
    flags = {"image": "--images", "audio": "--audio"}
    mine = flags[chosen.modality]
    given = {"--images": args.images, "--audio": args.audio}
    for flag, folder in given.items():
        if folder is not None and flag != mine:
            remedy = f"table {chosen.key} is about {chosen.modality}; use {mine}."
            raise InvalidArgument(flag, str(folder), remedy)
    wanted = [name for name in metrics if METRICS[name].reference]
    if given[mine] is not None:
        return tuple(reference_files(given[mine], chosen.modality, mine)), False
    if wanted and not boxed:
        remedy = f"{', '.join(wanted)} compare with a folder of it: {chosen.data}."
        raise InvalidArgument(mine, None, remedy)
    return (), bool(wanted)


def _calibration(args: argparse.Namespace, boxed: bool) -> Calibration | None:
    """The given error curves; for the pipeline in the box the ones that came with it."""
    if args.calibration is not None:
        return Calibration.load(args.calibration)
    shipped = (curves for curves in shipped_calibrations() if curves.model.startswith(BOXED_CURVES))
    return next(shipped, None) if boxed else None


def _out(folder: Path | None) -> Path:
    """The folder to write to; found out before anything is generated."""
    if folder is None:
        raise InvalidArgument("--out", None, "give the folder for samples and results.")
    writable(folder)
    read_results(folder / RESULTS)
    return folder


def _methods(rows: Sequence[Row], context: Context) -> tuple[Any, Any]:
    """Rows with their methods, and rows with the reason why they have none."""
    runnable, unavailable = [], []
    for row in rows:
        try:
            runnable.append((row, guidance_of(row, context)))
        except NotAvailable as reason:
            unavailable.append((row, str(reason)))
    return tuple(runnable), tuple(unavailable)
