"""A rule that only the shots tell: without them the question cannot be answered beyond chance."""

import dataclasses

import numpy as np

from jaxfw.evals.items import Item, side

SHIFTS = tuple(range(1, 10))
NUMBERS = range(10, 500)


def _identity(number: int) -> str:
    return f"rule {number}"


SHOWN = np.array([number for number in NUMBERS if side(_identity(number)) == "train"])


@dataclasses.dataclass(frozen=True)
class Rule:
    """x -> x + c for a c that only the shots show, `level` of them. Without one, chance is one in nine.

    Held out is the number that is asked about: it is never shown either.
    """

    name: str = "rule"
    levels: tuple[int, ...] = (0, 1, 2, 4, 8)
    standard: int = 4

    def draw(self, rng: np.random.Generator, level: int) -> Item:
        shift = int(rng.choice(SHIFTS))
        asked = int(rng.choice(NUMBERS))
        shown = rng.choice(SHOWN[asked != SHOWN], size=level, replace=False).tolist()
        return Item(
            identity=_identity(asked),
            level=level,
            context="".join(f"Q: {x} -> ?\nA: {x + shift}\n" for x in shown),
            question=f"{asked} -> ?",
            answer=str(asked + shift),
            choices=tuple(str(asked + c) for c in SHIFTS),
        )
