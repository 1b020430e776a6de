"""Fronts of tiny pipelines, and their fitted plans as loops by hand over the stock networks."""

from __future__ import annotations

import functools

import numpy as np
import torch

import thg_engine
from pipelines import arguments, ddim, tiny
from rows_by_hand import Plain
from thg_engine.doctor import machine_line
from thg_engine.fitting.front import PlanEntry, PlanFront, ScaleFit, StockEntry, base_plan
from thg_engine.fitting.rows import Correction
from thg_engine.integrations.diffusers.planned import native_schedule, schedule_digest
from thg_engine.integrations.diffusers.resolve import fingerprint

SCALES = (3.0, 7.0)
DENSE, SPARSE = {"nfe": 12}, {"nfe": 10}
"""Targets that choose six rows of full guidance, and seven with both branches in three."""
STOCK = (
    *(StockEntry("dpm++2m", n, w, 0.8 / n**2) for n in (8, 20, 50) for w in (3.0, 7.0)),
    *(StockEntry("ddim", n, 7.0, 0.8 / n) for n in (10, 40)),
)


def entry_of(schedule, times, coarse, error, size=0.02) -> PlanEntry:
    """A plan with corrections drawn by chance: big enough to show, small enough to stay finite."""
    rng, deltas, rows = np.random.default_rng(len(times)), 0, []
    for i in range(len(times)):
        deltas += i in coarse
        rows.append([min(i + 1, 3), min(i + 1, 4), min(deltas, 3)])

    def fit(w: float) -> ScaleFit:
        made = [Correction(*(tuple(size * rng.normal(size=n)) for n in row), 0.5) for row in rows]
        return ScaleFit(w, error, 0.1 * error, 3 * error, tuple(made))

    return PlanEntry("dpmpp2m", tuple(times), coarse, tuple(map(fit, SCALES)))


def front_for(pipe, module, **changes) -> PlanFront:
    schedule, predicts = native_schedule(pipe.scheduler)
    whole = np.rint if schedule.kind == "vp" else np.asarray
    full = whole(np.linspace(999, 60, 6)).tolist()
    held = whole(np.linspace(999, 30, 7)).tolist()
    values = {
        "model": "tiny",
        "fingerprint": fingerprint(module),
        "scheduler_family": f"{schedule.kind}/{predicts}",
        "schedule_digest": schedule_digest(schedule),
        "prompts_sha256": "",
        "num_prompts": 4,
        "num_held_out": 2,
        "reference_steps": 240,
        "date": "2026-01-01",
        "machine": machine_line(),
        "seconds": (0.1, 0.2),
        "shape": (4, 8, 8),
        "plans": (
            entry_of(schedule, full, tuple(range(6)), 0.02),
            entry_of(schedule, held, (0, 2, 4), 0.03),
        ),
        "stock": STOCK,
    }
    return PlanFront(**{**values, **changes})


@functools.cache
def front() -> PlanFront:
    pipe = tiny()
    return front_for(pipe, pipe.unet)


def compiled(target=None, **options):
    pipe = tiny()
    return thg_engine.compile(pipe, calibration=front(), **(target or SPARSE), **options)


def entry_for(target) -> PlanEntry:
    return next(e for e in front().plans if e.is_full is (target is DENSE))


@torch.no_grad()
def by_hand(plan, x, network):
    """The rows of ``plan`` in float64 over the outputs of the network as it is.

    Args:
        plan: its rows.
        x: first sample.
        network: (cond, uncond) outputs of a float32 sample at a timestep.
    """
    plain = Plain(x.double().numpy())
    for row in plan.rows:
        fed = torch.from_numpy(plain.X[0]).to(x.dtype)
        c, u = network(fed, torch.tensor(row.timestep))
        plain.run(row, c.double().numpy(), u.double().numpy())
    return torch.from_numpy(plain.X[0])


def sd_by_hand(plan, seed: int = 1, **changes):
    """Stable Diffusion's own embeddings and latents, and `by_hand`."""
    pipe = tiny()
    given = arguments(pipe, seed, **changes)
    copies = given.get("num_images_per_prompt", 1)
    prompts = given["prompt"] if isinstance(given["prompt"], list) else [given["prompt"]]
    negative = given.get("negative_prompt", "")
    negative = [negative] * len(prompts)
    cond, uncond = pipe.encode_prompt(prompts, "cpu", copies, True, negative)
    size = (given["height"], given["width"])
    x = pipe.prepare_latents(len(cond), 4, *size, cond.dtype, "cpu", given["generator"])

    def network(fed, t):
        pair = torch.cat([fed, fed]), t, torch.cat([cond, uncond])
        return pipe.unet(*pair).sample.chunk(2)

    return by_hand(plan, x, network)


def close(found, expected, rtol: float = 3e-5) -> None:
    scale = float(expected.abs().max())
    assert float((found.double() - expected.double()).abs().max()) < rtol * scale


def fitted(target, scale: float = 5.0):
    schedule, predicts = native_schedule(ddim())
    return entry_for(target).plan(schedule, predicts, scale)


def base(target, scale: float = 5.0):
    schedule, predicts = native_schedule(ddim())
    return base_plan(entry_for(target), schedule, predicts, scale)
