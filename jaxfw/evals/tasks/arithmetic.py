"""Sums of whole numbers, column by column."""

import dataclasses

import numpy as np

from jaxfw.evals.items import Item


def columns(a: int, b: int) -> str:
    """The written method from the right: each column with what is carried into it.

    >>> columns(48, 75)
    '8+5+0=13 4+7+1=12'
    """
    x, y = str(a)[::-1], str(b)[::-1]
    carry, steps = 0, []
    for i in range(max(len(x), len(y))):
        p, q = int(x[i : i + 1] or 0), int(y[i : i + 1] or 0)
        steps.append(f"{p}+{q}+{carry}={p + q + carry}")
        carry = (p + q + carry) // 10
    return " ".join(steps)


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """a + b, both with `level` digits; held out is the pair, in whichever order."""

    name: str = "arithmetic"
    levels: tuple[int, ...] = (2, 3, 4, 6, 10)
    standard: int = 3

    def draw(self, rng: np.random.Generator, level: int) -> Item:
        a, b = (int(x) for x in rng.integers(10 ** (level - 1), 10**level, 2))
        return Item(
            identity=f"arithmetic {min(a, b)} {max(a, b)}",
            level=level,
            question=f"{a} + {b}",
            answer=str(a + b),
            working=columns(a, b),
        )
