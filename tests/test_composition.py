"""What people put around a denoiser, and `thg_engine.compile`: the same values, exact cost."""

from __future__ import annotations

import functools
from collections.abc import Callable

import accelerate
import diffusers
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from packaging.version import Version

import thg_engine
from composition_cases import HELD, STEPS, close
from pipelines import CountRows, pattern, reference, tiny
from pipelines import call as call_sd
from thg_engine import CFG
from thg_engine.fingerprint import why_not_captured
from thg_engine.integrations.diffusers import caches
from thg_engine.integrations.diffusers.adapters import HOOK_NAME
from zoo import build, call
from zoo_all import ZOO

CPU = torch.device("cpu")
ORDERS = pytest.mark.parametrize("order", ["before", "after"])


def run(entry, pipe, **changes) -> torch.Tensor:
    return call(entry, pipe, **{"num_inference_steps": STEPS, **changes})


def composed(setup: Callable, order: str, tolerance: float = 2e-5):
    """Full guidance equals the plain pipeline with the same around it, held guidance the loop."""
    pipe = tiny()
    setup(pipe)
    stock = call_sd(pipe)
    pipe = tiny()
    if order == "before":
        setup(pipe)
    thg_engine.compile(pipe, CFG())
    if order == "after":
        setup(pipe)
    assert torch.equal(call_sd(pipe), stock)
    assert torch.equal(call_sd(pipe), stock), "two runs in a row"
    thg_engine.compile(pipe, HELD)
    found, plan = call_sd(pipe), pipe.thg.plan
    assert pipe.thg.stats()["last_nfe"] == plan.nfe == 12 and not pipe.thg.stats()["fallbacks"]
    assert torch.equal(call_sd(pipe), found)
    thg_engine.uncompile(pipe)
    assert torch.equal(call_sd(pipe), stock)
    expected, rows = reference(pipe, pattern(plan))
    assert rows == plan.nfe and close(found, expected, tolerance)
    assert not close(found, stock, 1e-3), "holding shows"
    return thg_engine.compile(pipe, HELD)


# -- weights elsewhere and in other types ----------------------------------------------------------


def model_offload(pipe) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def sequential_offload(pipe) -> None:
    accelerate.cpu_offload(pipe.unet, CPU)


def needs_offload_on_cpu() -> None:
    if Version(diffusers.__version__) < Version("0.41") and not torch.accelerator.is_available():
        pytest.skip("this diffusers offloads groups from an accelerator only")


def group_offload(pipe) -> None:
    needs_offload_on_cpu()
    apply_group_offloading(pipe.unet, CPU, CPU, "leaf_level")


def block_offload(pipe) -> None:
    needs_offload_on_cpu()
    apply_group_offloading(pipe.unet, CPU, CPU, "block_level", num_blocks_per_group=1)


def pipeline_group_offload(pipe) -> None:
    needs_offload_on_cpu()
    pipe.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="leaf_level")


OFFLOADS = [model_offload, sequential_offload, group_offload, block_offload, pipeline_group_offload]


@ORDERS
@pytest.mark.parametrize("setup", OFFLOADS)
def test_offloading(setup: Callable, order: str) -> None:
    """The execution device is the CPU, too; sequential offload keeps the weights on none at all."""
    pipe = composed(setup, order)
    away = {weight.device.type for weight in pipe.unet.parameters()}
    assert away == {"meta" if setup is sequential_offload else "cpu"}
    assert "offloading moves" in why_not_captured(pipe.unet, own=HOOK_NAME)
    with CountRows(pipe.unet) as count:
        call_sd(pipe)
    assert count.total == pipe.thg.plan.nfe


@ORDERS
def test_layerwise_casting(order: str) -> None:
    def setup(pipe) -> None:
        types = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.float32}
        pipe.unet.enable_layerwise_casting(**types)

    pipe = composed(setup, order)
    assert torch.float8_e4m3fn in {weight.dtype for weight in pipe.unet.parameters()}
    assert "layerwise_casting" in why_not_captured(pipe.unet, own=HOOK_NAME)


@ORDERS
def test_channels_last(order: str) -> None:
    pipe = composed(lambda pipe: pipe.unet.to(memory_format=torch.channels_last), order)
    weight = pipe.unet.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


@ORDERS
def test_weights_of_eight_bits(order: str) -> None:
    ao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    pipe = composed(lambda pipe: ao.quantize_(pipe.unet, ao.Int8WeightOnlyConfig()), order)
    kinds = {type(weight).__name__ for weight in pipe.unet.parameters()}
    assert "Int8Tensor" in kinds, kinds


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@ORDERS
def test_xformers_attention(order: str) -> None:
    pytest.importorskip("xformers", reason="xformers is not installed")
    pipe = tiny().to("cuda")
    pipe.enable_xformers_memory_efficient_attention()
    stock = call_sd(pipe)
    assert torch.equal(call_sd(thg_engine.compile(pipe, CFG(), graph=False)), stock)


# -- torch.compile ---------------------------------------------------------------------------------


class Backend:
    """An eager backend that counts what it compiles, and the calls of that."""

    def __init__(self) -> None:
        self.graphs = self.calls = 0

    def __call__(self, graph, inputs):
        self.graphs += 1

        def run(*args):
            self.calls += 1
            return graph.forward(*args)

        return run


def wrapped(pipe, backend) -> None:
    pipe.unet = torch.compile(pipe.unet, backend=backend, dynamic=False)


def in_place(pipe, backend) -> None:
    pipe.unet.compile(backend=backend, dynamic=False)


def by_blocks(pipe, backend) -> None:
    pipe.unet.compile_repeated_blocks(backend=backend, dynamic=False)


@pytest.mark.slow
@ORDERS
@pytest.mark.parametrize("how", [wrapped, in_place, by_blocks])
def test_compiled_denoisers(how: Callable, order: str) -> None:
    torch._dynamo.reset()
    backend = Backend()
    pipe = composed(lambda pipe: how(pipe, backend), order)
    call_sd(pipe)
    graphs, calls = backend.graphs, backend.calls
    call_sd(pipe)
    assert backend.graphs == graphs > 0, "nothing is compiled again"
    assert backend.calls > calls > 0


@pytest.mark.slow
@ORDERS
def test_blocks_compiled_by_inductor(order: str) -> None:
    torch._dynamo.reset()
    entry = ZOO["ltx"]
    pipe = build(entry)
    eager = run(entry, thg_engine.compile(pipe, HELD))
    thg_engine.uncompile(pipe)
    if order == "before":
        pipe.transformer.compile_repeated_blocks(dynamic=False)
        stock = run(entry, pipe)
    thg_engine.compile(pipe, CFG())
    if order == "after":
        pipe.transformer.compile_repeated_blocks(dynamic=False)
    found = run(entry, pipe)
    if order == "before":
        assert torch.equal(found, stock)
    thg_engine.compile(pipe, HELD)
    assert close(run(entry, pipe), eager, 1e-4)
    assert pipe.thg.stats()["last_nfe"] == pipe.thg.plan.nfe
    thg_engine.uncompile(pipe)
    assert torch.equal(run(entry, pipe), found)


# -- caches of others ------------------------------------------------------------------------------


def test_deep_cache_is_refused() -> None:
    deep = pytest.importorskip("DeepCache", reason="DeepCache is not installed")

    def helper(pipe):
        made = deep.DeepCacheSDHelper(pipe=pipe)
        made.set_params(cache_interval=2, cache_branch_id=0)
        made.enable()
        return made

    pipe = tiny()
    plain, cached = call_sd(pipe), helper(pipe)
    stock = call_sd(pipe)
    cached.disable()
    assert not torch.equal(stock, plain)
    for order in ("before", "after"):
        cached = helper(pipe) if order == "before" else None
        thg_engine.compile(pipe, HELD)
        cached = cached or helper(pipe)
        assert torch.equal(call_sd(pipe), stock)
        assert pipe.thg.stats()["last_nfe"] == 16 and "DeepCache keeps" in pipe.thg.report()
        assert why_not_captured(pipe.unet, own=HOOK_NAME) == "DeepCache decides on the host"
        if order == "after":
            cached.disable()
        thg_engine.uncompile(pipe)
        if order == "before":
            cached.disable()
        assert torch.equal(call_sd(pipe), plain) and not why_not_captured(pipe.unet)


def test_cache_dit_is_refused() -> None:
    dit = pytest.importorskip("cache_dit", reason="cache-dit is not installed")
    entry = ZOO["cogvideox"]
    pipe = build(entry)
    plain = run(entry, pipe)
    options = {"Fn_compute_blocks": 1, "residual_diff_threshold": 0.9, "max_warmup_steps": 1}
    dit.enable_cache(pipe, cache_config=dit.BasicCacheConfig(**options))
    stock = run(entry, pipe)
    assert not torch.equal(stock, plain)
    thg_engine.compile(pipe, HELD)
    assert torch.equal(run(entry, pipe), stock)
    assert pipe.thg.stats()["last_nfe"] == 2 * STEPS and "cache-dit keeps" in pipe.thg.report()
    thg_engine.uncompile(pipe)
    assert torch.equal(run(entry, pipe), stock)
    dit.disable_cache(pipe)
    assert torch.equal(run(entry, pipe), plain)


@pytest.mark.parametrize(
    ("cache", "name"),
    [("TeaCache", "teacache_forward"), ("FORA", "fora_forward"), ("ParaAttention", "para_attn.f")],
)
def test_forwards_of_other_caches_are_known_by_name(cache: str, name: str, monkeypatch) -> None:
    """They replace the ``forward`` of the class; TeaCache sets a mark on it besides."""
    pipe = tiny()
    kind, plain, stock = type(pipe.unet), type(pipe.unet).forward, call_sd(pipe)

    @functools.wraps(plain)
    def forward(self, *args, **kwargs):
        return plain(self, *args, **kwargs)

    forward.__qualname__ = name
    monkeypatch.setattr(kind, "forward", forward)
    thg_engine.compile(pipe, HELD)
    assert torch.equal(call_sd(pipe), stock)
    assert f"{cache} keeps what the last call gave" in pipe.thg.report()
    thg_engine.uncompile(pipe)
    monkeypatch.setattr(kind, "forward", plain)
    monkeypatch.setattr(kind, "enable_teacache", True, raising=False)
    assert caches.why_not_driven(pipe.unet).startswith("TeaCache")
    monkeypatch.undo()
    assert torch.equal(call_sd(pipe), stock) and not caches.why_not_driven(pipe.unet)
