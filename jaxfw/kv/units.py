"""Where the units of a text lie: its shots, lines or sentences, as characters, and then as tokens.

What follows the last separator is the question: it belongs to no unit, and neither does what stands before the first.
"""

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType

Spans = tuple[tuple[int, int], ...]


def blocks(text: str) -> Spans:
    r"""Pieces that end with an empty line, as few-shot prompts are written.

    >>> blocks("Q: 1\nA: 2\n\nQ: 3\nA: 4\n\nQ: 5")
    ((0, 11), (11, 22))
    """
    return _split(text, r"\n[ \t]*\n\s*")


def lines(text: str) -> Spans:
    r"""Lines that end.

    >>> lines("The red cat.\nThe blue dog.\nQ: which?")
    ((0, 13), (13, 27))
    """
    return _split(text, r"\n+")


def sentences(text: str) -> Spans:
    r"""Pieces that end with a full stop, question or exclamation mark and a space, or with a line.

    >>> sentences("Cats sleep. Dogs bark! Who purrs?")
    ((0, 12), (12, 23))
    """
    return _split(text, r"[.!?]+[\"')\]]*\s+|\n+")


def _split(text: str, separator: str) -> Spans:
    ends = [found.end() for found in re.finditer(separator, text)]
    begins = [0, *ends[:-1]]
    return tuple((begin, end) for begin, end in zip(begins, ends, strict=False) if text[begin:end].strip())


SEGMENTERS: Mapping[str, Callable[[str], Spans]] = MappingProxyType(
    {"blocks": blocks, "lines": lines, "sentences": sentences}
)
