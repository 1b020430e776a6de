"""Prompts of report and selection: the 80 pairs of garment and colour in two disjoint halves."""

from __future__ import annotations

from ..demo.classifier import CLASSES, COLOURS


def _caption(pair: int) -> str:
    words = f"{COLOURS[pair // len(CLASSES)]} {CLASSES[pair % len(CLASSES)]}"
    return f"a photo of {'an' if words[0] in 'aeiou' else 'a'} {words}"


def _spread(count: int, odd: bool) -> list[int]:
    """``count`` of the 40 pairs of a half, over garments and colours alike."""
    pairs = [pair for pair in range(80) if (pair % 10 + pair // 10) % 2 == odd]
    return [pairs[i * 17 % len(pairs)] for i in range(count)]


def report_prompts(count: int) -> list[str]:
    """Captions that numbers are reported on; at most 40."""
    return [_caption(pair) for pair in _spread(count, odd=False)]


def selection_prompts(count: int) -> list[str]:
    """Captions that plans are calibrated and chosen on; at most 40, none of the report's."""
    return [_caption(pair) for pair in _spread(count, odd=True)]


def quality_prompts(count: int) -> tuple[list[str], list[int], list[int]]:
    """Captions over all 80 pairs in turn, with their garment and colour indices."""
    pairs = [i * 37 % 80 for i in range(count)]
    return [_caption(pair) for pair in pairs], [p % 10 for p in pairs], [p // 10 for p in pairs]
