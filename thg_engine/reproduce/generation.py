"""Samples of a row: sharded over processes, resumable, nothing generated twice.

Sample i is made from the noise of ``seed + i``, drawn on the CPU, and batches are cut from the list
of prompts before they are dealt to processes: neither their number nor a machine decides what a
sample is. (Kernels may round differently in batches of another size, which a resumed batch is.)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .. import compile, uncompile
from ..curves import Calibration
from ..errors import InvalidArgument, ThgError
from ..guidance import Guidance
from .methods import SOLVERS
from .samples import Folder, write_json, write_wav, write_whole
from .tables import Row, Table

FORMAT, VERSION = "thg-engine reproduction", 1
DEMO = "demo"
MAX_SEED = 2**62
"""Sample i has seed + i, and torch takes 63 bits."""
REFERENCE_SEED = 1_000_000
"""Distance of the seeds of a generated reference set from those of the rows."""


@dataclass(frozen=True)
class Job:
    """Everything that decides what the samples are.

    Attributes:
        table: whose rows are run.
        model: pipeline folder, or "demo".
        prompts: all of them; sample i belongs to prompt i.
        seed: of sample 0.
        dtype: of the weights.
        calibration: error curves for the rows that need them.
        out: folder of everything that is written.
        batch_size: samples at a time.
    """

    table: Table
    model: str
    prompts: tuple[str, ...]
    seed: int
    dtype: torch.dtype
    calibration: Calibration | None
    out: Path
    batch_size: int

    def folder(self, name: str) -> Folder:
        """Where the samples of row ``name`` lie."""
        return Folder(self.out / name, self.table.modality)

    def settings(self) -> dict[str, Any]:
        """What a second run in the same folder must share; prompts may be added at the end."""
        rows = {
            row.name: [row.solver, row.num_steps, row.method, dict(row.options)]
            for row in self.table.rows
        }
        curves = None if self.calibration is None else _digest(json.dumps(asdict(self.calibration)))
        return {
            "format": FORMAT,
            "version": VERSION,
            "table": self.table.key,
            "guidance_scale": self.table.guidance_scale,
            "rows": rows,
            "model": self.model,
            "model_files": _model_digest(self.model),
            "seed": self.seed,
            "dtype": str(self.dtype).removeprefix("torch."),
            "calibration": curves,
        }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _model_digest(model: str) -> str:
    """Names and sizes of a pipeline's files; reading gigabytes of weights would take minutes."""
    if model == DEMO:
        return ""
    files = sorted(path for path in Path(model).rglob("*") if path.is_file())
    return _digest("\n".join(f"{path.relative_to(model)} {path.stat().st_size}" for path in files))


def check_manifest(job: Job) -> dict[str, Any]:
    """What ``manifest.json`` will hold, checked against the one that is there; writes nothing.

    Raises:
        InvalidArgument: the folder holds samples of other settings or other prompts.
    """
    wanted = {**job.settings(), "prompts": [_digest(prompt) for prompt in job.prompts]}
    path = job.out / "manifest.json"
    if not path.is_file():
        return wanted
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = {}
    remedy = "give the same settings, or another folder."
    if not isinstance(found, dict):
        found = {}
    for key, value in wanted.items():
        there = found.get(key)
        if key == "prompts":
            shared = min(len(there or ()), len(value))
            if not there or there[:shared] != value[:shared]:
                raise InvalidArgument("--out", str(job.out), f"was made of other prompts; {remedy}")
            wanted[key] = max(there, value, key=len)
        elif there != value:
            what = f"was made with {key} = {there!r}, this run has {value!r}"
            raise InvalidArgument("--out", str(job.out), f"{what}; {remedy}")
    return wanted


def write_manifest(job: Job, manifest: dict[str, Any]) -> None:
    """Write what `check_manifest` returned."""
    job.out.mkdir(parents=True, exist_ok=True)
    write_json(job.out / "manifest.json", manifest)


@dataclass(frozen=True)
class Shard:
    """This process's part: every ``count``-th batch from number ``index`` on."""

    index: int = 0
    count: int = 1

    def batches(self, samples: int, batch_size: int) -> list[range]:
        """Prompt numbers of each batch."""
        cuts = range(0, samples, batch_size)
        every = [range(cut, min(cut + batch_size, samples)) for cut in cuts]
        return every[self.index :: self.count]


class Sampler:
    """Makes the missing samples of rows; loads the pipeline when the first one is missing."""

    def __init__(self, job: Job, shard: Shard | None = None) -> None:
        self.job, self.shard = job, shard or Shard()
        self._pipe: Any = None
        self._rows = 0

    def todo(self, name: str) -> list[list[int]]:
        """Prompt numbers without a sample, of this process, by batch."""
        folder = self.job.folder(name)
        batches = self.shard.batches(len(self.job.prompts), self.job.batch_size)
        return [missing for batch in batches if (missing := folder.missing(batch))]

    def run(
        self,
        row: Row,
        guidance: Guidance | None,
        done: Callable[[int], Any] = lambda count: None,
        seed_offset: int = 0,
    ) -> None:
        """Generate what is missing of ``row``; ``done`` hears of every sample that is written."""
        todo = self.todo(row.name)
        if not todo:
            return
        folder = self.job.folder(row.name)
        folder.path.mkdir(parents=True, exist_ok=True)
        with self._set_up(row, guidance) as plan:
            for indices in todo:
                before = self._rows
                samples = self._call(row, indices, seed_offset)
                folder.record(self.shard.index, len(indices), self._rows - before, plan)
                for i, sample in zip(indices, samples, strict=True):
                    self._save(folder.file(i), sample)
                    done(1)

    @contextmanager
    def _set_up(self, row: Row, guidance: Guidance | None) -> Iterator[int]:
        """The pipeline under the row's scheduler and method; gives the planned evaluations.

        The pipeline's own scheduler steps and nothing is replayed: scores are about the method, and
        evaluations are counted inside the network, past which a replay would run.
        """
        if self._pipe is None:
            self._pipe = self._load()
        pipe, steps = self._pipe, row.num_steps
        own = pipe.scheduler
        pipe.scheduler = SOLVERS[row.solver](own.config)
        try:
            plan = 2 * steps
            if guidance is not None:
                compile(pipe, guidance, fused=False, graph=False)
                scale = self.job.table.guidance_scale
                plan = pipe.thg.preview(pipe.scheduler, steps, scale).nfe
            yield plan
        finally:
            uncompile(pipe)
            pipe.scheduler = own

    def _load(self) -> Any:
        if self.job.model == DEMO:
            from ..demo import load_pipeline

            flow = "StableDiffusion3Pipeline" in self.job.table.pipelines
            pipe: Any = load_pipeline("flow" if flow else "sd", torch_dtype=self.job.dtype)
        else:
            from ..integrations.diffusers.loading import load

            pipe = load(self.job.model, self.job.dtype)
        pipe.set_progress_bar_config(disable=True)
        if getattr(pipe, "safety_checker", None) is not None:
            # It paints images black, and a score of black images says nothing about a method.
            pipe.safety_checker = None
        self._first_layer(pipe).register_forward_hook(self._count)
        return pipe

    @staticmethod
    def _first_layer(pipe: Any) -> torch.nn.Module:
        """Where the network begins: behind the hooks around it, which may leave rows out."""
        network = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
        for name in ("conv_in", "pos_embed"):
            layer = getattr(network, name, None)
            if isinstance(layer, torch.nn.Module):
                return layer
        raise ThgError(f"cannot count the evaluations of {type(network).__name__}.")

    def _count(self, module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        self._rows += output.shape[0]

    def _call(self, row: Row, indices: Sequence[int], seed_offset: int) -> Sequence[Any]:
        """PIL images, or arrays of sound."""
        job, audio = self.job, self.job.table.modality == "audio"
        seeds = [job.seed + seed_offset + i for i in indices]
        extra: dict[str, Any] = {"output_type": "np" if audio else "pil"}
        if job.model == DEMO and type(self._pipe).__name__ == "StableDiffusion3Pipeline":
            extra["max_sequence_length"] = 1  # zeros in T5's place: one is as good as 256
        result = self._pipe(
            [job.prompts[i] for i in indices],
            num_inference_steps=row.num_steps,
            guidance_scale=job.table.guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            **extra,
        )
        made: Sequence[Any] = result.audios if audio else result.images
        return made

    def _save(self, path: Path, sample: Any) -> None:
        if self.job.table.modality == "audio":
            rate = self._pipe.vocoder.config.sampling_rate
            write_whole(path, lambda part: write_wav(part, sample, rate))
        else:
            write_whole(path, lambda part: sample.save(part, format="PNG"))
