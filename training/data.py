"""Fashion-MNIST, colourised and captioned.

Each 28x28 grey image is padded to 32x32 and tinted with one of eight named colours: the garment's
shading becomes the colour's brightness, the background stays black. The tone of a garment, "dark"
or "bright", is not invented: it is the lower or upper third of mean brightness within its class.

References:
    Xiao, Rasul and Vollgraf 2017, arXiv 1708.07747 (Fashion-MNIST, MIT licence).
"""

from __future__ import annotations

import gzip
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from thg_engine.demo.classifier import CLASSES, COLOURS

DEFAULT_DATA_DIR = Path("/usr/share/datasets/fashion-mnist")
RGB: dict[str, tuple[float, float, float]] = {
    "red": (1.0, 0.10, 0.10),
    "orange": (1.0, 0.52, 0.05),
    "yellow": (1.0, 0.95, 0.10),
    "green": (0.10, 0.80, 0.15),
    "cyan": (0.10, 0.90, 0.95),
    "blue": (0.12, 0.25, 1.0),
    "purple": (0.58, 0.15, 0.95),
    "pink": (1.0, 0.50, 0.78),
}
JITTER = 0.05
TONES: tuple[str, ...] = ("dark", "", "bright")
TEMPLATES: tuple[str, ...] = ("a photo of {}", "a picture of {}", "{}")
TEMPLATE_ODDS: tuple[float, ...] = (0.7, 0.15, 0.15)
COLOUR_ODDS = 0.88
TONE_ODDS = 0.4
CAPTION_DROPOUT = 0.12


@dataclass(frozen=True)
class Garments:
    """Grey images and what is known of them, all on the CPU.

    ``grey`` is uint8 of shape ``(N, 32, 32)``; ``classes`` and ``tones`` (an index into
    :data:`TONES`) are int64 of shape ``(N,)``.
    """

    grey: torch.Tensor
    classes: torch.Tensor
    tones: torch.Tensor

    def __len__(self) -> int:
        return self.grey.shape[0]


def _read_idx(path: Path) -> np.ndarray:
    """One gzip-compressed idx file of unsigned bytes."""
    with gzip.open(path, "rb") as stream:
        raw = stream.read()
    zero, kind, ndim = struct.unpack(">HBB", raw[:4])
    if zero != 0 or kind != 8:
        raise ValueError(f"{path} is not an idx file of unsigned bytes")
    shape = struct.unpack(f">{ndim}I", raw[4 : 4 + 4 * ndim])
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * ndim).reshape(shape)


def _tones(grey: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """0, 1, 2 for the lower, middle and upper third of foreground brightness in each class."""
    foreground = (grey > 16).sum((1, 2)).clamp(min=1)
    brightness = grey.float().sum((1, 2)) / foreground
    tones = torch.ones_like(classes)
    for label in range(len(CLASSES)):
        inside = classes == label
        low, high = brightness[inside].quantile(torch.tensor([1 / 3, 2 / 3]))
        tones[inside & (brightness < low)] = 0
        tones[inside & (brightness > high)] = 2
    return tones


def load(data_dir: Path, split: str) -> Garments:
    """The ``"train"`` (60,000) or ``"t10k"`` (10,000) split, padded to 32x32."""
    images = _read_idx(data_dir / f"{split}-images-idx3-ubyte.gz")
    labels = _read_idx(data_dir / f"{split}-labels-idx1-ubyte.gz")
    grey = torch.from_numpy(np.pad(images, ((0, 0), (2, 2), (2, 2))))
    classes = torch.from_numpy(labels.astype(np.int64))
    return Garments(grey, classes, _tones(grey, classes))


def random_colours(count: int, generator: torch.Generator) -> torch.Tensor:
    """Uniform indices into :data:`COLOURS`, int64 of shape ``(count,)``."""
    return torch.randint(len(COLOURS), (count,), generator=generator)


def colourise(
    grey: torch.Tensor, colours: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """RGB images in [0, 1], shape ``(B, 3, 32, 32)``, of ``grey`` (uint8) tinted by ``colours``.

    The tint varies a little from image to image: each channel by up to 0.05.
    """
    palette = torch.tensor([RGB[name] for name in COLOURS])
    jitter = JITTER * (2 * torch.rand(len(colours), 3, generator=generator) - 1)
    tint = (palette[colours] + jitter).clamp(0, 1)
    return grey.float()[:, None] / 255 * tint[:, :, None, None]


def describe(class_name: str, colour: str = "", tone: str = "") -> str:
    """Tone, colour and garment in that order with their article: "a dark red sneaker"."""
    words = " ".join(word for word in (tone, colour, class_name) if word)
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def prompt(class_name: str, colour: str = "", tone: str = "") -> str:
    """The caption's usual form: "a photo of a red sneaker"."""
    return TEMPLATES[0].format(describe(class_name, colour, tone))


def random_captions(
    classes: torch.Tensor, colours: torch.Tensor, tones: torch.Tensor, generator: torch.Generator
) -> list[str]:
    """One caption per image; colour and tone are left out at times, all of it in 12 %."""
    count = len(classes)
    odds = torch.rand(count, 3, generator=generator)
    templates = torch.multinomial(torch.tensor(TEMPLATE_ODDS), count, True, generator=generator)
    captions = []
    for i in range(count):
        colour = COLOURS[colours[i]] if odds[i, 0] < COLOUR_ODDS else ""
        tone = TONES[tones[i]] if odds[i, 1] < TONE_ODDS else ""
        text = TEMPLATES[templates[i]].format(describe(CLASSES[classes[i]], colour, tone))
        captions.append("" if odds[i, 2] < CAPTION_DROPOUT else text)
    return captions


def vocabulary() -> list[str]:
    """Every word that a caption can hold, sorted; "t-shirt" counts as "t", "-", "shirt"."""
    phrases = [*TEMPLATES, *TONES, *COLOURS, *CLASSES, "a an"]
    text = " ".join(phrases).replace("{}", "").replace("-", " - ")
    return sorted(set(text.split()))
