"""What `bench_step_update` says about its rows: speed-ups, means, goals, table, plot, page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from step_cases import FUSED, PROVIDERS, VIDEO

Row = dict[str, Any]


def add_speedups(rows: Sequence[Row], refusal: str) -> None:
    """``speedup``: diffusers' median over the provider's, of the same case, size and dtype.

    None where ``refusal`` says that no speed-up may be stated.
    """
    base = {_key(row): row["ms_median"] for row in rows if row["provider"] == "diffusers"}
    for row in rows:
        known = not refusal and _key(row) in base
        row["speedup"] = base[_key(row)] / row["ms_median"] if known else None


def _key(row: Row) -> tuple[str, str, str]:
    return row["case"], row["size"], row["dtype"]


def summarise(rows: Sequence[Row]) -> list[Row]:
    """One line per dtype, size, kind of row and provider; means over schedulers are geometric."""
    lines: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        kind = row["case"].partition("/")[2]
        lines.setdefault((row["dtype"], row["size"], kind, row["provider"]), []).append(row)
    return [
        {
            **dict(zip(("dtype", "size", "kind", "provider"), key, strict=True)),
            "elements": group[0]["elements"],
            "ms": geometric_mean(row["ms_median"] for row in group),
            "gbps": geometric_mean(row["gbps"] for row in group),
            "of_copy": _of_copy(group),
            "speedup": _mean(row["speedup"] for row in group),
        }
        for key, group in lines.items()
    ]


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return geometric_mean(known) if known else None


def _of_copy(rows: Sequence[Row]) -> float:
    return geometric_mean(row["gbps"] / row["copy_gbps"] for row in rows)


def goals(rows: Sequence[Row], machine: dict[str, Any]) -> list[Row]:
    """The goals that this run can decide, each with its number."""
    found: list[Row] = []

    def state(goal: str, value: float, unit: str, reached: bool) -> None:
        found.append({"goal": goal, "value": value, "unit": unit, "reached": reached})

    hopper = any(name in machine["line"] for name in ("H100", "H200"))
    share = 0.9 if hopper else 0.8
    for provider, dtype in sorted({(row["provider"], row["dtype"]) for row in rows}):
        if provider not in FUSED:
            continue
        mine = [row for row in rows if (row["provider"], row["dtype"]) == (provider, dtype)]
        small = [row for row in mine if row["size"] == "sd15"]
        video = [row for row in mine if row["size"] in VIDEO]
        label = f"{provider} {dtype}"
        speedups = [row["speedup"] for row in small if row["speedup"] is not None]
        if provider == "cpu" and speedups:
            value = geometric_mean(speedups)
            state(f"{label}: SD 1.5 size >= 3 x diffusers", value, "x", value >= 3.0)
        if video:
            value = _of_copy(video)
            goal = f"{label}: video sizes >= {share:.0%} of copy"
            state(goal, 100 * value, "%", value >= share)
        if small and "launch_ms" in machine:
            over = 1e3 * (median(row["ms_median"] for row in small) - machine["launch_ms"])
            goal = f"{label}: SD 1.5 size <= a launch ({1e3 * machine['launch_ms']:.1f} us) + 1 us"
            state(goal, over, "us over a launch", over <= 1.0)
    return found


def print_report(result: dict[str, Any], console: Console) -> None:
    """Rows by size, then the summary, the goals, and what is missing and why."""
    console.print(result["machine"]["line"], highlight=False)
    for dtype, size in dict.fromkeys((row["dtype"], row["size"]) for row in result["rows"]):
        rows = [row for row in result["rows"] if (row["dtype"], row["size"]) == (dtype, size)]
        console.print(_table(f"{size} ({rows[0]['elements']:,} elements), {dtype}", rows, result))
    table = Table(title="geometric means over schedulers", title_justify="left", box=box.SIMPLE)
    for column in ("dtype", "size", "row", "provider", "ms", "GB/s", "% of copy"):
        table.add_column(column, justify="left" if column in ("row", "provider") else "right")
    if not result["refusal"]:
        table.add_column("speed-up", justify="right")
    for line in result["summary"]:
        table.add_row(*_cells(line))
    console.print(table)
    for goal in result["goals"]:
        word = "reached" if goal["reached"] else "MISSED"
        console.print(f"{word}: {goal['goal']}: {goal['value']:.3g} {goal['unit']}")
    for reason in result["left_out"]:
        console.print(f"left out: {reason}", highlight=False)
    if result["refusal"]:
        console.print(f"no speed-up is stated: {result['refusal']}", highlight=False)


def _cells(line: Row) -> list[str]:
    cells = [line[name] for name in ("dtype", "size", "kind", "provider")]
    cells += [f"{line['ms']:.4g}", f"{line['gbps']:.3g}", f"{100 * line['of_copy']:.0f}"]
    return cells + ([f"{line['speedup']:.2f}"] if line["speedup"] is not None else [])


def _table(title: str, rows: Sequence[Row], result: dict[str, Any]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    columns = ["case", "provider", "ms", "IQR", "launches", "GB/s", "copy GB/s"]
    energy = any(row["joules"] is not None for row in rows)
    columns += ["mJ"] * energy + ["speed-up"] * (not result["refusal"])
    for column in columns:
        table.add_column(column, justify="left" if column in ("case", "provider") else "right")
    for row in rows:
        cells = [row["case"], row["provider"], f"{row['ms_median']:.4g}", f"{row['ms_iqr']:.2g}"]
        cells += [f"{row['launches']:g}", f"{row['gbps']:.3g}", f"{row['copy_gbps']:.3g}"]
        if energy:
            cells.append("" if row["joules"] is None else f"{1e3 * row['joules']:.3g}")
        if not result["refusal"]:
            cells.append("" if row["speedup"] is None else f"{row['speedup']:.2f}")
        table.add_row(*cells)
    return table


def plot(result: dict[str, Any], path: Path) -> None:
    """Useful GB/s over elements: a panel per scheduler and dtype, a colour per provider."""
    from matplotlib.figure import Figure

    rows = result["rows"]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    schedulers = list(dict.fromkeys(row["case"].partition("/")[0] for row in rows))
    size = (3.4 * len(schedulers) + 1.2, 3.2 * len(dtypes) + 0.8)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(dtypes), len(schedulers), squeeze=False, sharey=True)
    for dtype, line in zip(dtypes, panels, strict=True):
        for scheduler, axes in zip(schedulers, line, strict=True):
            mine = [row for row in rows if row["dtype"] == dtype]
            _panel(axes, [row for row in mine if row["case"].startswith(f"{scheduler}/")])
            axes.set(title=f"{scheduler}, {dtype}", xlabel="latent elements", ylabel="useful GB/s")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize="small")
    figure.suptitle(f"one sampling step: {result['machine']['line']}", fontsize="x-small")
    figure.savefig(path, dpi=120)


def _panel(axes: Any, rows: Sequence[Row]) -> None:
    for kind, style in (("cfg", "-o"), ("thg-held", "--s")):
        mine = [row for row in rows if row["case"].endswith(kind)]
        for k, provider in enumerate(PROVIDERS):
            points = sorted((r["elements"], r["gbps"]) for r in mine if r["provider"] == provider)
            if points:
                label = f"{provider}, {kind}"
                axes.plot(*zip(*points, strict=True), style, ms=3, color=f"C{k}", label=label)
        points = sorted({(r["elements"], r["copy_gbps"]) for r in mine})
        if points:
            label = f"copy_, {kind}"
            axes.plot(*zip(*points, strict=True), style[:-1], color="0.5", label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.grid(alpha=0.3)


def markdown(result: dict[str, Any]) -> str:
    """Machine, summary and goals as a page."""
    lines = ["# `step_update`: one sampling step", "", result["machine"]["line"], ""]
    head = ["dtype", "size", "row", "provider", "ms", "GB/s", "% of copy"]
    head += ["speed-up"] * (not result["refusal"])
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for line in result["summary"]:
        lines.append("| " + " | ".join(_cells(line)) + " |")
    lines += [
        "",
        "Geometric means over schedulers; a held row replaces a CFG row of diffusers.",
        "",
    ]
    for goal in result["goals"]:
        word = "reached" if goal["reached"] else "missed"
        lines.append(f"- {goal['goal']}: {goal['value']:.3g} {goal['unit']}, {word}")
    lines += [f"- left out: {reason}" for reason in result["left_out"]]
    if result["refusal"]:
        lines.append(f"- no speed-up is stated: {result['refusal']}")
    return "\n".join(lines) + "\n"
