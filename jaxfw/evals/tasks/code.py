"""Small programs of Python to be executed: assignments to some names, and what is printed in the end."""

import dataclasses

import numpy as np

from jaxfw.evals.items import Item

NAMES = ("x", "y", "z")
MOST = 10  # values stay below: what is tried is following the program, not arithmetic


@dataclasses.dataclass(frozen=True)
class Code:
    """`level` assignments; the working repeats each and writes the value of every name behind it, as in x7.

    Held out is the program.
    """

    name: str = "code"
    levels: tuple[int, ...] = (2, 4, 6, 10, 16)
    standard: int = 4

    def draw(self, rng: np.random.Generator, level: int) -> Item:
        held: dict[str, int] = {}
        lines, trace = [], []
        for _ in range(level):
            name = NAMES[int(rng.integers(len(NAMES)))]
            right, filled, value = _right_side(rng, held)
            held[name] = value
            lines.append(f"{name} = {right}")
            trace.append(f"{name} = {right}: {filled}{name}{value}")
        asked = sorted(held)[int(rng.integers(len(held)))]
        program = "\n".join([*lines, f"print({asked})"])
        trace.append(f"print({asked}): {asked}{held[asked]}")
        return Item(
            identity=f"code {program}",
            level=level,
            question=f"What does this print?\n{program}",
            answer=str(held[asked]),
            working="; ".join(trace),
        )


def _right_side(rng: np.random.Generator, held: dict[str, int]) -> tuple[str, str, int]:
    """An expression over what is held, itself with the values behind the names, and its value in 0..MOST - 1.

    A number, with nothing to put in, where no name is held or the value would not fit.
    """
    number = int(rng.integers(1, MOST))
    known = sorted(held)
    if known and rng.random() < 0.8:
        first = known[int(rng.integers(len(known)))]
        second = known[int(rng.integers(len(known)))]
        p, q = held[first], held[second]
        made = (
            (f"{first} + {number}", f"{first}{p} + {number} = ", p + number),
            (f"{first} - {number}", f"{first}{p} - {number} = ", p - number),
            (f"{first} + {second}", f"{first}{p} + {second}{q} = ", p + q),
            (f"{first} - {second}", f"{first}{p} - {second}{q} = ", p - q),
        )
        text, filled, value = made[int(rng.integers(len(made)))]
        if 0 <= value < MOST:
            return text, filled, value
    return str(number), "", number
