"""Writes docs/pipelines.json and docs/pipelines.md.

``PYTHONPATH=.:kernels:tests python tests/pipeline_report.py``; some minutes.

Pattern: read from the source of every pipeline class (`scan_pipelines`). Tier: what a compiled
pipeline of the zoo reached when it ran with a held delta. `test_pipeline_table.py` holds the table
to the installed diffusers, to the records and to the zoo.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from pathlib import Path

import diffusers

import thg_engine
import zoo_all  # noqa: F401  (it fills the registry)
from scan_pipelines import scan
from thg_engine.integrations.diffusers.records import RECORDS
from zoo import ZOO, Zoo, arguments, build

DOCS = Path(__file__).resolve().parents[1] / "docs"
REASONS = {
    "concat": "no adapter record yet",
    "concat-cond-first": "no adapter record yet",
    "lists": "the branches are items of lists, which no record describes yet",
    "two-calls": "one call per branch, which no record describes yet",
    "guider": "a guider makes the batches; there is no guider of ours yet",
    "three-way": "three branches: not one delta to hold",
    "distilled": "guidance is distilled into the network: one branch, nothing to save",
    "none": "no classifier-free guidance in a loop of its own",
}
_TWO_STAGES = "several denoisers, each with a scheduler of its own"
_ONNX = "an ONNX network, which cannot be hooked"
_TWICE = "its loop asks the scheduler twice per step: for x0 of both branches, then for the sample"
_TEXT_TOO = "the network puts out the places of the text too, as many as its branch has"
_OWN_COPIES = "copies of the scheduler step the frames, each at a noise level of its own"
_CHUNKS = "one run of all timesteps for every chunk of the video: rows are not timesteps"
SPECIFIC_REASONS = {
    "OnnxStableDiffusionPipeline": _ONNX,
    "OnnxStableDiffusionImg2ImgPipeline": _ONNX,
    "OnnxStableDiffusionInpaintPipeline": _ONNX,
    "OnnxStableDiffusionInpaintPipelineLegacy": _ONNX,
    "OnnxStableDiffusionUpscalePipeline": _ONNX,
    "StableDiffusionOnnxPipeline": _ONNX,
    "UnCLIPPipeline": _TWO_STAGES,
    "UnCLIPImageVariationPipeline": _TWO_STAGES,
    "LTXI2VLongMultiPromptPipeline": _CHUNKS,
    "AnyFlowFARPipeline": f"{_CHUNKS}; a cache holds keys of both branches",
    "StableDiffusionAttendAndExcitePipeline": "its attention maps and gradients steer the latents",
    "StableDiffusionPix2PixZeroPipeline": "its attention maps and gradients steer the latents",
    "StableDiffusionPanoramaPipeline": "several windows per step, each in calls of its own",
    "StableDiffusionParadigmsPipeline": "many steps in one call, repeated until they agree",
    "TextToVideoZeroPipeline": "its attention splits the batch into two halves by itself",
    "TextToVideoZeroSDXLPipeline": "its attention splits the batch into two halves by itself",
    "UniDiffuserPipeline": "picture, its features and text in one answer; the mode says what guides",
    "StableDiffusionGLIGENTextImagePipeline": (
        "two doubled calls per step, with boxes and without, and half of each is used"
    ),
    "CosmosTextToWorldPipeline": _TWICE,
    "CosmosVideoToWorldPipeline": _TWICE,
    "Cosmos2_5_TransferPipeline": _CHUNKS,
    "HunyuanVideoFramepackPipeline": _CHUNKS,
    "HeliosPipeline": _CHUNKS,
    "HeliosPyramidPipeline": f"{_CHUNKS}, at several sizes",
    "WanAnimatePipeline": _CHUNKS,
    "SkyReelsV2DiffusionForcingPipeline": _OWN_COPIES,
    "SkyReelsV2DiffusionForcingImageToVideoPipeline": _OWN_COPIES,
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": _OWN_COPIES,
    "ChronoEditPipeline": "it drops frames in the course of a run: what is held has another shape",
    "Ideogram4Pipeline": f"a network for each branch; {_TEXT_TOO}",
    "QwenImage21Pipeline": _TEXT_TOO,
    "Kandinsky6TI2VAPipeline": "picture and sound, both guided, with a scheduler each",
    "Cosmos3OmniPipeline": "picture, sound and action, all guided, with a scheduler each",
    "EasyAnimateControlPipeline": "its call fails in diffusers itself (an unknown argument)",
}
"""Why a class has no record, where there is more to say than its pattern does."""
HEAD = """# Pipelines

Every pipeline class of diffusers {version}, the pattern of its guidance, and what
`thg_engine.compile` makes of it. Written by `tests/pipeline_report.py`;
`tests/test_pipeline_table.py` fails when diffusers exports a class that is not here, or when a
record or a test comes or goes.

- **tier** `fused`: the conditional branch alone on most steps, and `scheduler.step` as one launch.
  `hook`: the conditional branch alone; the scheduler steps itself. `none`: runs as before, and the
  report says so.
- **tested**: a genuine pipeline of tiny random parts runs compiled: full guidance bit-identical to
  the plain pipeline, rows of the denoiser counted, a held delta equal to the same by hand, two
  prompts, several results, another size, callbacks, interruption, `uncompile`
  (`tests/test_zoo_compile.py`, `tests/test_compile*.py`). Of tier `none`: the pipeline is left as
  it is.

{counts}

| class | pattern | tier | tested | reason |
|---|---|---|---|---|
"""


def tier_of(entry: Zoo) -> str:
    """What a held delta reaches on the zoo's pipeline."""
    pipe = thg_engine.compile(build(entry), thg_engine.THG(grid=2))
    pipe(**arguments(entry))
    return "fused" if pipe.thg.stats()["fused_steps"] else "hook"


def rows() -> list[dict[str, object]]:
    """The table: class, pattern, tier, tested, reason."""
    zoo: dict[str, list[Zoo]] = {}
    for entry in ZOO.values():
        zoo.setdefault(entry.cls, []).append(entry)
    found = []
    for seen in scan():
        name = seen["class"]
        ready = [entry for entry in zoo.get(name, ()) if not entry.missing]
        row = {"class": name, "pattern": seen["pattern"], "tier": "none", "tested": bool(ready)}
        if name in RECORDS:
            row |= {"tier": tier_of(ready[0]) if ready else "hook", "reason": ""}
        else:
            usual = REASONS.get(seen["pattern"], seen["reason"])
            row["reason"] = SPECIFIC_REASONS.get(name, usual)
        found.append(row)
    return found


def main() -> None:
    """Write both files."""
    warnings.simplefilter("ignore")
    table = rows()
    (DOCS / "pipelines.json").write_text(json.dumps(table, indent=0) + "\n", encoding="utf-8")
    tiers = Counter(row["tier"] for row in table)
    counts = f"{len(table)} classes: " + ", ".join(f"{n} {tier}" for tier, n in tiers.items())
    text = HEAD.format(version=diffusers.__version__, counts=counts + ".")
    lines = [
        f"| {r['class']} | {r['pattern']} | {r['tier']} | {'yes' if r['tested'] else 'no'} "
        f"| {r['reason']} |"
        for r in table
    ]
    (DOCS / "pipelines.md").write_text(text + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
