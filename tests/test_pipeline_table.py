"""docs/pipelines.json knows every pipeline class of the installed diffusers."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest

import zoo_all  # noqa: F401  (it fills the registry)
from scan_pipelines import exported
from thg_engine.integrations.diffusers.records import RECORDS
from zoo import ZOO

TABLE = json.loads(
    (Path(__file__).resolve().parents[1] / "docs" / "pipelines.json").read_text(encoding="utf-8")
)
AGAIN = "run tests/pipeline_report.py"


def test_every_class_is_in_the_table() -> None:
    """Those of the installed diffusers; an older one may lack some of the table."""
    modular = {n for n in dir(diffusers) if n.endswith("ModularPipeline")}
    blocks = {n for n in modular if getattr(getattr(diffusers, n), "default_blocks_name", None)}
    missing = ({*exported()} | blocks) - {row["class"] for row in TABLE}
    assert not missing, f"{sorted(missing)}; {AGAIN}"


def test_tiers_are_those_of_the_records() -> None:
    compiled = {row["class"] for row in TABLE if row["tier"] != "none"}
    assert compiled == set(RECORDS), f"{compiled ^ set(RECORDS)}; {AGAIN}"
    for row in TABLE:
        assert set(row) == {"class", "pattern", "tier", "tested", "reason"}
        assert bool(row["reason"]) == (row["tier"] == "none"), row


def test_what_is_tested_is_in_the_zoo() -> None:
    tested = {row["class"] for row in TABLE if row["tested"]}
    assert tested <= {entry.cls for entry in ZOO.values()}, AGAIN
    ready = {entry.cls for entry in ZOO.values() if not entry.missing}
    assert ready & {row["class"] for row in TABLE} <= tested, AGAIN


@pytest.mark.parametrize("name", RECORDS)
def test_records_are_of_one_call_with_two_halves(name: str) -> None:
    (row,) = [row for row in TABLE if row["class"] == name]
    halves = "concat-cond-first" if RECORDS[name].cond_half == 0 else "concat"
    assert row["pattern"] == halves
