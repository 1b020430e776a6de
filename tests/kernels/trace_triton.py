"""Traces the Triton operator with faked GPU tensors; run by test_step_update_op in a process of
its own, without TRITON_INTERPRET.

Prints the node that stands for the kernel and the arguments that torch finds mutated in its code.
Exit code 77: this torch cannot trace it, for the reason printed.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kernels"))

import torch
import triton
from torch import Tensor
from torch._functorch.aot_autograd import aot_function
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget

from thg_kernels.step_update import op
from thg_kernels.step_update.table import HEAD


class Driver:
    """Stands for a GPU's driver, of which torch asks only the target."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class Traced(Exception):
    """Ends the trace with the graph: it cannot be run without a GPU."""


def step(*tensors: Tensor) -> Tensor:
    torch.ops.thg_engine.step_update_triton(*tensors, 63, [1, 1, 1, 0, 0])
    return tensors[0]


def keep(graph: torch.fx.GraphModule, _: object) -> None:
    raise Traced(graph)


def fake_arguments() -> list[Tensor]:
    """All of them, optional ones included."""
    slots, batch, numel = 3, 2, 64
    rows = torch.empty(2, batch, dtype=torch.int32, device="cuda")
    half = {"dtype": torch.float16, "device": "cuda"}
    return [
        torch.empty(slots, batch, numel, device="cuda"),
        torch.empty_like(rows),
        torch.empty(4, HEAD + 4 * slots, device="cuda"),
        torch.empty(2 * batch, numel, **half),
        rows,
        torch.empty(2 * batch, numel, **half),
        torch.empty(2 * batch, device="cuda"),
        torch.empty_like(rows),
        torch.empty(batch, numel, **half),
        torch.empty(batch, numel, **half),
    ]


def main() -> int:
    """See the module's docstring."""
    op.triton_backend()
    if not torch.cuda.is_available():
        triton.runtime.driver.set_active(Driver())
    with FakeTensorMode():
        try:
            tensors = fake_arguments()
        except (RuntimeError, AssertionError) as error:
            print(f"this torch cannot fake CUDA tensors: {error}")
            return 77
        try:
            aot_function(step, keep)(*tensors)
        except Traced as traced:
            graph = traced.args[0].graph
    found = [node for node in graph.nodes if "triton" in str(node.target)]
    assert len(found) == 1, graph
    print(found[0].target, *found[0].kwargs["tensors_to_clone"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
