"""Scores of sounds: FAD through its package, CLAP through transformers.

References:
    Kilgour et al. 2019, arXiv 1812.08466 (FAD, on VGGish embeddings); Wu et al. 2023, arXiv
    2211.06687 (CLAP).
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ThgError
from .samples import read_wav

if TYPE_CHECKING:
    from .metrics import Samples, Score, Setting

CLAP_RATE = 48_000


def fad(setting: Setting) -> Score:
    """Frechet distance of VGGish embeddings, package ``frechet-audio-distance``."""
    from .metrics import load_package

    package = load_package("frechet_audio_distance", "frechet-audio-distance", "fad")
    options: dict[str, Any] = {"model_name": "vggish", "sample_rate": 16_000}
    if "fad" in setting.weights:
        options["ckpt_dir"] = str(setting.weights["fad"])
    distance = package.FrechetAudioDistance(**options)

    def score(samples: Samples) -> float:
        # It takes folders, whole: ours also hold samples beyond --limit and records.
        with tempfile.TemporaryDirectory() as folder:
            ours, theirs = Path(folder, "ours"), Path(folder, "theirs")
            _link(samples.files, ours)
            _link(setting.reference, theirs)
            found = float(distance.score(str(theirs), str(ours)))
        if found < 0:  # its way of saying that it failed; the reason is printed, not raised
            raise ThgError("frechet-audio-distance failed; its message is above.")
        return found

    return score


def _link(files: Sequence[Path], folder: Path) -> None:
    folder.mkdir()
    for i, path in enumerate(files):
        (folder / f"{i:06d}{path.suffix}").symlink_to(path.resolve())


def clap(setting: Setting) -> Score:
    """Mean cosine of the CLAP embeddings of sound and caption, in [-1, 1]."""
    from scipy.signal import resample_poly
    from transformers import ClapModel, ClapProcessor

    from .metrics import pooled

    folder = str(setting.weights["clap"])
    model = ClapModel.from_pretrained(folder, local_files_only=True).eval().to(setting.device)
    processor = ClapProcessor.from_pretrained(folder, local_files_only=True)

    @torch.no_grad()
    def cosine(prompt: str, path: Path) -> float:
        sound, rate = read_wav(path)
        sound = resample_poly(sound, CLAP_RATE, rate)
        heard = processor.feature_extractor(sound, sampling_rate=CLAP_RATE, return_tensors="pt")
        read = processor.tokenizer(prompt, truncation=True, return_tensors="pt")
        of_sound = pooled(model.get_audio_features(**heard.to(setting.device)))
        of_text = pooled(model.get_text_features(**read.to(setting.device)))
        return torch.nn.functional.cosine_similarity(of_sound, of_text).item()

    def score(samples: Samples) -> float:
        pairs = zip(samples.prompts, samples.files, strict=True)
        return sum(cosine(prompt, path) for prompt, path in pairs) / len(samples.files)

    return score
