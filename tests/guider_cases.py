"""Pipelines with guiders: whose network is watched, and whose guiders are replaced."""

from __future__ import annotations

import thg_engine
import zoo_images3
import zoo_images4
import zoo_modular
import zoo_videos2
from thg_engine import THG
from thg_engine.integrations.diffusers.guided import GuiderSwap
from zoo import Zoo

MODULES = (zoo_images3, zoo_images4, zoo_modular, zoo_videos2)
GRID = THG(grid=2)


class Network:
    """Counts the calls of a pipeline's networks and their rows; raises in call ``fails``."""

    def __init__(self, pipe, entry: Zoo, fails: int = -1) -> None:
        self.rows: list[int] = []
        self.fails = fails
        nets = [getattr(pipe, name) for name in entry.denoiser.split(",")]
        self.handles = [net.register_forward_hook(self._see) for net in nets]

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *exc) -> None:
        for handle in self.handles:
            handle.remove()

    def _see(self, module, inputs, output) -> None:
        if len(self.rows) == self.fails:
            raise KeyboardInterrupt
        self.rows.append(len(output[0]))


def compile_guider(pipe, *args, **kwargs) -> GuiderSwap:
    """Of a compiled pipeline."""
    return thg_engine.compile(pipe, *args, **kwargs).thg.swap
