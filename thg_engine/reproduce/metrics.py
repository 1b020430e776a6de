"""Scores of a row's samples, each behind one name in `METRICS`.

Every metric imports its packages when it is made, and says beforehand what is missing. Weights come
from local folders (``--weights NAME=PATH``); where none is given, a package fetches its own if it
can. Under the pipeline in the box, whose images Inception and CLIP have no eyes for, the boxed
classifier takes their place.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidArgument, MissingPackage
from .distances import ClassifierFeatures, mmd
from .samples import image_size, read_images


@dataclass(frozen=True)
class Samples:
    """What a metric scores.

    Attributes:
        files: one per prompt, in order.
        prompts: what they were made from.
        compare: files of the row that PSNR is measured to; empty where there is none.
    """

    files: Sequence[Path]
    prompts: Sequence[str]
    compare: Sequence[Path] = ()


@dataclass(frozen=True)
class Setting:
    """What a metric is made with.

    Attributes:
        reference: images or sounds that samples are compared with as a set.
        size: (width, height) of samples and, after resizing, of reference images.
        weights: metric -> local file or folder.
        batch_size: images at a time.
        device: where networks run.
        boxed: whether the boxed classifier takes the place of Inception and CLIP.
    """

    reference: Sequence[Path] = ()
    size: tuple[int, int] = (0, 0)
    weights: dict[str, Path] = field(default_factory=dict)
    batch_size: int = 16
    device: str = "cpu"
    boxed: bool = False

    def images(self, files: Sequence[Path]) -> Iterator[Tensor]:
        """Batches of uint8 images on the device."""
        for batch in read_images(files, self.size, self.batch_size):
            yield batch.to(self.device)


Score = Callable[[Samples], float]
ALONE: dict[str, Any] = {"sync_on_compute": False}
"""For torchmetrics: one process scores, the others must not be waited for, nor added in."""


@dataclass(frozen=True)
class Metric:
    """A metric that can be asked for.

    Attributes:
        label: as printed.
        make: from a `Setting`; loads networks and looks at the reference.
        packages: module -> distribution, of what it needs besides the dependencies.
        modality: what it scores, "image" or "audio".
        weights: what ``--weights`` holds for it; "" where it has none.
        must: whether it cannot do without these weights.
        reference: whether it compares with a reference set.
        in_box: whether the classifier can take the place of its network.
    """

    label: str
    make: Callable[[Setting], Score]
    packages: dict[str, str] = field(default_factory=dict)
    modality: str = "image"
    weights: str = ""
    must: bool = False
    reference: bool = False
    in_box: bool = False


def load_package(module: str, distribution: str, metric: str) -> Any:
    """Import a metric's package.

    Raises:
        MissingPackage: it is not installed, or cannot be imported beside what is installed.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, AttributeError) as error:  # the latter: names that a dependency has lost
        remedy = f"pip install {distribution} (or 'thg-engine[reproduce]')"
        message = f"metric {metric} needs {distribution}: {remedy} ({error})."
        raise MissingPackage(f"{message} --metrics leaves it out.") from error


def _judge(setting: Setting) -> ClassifierFeatures:
    from ..demo import load_classifier

    return ClassifierFeatures(load_classifier()).to(setting.device)


def _fid(setting: Setting) -> Score:
    """torchmetrics' Frechet distance, in Inception's features or the classifier's.

    Source: Heusel et al. 2017, arXiv 1706.08500.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    feature: Any = 2048
    options: dict[str, Any] = {"reset_real_features": False, **ALONE}
    if setting.boxed:
        feature = _judge(setting)
    else:
        load_package("torch_fidelity", "torch-fidelity", "fid")
        if "fid" in setting.weights:
            options["feature_extractor_weights_path"] = str(setting.weights["fid"])
    distance = FrechetInceptionDistance(feature, **options).to(setting.device)
    with torch.no_grad():
        for images in setting.images(setting.reference):
            distance.update(images, real=True)

    @torch.no_grad()
    def score(samples: Samples) -> float:
        distance.reset()
        for images in setting.images(samples.files):
            distance.update(images, real=False)
        return float(distance.compute())

    return score


def _cmmd(setting: Setting) -> Score:
    """The kernel distance in unit-length CLIP embeddings, or the classifier's unit features."""
    if setting.boxed:
        embed: Callable[[Tensor], Tensor] = _judge(setting)
    else:
        embed = _clip_embedding(setting)

    @torch.no_grad()
    def features(files: Sequence[Path]) -> Tensor:
        parts = [embed(images).float() for images in setting.images(files)]
        return torch.nn.functional.normalize(torch.cat(parts), dim=1)

    real = features(setting.reference)
    return lambda samples: mmd(real, features(samples.files))


def _clip_embedding(setting: Setting) -> Callable[[Tensor], Tensor]:
    """CLIP's image embedding, images stretched to its size bicubically as CMMD's authors do."""
    from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

    folder = str(setting.weights["cmmd"])
    processor = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
    model = CLIPVisionModelWithProjection.from_pretrained(folder, local_files_only=True)
    model = model.eval().to(setting.device)
    side = model.config.image_size
    shape = (1, 3, 1, 1)
    mean = torch.tensor(processor.image_mean, device=setting.device).view(shape)
    std = torch.tensor(processor.image_std, device=setting.device).view(shape)

    def embed(images: Tensor) -> Tensor:
        pixels = images.float() / 255
        pixels = torch.nn.functional.interpolate(pixels, size=(side, side), mode="bicubic")
        embedded: Tensor = model(pixel_values=(pixels - mean) / std).image_embeds
        return embedded

    return embed


class _ClipWithTensors(torch.nn.Module):
    """A CLIP model whose features are tensors, which newer releases of transformers wrap."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, *args: Any) -> Tensor:
        return pooled(self.model.get_image_features(*args))

    def get_text_features(self, *args: Any) -> Tensor:
        return pooled(self.model.get_text_features(*args))


def pooled(output: Any) -> Tensor:
    """The embedding in what transformers returns, of whatever release."""
    found: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return found


def _clip_score(setting: Setting) -> Score:
    """torchmetrics' CLIP score with a model from a local folder."""
    from torchmetrics.multimodal.clip_score import CLIPScore
    from transformers import CLIPModel, CLIPProcessor

    folder = str(setting.weights["clip-score"])

    def loaded() -> tuple[Any, Any]:
        model = CLIPModel.from_pretrained(folder, local_files_only=True)
        processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
        return _ClipWithTensors(model.eval()), processor

    similarity = CLIPScore(loaded, **ALONE).to(setting.device)

    @torch.no_grad()
    def score(samples: Samples) -> float:
        similarity.reset()
        done = 0
        for images in setting.images(samples.files):
            captions = list(samples.prompts[done : done + len(images)])
            similarity.update(images, captions)
            done += len(images)
        return float(similarity.compute())

    return score


def _image_reward(setting: Setting) -> Score:
    """Mean ImageReward. Source: Xu et al. 2023, arXiv 2304.05977."""
    package = load_package("ImageReward", "image-reward", "image-reward")
    options: dict[str, Any] = {"device": setting.device}
    if "image-reward" in setting.weights:
        folder = setting.weights["image-reward"]
        options |= {"med_config": str(folder / "med_config.json")}
        model = package.load(str(folder / "ImageReward.pt"), **options)
    else:
        model = package.load("ImageReward-v1.0", **options)

    @torch.no_grad()
    def score(samples: Samples) -> float:
        pairs = zip(samples.prompts, samples.files, strict=True)
        rewards = [float(model.score(prompt, str(path))) for prompt, path in pairs]
        return sum(rewards) / len(rewards)

    return score


def _psnr(setting: Setting) -> Score:
    """Mean over images of the PSNR in dB to the same prompt and noise under another row."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    def score(samples: Samples) -> float:
        total = 0.0
        for ours, theirs in zip(
            setting.images(samples.files), setting.images(samples.compare), strict=True
        ):
            decibels = peak_signal_noise_ratio(
                ours.float(), theirs.float(), data_range=255.0, dim=(1, 2, 3), reduction="none"
            )
            total += decibels.sum().item()
        return total / len(samples.files)

    return score


def _accuracy(joint: bool) -> Callable[[Setting], Score]:
    """Share of images that the boxed classifier takes for what their caption says."""

    def make(setting: Setting) -> Score:
        judge = _judge(setting).judge

        @torch.no_grad()
        def score(samples: Samples) -> float:
            wanted = torch.tensor([caption_labels(prompt) for prompt in samples.prompts])
            logits = [judge(batch.float() / 255) for batch in setting.images(samples.files)]
            found = [torch.cat(part).argmax(1).cpu() for part in zip(*logits, strict=True)]
            right = found[0] == wanted[:, 0]
            if joint:
                right &= found[1] == wanted[:, 1]
            return right.float().mean().item()

        return score

    return make


def caption_labels(caption: str) -> tuple[int, int]:
    """Class and colour that a caption of the box names.

    Raises:
        InvalidArgument: it names neither one of each at its end.
    """
    from ..demo.classifier import CLASSES, COLOURS

    for i, garment in enumerate(CLASSES):
        for j, colour in enumerate(COLOURS):
            if caption.endswith(f" {colour} {garment}"):
                return i, j
    remedy = 'accuracy asks for captions such as "a photo of a red bag"; --metrics leaves it out.'
    raise InvalidArgument("--prompts", caption, remedy)


def _audio(name: str) -> Callable[[Setting], Score]:
    def make(setting: Setting) -> Score:
        from . import audio

        makers: dict[str, Callable[[Setting], Score]] = {"fad": audio.fad, "clap": audio.clap}
        return makers[name](setting)

    return make


CLIP_336 = "folder of openai/clip-vit-large-patch14-336"
METRICS: dict[str, Metric] = {
    "fid": Metric(
        *("FID", _fid, {"torch_fidelity": "torch-fidelity"}),
        weights="Inception weights of torch-fidelity, a .pth file",
        reference=True,
        in_box=True,
    ),
    "cmmd": Metric("CMMD", _cmmd, weights=CLIP_336, must=True, reference=True, in_box=True),
    "clip-score": Metric("CLIP score", _clip_score, weights="folder of a CLIP model", must=True),
    "image-reward": Metric(
        *("ImageReward", _image_reward, {"ImageReward": "image-reward"}),
        weights="folder with ImageReward.pt and med_config.json",
    ),
    "psnr": Metric("PSNR to CFG", _psnr),
    "class-accuracy": Metric("class acc.", _accuracy(joint=False), in_box=True),
    "joint-accuracy": Metric("class+colour", _accuracy(joint=True), in_box=True),
    "fad": Metric(
        *("FAD", _audio("fad"), {"frechet_audio_distance": "frechet-audio-distance"}, "audio"),
        weights="folder for the package's checkpoint of VGGish",
        reference=True,
    ),
    "clap": Metric(
        *("CLAP", _audio("clap"), {"scipy": "scipy"}, "audio"),
        weights="folder of a CLAP model, e.g. laion/clap-htsat-unfused",
        must=True,
    ),
}
BOXED = ("fid", "cmmd", "class-accuracy", "joint-accuracy")
"""Scores of the pipeline in the box, where none are asked for."""


def make_scores(names: Sequence[str], setting: Setting) -> dict[str, Score]:
    """The metrics called ``names``, ready to score."""
    return {name: METRICS[name].make(setting) for name in names}


def sized(setting: dict[str, Any], files: Sequence[Path]) -> Setting:
    """A `Setting` whose images have the size of the first of ``files``."""
    return Setting(size=image_size(files[0]), **setting)
