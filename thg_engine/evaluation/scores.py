"""Quality scores: accuracies of the boxed classifier, Frechet and kernel distances, their floor.

Distances are taken in the classifier's 64 features between equal counts. They never reach zero at
a finite count: the floor is the distance between two disjoint sets of references of that count.
The references are real test images where their files are given, and otherwise images of converged
full guidance at other noise, at the same scale; then a distance says how far a method is from full
guidance, not from reality.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ..demo import load_classifier
from .box import Box
from .garments import real_images
from .methods import CFG_NAME, Method, plain
from .metrics import frechet_distance, kernel_distance
from .prompts import quality_prompts
from .runner import REFERENCE_SOLVER, run
from .settings import Settings

BATCH = 80
REFERENCE_STEPS = 50
"""Of the references without test images, DPM-Solver++ 2M: far below what features resolve."""
QUALITY_SEED = 500_000
"""Of the noise under test; references use the two seeds after it."""


@dataclass(frozen=True)
class Quality:
    """Scores of one method at one scale.

    Attributes:
        key, scale, images, nfe: of what; how many images; rows per image.
        class_accuracy, attribute_accuracy: share whose garment, whose colour the classifier names
            as the prompt does.
        frechet, kernel: distances to the references; ``*_floor``: between two sets of those.
        reference: what the references are.
    """

    key: str
    scale: float
    images: int
    nfe: float
    class_accuracy: float
    attribute_accuracy: float
    frechet: float
    kernel: float
    frechet_floor: float
    kernel_floor: float
    reference: str

    def document(self) -> dict[str, object]:
        """JSON-able."""
        return asdict(self)


class Judge:
    """Scores methods of one pipeline at one scale against the same references."""

    def __init__(self, box: Box, scale: float, settings: Settings) -> None:
        self.box, self.scale, self.count = box, scale, settings.quality_images
        self.prompts, classes, colours = quality_prompts(self.count)
        self.classes, self.colours = torch.tensor(classes), torch.tensor(colours)
        self.classifier = load_classifier()
        self.seed = QUALITY_SEED + 3 * settings.seed
        if settings.data:
            self.reference = "test images"
            pair = real_images(settings.data, self.classes, self.colours, self.seed)
        else:
            self.reference = "converged full guidance at other noise"
            method = Method(CFG_NAME, REFERENCE_SOLVER, REFERENCE_STEPS, plain)
            first, second = (self._images(method, self.seed + i)[0] for i in (1, 2))
            pair = first, second
        self.features = self._features(pair[0])
        other = self._features(pair[1])
        self.floors = frechet_distance(self.features, other), kernel_distance(self.features, other)

    def score(self, method: Method) -> Quality:
        """Generate with ``method`` and score."""
        images, nfe = self._images(method, self.seed)
        with torch.no_grad():
            class_logits, colour_logits = self.classifier(images)
        features = self._features(images)
        return Quality(
            key=method.key,
            scale=self.scale,
            images=self.count,
            nfe=nfe,
            class_accuracy=_share(class_logits, self.classes),
            attribute_accuracy=_share(colour_logits, self.colours),
            frechet=frechet_distance(features, self.features),
            kernel=kernel_distance(features, self.features),
            frechet_floor=self.floors[0],
            kernel_floor=self.floors[1],
            reference=self.reference,
        )

    def _images(self, method: Method, seed: int) -> tuple[Tensor, float]:
        """Images of all prompts and the mean NFE."""
        noise = self.box.noise(self.count, seed)
        parts, nfe = [], 0.0
        for prompts, part in _batches(self.prompts, noise):
            output = run(self.box, method, prompts, part, self.scale)
            parts.append(self.box.decode(output.latents))
            nfe += output.nfe * len(part) / self.count
        return torch.cat(parts), nfe

    @torch.no_grad()
    def _features(self, images: Tensor) -> Tensor:
        return self.classifier.features(images)


def _share(logits: Tensor, wanted: Tensor) -> float:
    return (logits.argmax(1) == wanted).float().mean().item()


def _batches(prompts: Sequence[str], noise: Tensor) -> Iterator[tuple[Sequence[str], Tensor]]:
    for start in range(0, len(prompts), BATCH):
        yield prompts[start : start + BATCH], noise[start : start + BATCH]
