"""The tables of an evaluation for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from .comparison import groups

if TYPE_CHECKING:
    from rich.table import Table


def tables(document: dict[str, Any]) -> Iterator[Table]:
    """Work-precision rows, the comparison, then quality, a table per pipeline and scale."""
    for title, some in _titled(document["rows"]):
        yield _curves_table(title, some)
    for title, some in _titled(document["comparison"]):
        yield _comparison_table(title, [row for row in some if row["cost"] == "seconds"])
    for title, some in _titled(document["quality"]):
        yield _quality_table(title, some)


def _titled(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for (pipeline, scale), some in groups(rows).items():
        yield f"{pipeline}, w = {scale:g}", some


def _table(title: str, heads: Sequence[str]) -> Table:
    from rich.table import Table

    table = Table(title=title)
    for i, head in enumerate(heads):
        table.add_column(head, justify="left" if i < 2 else "right", no_wrap=i < 2)
    return table


def _label(row: dict[str, Any]) -> str:
    """The method, and the budget of one that chooses its own steps."""
    budget = row["budget"]
    return str(row["method"]) if budget is None else f"{row['method']}, {budget} NFE"


def _curves_table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    """By NFE, so that what costs the same stands together."""
    heads = ("method", "solver", "N", "NFE", "s/image", "PSNR to converged", "95 %", "to same N")
    table = _table(f"{title}, c2 = {rows[0]['c2']:.2f}", (*heads, "rel. error"))
    for row in sorted(rows, key=lambda row: (row["nfe"], -row["psnr_to_converged"])):
        interval = row["ci95"]
        same_n = row["psnr_to_same_n"]
        table.add_row(
            _label(row) + (" *" if row["ours"] else ""),
            row["solver"],
            str(row["num_steps"]),
            f"{row['nfe']:.4g}",
            f"{row['seconds']:.4f}",
            f"{row['psnr_to_converged']:.1f} dB",
            "-" if interval is None else f"{interval[0]:.1f} to {interval[1]:.1f}",
            "-" if same_n is None else f"{same_n:.1f} dB",
            f"{100 * row['rel_error']:.2f} %",
            style="bold" if row["ours"] else "",
        )
    return table


def _comparison_table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    """What is proposed here, against the best baseline at equal time and at equal error."""
    heads = (
        "proposed here",
        "solver",
        "N",
        "s/image",
        "PSNR",
        "lead",
        "best baseline in that time",
    )
    table = _table(f"{title}: against the best baseline", (*heads, "time of", "the same PSNR by"))
    for row in rows:
        share, lead = row["share"], row["lead"]
        table.add_row(
            _label(row),
            row["solver"],
            str(row["num_steps"]),
            f"{row['value']:.4f}",
            f"{row['psnr']:.1f} dB",
            "-" if lead is None else f"{lead:+.1f} dB",
            row["baseline"] or "none is as fast",
            "-" if share is None else f"{share:.2f} x",
            row["equal"] or "none measured does",
            style="bold" if lead is not None and _beyond(row) else "",
        )
    return table


def _beyond(row: dict[str, Any]) -> bool:
    """Whether the whole interval of ours lies above the baseline."""
    low = row["psnr"] if row["ci95"] is None else row["ci95"][0]
    return bool(low > row["baseline_psnr"])


def _quality_table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    first = rows[0]
    floors = f"Frechet {first['frechet_floor']:.2f}, kernel {first['kernel_floor']:.4f}"
    about = f"{title}: {first['images']} images against {first['reference']}; floor: {floors}"
    heads = ("method", "solver", "N", "NFE", "class acc.", "attribute acc.", "Frechet", "kernel")
    table = _table(about, heads)
    for row in rows:
        table.add_row(
            _label(row) + (" *" if row["ours"] else ""),
            row["solver"],
            str(row["num_steps"]),
            f"{row['nfe']:.4g}",
            f"{100 * row['class_accuracy']:.1f} %",
            f"{100 * row['attribute_accuracy']:.1f} %",
            f"{row['frechet']:.2f}",
            f"{row['kernel']:.4f}",
            style="bold" if row["ours"] else "",
        )
    return table
