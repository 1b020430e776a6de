"""``thg-engine calibrate --plans`` in small: few nodes, a given c2. Run by test_cli_plans.py."""

from __future__ import annotations

import importlib
import sys

import torch

from thg_engine.cli import main
from thg_engine.fitting import search
from thg_engine.fitting.reference import make_nodes


def shrink() -> None:
    """Seconds instead of minutes, and grids that do not depend on timings."""
    # The package has a function of the module's name.
    calibration = importlib.import_module("thg_engine.integrations.diffusers.calibrate_plans")
    calibration.STOCK_STEPS = (4,)
    calibration.time_denoiser = lambda _captured, **_call: (1.0, 1.5)
    search.make_nodes = lambda schedule, end: make_nodes(schedule, 12, 1, end)


if __name__ == "__main__":
    torch.set_num_threads(1)
    shrink()
    sys.exit(main(sys.argv[1:]))
