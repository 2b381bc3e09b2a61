"""What answers without understanding: a system that is not clearly above the best of these has shown nothing.

Each sees what a prompt could hold, examples of the training side, and the question.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from types import MappingProxyType

from jaxfw.evals.items import Item

EXAMPLES = 16
Baseline = Callable[[Sequence[Item], Item], str]


def majority(examples: Sequence[Item], item: Item) -> str:
    """The commonest answer of the examples, the first of several."""
    return Counter(example.answer for example in examples).most_common(1)[0][0]


def copy_last(examples: Sequence[Item], item: Item) -> str:
    """The last answer that was read: in what stands before the question, or else in the last example."""
    words = re.findall(r"\w+", item.context)
    return words[-1] if words else examples[-1].answer


def nearest(examples: Sequence[Item], item: Item) -> str:
    """The answer of the example whose question shares most words with this one (Jaccard), the first of several."""
    asked = _words(item)

    def likeness(example: Item) -> float:
        words = _words(example)
        return len(asked & words) / max(len(asked | words), 1)

    return max(examples, key=likeness).answer


def _words(item: Item) -> set[str]:
    return set(re.findall(r"\w+", item.question))


BASELINES: MappingProxyType[str, Baseline] = MappingProxyType(
    {"majority": majority, "copy last": copy_last, "nearest": nearest}
)


def chance(items: Sequence[Item]) -> float:
    """The mean accuracy of drawing among the choices; 0 for answers without any."""
    return sum(1 / len(item.choices) if item.choices else 0.0 for item in items) / len(items)
