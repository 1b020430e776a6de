"""Compiled pipelines on graphs, of a fake CUDA and of a real one, and beside them on none."""

from __future__ import annotations

import pytest
import torch

import thg_engine
from fake_cuda import FakeCuda, OnFakeCuda
from pipelines import call
from pipelines import tiny as tiny_on_cpu
from thg_engine import THG

HELD = THG(grid=3)


@pytest.fixture(params=["fake", pytest.param("cuda", marks=pytest.mark.gpu)], autouse=True)
def place(request, monkeypatch):
    """On a fake CUDA and on a real one; failures are injected into the fake alone."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        if request.node.get_closest_marker("fake_only"):
            pytest.skip("injects failures, or is about the CPU")
    monkeypatch.setitem(PLACE, "name", request.param)


PLACE = {"name": "fake"}


def tiny(*args, **kwargs):
    pipe = tiny_on_cpu(*args, **kwargs)
    return pipe.to("cuda") if PLACE["name"] == "cuda" else pipe


def on_fake(pipe, cuda=None):
    """The compiled pipeline with its graphs on a fake CUDA, unless there is a real one."""
    if PLACE["name"] == "cuda":
        return pipe
    cache = pipe.thg._graphs
    cache.cuda = cuda or FakeCuda()
    acquire = cache.acquire
    cache.acquire = lambda signature, fingerprint, device, build: acquire(
        signature, fingerprint, OnFakeCuda(), build
    )
    return pipe


def graphed(method=HELD, cuda=None, kind="text", scheduler=None, **kwargs):
    pipe = tiny(kind, scheduler=scheduler)
    return on_fake(thg_engine.compile(pipe, method, graph=True, **kwargs), cuda)


def eager(method=HELD, kind="text", scheduler=None, seed=1, **kwargs):
    options = {name: kwargs.pop(name) for name in ("fused",) if name in kwargs}
    pipe = thg_engine.compile(tiny(kind, scheduler=scheduler), method, graph=False, **options)
    return call(pipe, seed=seed, **kwargs)


def graph_stats(pipe):
    return pipe.thg.stats()["graphs"]
