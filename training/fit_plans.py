"""Fits the plans that ship with the pipelines in the box.

    python -m training.fit_plans --name sd      # -> thg_engine/data/plans-sd.json
    python -m training.fit_plans --name flow    # -> thg_engine/data/plans-flow.json

On the selection prompts and noise of the evaluation, so that its report sees neither. Interrupted,
it goes on with the same flags.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import thg_engine
from thg_engine.demo import load_pipeline
from thg_engine.evaluation.prompts import selection_prompts
from thg_engine.evaluation.settings import SELECTION_SEED

DATA = Path(thg_engine.__file__).parent / "data"
BUDGETS = (12, 16, 20, 24, 32, 40, 56, 80)
SCALES = (7.5, 5.0, 3.0, 2.0)
"""The default scale of Stable Diffusion first: grids are made for it."""
ROUNDS = 1
OPTIONS = {"sd": {}, "flow": {"max_sequence_length": 1}}


def main() -> None:
    """Reads the command line, fits, writes the file."""
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    cli.add_argument("--name", choices=[*OPTIONS], required=True)
    cli.add_argument("--samples", type=int, default=2, help="noises per prompt (2)")
    cli.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    cli.add_argument("--work-dir", type=Path, default=Path("runs/plans"))
    args = cli.parse_args()
    torch.set_num_threads(args.threads)
    front = thg_engine.calibrate_plans(
        load_pipeline(args.name),
        selection_prompts(40),
        guidance_scales=SCALES,
        budgets=BUDGETS,
        samples=args.samples,
        seed=SELECTION_SEED,
        refine=ROUNDS,
        batch_size=27,
        model=f"the pipeline in the box ({args.name})",
        work_dir=args.work_dir,
        **OPTIONS[args.name],
    )
    path = DATA / f"plans-{args.name}.json"
    front.save(path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
