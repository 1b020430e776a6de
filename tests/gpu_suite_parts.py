"""The modules of the GPU suite, which lie in ``benchmarks``."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
checks = importlib.import_module("gpu_checks")
curve = importlib.import_module("gpu_curve")
graphs = importlib.import_module("gpu_graphs")
models = importlib.import_module("gpu_models")
report = importlib.import_module("gpu_report")
runs = importlib.import_module("gpu_runs")
store_module = importlib.import_module("gpu_store")
suite = importlib.import_module("gpu_suite")
timing = importlib.import_module("gpu_timing")
