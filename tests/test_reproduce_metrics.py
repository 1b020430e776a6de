"""Metrics of ``thg-engine reproduce``, each by itself, and the files of the samples they score."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

from reproduce_cases import brute_mmd, features
from thg_engine.errors import ThgError
from thg_engine.reproduce.distances import mmd
from thg_engine.reproduce.generation import Sampler
from thg_engine.reproduce.methods import Context, guidance_of
from thg_engine.reproduce.metrics import METRICS, Samples, Setting
from thg_engine.reproduce.samples import read_wav, write_wav, write_whole
from thg_engine.reproduce.tables import table


@pytest.mark.filterwarnings("ignore:Matrix is singular")  # features that are 0 on all images
def test_frechet_distance_against_scipy(tmp_path):
    """More images than features, so that square roots of matrices are well conditioned."""
    generator = np.random.default_rng(0)
    sets = []
    for name, spread in (("a", 255), ("b", 140)):
        (tmp_path / name).mkdir()
        coarse = generator.integers(0, spread, (160, 4, 4, 3), dtype=np.uint8)
        images = coarse.repeat(8, 1).repeat(8, 2)
        for i, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / name / f"{i:06d}.png")
        sets.append(features(images))
    files = [sorted((tmp_path / name).iterdir()) for name in ("a", "b")]
    score = METRICS["fid"].make(Setting(files[0], (32, 32), boxed=True))
    first = score(Samples(files[1], [""] * 160))
    assert score(Samples(files[1], [""] * 160)) == first  # nothing is left of the last row
    (m1, m2), (s1, s2) = ([f.mean(0) for f in sets], [np.cov(f.T) for f in sets])
    root = scipy.linalg.sqrtm(s1 @ s2).real
    expected = ((m1 - m2) ** 2).sum() + np.trace(s1 + s2 - 2 * root)
    assert first == pytest.approx(expected, rel=1e-4)


def test_mmd_against_brute_force():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 7, generator=generator, dtype=torch.float64) * 9 for n in (13, 8))
    assert mmd(x, y) == pytest.approx(brute_mmd(x.numpy(), y.numpy()), rel=1e-10)
    assert mmd(x, x) == pytest.approx(0, abs=1e-9)


def test_half_a_file_never_takes_the_name(tmp_path):
    def cut_short(path):
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "a.png", cut_short)
    assert not list(tmp_path.iterdir())


def test_sound_survives_the_disk(tmp_path):
    sound = np.sin(np.linspace(0, 40, 1600)) * 1.2  # beyond full scale: clipped, not wrapped
    write_wav(tmp_path / "a.wav", sound, 16_000)
    found, rate = read_wav(tmp_path / "a.wav")
    assert rate == 16_000
    np.testing.assert_allclose(found, np.clip(sound, -1, 1), atol=1 / 32767)


def test_sounds_are_made_counted_and_resumed(tmp_path, monkeypatch):
    """On a genuine AudioLDM 2 of tiny random parts, with fewer steps than the table's."""
    from thg_engine.reproduce.generation import Job
    from zoo_videos_audio import audioldm2

    pipe, arguments = audioldm2()
    pipe.set_progress_bar_config(disable=True)
    # Its decoder paints three channels, which no vocoder can voice: latents as sound will do.
    pipe.mel_spectrogram_to_waveform = lambda mel: mel.flatten(1)
    monkeypatch.setattr(Sampler, "_load", lambda self: listening(self, pipe))
    chosen = replace(table("audioldm2"), guidance_scale=arguments["guidance_scale"])
    captions = tuple(arguments["prompt"])[:2] if isinstance(arguments["prompt"], list) else ()
    captions = captions or (arguments["prompt"],) * 2
    job = Job(chosen, "demo", captions, 0, torch.float32, None, tmp_path, 2)
    row = replace(chosen.rows[1], num_steps=6, options={"interval": 2, "start": 0.5})
    Sampler(job).run(row, guidance_of(row, Context("audioldm2")))
    folder = job.folder(row.name)
    sounds = [read_wav(path) for path in folder.files(2)]
    assert all(np.isfinite(sound).all() and len(sound) > 0 for sound, _ in sounds)
    assert {rate for _, rate in sounds} == {pipe.vocoder.config.sampling_rate}
    assert folder.evaluations() == (11.0, 11)  # 6 rows, both branches in 0, 1, 2, 3, 5
    Sampler(job).run(row, guidance_of(row, Context("audioldm2")))
    assert folder.evaluations() == (11.0, 11) and len(list(folder.path.glob("*.jsonl"))) == 1


def listening(sampler, pipe):
    """The pipeline with the sampler's counter, as `Sampler._load` leaves it."""
    sampler._first_layer(pipe).register_forward_hook(sampler._count)
    return pipe


def test_fad_scores_the_first_samples_alone(tmp_path, monkeypatch):
    """Against a stand-in with the package's interface: it takes folders, and -1 is its failure."""
    seen = {}

    class FrechetAudioDistance:
        def __init__(self, **options):
            seen["options"] = options

        def score(self, background, evaluated):
            seen["folders"] = [len(os.listdir(folder)) for folder in (background, evaluated)]
            return seen.get("answer", 2.5)

    stand_in = SimpleNamespace(FrechetAudioDistance=FrechetAudioDistance)
    monkeypatch.setitem(sys.modules, "frechet_audio_distance", stand_in)
    files = [tmp_path / f"{i:06d}.wav" for i in range(5)]
    for path in files:
        write_wav(path, np.zeros(160), 16_000)
    score = METRICS["fad"].make(Setting(reference=files, weights={"fad": tmp_path}))
    assert score(Samples(files[:3], ["a"] * 3)) == 2.5
    assert seen["folders"] == [5, 3]
    wanted = {"model_name": "vggish", "sample_rate": 16_000, "ckpt_dir": str(tmp_path)}
    assert seen["options"] == wanted
    seen["answer"] = -1
    with pytest.raises(ThgError, match="failed"):
        score(Samples(files[:3], ["a"] * 3))


def test_image_reward_pairs_prompts_with_files(tmp_path, monkeypatch):
    """Against a stand-in with the package's interface."""
    given = {}

    def load(name, **options):
        given.update(options, name=name)
        return SimpleNamespace(score=lambda prompt, path: len(prompt) + int(Path(path).stem))

    monkeypatch.setitem(sys.modules, "ImageReward", SimpleNamespace(load=load))
    score = METRICS["image-reward"].make(Setting(weights={"image-reward": tmp_path}))
    files = [tmp_path / "10.png", tmp_path / "20.png"]
    assert score(Samples(files, ["a", "bcd"])) == (11 + 23) / 2
    assert given["name"] == str(tmp_path / "ImageReward.pt")
    assert given["med_config"] == str(tmp_path / "med_config.json")
