"""Solved examples in front of a question, and where each of them stands among the tokens."""

import dataclasses
from collections.abc import Sequence

from jaxfw.data.tokenizer import Tokenizer
from jaxfw.evals.items import Item


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What a model reads, and characters [begin, end): of each example, and of each unit of what precedes the question.

    Units are what may be forgotten as a whole: the examples, and the lines of the question's own context.
    """

    text: str
    shots: tuple[tuple[int, int], ...] = ()
    units: tuple[tuple[int, int], ...] = ()


def few_shot(item: Item, shots: Sequence[Item]) -> Prompt:
    """A question behind examples with their answers; none of them is the question itself."""
    text, spans = "", []
    for shot in shots:
        begin = len(text)
        text += shot.prompt + shot.target
        spans.append((begin, len(text)))
    units, begin = list(spans), len(text)
    for line in item.context.splitlines(keepends=True):
        units.append((begin, begin + len(line)))
        begin += len(line)
    return Prompt(text + item.prompt, tuple(spans), tuple(units))


def token_spans(tokenizer: Tokenizer, prompt: Prompt) -> list[tuple[int, int]]:
    """The tokens [begin, end) of each example in `tokenizer.encode(prompt.text)`.

    A token belongs to where its first character stands; what is put in front of the text belongs to no example.
    """
    units = tokenizer.unit_ids(prompt.text, prompt.shots)
    inside = [[i for i, unit in enumerate(units) if unit == number] for number in range(len(prompt.shots))]
    return [(found[0], found[-1] + 1) for found in inside]
