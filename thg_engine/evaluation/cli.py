"""``thg-engine evaluate``."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

from ..cli_checks import writable
from ..errors import InvalidArgument, MissingWeights

DESCRIPTION = """\
Measures every training-free baseline and what this package proposes on the pipelines in the box:
error to the converged solution and PSNR to the same-N image against NFE and measured seconds, and
quality scores. Writes DIR/evaluate.json and DIR/PIPELINE-wSCALE.png. A run that was stopped goes
on where it was when the same command is given again."""


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "evaluate",
        help="work-precision curves and quality against every baseline",
        description=DESCRIPTION,
    )
    parser.add_argument("--out", type=Path, default=Path("evaluate-out"), metavar="DIR")
    parser.add_argument("--pipeline", choices=("sd", "flow", "all"), help="(all; --quick: sd)")
    parser.add_argument("--quick", action="store_true", help="a smaller grid: below ten minutes")
    many: dict[str, Any] = {"nargs": "+", "metavar": "W", "type": float}
    parser.add_argument("--guidance-scales", **many, help="w of the curves (2 3 5 7.5)")
    parser.add_argument("--quality-scales", **many, help="w of the quality scores (2 3 5 7.5)")
    parser.add_argument("--prompts", type=int, help="images per seed (20)")
    parser.add_argument("--seeds", type=int, help="seeds of noise, at least 3 (5)")
    parser.add_argument("--seed", type=int, help="the first of them (0)")
    parser.add_argument("--quality-images", type=int, help="per method; 0: no quality (480)")
    parser.add_argument(
        "--data", metavar="DIR", help="Fashion-MNIST's test files, as reference of quality"
    )
    parser.set_defaults(run=evaluate_command)


def evaluate_command(args: argparse.Namespace) -> None:
    """Check, measure, draw, print."""
    from rich.console import Console

    from .report import tables

    console = Console(width=None if sys.stdout.isatty() else 150)
    document, written = run_evaluation(args, lambda text: console.print(text, soft_wrap=True))
    for table in tables(document):
        console.print(table)
    console.print("* proposed here; PSNR in dB over decoded images, intervals over seeds")
    console.print(document["runs"][-1]["machine"], soft_wrap=True)
    console.print(f"wrote {', '.join(map(str, written))}", soft_wrap=True)


def run_evaluation(args: argparse.Namespace, say: Any) -> tuple[dict[str, Any], list[Path]]:
    """The document and the files; every mistake is found before anything runs.

    Raises:
        InvalidArgument, MissingWeights: see the message.
    """
    settings = settings_of(args)
    if importlib.util.find_spec("matplotlib") is None:
        remedy = "plots need matplotlib: pip install thg-engine[metrics]."
        raise InvalidArgument("--out", str(args.out), remedy)
    writable(args.out)
    from ..doctor import machine_line
    from .evaluate import evaluate
    from .plots import plot_rows
    from .settings import BOXES
    from .store import Store

    path = args.out / "evaluate.json"
    store = Store(path, settings.document(), {"machine": machine_line()})
    for box in _boxes(settings.pipelines, settings.pipelines == BOXES, store, say):
        evaluate(box, settings, store, say)
    store.save(force=True)
    return store.document, [path, *plot_rows(store.document["rows"], args.out)]


def settings_of(args: argparse.Namespace) -> Any:
    """The checked settings of a command line."""
    from .garments import check_data
    from .settings import BOXES, QUICK, Settings

    given: dict[str, Any] = dict(QUICK) if args.quick else {}
    chosen = args.pipeline or ("sd" if args.quick else "all")
    given["pipelines"] = BOXES if chosen == "all" else (chosen,)
    names = ("guidance_scales", "quality_scales", "prompts", "seeds", "seed", "quality_images")
    for name in (*names, "data"):
        value = getattr(args, name)
        if value is not None:
            given[name] = tuple(value) if isinstance(value, list) else value
    check_data(given.get("data", ""))
    return Settings(**given)


def _boxes(names: tuple[str, ...], skip_missing: bool, store: Any, say: Any) -> list[Any]:
    """The pipelines; of ``--pipeline all``, those that are there."""
    from .box import load_box

    boxes = []
    for name in names:
        try:
            boxes.append(load_box(name))
        except MissingWeights as error:
            if not skip_missing:
                raise
            say(f"{name}: left out: {error}")
            store.note(f"{name}: left out: its weights are not there")
    return boxes
