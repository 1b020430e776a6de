"""Writes docs/pipelines.json and docs/pipelines.md.

``PYTHONPATH=.:kernels:tests python tests/pipeline_report.py``; some minutes.

Pattern: read from the source of every pipeline class (`scan_pipelines`). Tier: what a compiled
pipeline of the zoo reached when it ran with a held delta. `test_pipeline_table.py` holds the table
to the installed diffusers, to the records and to the zoo.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from pathlib import Path

import diffusers

import thg_engine
import zoo_all  # noqa: F401  (it fills the registry)
from scan_pipelines import scan
from thg_engine.integrations.diffusers.reasons import REASONS
from thg_engine.integrations.diffusers.records import RECORDS
from zoo import ZOO, Zoo, arguments, build

DOCS = Path(__file__).resolve().parents[1] / "docs"
NO_RECORD = "no adapter record yet"
HEAD = """# Pipelines

Every pipeline class of diffusers {version}, the pattern of its guidance, and what
`thg_engine.compile` makes of it. Written by `tests/pipeline_report.py`;
`tests/test_pipeline_table.py` fails when diffusers exports a class that is not here, or when a
record or a test comes or goes.

- **pattern** of guidance: `concat` and `concat-cond-first`, one call with both branches in the
  batch; `lists`, the same in Python lists; `two-calls`, one call per branch; `guider`, a guider
  makes the batches; `three-way`, further branches; `distilled`, none.
- **tier** `fused`: the conditional branch alone on most steps, and `scheduler.step` as one launch.
  `hook`: the conditional branch alone; the scheduler steps itself. `guider`: the same with a
  `TortoiseHareGuidance` in the place of a `ClassifierFreeGuidance`; other guiders stay, and the
  report says so ([guiders.md](guiders.md)). `none`: runs as before, and the report says why.
- **tested**: a genuine pipeline of tiny random parts runs compiled: full guidance bit-identical to
  the plain pipeline, rows of the denoiser counted, a held delta equal to the same by hand, two
  prompts, several results, another size, callbacks, interruption, `uncompile`
  (`tests/test_zoo_compile.py`, `tests/test_compile*.py`; guiders: `tests/test_guider*.py`). Of
  tier `none`: the pipeline is left as it is.

{counts}

| class | pattern | tier | tested | reason |
|---|---|---|---|---|
"""


def tier_of(entry: Zoo) -> str:
    """What a held delta reaches on the zoo's pipeline."""
    pipe = thg_engine.compile(build(entry), thg_engine.THG(grid=2))
    pipe(**arguments(entry))
    return "fused" if pipe.thg.stats()["fused_steps"] else "hook"


def rows() -> list[dict[str, object]]:
    """The table: class, pattern, tier, tested, reason."""
    zoo: dict[str, list[Zoo]] = {}
    for entry in ZOO.values():
        zoo.setdefault(entry.cls, []).append(entry)
    found = []
    for seen in scan():
        name = seen["class"]
        ready = [entry for entry in zoo.get(name, ()) if not entry.missing]
        row = {"class": name, "pattern": seen["pattern"], "tier": "none", "tested": bool(ready)}
        guided = [entry for entry in ready if entry.guided]
        if name in RECORDS:
            row |= {"tier": tier_of(guided[0]) if guided else "hook", "reason": ""}
        elif seen["pattern"] == "guider":
            row |= {"tier": "guider", "reason": ""}
        else:
            row["reason"] = REASONS.get(name, NO_RECORD)
        found.append(row)
    return found


def main() -> None:
    """Write both files."""
    warnings.simplefilter("ignore")
    table = rows()
    (DOCS / "pipelines.json").write_text(json.dumps(table, indent=0) + "\n", encoding="utf-8")
    tiers = Counter(row["tier"] for row in table)
    counts = f"{len(table)} classes: " + ", ".join(f"{n} {tier}" for tier, n in tiers.items())
    text = HEAD.format(version=diffusers.__version__, counts=counts + ".")
    lines = [
        f"| {r['class']} | {r['pattern']} | {r['tier']} | {'yes' if r['tested'] else 'no'} "
        f"| {r['reason']} |"
        for r in table
    ]
    (DOCS / "pipelines.md").write_text(text + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
