"""What there is to know about a pipeline family and about a class of denoisers, as data.

A record says which attribute is the denoiser and how the branches share its calls; a layout says,
per class of denoiser, which arguments carry the batch. Nothing is inferred from shapes: with two
prompts a batch of 2 looks like guidance.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ArgumentLayout:
    """Arguments of one class of denoisers.

    Attributes:
        sample: name of the first argument, whose batch holds both branches.
        batched: arguments whose tensors carry the doubled batch in dim 0, nested or not.
        unbatched: arguments whose tensors may also be shared by both halves (batch 1 or none).
        shared: arguments whose tensors never carry the batch.
        repeated: batched arguments that may have several rows for one of the sample, its frames.
        residuals: batched arguments that companions have made, a ControlNet say.
        moving: batched arguments that are others in every step (a second sample, a noise level);
            a change of all the rest makes held deltas stale.
        second: batched arguments whose tensors carry the batch in dim 1.
        lists: arguments that are lists with one item per row of the batch; may be the sample.
        outputs: how many of the denoiser's outputs, counted from the first, are guided.
        drops: whether pipelines feed one branch alone for a part of a guided run and do not say
            so; the halves of the sample are then compared before a call is taken for doubled.
        extras: arguments that are set in calls besides those of a row, for guidance of another
            kind (blocks left out, picture and sound kept apart); such calls hold one branch.
    """

    sample: str
    batched: tuple[str, ...]
    unbatched: tuple[str, ...] = ("timestep",)
    shared: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()
    residuals: tuple[str, ...] = ()
    moving: tuple[str, ...] = ()
    second: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()
    outputs: int = 1
    drops: bool = False
    extras: tuple[str, ...] = ()


@dataclass(frozen=True)
class AdapterRecord:
    """One pipeline family.

    Attributes:
        pipeline: name of the class that defines ``__call__``.
        denoiser: attribute that holds the network.
        cond_half: which part of the batch is the conditional branch, counted from 0.
        scale: argument of the call that holds w, where the pipeline keeps no property of it.
        calls: whether the denoiser is called once per branch, the conditional one first; False:
            once per step, with all branches in the batch.
        branches: how many share the batch; the guidance of each but the conditional one is held.
        experts: attributes of further denoisers, which take over in the course of a run.
        companions: attributes of networks that are called before the denoiser in every step with
            the same batch, and whose answers it is given (a ControlNet).
        anchor: what has to be added to the pipeline's scale to give the w of ``u + w (c - u)``: 1
            where it forms ``c + scale (c - u)``.
        whole_step: whether it reads more than the sample from what ``scheduler.step`` returns.
    """

    pipeline: str
    denoiser: str = "unet"
    cond_half: int = 1
    scale: str = "guidance_scale"
    calls: bool = False
    branches: int = 2
    experts: tuple[str, ...] = ()
    companions: tuple[str, ...] = ()
    anchor: float = 0.0
    whole_step: bool = False
