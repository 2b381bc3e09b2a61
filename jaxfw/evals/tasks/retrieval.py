"""A number said once among others, asked for in the end."""

import dataclasses

import numpy as np

from jaxfw.evals.items import Item

DIGITS = 3
WORDS = (
    "amber", "basil", "cedar", "delta", "ember", "fable", "grove", "hazel", "ivory", "jolly", "kayak", "lemon", "maple",
    "noble", "olive", "pearl", "quilt", "raven", "silver", "tulip", "umber", "velvet", "walnut", "yarrow", "zephyr",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """`level` sentences that give a number to a name of two words; where the one asked for stands is drawn evenly.

    The working is the sentence again. The names are never known before, and what is held out is the name with its
    number.
    """

    name: str = "retrieval"
    levels: tuple[int, ...] = (4, 8, 16, 32, 64)
    standard: int = 16

    def draw(self, rng: np.random.Generator, level: int) -> Item:
        chosen = rng.choice(len(WORDS) ** 2, size=level, replace=False)
        names = [f"{WORDS[i // len(WORDS)]} {WORDS[i % len(WORDS)]}" for i in chosen.tolist()]
        numbers = ["".join(str(d) for d in rng.integers(0, 10, DIGITS)) for _ in names]
        sentences = [f"The code of {name} is {number}." for name, number in zip(names, numbers, strict=True)]
        asked = int(rng.integers(level))
        return Item(
            identity=f"retrieval {names[asked]} {numbers[asked]}",
            level=level,
            context="".join(f"{sentence}\n" for sentence in sentences),
            question=f"What is the code of {names[asked]}?",
            answer=numbers[asked],
            working=sentences[asked],
        )
