"""A rule that only the shots tell: without them the question cannot be answered beyond chance."""

import dataclasses

import numpy as np

from jaxfw.evals.items import Item

SHIFTS = tuple(range(1, 10))


@dataclasses.dataclass(frozen=True)
class Rule:
    """x -> x + c for a c that only the shots show, `level` of them. Without one, chance is one in nine."""

    name: str = "rule"
    levels: tuple[int, ...] = (0, 1, 2, 4, 8)
    standard: int = 4

    def draw(self, rng: np.random.Generator, level: int) -> Item:
        shift = int(rng.choice(SHIFTS))
        *shown, asked = (int(x) for x in rng.choice(np.arange(10, 500), size=level + 1, replace=False))
        return Item(
            identity=f"rule {shift} {asked}",
            level=level,
            context="".join(f"Q: {x} -> ?\nA: {x + shift}\n" for x in shown),
            question=f"{asked} -> ?",
            answer=str(asked + shift),
            choices=tuple(str(asked + c) for c in SHIFTS),
        )
