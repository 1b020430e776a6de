"""Published beside measured: for the terminal, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InvalidArgument
from .metrics import METRICS
from .samples import write_json
from .tables import Row, tables

if TYPE_CHECKING:
    from rich.table import Table as RichTable

RESULTS = "results.json"
DIGITS = {"cmmd": 5, "image-reward": 5, "clap": 4, "psnr": 2}


@dataclass
class Result:
    """What became of a row.

    Attributes:
        row: the published setting.
        samples: how many were scored.
        nfe_plan: evaluations per sample that the plan says; None where unknown.
        nfe_counted: the same as counted inside the network.
        measured: metric -> score.
        unavailable: why the row was not run; "" if it was.
    """

    row: Row
    samples: int = 0
    nfe_plan: int | None = None
    nfe_counted: float | None = None
    measured: dict[str, float] = field(default_factory=dict)
    unavailable: str = ""

    def document(self) -> dict[str, Any]:
        """For JSON."""
        row = self.row
        return {
            "row": row.name,
            "label": row.label,
            "solver": row.solver,
            "num_steps": row.num_steps,
            "samples": self.samples,
            "nfe": {"published": row.nfe, "plan": self.nfe_plan, "counted": self.nfe_counted},
            "published": dict(row.published),
            "measured": self.measured,
            "note": row.note,
            "unavailable": self.unavailable,
        }


def _number(value: float | None, metric: str) -> str:
    return "-" if value is None else f"{value:.{DIGITS.get(metric, 3)}f}"


def result_table(title: str, results: Sequence[Result], metrics: Sequence[str]) -> RichTable:
    """Rows with ``published | measured`` in each cell; "-" is what is not known."""
    from rich.table import Table

    shown = [m for m in METRICS if m in metrics or any(m in r.row.published for r in results)]
    drawn = Table(title=title, caption="published | measured; - is not known or not asked for")
    for head in ("row", "N", "NFE", "plan"):
        drawn.add_column(head, justify="left" if head == "row" else "right", no_wrap=True)
    for metric in shown:
        drawn.add_column(METRICS[metric].label, justify="right", no_wrap=True)
    for result in results:
        row = result.row
        counted = "-" if result.nfe_counted is None else f"{result.nfe_counted:g}"
        cells = [
            f"{_number(row.published.get(m), m)} | {_number(result.measured.get(m), m)}"
            for m in shown
        ]
        plan = "-" if result.nfe_plan is None else str(result.nfe_plan)
        drawn.add_row(row.name, str(row.num_steps), f"{row.nfe} | {counted}", plan, *cells)
    return drawn


def notes(results: Sequence[Result]) -> list[str]:
    """What the numbers do not say: rows that were not run, and settings that are ours."""
    lines = [f"{r.row.name}: not available: {r.unavailable}" for r in results if r.unavailable]
    return lines + [f"{r.row.name}: {r.row.note}" for r in results if r.row.note]


def read_results(path: Path) -> dict[str, Any]:
    """What ``results.json`` holds; nothing where it is not there.

    Raises:
        InvalidArgument: another file by that name, which scores cannot be added to.
    """
    if not path.is_file():
        return {}
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        known = all({"row", "samples", "measured"} <= set(entry) for entry in found["rows"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        remedy = f"{path.name} in it cannot be read ({error!r}); give another folder."
        raise InvalidArgument("--out", str(path.parent), remedy) from error
    if not known:
        remedy = f"{path.name} in it is of another format; give another folder."
        raise InvalidArgument("--out", str(path.parent), remedy)
    return found


def save_results(path: Path, header: Mapping[str, Any], results: Sequence[Result]) -> None:
    """Write ``results.json``; scores of earlier runs of the same samples and reference stay.

    Some packages cannot live beside others: a second environment adds its scores to the first's.
    """
    earlier: dict[str, Any] = {}
    found = read_results(path)
    if all(found.get(key) == value for key, value in header.items()):
        earlier = {entry["row"]: entry for entry in found.get("rows", ())}
    for result in results:
        before = earlier.pop(result.row.name, None)
        if before is not None and before["samples"] == result.samples:
            result.measured = {**before["measured"], **result.measured}
    rows = [*earlier.values(), *(result.document() for result in results)]
    write_json(path, {**header, "rows": rows})


def list_tables() -> list[str]:
    """Lines of ``--list``: tables, what they need, and their rows."""
    lines: list[str] = []
    for table in tables().values():
        names = ", ".join(METRICS[m].label for m in table.metrics)
        lines += [
            f"{table.key}: {table.title}",
            f"  model: {table.model} ({', '.join(table.pipelines)}), w = {table.guidance_scale:g}",
            f"  data: {table.data}; metrics: {names}",
            "  rows:",
        ]
        for row in table.rows:
            lines.append(f"    {row.name:24} {row.label}, N = {row.num_steps}, NFE {row.nfe}")
        lines.append("")
    lines.append("metrics:")
    for name, metric in METRICS.items():
        needs = [*(f"pip install {d}" for d in metric.packages.values())]
        needs += [f"--weights {name}=PATH ({metric.weights})"] if metric.weights else []
        lines.append(f"  {name:16} {metric.label}: {'; '.join(needs) or 'needs nothing more'}")
    return lines
