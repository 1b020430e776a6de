"""What the GPU suite says about its parts: goals, faults, tables for the terminal and the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gpu_curve import BATCHES, MODES
from gpu_graphs import SLACK
from gpu_models import SPECS
from gpu_runs import ENGINE, ENGINE_COMPILED, ENGINE_THG, STOCK, STOCK_COMPILED
from rich import box
from rich.console import Console
from rich.table import Table

Found = dict[str, Any]
REQUIRED = (STOCK, STOCK_COMPILED, ENGINE, ENGINE_THG, ENGINE_COMPILED)
NEEDS_GPU = "needs a GPU"
COMPILED_MODELS = ("sdxl", "sd35")


def part(found: Found, name: str) -> Found:
    """The result of a part; {} if it is missing or has failed."""
    result = found["parts"].get(name, {})
    return {} if result.get("failure") else result


def why_missing(found: Found, name: str) -> str:
    """Why there is no result of a part."""
    result = found["parts"].get(name)
    return "has not run" if result is None else result.get("failure", "")


def way(found: Found, model: str, name: str) -> Found:
    """The row of one way to make an image; {} if there is none."""
    rows = part(found, f"{model}/runs").get("rows", [])
    return next((row for row in rows if row["way"] == name), {})


@dataclass(frozen=True)
class Goal:
    """A goal, where its number comes from, and its bound.

    Attributes:
        source: the part that measures it.
        read: the number in the unit of the bound; None if it was not measured.
    """

    text: str
    source: str
    read: Callable[[Found], float | None]
    bound: float
    unit: str
    at_most: bool = False


def _non_denoiser(model: str) -> Callable[[Found], float | None]:
    def read(found: Found) -> float | None:
        share = way(found, model, ENGINE_THG).get("denoiser_share")
        return None if share is None else 100 * (1 - share)

    return read


def _field(name: str, field: str, scale: float = 1.0) -> Callable[[Found], float | None]:
    def read(found: Found) -> float | None:
        value = part(found, name).get(field)
        return None if value is None else scale * value

    return read


def _clean(tool: str) -> Callable[[Found], float | None]:
    def read(found: Found) -> float | None:
        clean = part(found, "sanitizer").get("tools", {}).get(tool, {}).get("clean")
        return None if clean is None else float(not clean)

    return read


def _failed_tests(found: Found) -> float | None:
    tests = part(found, "tests")
    return float(len(tests["failed"])) if tests.get("ran") else None


def _growth(found: Found) -> float | None:
    growth = part(found, "cycles").get("growth_bytes", {})
    return growth["device"] / 2**20 if "device" in growth else None


def all_goals() -> list[Goal]:
    """The goals of the GPU work, in the order of the report."""
    found = []
    for name, spec in SPECS.items():
        text = f"{spec.title}: time outside the denoiser, engine THG"
        found.append(Goal(text, f"{name}/runs", _non_denoiser(name), 1.0, "% of the loop", True))
    for name, spec in SPECS.items():
        text, source = f"{spec.title}: THG over CFG on the engine, of the ideal", f"{name}/runs"
        found.append(Goal(text, source, _field(source, "of_ideal", 100.0), 98.0, "%"))
    for name in COMPILED_MODELS:
        text = f"{SPECS[name].title}: engine THG + compile over diffusers + torch.compile"
        source = f"{name}/runs"
        read = _field(source, "compiled_over_stock_compiled")
        found.append(Goal(text, source, read, 1.35, "x"))
    text = f"{SPECS['sd15'].title}: capture"
    found.append(Goal(text, "sd15/graphs", _field("sd15/graphs", "capture_s"), 2.0, "s", True))
    for name, spec in SPECS.items():
        source = f"{name}/graphs"
        text = f"{spec.title}: host syncs in the steady loop"
        found.append(Goal(text, source, _field(source, "host_syncs"), 0.0, "", True))
    text = "growth of device memory over flush and capture cycles"
    found.append(Goal(text, "cycles", _growth, SLACK / 2**20, "MiB", True))
    found.append(Goal("failed tests on the GPU", "tests", _failed_tests, 0.0, "", True))
    for tool in ("memcheck", "racecheck"):
        text = f"compute-sanitizer {tool}: faults"
        found.append(Goal(text, "sanitizer", _clean(tool), 0.0, "", True))
    return found


def goals(found: Found) -> list[Found]:
    """Each goal with its number and verdict; figures of a CPU decide nothing."""
    lines = []
    for goal in all_goals():
        value = goal.read(found) if found["device"] != "cpu" else None
        line = {"goal": goal.text, "value": value, "bound": goal.bound, "unit": goal.unit}
        line["sense"] = "<=" if goal.at_most else ">="
        if found["device"] == "cpu":
            line["verdict"] = NEEDS_GPU
        elif value is None:
            reason = why_missing(found, goal.source) or _why_none(found, goal)
            line["verdict"] = f"not measured: {reason}"
        elif value <= goal.bound if goal.at_most else value >= goal.bound:
            line["verdict"] = "reached"
        else:
            line["verdict"] = f"missed by {abs(value - goal.bound):.3g} {goal.unit}".rstrip()
        lines.append(line)
    return lines


def _why_none(found: Found, goal: Goal) -> str:
    """The reason that stands in the part itself."""
    result = part(found, goal.source)
    if goal.source == "sanitizer":
        reasons = (t["reason"] for name, t in result["tools"].items() if name in goal.text)
        return next(reasons, "")
    for field in ("refusal", "reason", "sync_reason", "skip_reason"):
        if result.get(field):
            return str(result[field])
    rows = result.get("rows", [])
    return "; ".join(row["reason"] for row in rows if row["way"] in REQUIRED and row["reason"])


def faults(found: Found) -> list[str]:
    """What must not be: parts that failed, tests that are red, ways that do not run or disagree."""
    said = [f"{name}: {p['failure']}" for name, p in found["parts"].items() if p.get("failure")]
    said += [f"test failed: {name}" for name in part(found, "tests").get("failed", [])]
    for tool, result in part(found, "sanitizer").get("tools", {}).items():
        said += [f"{tool}: {result['reason']}"] if result["clean"] is False else []
    refusal = part(found, "kernels").get("refusal")
    said += [f"kernels: {refusal}"] if refusal and found["device"] != "cpu" else []
    for model in SPECS:
        runs = part(found, f"{model}/runs")
        said += [f"{model}: {runs['refusal']}"] if runs.get("refusal") else []
        for row in runs.get("rows", []):
            if row["way"] in REQUIRED and row["reason"]:
                said.append(f"{model}, {row['way']}: {row['reason']}")
        if part(found, f"{model}/graphs").get("host_syncs"):
            said.append(f"{model}: {part(found, f'{model}/graphs')['sync_reason']}")
    if part(found, "cycles").get("same_result") is False:
        said.append("cycles: the result differs after a flush")
    return said


@dataclass(frozen=True)
class Sheet:
    """A table of strings; the first ``text`` columns are words, the rest numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: int = 2

    def rich(self) -> Table:
        """For a terminal."""
        table = Table(title=self.title, title_justify="left", box=box.SIMPLE)
        for k, column in enumerate(self.columns):
            table.add_column(column, justify="left" if k < self.text else "right")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> list[str]:
        """For a page."""
        lines = [f"## {self.title}", "", "| " + " | ".join(self.columns) + " |"]
        lines += ["|" + "---|" * self.text + "---:|" * (len(self.columns) - self.text)]
        return [*lines, *("| " + " | ".join(row) + " |" for row in self.rows), ""]


def cell(value: float | None, form: str = ".4g", scale: float = 1) -> str:
    """A number; "-" where there is none."""
    return "-" if value is None else format(scale * value, form)


def curve_sheet(found: Found) -> Sheet:
    """Milliseconds of the denoiser by batch."""
    rows = []
    for model in SPECS:
        result = part(found, f"{model}/curve")
        for mode in MODES if result else ():
            points = {p["batch"]: p["ms"] for p in result["points"] if p["mode"] == mode}
            row = [model, mode, *(cell(points[batch]) for batch in BATCHES)]
            rows.append([*row, cell(result["c2"][mode], ".2f")])
    columns = ["model", "denoiser", *(f"batch {batch}, ms" for batch in BATCHES), "c2"]
    return Sheet("c2 curve", columns, rows)


def runs_sheet(found: Found) -> Sheet:
    """Whole runs, one line per model and way."""
    columns = [
        "model",
        "way",
        "mode",
        "steps",
        "NFE",
        "wall s",
        "GPU s",
        "denoiser",
        "host ms/step",
    ]
    columns += ["J", "peak GiB", "to diffusers", "speed-up"]
    rows = []
    for model in SPECS:
        base = way(found, model, STOCK).get("seconds")
        refused = part(found, f"{model}/runs").get("refusal")
        for row in part(found, f"{model}/runs").get("rows", []):
            known = base and row["seconds"] and not refused
            cells = [model, row["way"], row["mode"], str(row["rows"]), cell(row["nfe"], "d")]
            cells += [cell(row["wall_s"], ".3f"), cell(row["gpu_s"], ".3f")]
            cells += [cell(row["denoiser_share"], ".1%"), cell(row["host_ms_per_step"], ".2f")]
            cells += [cell(row["joules"], ".0f"), cell(row["peak_bytes"], ".1f", 2**-30)]
            cells += [cell(row["difference"], ".1e")]
            cells += [f"{base / row['seconds']:.2f}x" if known else "-"]
            rows.append(cells)
    return Sheet("whole runs", columns, rows, text=3)


def graphs_sheet(found: Found) -> Sheet:
    """What graphs cost, and the ideal speed-up beside the measured one."""
    columns = ["model", "capture s", "pool MiB", "to eager", "host syncs", "h", "c2"]
    columns += ["ideal", "measured", "of ideal"]
    rows = []
    for model in SPECS:
        graphs, runs = part(found, f"{model}/graphs"), part(found, f"{model}/runs")
        cells = [model, cell(graphs.get("capture_s"), ".2f")]
        cells += [cell(graphs.get("pool_bytes"), ".0f", 2**-20)]
        cells += [cell(graphs.get("difference"), ".1e"), cell(graphs.get("host_syncs"), "d")]
        cells += [cell(runs.get(name), ".2f") for name in ("h", "c2", "ideal", "measured")]
        rows.append([*cells, cell(runs.get("of_ideal"), ".1%")])
    return Sheet("graphs and speed-ups", columns, rows, text=1)


def kernels_sheet(found: Found) -> Sheet:
    """The fused step, means over schedulers, as `bench_step_update` gives them."""
    result = part(found, "kernels")
    rows = []
    for line in result.get("summary", []):
        cells = [line["provider"], line["size"], line["kind"], line["dtype"], cell(line["ms"])]
        cells += [cell(line["gbps"], ".3g"), cell(line["of_copy"], ".0%")]
        rows.append([*cells, cell(line["speedup"], ".2f")])
    columns = ["provider", "size", "row", "dtype", "ms", "GB/s", "of copy", "speed-up"]
    return Sheet(f"one step, launch {cell(result.get('launch_ms'))} ms", columns, rows, text=4)


def goals_sheet(found: Found) -> Sheet:
    """Goals and verdicts."""
    rows = [
        [
            line["goal"],
            f"{line['sense']} {line['bound']:g} {line['unit']}".rstrip(),
            line["verdict"],
            cell(line["value"]),
        ]
        for line in found["goals"]
    ]
    return Sheet("goals", ["goal", "bound", "verdict", "measured"], rows, text=3)


def parts_sheet(found: Found) -> Sheet:
    """Seconds of every part."""
    parts = found["parts"].items()
    rows = [[name, p["failure"] or "done", f"{p['seconds']:.1f}"] for name, p in parts]
    total = sum(p["seconds"] for _, p in parts)
    return Sheet("parts", ["part", "state", "s"], [*rows, ["all", "", f"{total:.0f}"]])


def notes(found: Found) -> list[str]:
    """What no table holds: verdicts in words, and the reason of everything that is missing."""
    said = []
    tests = part(found, "tests")
    if tests:
        text = f"tests on the GPU: {tests['ran']} ran, {len(tests['failed'])} failed"
        skipped = f", {tests['skipped']} skipped ({tests['skip_reason']})"
        said.append(text + (skipped if tests["skipped"] else ""))
    for tool, result in part(found, "sanitizer").get("tools", {}).items():
        said.append(f"compute-sanitizer {tool}: {result['reason'] or result.get('summary')}")
    kernels = part(found, "kernels")
    said += [f"kernels: {line['goal']}: {line['value']:.3g}" for line in kernels.get("goals", [])]
    said += [f"kernels: no speed-up: {kernels['refusal']}"] if kernels.get("refusal") else []
    for model in SPECS:
        said += _model_notes(found, model)
    cycles = part(found, "cycles")
    if cycles:
        growth = ", ".join(f"{k} {v / 2**20:.2f} MiB" for k, v in cycles["growth_bytes"].items())
        text = f"{cycles['cycles']} flush and capture cycles: growth {growth}"
        said.append(text + (f" ({cycles['reason']})" if cycles["reason"] else ""))
    cold = part(found, "cold_start")
    if cold:
        text = "cold start of SD 1.5: imports {imports_s:.1f} s, model {model_s:.1f} s,"
        text += " first image {first_image_s:.1f} s, the next in {second_image_s:.2f} s"
        said.append(text.format(**cold))
    return said


def _model_notes(found: Found, model: str) -> list[str]:
    curve, runs = part(found, f"{model}/curve"), part(found, f"{model}/runs")
    graphs = part(found, f"{model}/graphs")
    points = curve.get("points", [])
    missing: dict[tuple[str, str], list[str]] = {}
    for point in points:
        if point["ms"] is None:
            missing.setdefault((point["reason"], point["mode"]), []).append(str(point["batch"]))
    said = [
        f"{model}, denoiser {mode}, batch {', '.join(batches)}: {reason}"
        for (reason, mode), batches in missing.items()
    ]
    said += [f"{model}, {r['way']}: {r['reason']}" for r in runs.get("rows", []) if r["reason"]]
    if runs and runs["steps"] != runs["full_steps"]:
        said.append(f"{model}: {runs['steps']} steps are timed of the usual {runs['full_steps']}")
    said += [f"{model}: no speed-up: {runs['refusal']}"] if runs.get("refusal") else []
    said += [f"{model}, graphs: {graphs['reason']}"] if graphs.get("reason") else []
    for row in runs.get("rows", []) if found["device"] != "cpu" else ():
        if "graphed" not in row["mode"] and row["graphs"].get("refusals"):
            said.append(f"{model}, {row['way']}: no graphs: {'; '.join(row['graphs']['refusals'])}")
    return said


def headline(found: Found) -> list[str]:
    """The machine, and what a smoke run is not."""
    lines = [found["machine"]["line"]]
    if found["smoke"]:
        lines.append("SMOKE: tiny models; these figures say that the suite runs, nothing else")
    return lines


def print_report(found: Found, console: Console) -> None:
    """Runs, graphs, notes, faults; the goals last."""
    for line in headline(found):
        console.print(line, highlight=False)
    for sheet in (curve_sheet, runs_sheet, graphs_sheet):
        console.print(sheet(found).rich())
    for note in notes(found):
        console.print(note, highlight=False, markup=False)
    for fault in faults(found):
        console.print(f"FAULT: {fault}", style="red", highlight=False, markup=False)
    console.print(goals_sheet(found).rich())


def markdown(found: Found) -> str:
    """Everything as a page."""
    title = "GPU suite, smoke run" if found["smoke"] else "GPU suite"
    lines = [f"# {title}", "", *(f"{line}  " for line in headline(found)), ""]
    lines += ["How it is measured: `benchmarks/gpu_suite.py`, `gpu_timing.py`.", ""]
    for sheet in (goals_sheet, runs_sheet, graphs_sheet, curve_sheet, kernels_sheet, parts_sheet):
        lines += sheet(found).markdown()
    lines += ["## Notes", "", *(f"- {note}" for note in notes(found))]
    lines += [f"- **fault**: {fault}" for fault in faults(found)]
    return "\n".join(lines) + "\n"
