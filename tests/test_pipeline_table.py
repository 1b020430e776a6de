"""docs/pipelines.json knows every pipeline class of the installed diffusers."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest

import zoo_all  # noqa: F401  (it fills the registry)
from scan_pipelines import exported
from thg_engine.integrations.diffusers.reasons import DISTILLED, REASONS, UNGUIDED
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
    compiled = {row["class"] for row in TABLE if row["tier"] in ("fused", "hook")}
    assert compiled == set(RECORDS), f"{compiled ^ set(RECORDS)}; {AGAIN}"
    for row in TABLE:
        assert set(row) == {"class", "pattern", "tier", "tested", "reason"}
        assert bool(row["reason"]) == (row["tier"] == "none"), row
        assert (row["tier"] == "guider") == (row["pattern"] == "guider"), row


def test_reasons_are_those_that_compile_gives() -> None:
    named = {row["class"]: row for row in TABLE if row["class"] in REASONS}
    assert set(named) == set(REASONS) and not set(REASONS) & set(RECORDS)
    for name, row in named.items():
        assert row["reason"] == REASONS[name]
    for pattern, reason in (("distilled", DISTILLED), ("none", UNGUIDED)):
        found = {row["class"] for row in TABLE if row["pattern"] == pattern}
        assert found == {name for name, said in REASONS.items() if said == reason}


def test_what_is_tested_is_in_the_zoo() -> None:
    tested = {row["class"] for row in TABLE if row["tested"]}
    assert tested <= {entry.cls for entry in ZOO.values()}, AGAIN
    ready = {entry.cls for entry in ZOO.values() if not entry.missing}
    assert ready & {row["class"] for row in TABLE} <= tested, AGAIN


@pytest.mark.parametrize("name", RECORDS)
def test_records_are_of_the_pattern_that_the_source_shows(name: str) -> None:
    (row,) = [row for row in TABLE if row["class"] == name]
    record = RECORDS[name]
    expected = {"concat-cond-first", "lists"} if record.cond_half == 0 else {"concat"}
    if record.calls:
        expected = {"two-calls"}
    elif record.branches > 2:
        expected = {"three-way"}
    assert row["pattern"] in expected
