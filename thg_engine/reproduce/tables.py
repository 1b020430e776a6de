"""The published tables as data: settings, cost and scores, read from ``thg_engine/data``.

Source: Tortoise and Hare Guidance, arXiv 2511.04117. The tables carry names, not the paper's
numbers for them: a name says what a table compares. A score that is not known is absent.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InvalidArgument
from ..published import DATA


@dataclass(frozen=True)
class Row:
    """One published setting and its scores.

    Attributes:
        name: key within its table, also the folder of its samples.
        label: as printed.
        solver: key of `methods.SOLVERS`.
        num_steps: N.
        method: key of `methods.register_guidance`.
        options: what the method is made with.
        nfe: published evaluations per sample.
        published: metric -> published score; a metric without one is absent.
        note: in which respect the setting is ours, "" if it is published whole.
    """

    name: str
    label: str
    solver: str
    num_steps: int
    method: str
    options: Mapping[str, Any]
    nfe: int
    published: Mapping[str, float]
    note: str = ""


@dataclass(frozen=True)
class Table:
    """One published table.

    Attributes:
        key, title: its name here, and what it compares.
        model: key of the model, as in `published.published`.
        pipelines: classes of diffusers that can hold the model.
        modality: "image" or "audio".
        count: published number of samples.
        guidance_scale: w.
        data: prompts and reference, in words.
        metrics: scored.
        rows: in the published order.
        psnr_to: the row that PSNR is measured to, "" for none.
    """

    key: str
    title: str
    model: str
    pipelines: tuple[str, ...]
    modality: str
    count: int
    guidance_scale: float
    data: str
    metrics: tuple[str, ...]
    rows: tuple[Row, ...]
    psnr_to: str = ""

    def select(self, names: Sequence[str] | None) -> tuple[Row, ...]:
        """The rows called ``names``, in the table's order; all for None.

        Raises:
            InvalidArgument: there is no such row, or none was named.
        """
        known = [row.name for row in self.rows]
        for name in known if names is None else names:
            if name not in known:
                remedy = f"table {self.key} has {', '.join(known)}."
                raise InvalidArgument("--rows", name, remedy)
        if names is not None and not names:
            raise InvalidArgument("--rows", "", f"name some of {', '.join(known)}.")
        return tuple(row for row in self.rows if names is None or row.name in names)


@functools.cache
def tables() -> dict[str, Table]:
    """Every published table by its key."""
    document = json.loads((DATA / "tables.json").read_text(encoding="utf-8"))
    return {key: _table(key, entry) for key, entry in document["tables"].items()}


def table(key: str) -> Table:
    """The table called ``key``; `InvalidArgument` lists the keys there are."""
    if key not in tables():
        remedy = f"use one of {', '.join(tables())}; --list shows what they hold."
        raise InvalidArgument("TABLE", key, remedy)
    return tables()[key]


def _table(key: str, entry: dict[str, Any]) -> Table:
    rows = tuple(Row(**row) for row in entry["rows"])
    lists = {name: tuple(entry[name]) for name in ("pipelines", "metrics")}
    return Table(**{**entry, **lists, "key": key, "rows": rows})
