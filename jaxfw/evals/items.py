"""What a test item is, how an output is read, and which items are for training and which for tests.

An item asks a closed question. Its `identity` says what it is about, apart from how it is worded and what stands
around it; a hash of that puts it on one side, so training and test are disjoint by construction, whatever the seeds.
"""

import dataclasses
import hashlib
from typing import Literal, Protocol

import numpy as np

from jaxfw.core.errors import InputError, unknown

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")
HELD_OUT = 4  # one identity in so many is for tests
ARROW = "=>"  # between working and answer
TRIES = 1000


@dataclasses.dataclass(frozen=True)
class Item:
    """A question with its answer; `working` is what may be written before it, `context` what is read beforehand.

    `choices` are all answers that make sense, with the right one among them, where they are few. With `many`, the
    answer is a numbered list whose entries count one by one: "1) 5; 2) 9".
    """

    identity: str
    level: int
    question: str
    answer: str
    working: str = ""
    context: str = ""
    choices: tuple[str, ...] = ()
    many: bool = False

    @property
    def prompt(self) -> str:
        """What a model reads: its answer is to begin with a space and to end with the line."""
        return f"{self.context}Q: {self.question}\nA:"

    @property
    def target(self) -> str:
        """What it should write."""
        return f" {self.working} {ARROW} {self.answer}\n" if self.working else f" {self.answer}\n"


class Task(Protocol):
    """An ability: its name, levels of difficulty, from easy to hard, and the one at which systems are compared."""

    @property
    def name(self) -> str: ...
    @property
    def levels(self) -> tuple[int, ...]: ...
    @property
    def standard(self) -> int: ...

    def draw(self, rng: np.random.Generator, level: int) -> Item:
        """Any item of a level, of either side."""
        ...


def side(identity: str) -> Split:
    """Where an identity belongs."""
    digest = hashlib.sha256(identity.encode()).digest()
    return "test" if int.from_bytes(digest[:4], "big") % HELD_OUT == 0 else "train"


def draw(task: Task, rng: np.random.Generator, level: int, split: Split) -> Item:
    """An item of a side.

    Raises:
        InputError: the level or side is unknown.
    """
    if level not in task.levels:
        raise unknown(f"level of {task.name}", str(level), [str(known) for known in task.levels])
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    for _ in range(TRIES):
        item = task.draw(rng, level)
        if side(item.identity) == split:
            return item
    raise AssertionError(f"{task.name}: no {split} item of level {level} in {TRIES} draws")


def items(task: Task, *, n: int, level: int, seed: int, split: Split = "test") -> list[Item]:
    """`n` different items, a function of seed and level; a longer list begins with the shorter one.

    Raises:
        InputError: there are not so many, or the number or seed cannot be used.
    """
    if n < 1:
        raise InputError(f"n={n} must be at least 1: an accuracy of no item means nothing.")
    if seed < 0:
        raise InputError(f"seed={seed} must be 0 or more.")
    rng = np.random.default_rng([seed, level])
    found: dict[Item, None] = {}
    for _ in range(n):
        for _ in range(TRIES):
            item = draw(task, rng, level, split)
            if item not in found:
                found[item] = None
                break
        else:
            raise InputError(f"n={n} exceeds the {split} items of {task.name} at level {level}, about {len(found)}.")
    return list(found)


def parse(output: str) -> str:
    r"""The answer in an output: what stands behind the last arrow of its first line, or the whole line.

    >>> parse(" 3+4=7 => 7\nQ: and now?")
    '7'
    >>> parse(" seven.")
    'seven'
    """
    line = output.lstrip(" ").split("\n")[0]
    return line.rpartition(ARROW)[2].strip().removesuffix(".").rstrip()


def right(item: Item, output: str) -> list[bool]:
    """Exact match of the parsed answer; case and blanks inside count. One entry, or one for each of `many`.

    Of many, an answer counts behind its own number, the first time that it is given.

    >>> right(Item(identity="", level=2, question="", answer="1) 5; 2) 9", many=True), " 2) 9; 1) 4; 1) 5")
    [False, True]
    """
    found = parse(output)
    if not item.many:
        return [found == item.answer]
    given: dict[str, str] = {}
    for piece in found.split(";"):
        number, _, answer = piece.strip().partition(") ")
        given.setdefault(number, answer.strip())
    wanted = (piece.partition(") ") for piece in item.answer.split("; "))
    return [given.get(number) == answer for number, _, answer in wanted]
