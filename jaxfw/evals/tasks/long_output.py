"""Many answers in one output: each has to be the one to its own question."""

import dataclasses

import numpy as np

from jaxfw.evals.items import Item
from jaxfw.evals.tasks.arithmetic import Arithmetic


@dataclasses.dataclass(frozen=True)
class LongOutput:
    """`level` sums of two one-digit numbers, answered in their order, each behind its number.

    The table of sums is known; held out is the sequence of them.
    """

    name: str = "long_output"
    levels: tuple[int, ...] = (2, 4, 8, 16, 32)
    standard: int = 8

    def draw(self, rng: np.random.Generator, level: int) -> Item:
        parts = [Arithmetic().draw(rng, 1) for _ in range(level)]
        asked = "; ".join(f"{i}) {part.question}" for i, part in enumerate(parts, 1))
        return Item(
            identity=f"long_output {asked}",
            level=level,
            question=asked,
            answer="; ".join(f"{i}) {part.answer}" for i, part in enumerate(parts, 1)),
            many=True,
        )
