"""Trains the classifier that judges the boxed pipeline: garment class and colour.

    python -m training.train_classifier --out runs

The garment's loss is label-smoothed cross-entropy; the colour's, far easier, counts 0.3 of it.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from thg_engine.demo.classifier import DemoClassifier
from training import data
from training.common import Run, parser, start


@torch.no_grad()
def accuracy(model: DemoClassifier, garments: data.Garments, seed: int) -> tuple[float, float]:
    """Class and colour accuracy on ``garments``, colourised at random."""
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    colours = data.random_colours(len(garments), generator)
    right = torch.zeros(2)
    for batch in torch.arange(len(garments)).split(500):
        images = data.colourise(garments.grey[batch], colours[batch], generator)
        classes, hues = model(images)
        right[0] += (classes.argmax(1) == garments.classes[batch]).sum()
        right[1] += (hues.argmax(1) == colours[batch]).sum()
    return tuple((right / len(garments)).tolist())


def _step(run: Run, garments: data.Garments, batch_size: int) -> float:
    """One optimiser step on random garments in random colours, moved by up to two pixels."""
    generator = run.generator
    index = torch.randint(len(garments), (batch_size,), generator=generator)
    colours = data.random_colours(batch_size, generator)
    images = data.colourise(garments.grey[index], colours, generator)
    dy, dx = (torch.randint(-1, 2, (2,), generator=generator)).tolist()
    images = images.roll((dy, dx), (2, 3)) + 0.02 * torch.randn(images.shape, generator=generator)
    classes, hues = run.model(images)
    loss = cross_entropy(classes, garments.classes[index], label_smoothing=0.05)
    loss = loss + 0.3 * cross_entropy(hues, colours, label_smoothing=0.05)
    run.optimizer.zero_grad()
    loss.backward()
    run.optimizer.step()
    run.scheduler.step()
    return loss.item()


def train(args: argparse.Namespace) -> None:
    """Trains, measures on the test split, leaves ``classifier.pt`` in ``args.out``."""
    garments = data.load(args.data, "train")
    run = start(args, "classifier", DemoClassifier(), lr=args.lr, total=args.steps, decay=0.998)
    bar = tqdm(initial=run.step, total=args.steps, desc="classifier", mininterval=5)
    while run.step < args.steps:
        begin = time.perf_counter()
        run.model.train()
        loss = _step(run, garments, args.batch_size)
        run.average.update(run.model, run.step)
        run.step += 1
        run.seconds += time.perf_counter() - begin
        bar.update()
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        if run.step % args.save_every == 0:
            run.save()
    bar.close()
    judge = DemoClassifier()
    judge.load_state_dict(run.average.state)
    class_accuracy, colour_accuracy = accuracy(judge, data.load(args.data, "t10k"), seed=1)
    run.extra = {"class_accuracy": class_accuracy, "colour_accuracy": colour_accuracy}
    run.save()
    print(f"test accuracy: class {class_accuracy:.4f}, colour {colour_accuracy:.4f}")
    print(f"{run.step} steps, {run.seconds:.0f} s")


def main() -> None:
    """Reads the command line and trains."""
    cli = parser("Train the garment and colour classifier.")
    cli.add_argument("--steps", type=int, default=3600, help="optimiser steps")
    cli.add_argument("--batch-size", type=int, default=96, help="images per step")
    cli.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    args = cli.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    train(args)


if __name__ == "__main__":
    main()
