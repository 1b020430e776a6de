"""``thg-engine demo | calibrate | evaluate | reproduce | doctor``: the command line.

Mistakes of the user end in one line on stderr and exit status 2, never in a traceback.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .cli_calibrate import add_parser as _add_calibrate
from .cli_checks import writable
from .errors import ThgError
from .evaluation.cli import add_parser as _add_evaluate
from .reproduce.cli import add_parser as _add_reproduce

if TYPE_CHECKING:
    from rich.table import Table

EPILOG = """\
examples:
  thg-engine demo --out demo-out             see it work on the pipeline in the box, offline
  thg-engine doctor                          what is installed here, and what is missing
  thg-engine evaluate --quick --out eval     work-precision curves against every baseline
  thg-engine calibrate runwayml/stable-diffusion-v1-5 --prompts captions.txt --out sd15.json
                                             then: thg_engine.compile(pipe, calibration="sd15.json")
  thg-engine calibrate MODEL --plans --prompts captions.txt --out plans.json
                         then: thg_engine.compile(pipe, calibration="plans.json", speedup=2.0)
  thg-engine reproduce --list                the paper's tables, for those who have the weights
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command."""
    parser = argparse.ArgumentParser(
        prog="thg-engine",
        description="Tortoise and Hare Guidance for diffusers: fewer evaluations, the same images.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"thg-engine {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_calibrate(commands)
    _add_evaluate(commands)
    _add_reproduce(commands)
    doctor = commands.add_parser(
        "doctor",
        help="show versions, devices, and what is missing",
        description="Versions, devices and tools here; what is missing and how to get it.",
    )
    doctor.set_defaults(run=_doctor)
    return parser


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser(
        "demo",
        help="compare guidance methods on the pipeline in the box",
        description="Generates the same seeds with full guidance (CFG), CFG with fewer steps, "
        "CFG-Cache, THG and fitted plans, and writes DIR/demo.png (columns: methods, rows: "
        "prompts) and DIR/demo.json (NFE, seconds, distances, accuracy). Needs no network, no GPU.",
    )
    demo.add_argument("--out", type=Path, default=Path("demo-out"), metavar="DIR")
    demo.add_argument("--images", type=int, help="prompts, one image each (30, or 10)")
    demo.add_argument("--guidance-scale", type=float, default=5.0, help="w (5.0); 1 is off")
    demo.add_argument("--seed", type=int, default=0, help="of the initial noise (0)")
    demo.add_argument("--quick", action="store_true", help="10 images: a smoke test")
    demo.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> None:
    """``thg-engine demo``."""
    from rich.console import Console

    from .demo.compare import Settings, compare
    from .demo.sheet import contact_sheet
    from .doctor import collect, machine_line

    size = {"images": 10, "reference_steps": 100} if args.quick else {}
    if args.images is not None:
        size["images"] = args.images
    settings = Settings(**size, guidance_scale=args.guidance_scale, seed=args.seed)
    writable(args.out)
    result = compare(settings)
    sheet = contact_sheet(**result.pop("sheet"))
    sheet.save(args.out / "demo.png")
    document = {
        **result,
        "settings": dataclasses.asdict(settings),
        "machine": machine_line(),
        "versions": {name: dataclasses.asdict(found) for name, found in collect().items()},
    }
    (args.out / "demo.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(demo_table(result["methods"], settings.guidance_scale))
    console.print(f"{machine_line()}; c2 = {result['c2']:.2f} (time of a doubled batch / a single)")
    console.print(f"wrote {args.out / 'demo.png'} and {args.out / 'demo.json'}", soft_wrap=True)


def demo_table(rows: Sequence[dict[str, Any]], guidance_scale: float) -> Table:
    """The demo's rows for the terminal."""
    from rich.table import Table

    table = Table(title=f"The pipeline in the box, DDIM (but plans), w = {guidance_scale:g}")
    heads = ("method", "steps", "NFE", "s/image", "speed-up", "PSNR to CFG", "error to converged")
    for head in (*heads, "class acc.", "class+colour"):
        table.add_column(head, justify="left" if head == "method" else "right")
    for row in rows:
        psnr = "-" if row["psnr_to_cfg"] is None else f"{row['psnr_to_cfg']:.1f} dB"
        table.add_row(
            row["method"],
            str(row["num_steps"]),
            str(row["nfe"]),
            f"{row['seconds_per_image']:.3f}",
            f"{row['speedup']:.2f}x",
            psnr,
            f"{100 * row['rel_error_to_converged']:.1f} %",
            f"{100 * row['accuracy']:.0f} %",
            f"{100 * row['joint_accuracy']:.0f} %",
        )
    return table


def _doctor(args: argparse.Namespace) -> None:
    """``thg-engine doctor``."""
    from rich.console import Console

    from .doctor import print_report

    print_report(Console(width=None if sys.stdout.isatty() else 120))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status (2 for a mistake of the user)."""
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
    except ThgError as error:
        print(f"thg-engine {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nthg-engine {args.command}: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
