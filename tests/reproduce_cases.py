"""Command lines of ``thg-engine reproduce``, and scores of its images computed by hand."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from thg_engine.demo import load_classifier
from thg_engine.reproduce.request import check

ROWS = "cfg,cfg-cache,thg,cfg-20,thg-20"
COUNT = 4


def command(out: Path, *more: str, rows: str = ROWS, count: int = COUNT) -> list[str]:
    fixed = ["reproduce", "same-budget", "--model", "demo", "--rows", rows, "--out", str(out)]
    return [*fixed, "--limit", str(count), "--batch-size", "2", *more]


def request(*arguments: str):
    """What `check` makes of a command line."""
    parser = argparse.ArgumentParser()
    from thg_engine.reproduce.cli import add_parser

    add_parser(parser.add_subparsers())
    return check(parser.parse_args(list(arguments)))


def pixels(folder: Path, count: int = COUNT) -> np.ndarray:
    """Images ``(B, H, W, 3)`` of a row, read without the code under test."""
    return np.stack([np.asarray(Image.open(folder / f"{i:06d}.png")) for i in range(count)])


def features(images: np.ndarray) -> np.ndarray:
    """The classifier's, float64."""
    batch = torch.from_numpy(images.copy()).permute(0, 3, 1, 2).float() / 255
    return load_classifier().features(batch).double().numpy()


def brute_mmd(x: np.ndarray, y: np.ndarray, sigma: float = 10.0) -> float:
    def kernel(a, b):
        return float(
            np.mean([[np.exp(-((p - q) ** 2).sum() / (2 * sigma**2)) for q in b] for p in a])
        )

    return 1000 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y))
