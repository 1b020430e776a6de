"""``thg-engine reproduce``: the sub-command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..cli_checks import processes

DESCRIPTION = """\
Generates the samples of a published table with your weights and prompts, scores them, and prints
the published number beside each measured one. Interrupted, it goes on where it stopped; under
`accelerate launch -m thg_engine.cli reproduce ...` every process takes its share of the samples.
"""
EPILOG = """\
examples:
  thg-engine reproduce --list                      tables, their rows, and what metrics need
  thg-engine reproduce sd15 --model demo --rows ddim-cfg,ddim-thg --out demo-tables
                                                   the machinery on the pipeline in the box
  thg-engine reproduce rho --model sd15/ --prompts coco.txt --images coco/ --out rho \\
      --metrics fid                                the ablation of rho, FID alone
"""


def add_parser(commands: Any) -> None:
    """Add ``reproduce`` to the sub-commands of `argparse`."""
    parser = commands.add_parser(
        "reproduce",
        help="the paper's tables with your weights and data",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("table", nargs="?", metavar="TABLE", help="a table of --list")
    add("--list", action="store_true", help="print tables, rows and what they need")
    add("--model", metavar="FOLDER", help="a pipeline in diffusers' format, or 'demo'")
    add("--prompts", type=Path, metavar="FILE", help="one caption per line")
    reference = parser.add_mutually_exclusive_group()
    reference.add_argument("--images", type=Path, metavar="FOLDER", help="of FID and CMMD")
    reference.add_argument("--audio", type=Path, metavar="FOLDER", help="of FAD")
    add("--out", type=Path, metavar="DIR", help="for samples, manifest.json and results.json")
    add("--rows", metavar="NAME,NAME", help="some rows (all)")
    add("--limit", type=int, metavar="N", help="the first N prompts only; more can follow")
    add("--batch-size", type=int, default=8, metavar="B", help="samples at a time (8)")
    add("--seed", type=int, default=0, metavar="S", help="of sample 0; sample i has S + i (0)")
    add("--metrics", metavar="NAME,NAME", help="some scores (the table's), or 'none'")
    add("--weights", action="append", default=[], metavar="METRIC=PATH", help="may be repeated")
    add("--calibration", type=Path, metavar="FILE", help="of `thg-engine calibrate`")
    add("--dtype", choices=["float16", "bfloat16", "float32"], help="(float16 on CUDA)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """``thg-engine reproduce``."""
    from .report import list_tables

    if args.list:
        print("\n".join(list_tables()))
        return
    from .request import check

    request = check(args)
    from .generation import Shard, check_manifest, write_manifest
    from .running import generate, measure

    state = processes()
    manifest = check_manifest(request.job)
    # Every process refuses a folder of other settings itself, before one of them writes.
    state.wait_for_everyone()
    if state.is_main_process:
        write_manifest(request.job, manifest)
    shard = Shard(state.process_index, state.num_processes)
    generate(request, shard, progress=state.is_local_main_process)
    state.wait_for_everyone()
    if state.is_main_process:
        show(request, measure(request, str(state.device)))
    if state.num_processes > 1:
        state.destroy_process_group()


def show(request: Any, results: Sequence[Any]) -> None:
    """Print the table and write ``results.json``."""
    from rich.console import Console

    from ..doctor import machine_line
    from .report import RESULTS, notes, result_table, save_results
    from .running import header

    job = request.job
    about = header(request)
    path = job.out / RESULTS
    save_results(path, about, results)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(result_table(job.table.title, results, request.metrics))
    lines = [
        f"samples: {len(job.prompts)} of each row; published: {job.table.count}",
        f"reference: {about['reference']}",
        *notes(results),
        machine_line(),
        f"wrote {path}",
    ]
    if request.boxed:
        lines.insert(0, about["features"])
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
