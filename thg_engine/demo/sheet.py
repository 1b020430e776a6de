"""The contact sheet: one column per method, one row per prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont

TILE, GAP, MARGIN_LEFT, MARGIN_TOP = 96, 6, 190, 44
INK, PAPER = (30, 30, 30), (255, 255, 255)


def contact_sheet(
    columns: Sequence[str], rows: Sequence[str], images: Sequence[torch.Tensor], max_rows: int = 10
) -> Image.Image:
    """Draw the sheet.

    Args:
        columns: a label per method, at most two lines.
        rows: a caption per prompt.
        images: per method a tensor ``(len(rows), 3, H, W)``, floating, values in [0, 1].
        max_rows: captions shown; the first ones.
    """
    shown = min(max_rows, len(rows))
    width = MARGIN_LEFT + len(columns) * (TILE + GAP)
    sheet = Image.new("RGB", (width, MARGIN_TOP + shown * (TILE + GAP)), PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=11)
    for i, label in enumerate(columns):
        draw.multiline_text((MARGIN_LEFT + i * (TILE + GAP), 8), label, INK, font)
    for j in range(shown):
        top = MARGIN_TOP + j * (TILE + GAP)
        draw.text((8, top + TILE // 2 - 6), rows[j].removeprefix("a photo of "), INK, font)
        for i, batch in enumerate(images):
            sheet.paste(_tile(batch[j]), (MARGIN_LEFT + i * (TILE + GAP), top))
    return sheet


def _tile(image: torch.Tensor) -> Image.Image:
    """One image ``(3, H, W)`` in [0, 1], enlarged without smoothing: pixels are the evidence."""
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.NEAREST)
