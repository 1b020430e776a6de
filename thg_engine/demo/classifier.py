"""The small CNN that judges the boxed pipeline's images: garment class and colour.

It sees images in [0, 1], shape ``(B, 3, 32, 32)``, and has one trunk with two linear heads.
The trunk's output is the feature space in which Frechet distances are measured.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

CLASSES: tuple[str, ...] = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
COLOURS: tuple[str, ...] = (
    "red",
    "orange",
    "yellow",
    "green",
    "cyan",
    "blue",
    "purple",
    "pink",
)
IMAGE_SIZE = 32
NUM_FEATURES = 64
WEIGHTS = Path(__file__).parent / "classifier" / "model.safetensors"


def _conv_block(channels_in: int, channels_out: int, *, pool: bool) -> list[nn.Module]:
    """Convolution, batch norm, ReLU and, if asked, a halving of the resolution."""
    layers: list[nn.Module] = [
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    ]
    return [*layers, nn.MaxPool2d(2)] if pool else layers


class DemoClassifier(nn.Module):
    """Garment class and colour of 32x32 RGB images, and the features behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            *_conv_block(3, 24, pool=True),
            *_conv_block(24, 48, pool=True),
            *_conv_block(48, 96, pool=False),
            *_conv_block(96, 64, pool=True),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(64 * 4 * 4, NUM_FEATURES),
            nn.ReLU(),
        )
        self.class_head = nn.Linear(NUM_FEATURES, len(CLASSES))
        self.colour_head = nn.Linear(NUM_FEATURES, len(COLOURS))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Features of ``images``.

        Args:
            images: shape ``(B, 3, 32, 32)``, floating point, values in [0, 1].
        Returns:
            Shape ``(B, 64)``, non-negative, the dtype and device of the weights.
        Raises:
            ValueError: ``images`` has another shape; the message holds it.
        """
        if images.ndim != 4 or images.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(f"expected images of shape (B, 3, 32, 32), got {tuple(images.shape)}")
        features: torch.Tensor = self.trunk(images * 2 - 1)
        return features

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits over :data:`CLASSES`, shape ``(B, 10)``, and :data:`COLOURS`, ``(B, 8)``."""
        features = self.features(images)
        return self.class_head(features), self.colour_head(features)


def load_classifier(path: Path | str = WEIGHTS) -> DemoClassifier:
    """The trained classifier, float32, on the CPU, in evaluation mode.

    Args:
        path: a safetensors file with the weights; by default the one in the package.
    Raises:
        FileNotFoundError: there is no such file.
    """
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise FileNotFoundError(f"no classifier weights at {path}")
    model = DemoClassifier()
    model.load_state_dict(load_file(path))
    return model.float().eval().requires_grad_(False)
