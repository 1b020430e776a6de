"""``thg-engine calibrate --plans``: the command, alone and as two processes of a launcher."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import thg_engine
from thg_engine.demo import load_pipeline
from thg_engine.evaluation.prompts import selection_prompts
from thg_engine.fitting.front import PlanFront

ROOT = Path(__file__).parents[1]
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def calibrate(folder: Path, name: str, launcher: list[str]) -> tuple[PlanFront, str]:
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(selection_prompts(12)))
    command = [*launcher, str(ROOT / "tests" / "plans_worker.py"), "calibrate", "demo-flow"]
    command += ["--plans", "--prompts", str(prompts), "--out", str(folder / name)]
    command += ["--guidance-scales", "5", "--budgets", "8", "12", "--max-sequence-length", "1"]
    command += ["--refine", "1", "--batch-size", "2", "--work-dir", str(folder / f"work-{name}")]
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "tests")))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return PlanFront.load(folder / name), done.stdout


@pytest.mark.slow
def test_two_processes_find_the_plans_of_one(tmp_path: Path) -> None:
    """Each takes its share of the prompts; one of them writes."""
    one, printed = calibrate(tmp_path, "one.json", [sys.executable])
    two, said = calibrate(tmp_path, "two.json", LAUNCHER)
    assert "4 prompts held out" in printed and "dpm++2m@4" in printed
    assert said.count("wrote ") == 1
    shards = [*(tmp_path / "work-two.json").rglob("converged-*-of-2.safetensors")]
    assert {path.stem[-6:] for path in shards} == {"0-of-2", "1-of-2"}
    assert (one.num_prompts, one.num_held_out) == (two.num_prompts, two.num_held_out) == (8, 4)
    # Sums in another order may move a node, and then those after it, elsewhere.
    for budget in (8, 12):
        best = [
            min(e.error_at(5.0) for e in front.plans if e.nfe <= budget) for front in (one, two)
        ]
        assert best[0] == pytest.approx(best[1], rel=0.1)
    for front, name in ((one, "one.json"), (two, "two.json")):
        assert all(entry.fits[0].error < entry.fits[0].base_error for entry in front.plans)
        assert [*(tmp_path / f"work-{name}").rglob("refined-1-*.json")]
    pipe = thg_engine.compile(load_pipeline("flow"), calibration=two, nfe=12)
    pipe("a red shirt", guidance_scale=5.0, output_type="latent", max_sequence_length=1)
    assert pipe.thg.stats()["last_nfe"] <= 12
