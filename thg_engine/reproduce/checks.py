"""Metrics and their weights as the command line names them, checked before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import InvalidArgument
from .metrics import METRICS, load_package


def check_metrics(
    names: Sequence[str], modality: str, weights: dict[str, Path], boxed: bool
) -> None:
    """Refuse metrics that cannot be made, before hours of generating.

    Raises:
        InvalidArgument: no such metric, one of another kind, or its weights are not there.
        MissingPackage: a package is not installed.
    """
    for name in names:
        metric = METRICS.get(name)
        kinds = [key for key, one in METRICS.items() if one.modality == modality]
        if metric is None or metric.modality != modality:
            raise InvalidArgument("--metrics", name, f"use some of {', '.join(kinds)}, or none.")
        if name.endswith("accuracy") and not boxed:
            remedy = "only the captions of the pipeline in the box name what it judges."
            raise InvalidArgument("--metrics", name, remedy)
        if boxed and metric.in_box:
            continue
        if metric.must and name not in weights:
            remedy = f"is needed by metric {name}: {metric.weights}; --metrics leaves it out."
            raise InvalidArgument("--weights", f"{name}=PATH", remedy)
        for module, distribution in metric.packages.items():
            load_package(module, distribution, name)


def parse_weights(pairs: Sequence[str]) -> dict[str, Path]:
    """``NAME=PATH`` of the command line.

    Raises:
        InvalidArgument: no such metric, or nothing at the path.
    """
    weights: dict[str, Path] = {}
    for pair in pairs:
        name, _, path = pair.partition("=")
        takes = [key for key, metric in METRICS.items() if metric.weights]
        if name not in takes or not path:
            raise InvalidArgument("--weights", pair, f"give NAME=PATH, NAME of {', '.join(takes)}.")
        if not Path(path).exists():
            raise InvalidArgument(
                "--weights", pair, f"there is nothing; give the {METRICS[name].weights}."
            )
        weights[name] = Path(path)
    return weights
