"""``evaluate.json``: what is measured so far, kept after every step so that a run can go on.

A folder belongs to one set of settings, weights included: measurements of others are refused, not
mixed. Seconds are comparable within one run; rows of a run that went on say so by two entries
under ``runs``.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InvalidArgument
from .comparison import comparison
from .methods import Method
from .metrics import interval95

FORMAT, VERSION = "thg-engine/evaluation", 2
SAVE_EVERY = 5.0
"""Seconds between two writes of the file while measurements come in."""


@dataclass
class Store:
    """Measurements by pipeline.

    Attributes:
        path: of ``evaluate.json``.
        settings: what is evaluated; must equal those of a file that is there.
        about: machine, versions; kept of every run.
    """

    path: Path
    settings: dict[str, Any]
    about: dict[str, Any]
    document: dict[str, Any] = field(init=False)
    _saved: float = 0.0

    def __post_init__(self) -> None:
        self.document = self._read() if self.path.exists() else self._fresh()
        self.document["runs"].append(self.about)

    def _fresh(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "settings": self.settings,
            "runs": [],
            "notes": [],
            "pipelines": {},
            "rows": [],
            "comparison": [],
            "quality": [],
        }

    def _read(self) -> dict[str, Any]:
        try:
            document: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
            found = document["format"], document["version"]
            known = found == (FORMAT, VERSION) and set(self._fresh()) <= set(document)
        except (OSError, ValueError, KeyError, TypeError) as error:
            remedy = f"evaluate.json in it cannot be read ({error!r}); give another folder."
            raise InvalidArgument("--out", str(self.path.parent), remedy) from error
        if not known:
            remedy = "evaluate.json in it is of another format; give another folder."
            raise InvalidArgument("--out", str(self.path.parent), remedy)
        theirs = document["settings"]
        for name in sorted({*self.settings, *theirs}):
            if self.settings.get(name) != theirs.get(name):
                remedy = (
                    f"it holds an evaluation with {name}={theirs.get(name)!r}, this one has "
                    f"{self.settings.get(name)!r}; give another folder."
                )
                raise InvalidArgument("--out", str(self.path.parent), remedy)
        return document

    def part(self, pipeline: str, weights: str) -> dict[str, Any]:
        """What is stored of a pipeline; refuses measurements of other weights."""
        empty: dict[str, Any] = {"catalogues": {}, "measurements": [], "quality": [], "c2": {}}
        part: dict[str, Any] = self.document["pipelines"].setdefault(
            pipeline, {"weights": weights, **empty}
        )
        if part["weights"] != weights:
            remedy = f"it holds an evaluation of another {pipeline!r}; give another folder."
            raise InvalidArgument("--out", str(self.path.parent), remedy)
        return part

    def note(self, text: str) -> None:
        """Record what was left out, once."""
        if text not in self.document["notes"]:
            self.document["notes"].append(text)

    def save(self, force: bool = False) -> None:
        """Write the file with its rows brought up to date; atomically, and not too often."""
        if not force and time.monotonic() - self._saved < SAVE_EVERY:
            return
        parts = self.document["pipelines"].items()
        count = self.settings["seeds"]
        self.document["rows"] = [row for name, part in parts for row in rows_of(name, part, count)]
        if force:
            self.document["comparison"] = comparison(self.document["rows"])
        self.document["quality"] = [row for name, part in parts for row in quality_of(name, part)]
        partial = self.path.with_suffix(".partial")
        text = json.dumps(self.document, indent=1, allow_nan=False)
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(self.path)
        self._saved = time.monotonic()


def catalogue(methods: Sequence[Method]) -> list[dict[str, Any]]:
    """The methods as the file lists them."""
    return [
        {
            "key": method.key,
            "method": method.name,
            "solver": method.solver,
            "num_steps": method.num_steps,
            "ours": method.ours,
            "budget": method.budget,
        }
        for method in methods
    ]


def rows_of(pipeline: str, part: dict[str, Any], seeds: int) -> list[dict[str, Any]]:
    """A row per method and scale of which every seed is measured."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one in part["measurements"]:
        found.setdefault((f"{one['scale']:g}", one["key"]), []).append(one)
    rows = []
    for scale, entries in part["catalogues"].items():
        for entry in entries:
            several = found.get((scale, entry["key"]), [])
            if len(several) == seeds:
                c2 = part["c2"].get(scale)
                rows.append({"pipeline": pipeline, **_row(entry, several, float(scale), c2)})
    return rows


def _row(
    entry: dict[str, Any], several: list[dict[str, Any]], scale: float, c2: float | None
) -> dict[str, Any]:
    def mean(name: str) -> float | None:
        values = [one[name] for one in several]
        return None if None in values else statistics.fmean(values)

    converged = [one["psnr_to_converged"] for one in several]
    return {
        "method": entry["method"],
        "solver": entry["solver"],
        "ours": entry["ours"],
        "guidance_scale": scale,
        "num_steps": entry["num_steps"],
        "budget": entry["budget"],
        "nfe": mean("nfe"),
        "seconds": statistics.median(one["seconds"] for one in several),
        "c2": c2,
        "psnr_to_converged": mean("psnr_to_converged"),
        "psnr_to_same_n": mean("psnr_to_same_n"),
        "rel_error": mean("rel_error"),
        "ci95": interval95(converged),
        "rel_error_ci95": interval95([one["rel_error"] for one in several]),
        "seeds": len(several),
    }


def quality_of(pipeline: str, part: dict[str, Any]) -> list[dict[str, Any]]:
    """Quality rows with the method's columns in the place of its key."""
    rows = []
    for one in part["quality"]:
        rest = {k: v for k, v in one.items() if k not in ("key", "scale", "entry")}
        entry = {k: v for k, v in one["entry"].items() if k != "key"}
        rows.append({"pipeline": pipeline, **entry, "guidance_scale": one["scale"], **rest})
    return rows
