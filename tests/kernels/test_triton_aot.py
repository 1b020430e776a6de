"""The Triton kernel compiled for GPUs that are not here: no spills, wide loads, few registers.

`aot_compile` says what is compiled and how. The bounds are those of aot_table.json; after a change
of the kernel that moves them on purpose, or with another Triton:

    python tests/kernels/aot_compile.py --record
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mixture import flow_points, vp_points
from scheduler_cases import MATRIX, available, build, names
from thg_engine.guidance import CFG, THG, CFGCache, GuidanceInterval, SelectiveGuidance
from thg_engine.lowering import plan_from_solver, plan_from_table
from thg_engine.packing import step_table
from thg_engine.plan import SamplingPlan
from thg_engine.solvers import SOLVERS, Solver
from thg_engine.trace import trace
from thg_kernels.step_update import op

HERE = Path(__file__).resolve().parent
SCRIPT, RECORD = HERE / "aot_compile.py", HERE / "aot_table.json"
AGAIN = "python tests/kernels/aot_compile.py --record"
ITEMSIZE = {"fp16": 2, "bf16": 2, "fp32": 4}
Table = dict[str, dict[str, Any]]

ARCHS = (80, 90, 100, 120)
UNROLLED = 8  # slots; the rest is a loop, once in the code, or twice where it has two rounds

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("aot")]


@pytest.fixture(scope="module")
def recorded() -> Table:
    return json.loads(RECORD.read_text(encoding="utf-8"))["kernels"]


@pytest.fixture(scope="module")
def compiled() -> Table:
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)["kernels"]


def _of(name: str) -> tuple[str, list[str]]:
    """Architecture and the other parts of a name, `Case.name` of aot_compile."""
    arch, *parts = name.split("/")
    return arch, parts


def test_every_kernel_is_recorded(compiled: Table, recorded: Table) -> None:
    assert sorted(compiled) == sorted(recorded), f"run {AGAIN}"
    assert {_of(name)[0] for name in compiled} == {f"sm{arch}" for arch in ARCHS}


def test_nothing_spills(compiled: Table) -> None:
    spilled = {name: found["spill_bytes"] for name, found in compiled.items()}
    assert not any(spilled.values()), spilled


def test_resources_are_within_the_record(compiled: Table, recorded: Table) -> None:
    """Registers in steps of eight, as the hardware hands them out."""
    worse = {}
    for name, found in compiled.items():
        bound = {**recorded[name], "registers": -(-recorded[name]["registers"] // 8) * 8}
        for what in ("registers", "shared_bytes"):
            if found[what] > bound[what]:
                worse[f"{name} {what}"] = f"{found[what]} > {bound[what]}"
    assert not worse, f"{worse}; if this is meant, run {AGAIN}"


def test_accesses_are_as_wide_as_they_can_be(compiled: Table) -> None:
    """Every register, output and result of a thread moves in one piece, or pieces of 16 bytes.

    Counted exactly: a scalar load more or less (of the row's coefficients) is of no matter, one
    vector load less is a value that is fetched in pieces.
    """
    for name, found in compiled.items():
        arch, (slots, _, dtype, layout, config, outputs, *noise) = _of(name)
        launches = op.LAUNCHES[int(arch.removeprefix("sm")) // 10]
        elements, warps = launches.large if config == "large" else launches.small
        assert found["num_warps"] == warps
        each = elements // (32 * warps)
        of_model = 2 if layout == "flat" else 0
        count = int(slots.split("-")[0])
        loads = _pieces(count if count <= UNROLLED + 2 else UNROLLED + 1, 4 * each)
        loads = _add(loads, _pieces(of_model + len(noise), ITEMSIZE[dtype] * each))
        assert _vectors(found["loads"]) == loads, name
        results = 2 * ("input" in outputs) + ("sample" in outputs)
        stores = _add(_pieces(_kept(name), 4 * each), _pieces(results, ITEMSIZE[dtype] * each))
        assert _vectors(found["stores"]) == stores, name


GUIDANCE = (CFG(), THG(grid=3), CFGCache(), GuidanceInterval(), SelectiveGuidance())


def _asked_for(plan: SamplingPlan) -> tuple[int, int, bool]:
    """Slots, uses, noise of the kernel that ``plan`` needs."""
    table = step_table(plan)
    return table.num_slots, int(table.uses), table.has_noise


def _compiled_for(recorded: Table) -> set[tuple[int, int, bool]]:
    """What is there for every architecture as `Engine` launches it, and as `compile` for one."""
    forms = [(f"sm{arch}", "input") for arch in ARCHS] + [("sm90", "sample")]
    found: dict[tuple[str, str], set[tuple[int, int, bool]]] = {form: set() for form in forms}
    for name in recorded:
        arch, (slots, uses, _, layout, _, outputs, *noise) = _of(name)
        if layout == "flat" and (arch, outputs) in found:
            key = (int(slots.removesuffix("-slots")), int(uses.removeprefix("uses-")), bool(noise))
            found[arch, outputs].add(key)
    return set.intersection(*found.values())


@pytest.mark.parametrize("name", names("deterministic", "stochastic"))
def test_every_scheduler_asks_for_what_is_recorded(name: str, recorded: Table) -> None:
    """Under every guidance method and configuration. Twelve steps: past every warm-up."""
    case, asked = available(name), {}
    for config in ({}, *MATRIX.get(name, ())):
        arguments = {"set_timesteps_kwargs": case.set_kwargs, "step_kwargs": case.step_kwargs}
        table = trace(build(name, **config), min(case.steps, 12), **arguments)
        for guidance in GUIDANCE:
            plan = plan_from_table(table, guidance, 5.0)
            asked[_asked_for(plan)] = config, guidance.name
    missing = {key: asked[key] for key in asked.keys() - _compiled_for(recorded)}
    assert not missing, f"{missing}; add them to aot_compile and run {AGAIN}"


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=list(SOLVERS))
def test_every_solver_asks_for_what_is_recorded(solver: Solver, recorded: Table) -> None:
    predicts = "flow_prediction" if solver.name == "flow_euler" else "epsilon"
    points = flow_points(12) if solver.name == "flow_euler" else vp_points(12)
    for guidance in GUIDANCE:
        for form in ("auto", "combined"):
            plan = plan_from_solver(solver, points, guidance, 5.0, predicts, form)
            assert _asked_for(plan) in _compiled_for(recorded), (guidance.name, form)


def _kept(name: str) -> int:
    """Results that a specialisation can store in slots: the sample and what its uses name."""
    uses = int(_of(name)[1][1].removeprefix("uses-"))
    return 1 + sum(bool(uses & use) for use in (4, 8, 16, 32))


def _pieces(count: int, size: int) -> dict[str, int]:
    """``count`` values of ``size`` bytes a thread, at most 16 at a time."""
    width = min(size, 16)
    return {str(width): count * size // width} if count else {}


def _add(a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
    return {k: a.get(k, 0) + b.get(k, 0) for k in {*a, *b}}


def _vectors(widths: dict[str, int]) -> dict[str, int]:
    """Of more than one coefficient at a time; narrower ones are scalars and strided outputs."""
    return {width: count for width, count in widths.items() if int(width) > 4}
