"""Work-precision curves as PNG: one figure per pipeline and scale, drawn from the rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .comparison import curves_of, groups

_PANELS = (
    ("nfe", "psnr_to_converged", "NFE per image", "PSNR to converged, dB"),
    ("seconds", "psnr_to_converged", "seconds per image", "PSNR to converged, dB"),
    ("nfe", "rel_error", "NFE per image", "relative error of latents"),
    ("seconds", "rel_error", "seconds per image", "relative error of latents"),
    ("nfe", "psnr_to_same_n", "NFE per image", "PSNR to the same-N image, dB"),
    ("seconds", "psnr_to_same_n", "seconds per image", "PSNR to the same-N image, dB"),
)
_BARS = {"psnr_to_converged": "ci95", "rel_error": "rel_error_ci95"}


def plot_rows(rows: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Draw every pipeline and scale of ``rows``; returns the files.

    Raises:
        ImportError: matplotlib is missing (``pip install thg-engine[metrics]``).
    """
    written = []
    for (pipeline, scale), some in groups(rows).items():
        path = folder / f"{pipeline}-w{scale:g}.png"
        _figure(some, f"{pipeline}, w = {scale:g}").savefig(path, dpi=110)
        written.append(path)
    return written


def _figure(rows: Sequence[dict[str, Any]], title: str) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 15), layout="constrained")
    axes = figure.subplots(3, 2).flatten()
    for axis, panel in zip(axes, _PANELS, strict=True):
        _draw(axis, rows, *panel)
    figure.suptitle(title)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    return figure


def _draw(axis: Any, rows: Sequence[dict[str, Any]], x: str, y: str, *labels: str) -> None:
    """One panel: full guidance dashed, other baselines thin, ours thick and on top."""
    for i, (name, points) in enumerate(curves_of(rows).items()):
        shown = [row for row in points if row[y] is not None]
        if not shown:
            continue
        ours, full = shown[0]["ours"], shown[0]["method"] == "CFG"
        shown.sort(key=lambda row: row[x])
        axis.errorbar(
            [row[x] for row in shown],
            [row[y] for row in shown],
            yerr=_bars(shown, y),
            label=name + (" (ours)" if ours else ""),
            color=f"C{i % 10}",
            linestyle="-" if ours else "--" if full else ":",
            linewidth=2.5 if ours else 1.0,
            marker="*" if ours else "osv^D"[i // 10 % 5],
            markersize=10 if ours else 4,
            zorder=3 if ours else 2,
            capsize=2,
        )
    axis.set(xlabel=labels[0], ylabel=labels[1], xscale="log")
    if y == "rel_error":
        axis.set_yscale("log")
    axis.grid(alpha=0.3)


def _bars(rows: Sequence[dict[str, Any]], y: str) -> list[list[float]] | None:
    """Distances from the mean down and up to the interval; None where there is no interval."""
    column = _BARS.get(y)
    if column is None or any(row[column] is None for row in rows):
        return None
    low = [row[y] - row[column][0] for row in rows]
    if y == "rel_error":  # an interval over few seeds may reach below zero; the axis is a log
        low = [min(gap, 0.99 * row[y]) for gap, row in zip(low, rows, strict=True)]
    return [low, [row[column][1] - row[y] for row in rows]]
