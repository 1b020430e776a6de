"""Real images: Fashion-MNIST's test files, padded and tinted as the boxed models were trained on.

The files are ``t10k-images-idx3-ubyte.gz`` and ``t10k-labels-idx1-ubyte.gz``; they are not part of
the package. `training/data.py` in the repository is where the tinting comes from, and a test holds
the two together.
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InvalidArgument

IMAGES, LABELS = "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"
TINTS = (
    *((1.0, 0.10, 0.10), (1.0, 0.52, 0.05), (1.0, 0.95, 0.10), (0.10, 0.80, 0.15)),
    *((0.10, 0.90, 0.95), (0.12, 0.25, 1.0), (0.58, 0.15, 0.95), (1.0, 0.50, 0.78)),
)
"""In the order of ``demo.classifier.COLOURS``."""
JITTER = 0.05


def check_data(folder: str) -> None:
    """Refuse a folder without the two files, or with others by their names."""
    if not folder:
        return
    sizes = {}
    for name, header in ((IMAGES, 16), (LABELS, 8)):
        if not (Path(folder) / name).is_file():
            raise InvalidArgument("--data", folder, f"{name} is not in it.")
        try:
            sizes[name] = len(_read(Path(folder) / name, header))
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise InvalidArgument("--data", folder, f"{name} cannot be read ({error}).") from error
    if not sizes[LABELS] or sizes[IMAGES] != 28 * 28 * sizes[LABELS]:
        remedy = "its files are no images of 28 x 28 with as many labels."
        raise InvalidArgument("--data", folder, remedy)


def _read(path: Path, header: int) -> Tensor:
    with gzip.open(path, "rb") as stream:
        raw = bytearray(stream.read())
    return torch.frombuffer(raw, dtype=torch.uint8)[header:]


def real_images(folder: str, classes: Tensor, colours: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Two disjoint sets of test images with the given labels, ``(B, 3, 32, 32)`` in [0, 1].

    Raises:
        InvalidArgument: the files hold fewer than two images per wanted one.
    """
    grey = _read(Path(folder) / IMAGES, 16).reshape(-1, 28, 28)
    labels = _read(Path(folder) / LABELS, 8)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.empty(2, len(classes), dtype=torch.long)
    for label in set(classes.tolist()):
        wanted = classes == label
        pool = (labels == label).nonzero()[:, 0]
        if len(pool) < 2 * int(wanted.sum()):
            remedy = f"only {len(pool)} test images of one garment; ask for fewer."
            raise InvalidArgument("quality_images", len(classes), remedy)
        order = torch.randperm(len(pool), generator=generator)[: 2 * int(wanted.sum())]
        chosen[:, wanted] = pool[order].reshape(2, -1)
    first, second = (_tinted(grey[index], colours, generator) for index in chosen)
    return first, second


def _tinted(grey: Tensor, colours: Tensor, generator: torch.Generator) -> Tensor:
    jitter = JITTER * (2 * torch.rand(len(colours), 3, generator=generator) - 1)
    tint = (torch.tensor(TINTS)[colours] + jitter).clamp(0, 1)
    padded = torch.nn.functional.pad(grey.float() / 255, (2, 2, 2, 2))
    return padded[:, None] * tint[:, :, None, None]
