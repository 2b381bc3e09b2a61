"""Solved examples in front of a question, and where each of them stands among the tokens."""

import dataclasses
from collections.abc import Sequence

from jaxfw.data.tokenizer import Tokenizer
from jaxfw.evals.items import Item


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What a model reads; `shots` are the characters [begin, end) of each example."""

    text: str
    shots: tuple[tuple[int, int], ...] = ()


def few_shot(item: Item, shots: Sequence[Item]) -> Prompt:
    """A question behind examples with their answers; none of them is the question itself."""
    text, spans = "", []
    for shot in shots:
        begin = len(text)
        text += shot.prompt + shot.target
        spans.append((begin, len(text)))
    return Prompt(text + item.prompt, tuple(spans))


def token_spans(tokenizer: Tokenizer, prompt: Prompt) -> list[tuple[int, int]]:
    """The tokens [begin, end) of each example in `tokenizer.encode(prompt.text)`.

    A token belongs to where its first character stands; what is put in front of the text belongs to no example.
    """
    encoding = tokenizer.backend.encode(prompt.text)
    # Special tokens that were put around the text have no place in it, which the library writes as (0, 0).
    starts = [
        begin if not special else -1
        for (begin, _), special in zip(encoding.offsets, encoding.special_tokens_mask, strict=True)
    ]
    inside = [[i for i, at in enumerate(starts) if begin <= at < end] for begin, end in prompt.shots]
    return [(found[0], found[-1] + 1) for found in inside]
