"""A checked request, run: samples first, then scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .generation import REFERENCE_SEED, Sampler, Shard
from .metrics import Samples, Setting, make_scores, sized
from .report import Result
from .request import Request
from .tables import Row

BOXED = (
    "the pipeline in the box with its classifier in the place of Inception and CLIP: "
    "published numbers are of another model and another scale, and not to be compared with"
)


def reference_row(request: Request) -> Row:
    """Full guidance as in the table's first row; its samples stand for data that is not there."""
    first = request.job.table.rows[0]
    name, label = "reference", "full guidance, other seeds"
    return replace(first, name=name, label=label, method="cfg", options={}, published={}, note="")


def generate(request: Request, shard: Shard, progress: bool = True) -> None:
    """Make this process's share of every missing sample."""
    sampler = Sampler(request.job, shard)
    work = [(row, guidance, 0) for row, guidance in request.rows]
    if request.generate_reference:
        work.append((reference_row(request), None, REFERENCE_SEED))
    total = sum(len(batch) for row, _, _ in work for batch in sampler.todo(row.name))
    with tqdm(total=total, desc="samples", unit="sample", disable=not progress) as bar:
        for row, guidance, seed_offset in work:
            bar.set_postfix_str(row.name)
            sampler.run(row, guidance, bar.update, seed_offset)


def measure(request: Request, device: str) -> list[Result]:
    """Score every row that was run; in the table's order."""
    results = [_run_row(request, row) for row, _ in request.rows]
    if results and request.metrics:
        _score(request, results, device)
    results += [Result(row, unavailable=reason) for row, reason in request.unavailable]
    order = [row.name for row in request.job.table.rows]
    return sorted(results, key=lambda result: order.index(result.row.name))


def _run_row(request: Request, row: Row) -> Result:
    counted, plan = request.job.folder(row.name).evaluations()
    return Result(row, len(request.job.prompts), plan, counted)


def _score(request: Request, results: Sequence[Result], device: str) -> None:
    """Fill in what is measured."""
    job = request.job
    count = len(job.prompts)
    reference: Sequence[Path] = request.reference
    if request.generate_reference:
        reference = job.folder("reference").files(count)
    setting: dict[str, Any] = {"reference": reference, "weights": request.weights}
    setting |= {"batch_size": max(job.batch_size, 16), "device": device, "boxed": request.boxed}
    first = job.folder(results[0].row.name).files(count)
    if job.table.modality == "image":
        scores = make_scores(request.metrics, sized(setting, first))
    else:
        scores = make_scores(request.metrics, Setting(**setting))
    standing = job.folder(job.table.psnr_to).files(count) if job.table.psnr_to else []
    pairs = [(result, name) for result in results for name in scores]
    for result, name in tqdm(pairs, desc="scores", unit="score"):
        if name == "psnr" and result.row.name == job.table.psnr_to:
            continue
        files = job.folder(result.row.name).files(count)
        result.measured[name] = scores[name](Samples(files, job.prompts, standing))


def header(request: Request) -> dict[str, Any]:
    """What the results are about."""
    job = request.job
    reference = "none"
    if request.reference:
        folder = request.reference[0].parent.resolve()
        reference = f"{len(request.reference)} files of {folder}"
    elif request.generate_reference:
        reference = (
            f"{len(job.prompts)} images of full guidance from other seeds, for want of data: "
            "distances to the pipeline's own images, not to photographs"
        )
    features = BOXED if request.boxed else "each metric's own network"
    return {
        "format": "thg-engine reproduction results",
        "table": job.table.key,
        "title": job.table.title,
        "model": job.model,
        "seed": job.seed,
        "features": features,
        "reference": reference,
    }
