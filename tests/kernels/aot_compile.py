"""Compiles the Triton kernel for GPUs that are not here, as `op` would launch it there.

The operator is called with tensors of the CPU; in place of the launch stands Triton's compilation
for a target. So block, warps, alignment and what is constant are what Triton itself derives.

Every specialisation is compiled for every architecture in the form that `Engine` launches, which
writes the next model input; in that of `thg_engine.compile`, which writes a sample, for sm_90 alone
(SAMPLE_ARCH). That is two minutes of a core, and all of both forms would be more than three; the
forms differ in their last stores, and by some registers either way, as ptxas finds.

    python tests/kernels/aot_compile.py            prints the table as JSON
    python tests/kernels/aot_compile.py --record   writes it to aot_table.json

Without TRITON_INTERPRET, in a process of its own: see test_triton_aot.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kernels"))

import torch
import triton
from triton.backends.compiler import GPUTarget

from thg_kernels.step_update import op
from thg_kernels.step_update.table import HEAD, MAX_SLOTS, Uses
from thg_kernels.step_update.triton_kernel import step_update_kernel

ARCHS = (80, 90, 100, 120)
SAMPLE_ARCH = 90
RECORD = Path(__file__).with_name("aot_table.json")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
HELD = Uses.DELTA | Uses.KEEPS_DELTA
HISTORY = Uses.KEEPS_GUIDED
TWO_STATES = Uses.STATE | Uses.KEEPS_COND | Uses.KEEPS_DELTA
EVERYTHING = Uses(sum(Uses))
CHANGES = HELD | Uses.CHANGE | Uses.KEEPS_COND
# What plans ask for: uses, numbers of slots, and of those with noise. test_triton_aot packs the
# solvers of the core and the schedulers of diffusers under every guidance method.
SPECIALISATIONS: list[tuple[Uses, tuple[int, ...], tuple[int, ...]]] = [
    (Uses.NOTHING, (1, 2), (1, 2)),
    (HISTORY, (2, 3, 4, 5, 7), (3, 5)),
    (Uses.STATE, (2,), ()),
    (Uses.STATE | HISTORY, (3, 4, 5, 6, 7, 8), ()),
    (HELD, (2, 3), (2, 3)),
    (HELD | HISTORY, (3, 4, 5, 6, 8), (4, 6)),
    (HELD | Uses.STATE, (3,), ()),
    (HELD | Uses.STATE | HISTORY, (4, 5, 6, 7, 8, 9), ()),
    (TWO_STATES, (3, 5, 7), ()),
    # Captured graphs, which have room for other plans than their first.
    (EVERYTHING & ~Uses.CHANGE, (), (4, 8, 10)),
    (CHANGES, (4,), ()),
    (CHANGES | HISTORY, (5,), ()),
]


@dataclass(frozen=True)
class Case:
    """One compilation."""

    arch: int
    slots: int
    uses: int
    noise: bool = False
    dtype: str = "fp16"
    strided: bool = False
    config: str = "large"
    outputs: str = "input"
    """ "input" (and timestep), "sample", or "input+sample"."""

    @property
    def name(self) -> str:
        """Its key in the table."""
        parts = [f"sm{self.arch}", f"{self.slots}-slots", f"uses-{self.uses}", self.dtype]
        parts += ["strided" if self.strided else "flat", self.config, self.outputs]
        return "/".join([*parts, *(["noise"] if self.noise else [])])


def cases() -> Iterator[Case]:
    """See the module's docstring; then other dtypes, layouts and sizes of one specialisation."""
    for uses, plain, noisy in SPECIALISATIONS:
        for slots, noise in [*((n, False) for n in plain), *((n, True) for n in noisy)]:
            for arch in ARCHS:
                yield Case(arch, slots, int(uses), noise)
            yield Case(SAMPLE_ARCH, slots, int(uses), noise, outputs="sample")
    common = Case(90, 4, int(HELD | HISTORY))
    yield replace(common, dtype="bf16")
    yield replace(common, dtype="fp32")
    yield replace(common, config="small")
    yield replace(common, strided=True)
    yield replace(common, dtype="bf16", strided=True, config="small", outputs="sample")
    yield replace(common, dtype="fp32", strided=True, noise=True, outputs="input+sample")
    yield replace(common, dtype="fp32", config="small", outputs="sample")
    # Everything at once, with the longest history there may be.
    yield Case(90, MAX_SLOTS, EVERYTHING)
    for arch in ARCHS:
        yield Case(arch, 9, int(HELD | Uses.STATE | HISTORY), dtype="fp32")
        yield replace(common, arch=arch, dtype="bf16", strided=True, config="small", noise=True)


class Driver:
    """Stands for a GPU's driver; the index of the device is its architecture."""

    def __init__(self) -> None:
        self.arch = 90

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def arguments(case: Case) -> tuple[object, ...]:
    """A call of ``case`` in the operator's order; nothing in it is read."""
    batch, latent = 2, (4, 64, 64) if case.config == "small" else (4, 256, 256)
    dtype = DTYPES[case.dtype]
    rows = torch.zeros(2, batch, dtype=torch.int32)
    inputs, sample = "input" in case.outputs, "sample" in case.outputs
    output = torch.empty(2 * batch, *latent, dtype=dtype)
    strides = (latent[1] * latent[2], latent[1], latent[2], 1)
    return (
        torch.empty(case.slots, batch, *latent),
        torch.zeros_like(rows),
        torch.zeros(3, HEAD + 4 * case.slots),
        output,
        rows,
        torch.empty_like(output) if inputs else None,
        torch.empty(2 * batch) if inputs else None,
        rows if inputs else None,
        torch.empty(batch, *latent, dtype=dtype) if sample else None,
        torch.empty(batch, *latent, dtype=dtype) if case.noise else None,
        case.uses,
        # As of a channels_last output beside contiguous samples.
        [1, strides[0], 1, 1, latent[0]] if case.strided else list(op.FLAT),
    )


def measured(kernel: object) -> dict[str, object]:
    """What matters of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump says {text!r}")
    registers, stack, local = map(int, found.groups())
    ptx = kernel.asm["ptx"]
    return {
        "registers": registers,
        "spill_bytes": stack + local,
        "shared_bytes": kernel.metadata.shared,
        "num_warps": kernel.metadata.num_warps,
        "loads": _accesses(ptx, "ld"),
        "stores": _accesses(ptx, "st"),
    }


def _accesses(ptx: str, kind: str) -> dict[str, int]:
    """How many global loads or stores there are of each width in bytes."""
    counts: dict[str, int] = {}
    pattern = rf"\b{kind}\.global(?:\.[a-z]\w*)*?(?:\.v(\d))?\.[a-z](\d+)\b"
    for vector, bits in re.findall(pattern, ptx):
        width = str(int(vector or 1) * int(bits) // 8)
        counts[width] = counts.get(width, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: int(item[0])))


def compile_all() -> dict[str, dict[str, object]]:
    """The table."""
    driver = Driver()
    triton.runtime.driver.set_active(driver)
    launch, compiled = step_update_kernel.run, []

    def compile_only(*args: object, **kwargs: object) -> None:
        compiled.append(launch(*args, **{**kwargs, "warmup": True}))

    step_update_kernel.run = compile_only
    # The tensors are of the CPU, the block that of the target.
    op.architecture = lambda device: driver.arch // 10
    operator = op.triton_backend()
    table = {}
    for case in cases():
        driver.arch = case.arch
        operator(*arguments(case))
        table[case.name] = measured(compiled.pop())
    return table


def main() -> None:
    """See the module's docstring."""
    table = {"triton": triton.__version__, "kernels": compile_all()}
    if "--record" not in sys.argv[1:]:
        print(json.dumps(table))
        return
    lines = [f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(table["kernels"].items())]
    body = ",\n".join(lines)
    text = f'{{\n  "triton": "{table["triton"]}",\n  "kernels": {{\n{body}\n  }}\n}}\n'
    RECORD.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
