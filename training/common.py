"""What the training scripts share: checkpoints, learning rate, moving averages, loop, flags."""

from __future__ import annotations

import argparse
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from training.data import DEFAULT_DATA_DIR


def parser(description: str) -> argparse.ArgumentParser:
    """A parser with the flags that every training script takes."""
    out = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    out.add_argument("--data", type=Path, default=DEFAULT_DATA_DIR, help="folder of the idx files")
    out.add_argument("--out", type=Path, default=Path("runs"), help="folder for checkpoints")
    out.add_argument("--seed", type=int, default=0, help="seed of weights, data order and noise")
    out.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    out.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
    return out


def cosine_lr(total: int, warmup: int) -> Any:
    """Multiplier of the learning rate: linear warm-up, then half a cosine down to zero."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))

    return factor


class MovingAverage:
    """Exponential moving average of a module's parameters and buffers, warmed up from step 0."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.state = {k: v.detach().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Moves the average towards ``model`` by 1 - min(decay, (1 + step) / (10 + step))."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                self.state[name].lerp_(value, weight)
            else:
                self.state[name].copy_(value)


@dataclass
class Run:
    """All that a run needs to go on after an interruption, saved to and read from one file."""

    path: Path
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    average: MovingAverage
    generator: torch.Generator
    step: int = 0
    seconds: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)

    def save(self) -> None:
        """Writes the checkpoint; a reader sees the old one or the new one, never half of it."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "generator": self.generator.get_state(),
            "torch_rng": torch.get_rng_state(),
            "step": self.step,
            "seconds": self.seconds,
            "extra": self.extra,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.path)

    def resume(self) -> bool:
        """Reads the checkpoint if there is one; says whether there was."""
        if not self.path.is_file():
            return False
        state = torch.load(self.path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.average.state = state["average"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["torch_rng"])
        self.step, self.seconds, self.extra = state["step"], state["seconds"], state["extra"]
        return True


def start(
    args: argparse.Namespace, name: str, model: nn.Module, *, lr: float, total: int, decay: float
) -> Run:
    """A run of AdamW with a cosine learning rate, resumed from ``args.out`` where it can be."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-3)
    factor = cosine_lr(total, warmup=min(200, max(1, total // 10)))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    generator = torch.Generator().manual_seed(args.seed)
    average = MovingAverage(model, decay)
    run = Run(args.out / f"{name}.pt", model, optimizer, scheduler, average, generator)
    if run.resume():
        print(f"resumed {run.path} at step {run.step}")
    return run


def descend(run: Run, loss: torch.Tensor) -> float:
    """One optimiser step down ``loss``, gradients clipped to a norm of 1; returns its value."""
    run.optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    run.optimizer.step()
    run.scheduler.step()
    return loss.item()


def fit(run: Run, args: argparse.Namespace, step: Callable[[], float]) -> None:
    """Calls ``step``, which returns a loss, up to ``args.steps`` in all; saves now and then."""
    name = run.path.stem
    bar = tqdm(initial=run.step, total=args.steps, desc=name, mininterval=10)
    smooth = run.extra.get("loss", 1.0)
    while run.step < args.steps:
        begin = time.perf_counter()
        loss = step()
        run.average.update(run.model, run.step)
        smooth += (loss - smooth) * max(0.005, 1 / (run.step + 1))
        run.step += 1
        run.seconds += time.perf_counter() - begin
        bar.update()
        bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
        run.extra |= {"loss": smooth, "batch_size": args.batch_size, "total": args.steps}
        if run.step % args.save_every == 0 or run.step == args.steps:
            run.save()
    bar.close()
    print(f"{run.step} steps, {run.seconds:.0f} s, loss {smooth:.4f}")


def machine(threads: int) -> str:
    """Architecture, processor and threads, as results name the machine that they come from."""
    processor = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(encoding="utf-8").splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        processor = names[0] if names else processor
    parts = [platform.machine(), processor, f"{threads} thread{'s' * (threads != 1)}"]
    return ", ".join(part for part in parts if part)


def load_average(path: Path, model: nn.Module) -> dict[str, Any]:
    """Puts a checkpoint's averaged weights into ``model``; returns step, seconds and extra."""
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["average"])
    return {key: state[key] for key in ("step", "seconds", "extra")}
