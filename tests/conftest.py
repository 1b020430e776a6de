"""Makes the helper modules of these folders importable, and lets Triton's kernels run on a CPU."""

import os
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "kernels")]

# Read when Triton is imported, so set before any test is. With a GPU the kernels are compiled.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
