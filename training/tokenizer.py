"""A CLIP tokenizer whose vocabulary is bytes, the caption words and little else.

Merges are learnt by plain byte-pair encoding until each caption word is one token. Encoding applies
merges in the order in which they were learnt, so each word is certain to come out whole; other
words fall apart into letters and still encode.

References:
    Sennrich, Haddow and Birch 2016, arXiv 1508.07909 (byte-pair encoding).
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from transformers import CLIPTokenizer

MAX_TOKENS = 16
START, END = "<|startoftext|>", "<|endoftext|>"


def _byte_symbols() -> list[str]:
    """The 256 printable stand-ins for bytes of GPT-2's byte-level encoding, printables first."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = 256 - len(printable)
    return [chr(code) for code in printable] + [chr(256 + i) for i in range(others)]


def _merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """``symbols`` with each occurrence of ``pair`` joined, left to right."""
    out: list[str] = []
    i = 0
    while i < len(symbols):
        found = tuple(symbols[i : i + 2]) == pair
        out.append(symbols[i] + symbols[i + 1] if found else symbols[i])
        i += 2 if found else 1
    return out


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, the most frequent pair first, until each word is one symbol."""
    split = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while any(len(symbols) > 1 for symbols in split):
        pairs = Counter(pair for s in split for pair in pairwise(s))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        split = [_merge(symbols, best) for symbols in split]
    return merges


def build_tokenizer(words: list[str]) -> CLIPTokenizer:
    """The tokenizer that holds each of ``words`` (ASCII, lower case) as one token."""
    symbols = _byte_symbols()
    merges = learn_merges(words)
    tokens = [*symbols, *(s + "</w>" for s in symbols), *(a + b for a, b in merges), START, END]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)
