"""Networks of the zoo's pipelines, watched, or with THG put into their outputs by hand."""

from __future__ import annotations

import torch

from thg_engine.integrations.diffusers.adapter_types import ArgumentLayout
from thg_engine.integrations.diffusers.adapters import find_layout
from thg_engine.integrations.diffusers.outputs import sample_of, with_sample
from thg_engine.integrations.diffusers.records import RECORDS
from thg_engine.integrations.diffusers.slicing import is_extra
from zoo import Zoo


def layout_of(module) -> ArgumentLayout:
    return find_layout(module) or ArgumentLayout("hidden_states", ())


class Network:
    """Stands in front of a denoiser's ``forward``: counts rows, and may answer in its place."""

    def __init__(self, pipe, entry: Zoo) -> None:
        found = [getattr(pipe, name) for name in entry.denoiser.split(",")]
        self.modules = [module for module in found if module is not None]
        self.module = self.modules[0]
        self.forwards = [module.forward for module in self.modules]
        self.rows: list[int] = []
        self.extras = 0
        self.asked: list = []

    def __enter__(self) -> Network:
        for module, original in zip(self.modules, self.forwards, strict=True):
            module.forward = self.around(module, original)
            module.forward.__wrapped__ = original
        return self

    def __exit__(self, *exc) -> None:
        for module in self.modules:
            vars(module).pop("forward", None)

    def around(self, module, original):
        def forward(*args, **kwargs):
            out, layout = original(*args, **kwargs), layout_of(module)
            if is_extra(kwargs, layout):
                self.extras += 1
                return out
            self.rows.append(len(sample_of(out, layout)))
            self.asked.append(module)
            return out

        return forward


class ByHand(Network):
    """THG over the plain pipeline: on rows of one branch the others are c - delta.

    Computed from calls with all branches, whose conditional part is what one branch alone gives up
    to the rounding of another batch size.
    """

    def __init__(self, pipe, entry: Zoo, coarse: set[int]) -> None:
        super().__init__(pipe, entry)
        self.record = RECORDS[entry.cls]
        self.coarse, self.delta, self.step = coarse, None, -1
        self.cond = None

    def around(self, module, original):
        def forward(*args, **kwargs):
            out, layout = original(*args, **kwargs), layout_of(module)
            if is_extra(kwargs, layout):
                return out
            if self.asked and module is not self.asked[-1]:
                self.delta = None  # another expert
            self.asked.append(module)
            values = sample_of(out, layout)
            given = self.calls(values) if self.record.calls else self.batch(values)
            return out if given is values else with_sample(out, given, layout)

        return forward

    def batch(self, values):
        self.step += 1
        parts = list(values.chunk(self.record.branches))
        cond = parts.pop(self.record.cond_half)
        if self.step in self.coarse or self.delta is None:
            self.delta = [cond.float() - part.float() for part in parts]
            return values
        made = [(cond.float() - delta).to(cond.dtype) for delta in self.delta]
        made.insert(self.record.cond_half, cond)
        return torch.cat(made)

    def calls(self, values):
        if self.cond is None:
            self.step, self.cond = self.step + 1, values
            return values
        cond, self.cond = self.cond, None
        if self.step in self.coarse or self.delta is None:
            self.delta = cond.float() - values.float()
            return values
        return (cond.float() - self.delta).to(cond.dtype)
