"""A rule that only the shots tell: without them the question cannot be answered beyond chance."""

import dataclasses

import numpy as np

from jaxfw.evals.items import Item, side
from jaxfw.evals.tasks.retrieval import NAMES as LABELS
from jaxfw.evals.tasks.safety import LIVING, THINGS


def _identity(noun: str) -> str:
    return f"rule {noun}"


SHOWN = tuple(tuple(noun for noun in kind if side(_identity(noun)) == "train") for kind in (LIVING, THINGS))


@dataclasses.dataclass(frozen=True)
class Rule:
    """Living beings have one label and things another, which only the shots show, `level` of them in turns.

    Held out is the noun that is asked about; no shot shows a held-out one. The labels mean nothing by themselves
    (SUL-ICL of Wei et al. 2023, arXiv:2303.03846).
    """

    name: str = "rule"
    levels: tuple[int, ...] = (0, 1, 2, 4, 8)
    standard: int = 4

    def draw(self, rng: np.random.Generator, level: int) -> Item:
        labels = rng.choice(np.array(LABELS), size=2, replace=False).tolist()
        kind, first = (int(x) for x in rng.integers(2, size=2))
        noun = (LIVING, THINGS)[kind][int(rng.integers(len((LIVING, THINGS)[kind])))]
        kinds = [(first + i) % 2 for i in range(level)]
        shown = [(k, _another(rng, k, noun)) for k in kinds]
        return Item(
            identity=_identity(noun),
            level=level,
            context="".join(f"Q: {other}\nA: {other} {labels[k]}\n" for k, other in shown),
            question=noun,
            answer=f"{noun} {labels[kind]}",
            choices=tuple(f"{noun} {label}" for label in LABELS),
        )


def _another(rng: np.random.Generator, kind: int, noun: str) -> str:
    nouns = [other for other in SHOWN[kind] if other != noun]
    return nouns[int(rng.integers(len(nouns)))]
