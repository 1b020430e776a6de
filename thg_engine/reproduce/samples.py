"""Samples on disk: written whole or not at all, named by the number of their prompt."""

from __future__ import annotations

import contextlib
import json
import os
import wave
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InvalidArgument

if TYPE_CHECKING:
    from PIL import Image

SUFFIX = {"image": ".png", "audio": ".wav"}
READABLE = {"image": (".png", ".jpg", ".jpeg", ".webp"), "audio": (".wav", ".flac")}


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` fill a file beside ``path`` that then takes its name: never half a file."""
    part = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, document: Any) -> None:
    """``document`` as a JSON file, written whole."""
    text = json.dumps(document, indent=1) + "\n"
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_wav(path: Path, sound: Any, rate: int) -> None:
    """Mono sound in [-1, 1], shape ``(samples,)``, as 16-bit PCM."""
    pulses = np.round(np.clip(np.asarray(sound, dtype=np.float64), -1, 1) * 32767)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(pulses.astype("<i2").tobytes())


def read_wav(path: Path) -> tuple[Any, int]:
    """Sound of `write_wav` in [-1, 1], shape ``(samples,)``, float32, and its rate."""
    with wave.open(str(path), "rb") as file:
        pulses = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2")
        return pulses.astype(np.float32) / 32767, file.getframerate()


@dataclass(frozen=True)
class Folder:
    """The samples of one row.

    Attributes:
        path: holds ``000000.png``, ... and ``evaluations-*.jsonl``, one per process.
        modality: "image" or "audio".
    """

    path: Path
    modality: str

    def file(self, index: int) -> Path:
        """Where the sample of prompt ``index`` lies, or will."""
        return self.path / f"{index:06d}{SUFFIX[self.modality]}"

    def files(self, count: int) -> list[Path]:
        """The first ``count`` samples, in order."""
        return [self.file(i) for i in range(count)]

    def missing(self, indices: Sequence[int]) -> list[int]:
        """Which of ``indices`` have no sample yet."""
        return [i for i in indices if not self.file(i).is_file()]

    def record(self, process: int, images: int, rows: int, plan: int) -> None:
        """Note that ``images`` samples took ``rows`` evaluations, where the plan says ``plan``."""
        line = json.dumps({"images": images, "rows": rows, "plan": plan})
        with (self.path / f"evaluations-{process}.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def evaluations(self) -> tuple[float | None, int | None]:
        """Evaluations per sample: as counted, and as planned; None where nothing is known."""
        images, rows, plan = 0, 0, None
        for file in sorted(self.path.glob("evaluations-*.jsonl")):
            for line in file.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):  # a line cut short by a power failure
                    entry = json.loads(line)
                    images, rows, plan = (
                        images + entry["images"],
                        rows + entry["rows"],
                        entry["plan"],
                    )
        return (rows / images if images else None), plan


def reference_files(folder: Path, modality: str, argument: str) -> list[Path]:
    """The images or sounds of a reference folder, sorted.

    Raises:
        InvalidArgument: there is no such folder, or it holds fewer than two.
    """
    suffixes = READABLE[modality]
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    files = [path for path in found if path.suffix.lower() in suffixes]
    if len(files) < 2:
        remedy = (
            f"give a folder with at least two files of {', '.join(suffixes)}; found {len(files)}."
        )
        raise InvalidArgument(argument, str(folder), remedy)
    return files


def read_images(files: Sequence[Path], size: tuple[int, int], batch_size: int) -> Iterator[Tensor]:
    """Batches ``(B, 3, H, W)``, uint8, all of ``size`` (width, height).

    Images of another size, as photographs are, are cropped to its shape about their centre and
    resized (Lanczos).
    """
    from PIL import Image, ImageOps

    for start in range(0, len(files), batch_size):
        batch = []
        for path in files[start : start + batch_size]:
            with Image.open(path) as opened:
                image: Image.Image = opened.convert("RGB")
            if image.size != size:
                image = ImageOps.fit(image, size, Image.Resampling.LANCZOS)
            batch.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
        yield torch.stack(batch)


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) of an image file."""
    from PIL import Image

    with Image.open(path) as image:
        return int(image.width), int(image.height)
