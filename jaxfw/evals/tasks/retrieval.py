"""A number said once among others, asked for in the end."""

import dataclasses

import numpy as np

from jaxfw.evals.items import Item

DIGITS = 3
NAMES = (
    "amber", "basil", "cedar", "delta", "ember", "fable", "grove", "hazel", "ivory", "jolly", "kayak", "lemon",
    "maple", "noble", "olive", "pearl", "quilt", "raven", "silver", "tulip", "umber", "velvet", "walnut", "yarrow",
    "zephyr", "cello", "drum", "flute", "harp", "horn", "lute", "piano", "violin", "baker", "cook", "farmer", "judge",
    "miner", "nurse", "pilot", "sailor", "smith", "tailor", "teacher", "painter", "class", "file", "header",
    "keyword", "message", "method", "module", "object", "option", "order", "path", "server", "socket", "string",
    "thread", "token", "tree", "tuple", "version", "week", "widget", "hour", "test", "text", "type", "user", "line",
    "list",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """`level` sentences that give a number to a name; where the one asked for stands is drawn evenly.

    The working is the sentence again. The numbers are drawn anew each time, and what is held out is the name with its
    number.
    """

    name: str = "retrieval"
    levels: tuple[int, ...] = (4, 8, 16, 32, 64)
    standard: int = 16

    def draw(self, rng: np.random.Generator, level: int) -> Item:
        names = rng.choice(np.array(NAMES), size=level, replace=False).tolist()
        numbers = ["".join(str(d) for d in rng.integers(0, 10, DIGITS)) for _ in names]
        return _items(names, numbers)[int(rng.integers(level))]


def same_context(item: Item) -> list[Item]:
    """The questions about every sentence that an item of this task shows, in their order."""
    said = [line.removesuffix(".").split(" ") for line in item.context.splitlines()]
    return _items([words[3] for words in said], [words[5] for words in said])


def _items(names: list[str], numbers: list[str]) -> list[Item]:
    sentences = [f"The code of {name} is {number}." for name, number in zip(names, numbers, strict=True)]
    context = "".join(f"{sentence}\n" for sentence in sentences)
    return [
        Item(
            identity=f"retrieval {name} {number}", level=len(names), context=context,
            question=f"What is the code of {name}?", answer=number, working=sentence,
        )
        for name, number, sentence in zip(names, numbers, sentences, strict=True)
    ]  # fmt: skip
