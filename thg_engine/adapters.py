"""Pipelines of your own: `register` tells `thg_engine.compile` how they do guidance.

    thg_engine.adapters.register(MyPipeline, denoiser="transformer", calls=True)

See docs/adapters.md for a worked example.
"""

from __future__ import annotations

from .integrations.diffusers.adapter_types import AdapterRecord, ArgumentLayout
from .integrations.diffusers.adapters import register, unregister

__all__ = ["AdapterRecord", "ArgumentLayout", "register", "unregister"]
