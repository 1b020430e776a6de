"""How the Triton kernel is launched: on which device, in what pieces; and first uses at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from threading import Barrier

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from thg_kernels.step_update import BranchRows, native_op, op
from thg_kernels.step_update.table import HEAD, Uses

THREADS = 4


@pytest.fixture(autouse=True)
def fresh_architectures() -> Iterator[None]:
    op.architecture.cache_clear()
    yield
    op.architecture.cache_clear()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """In the kernel's place a list of (device that is current, block, warps)."""
    pytest.importorskip("triton")
    current, found = ["cuda:0"], []

    @contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        before, current[0] = current[0], str(wanted)
        yield
        current[0] = before

    class Kernel:
        def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
            return self

        def __call__(self, **given: object) -> None:
            found.append((current[0], given["BLOCK"], given["num_warps"]))

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.library, "wrap_triton", lambda kernel: Kernel())
    yield found
    assert current == ["cuda:0"], "the device from before is current again"


def has_gpus(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> list[torch.device]:
    """As if there were such GPUs; returns the devices asked for their capability."""
    asked: list[torch.device] = []

    def get_device_capability(device: torch.device) -> tuple[int, int]:
        asked.append(device)
        return capability

    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", get_device_capability)
    return asked


def launch(device: str, latent: tuple[int, ...] = (7,)) -> None:
    """A step of two samples of one slot, with tensors that are not there."""
    with FakeTensorMode():
        rows = torch.empty(2, 2, dtype=torch.int32, device=device)
        registers = torch.empty(1, 2, *latent, device=device)
        op.step_update_triton(
            registers,
            rows,
            torch.empty(3, HEAD + 4, device=device),
            torch.empty(4, *latent, device=device),
            rows,
            *(None,) * 5,
            int(Uses.NOTHING),
            op.FLAT,
        )


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_launched_on_the_device_of_the_tensors(
    monkeypatch: pytest.MonkeyPatch, launches: list[object], device: str
) -> None:
    """Triton itself takes the current one."""
    has_gpus(monkeypatch, (9, 0))
    launch(device)
    assert launches == [(device, 256, 2)]


def test_traced_without_a_gpu(monkeypatch: pytest.MonkeyPatch, launches: list[object]) -> None:
    """No device can be made current there; nor has any an architecture."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    launch("cuda:1")
    launch("cpu")
    assert launches == [("cuda:0", 256, 2)] * 2


@pytest.mark.parametrize("major", [7, 8, 9, 10, 11, 12])
def test_blocks_of_an_architecture(
    monkeypatch: pytest.MonkeyPatch, launches: list[object], major: int
) -> None:
    """By the elements of the whole batch; architectures that are not in the table have a default.
    The driver is asked once."""
    asked = has_gpus(monkeypatch, (major, 0))
    below = {10: 1 << 19, 12: 1 << 19}.get(major, 1 << 18)
    launch("cuda:0", (below // 2 - 1,))
    launch("cuda:0", (below // 2,))
    assert launches == [("cuda:0", 256, 2), ("cuda:0", 1024, 4)]
    assert asked == [torch.device("cuda:0")]


def test_amd_has_no_compute_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gfx90a calls itself 9.0, which is no Hopper."""
    asked = has_gpus(monkeypatch, (9, 0))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert op.architecture(torch.device("cuda:0")) == 0 and not asked


def test_every_launch_is_whole_vectors() -> None:
    for sizes in op.LAUNCHES.values():
        for elements, warps in sizes[1:]:
            assert elements & (elements - 1) == 0
            assert elements // (32 * warps) in (4, 8), "16 bytes of float32, or twice that"
        assert sizes.small < sizes.large


def at_once(function: Callable[[], object]) -> list[object]:
    """What threads get that call it at the same time."""
    barrier = Barrier(THREADS)

    def call(_: int) -> object:
        barrier.wait()
        return function()

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(call, range(THREADS)))


def test_triton_is_registered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By whichever thread comes first, and the others wait for it."""
    registered = []

    def register(*args: object, **kwargs: object) -> Callable[..., None]:
        registered.append(args)
        time.sleep(0.05)
        return lambda *args: None

    monkeypatch.setattr(op, "interpreted", lambda: False)
    monkeypatch.setattr(torch.library, "triton_op", register)
    monkeypatch.setattr(op, "_triton_operator", cache(op._triton_operator.__wrapped__))
    found = at_once(op.triton_backend)
    assert len(registered) == len({id(operator) for operator in found}) == 1


def test_libraries_are_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []

    def load(backend: str) -> str:
        loaded.append(backend)
        time.sleep(0.05)
        return ""

    monkeypatch.setattr(native_op, "_why_not_loaded", cache(load))
    assert at_once(lambda: native_op.why_unavailable("cpu")) == [""] * THREADS
    assert loaded == ["cpu"]


@pytest.mark.parametrize("kind", [BranchRows.both, BranchRows.cond_only])
def test_no_fake_outlives_its_trace(kind: Callable[[int], BranchRows]) -> None:
    """These are kept for the life of the process, and are often first asked for in a trace."""
    device, batch = torch.device("cpu"), 37
    with FakeTensorMode():
        assert type(kind(batch).tensor(device)) is not Tensor
    found = kind(batch).tensor(device)
    assert type(found) is Tensor and found[0].tolist() == list(kind(batch).cond)
    assert kind(batch).tensor(device) is found, "made once"
