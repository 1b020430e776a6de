"""Grids and calibrations that ship with the package, read from ``thg_engine/data``.

Sources: Tortoise and Hare Guidance, arXiv 2511.04117, appendix (published grids);
the calibration of the boxed pipeline was measured by ``thg-engine calibrate``.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from .curves import Calibration
from .errors import InvalidArgument
from .grid import MappedGrid

DATA = resources.files(__package__) / "data"


@dataclass(frozen=True)
class PublishedGrid:
    """One published setting.

    Attributes:
        model, solver: as the paper names them.
        num_steps, guidance_scale, rho, boost: the setting.
        cutoff: i_hi as a share of the steps.
        nfe: evaluations per sample that the paper's setting costs.
        grid: the coarse points and the fine grid they refer to.
    """

    model: str
    solver: str
    num_steps: int
    guidance_scale: float
    rho: float
    boost: float
    cutoff: float
    grid: MappedGrid

    @property
    def nfe(self) -> int:
        """Evaluations per sample on the published fine grid, cut-off applied."""
        limit = round(self.cutoff * self.num_steps)
        return self.num_steps + sum(i < limit for i in self.grid.indices)


@functools.cache
def _document() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((DATA / "published.json").read_text(encoding="utf-8"))
    return loaded


def published_models() -> tuple[str, ...]:
    """Keys of the models whose grids the paper publishes."""
    return tuple(_document()["models"])


def published(model: str, rho: float | None = None) -> PublishedGrid:
    """A published setting.

    Args:
        model: key from `published_models`, e.g. "stable-diffusion-1.5".
        rho: error ratio; the paper's main setting if None.
    Raises:
        InvalidArgument: no such model or rho.
    """
    models = _document()["models"]
    if model not in models:
        raise InvalidArgument("model", model, f"use one of {', '.join(models)}.")
    entry = models[model]
    number = entry["rho"] if rho is None else rho
    key = f"{number:g}" if isinstance(number, (int, float)) else str(number)
    if key not in entry["grids"]:
        raise InvalidArgument("rho", rho, f"published are {', '.join(entry['grids'])}.")
    grid = MappedGrid(tuple(entry["grids"][key]), tuple(entry["lambdas"]), entry["cutoff"])
    names = ("solver", "num_steps", "guidance_scale", "boost")
    values = {name: entry[name] for name in names}
    share = entry["cutoff"] / entry["num_steps"]
    return PublishedGrid(model=model, rho=float(key), cutoff=share, grid=grid, **values)


def published_grid(config: Mapping[str, Any]) -> PublishedGrid | None:
    """The main setting of the model whose architecture ``config`` shows; None if there is none."""
    for model, entry in _document()["models"].items():
        wanted = entry["architecture"]
        if all(_plain(config.get(key)) == value for key, value in wanted.items()):
            return published(model)
    return None


@functools.cache
def shipped_calibrations() -> tuple[Calibration, ...]:
    """Every calibration in the package."""
    files = sorted(entry.name for entry in DATA.iterdir() if entry.name.startswith("calibration-"))
    return tuple(
        Calibration.from_document(json.loads((DATA / name).read_text(encoding="utf-8")), name)
        for name in files
    )


def shipped_calibration(fingerprint: str) -> Calibration | None:
    """The shipped calibration of the architecture with this fingerprint, if there is one."""
    return next((c for c in shipped_calibrations() if c.fingerprint == fingerprint), None)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
