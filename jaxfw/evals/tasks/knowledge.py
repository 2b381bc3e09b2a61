"""What is in the weights: facts of the world, asked in words not trained for them, and facts put together."""

import dataclasses

import numpy as np

from jaxfw.evals import world
from jaxfw.evals.items import Item

STATEMENTS = {
    "home": "{0} lives in {1}.",
    "trade": "{0} works as a {1}.",
    "instrument": "{0} plays the {1}.",
    "superior": "{0} reports to {1}.",
    "region": "{0} lies in {1}.",
}
QUESTIONS = {
    "home": ("Where does {0} live?", "What is the home of {0}?", "In which town is {0} at home?", "{0} lives where?"),
    "trade": ("What does {0} work as?", "What is the trade of {0}?", "How does {0} earn money?", "{0} is a what?"),
    "instrument": ("What does {0} play?", "What is the instrument of {0}?", "Which one has {0}?", "{0} plays what?"),
    "superior": ("Who does {0} report to?", "Who is the boss of {0}?", "Who is above {0}?", "{0} reports to whom?"),
    "region": ("Where does {0} lie?", "What is the region of {0}?", "Which region has {0}?", "{0} lies where?"),
}  # fmt: skip
PERSONAL = ("home", "trade", "instrument", "superior")


def statement(relation: str, subject: str) -> str:
    """A fact as a sentence."""
    return STATEMENTS[relation].format(subject, world.fact(relation, subject))


@dataclasses.dataclass(frozen=True)
class Facts:
    """A fact of a person, in one of four wordings; each fact has wordings that training leaves out.

    The level is how little known the person is: how often training mentions whom is for the training mixture to say.
    """

    name: str = "facts"
    levels: tuple[int, ...] = tuple(range(1, world.FAME_GROUPS + 1))
    standard: int = 1

    def draw(self, rng: np.random.Generator, level: int) -> Item:
        group = world.PEOPLE // world.FAME_GROUPS
        person = world.people()[int(rng.integers((level - 1) * group, level * group))]
        relation = PERSONAL[int(rng.integers(len(PERSONAL)))]
        wording = int(rng.integers(len(QUESTIONS[relation])))
        return Item(
            identity=f"facts {relation} {person} {wording}",
            level=level,
            question=QUESTIONS[relation][wording].format(person),
            answer=world.fact(relation, person),
            choices=world.values(relation),
        )


@dataclasses.dataclass(frozen=True)
class Composition:
    """The home, trade or instrument of someone's boss, or the boss's boss: `level` facts, one leading to the next.

    All are about the best known people. Which person is asked about with which chain is held out, in every wording; the
    facts themselves are all known.
    """

    name: str = "composition"
    levels: tuple[int, ...] = (2, 3, 4, 8, 16)
    standard: int = 2

    def draw(self, rng: np.random.Generator, level: int) -> Item:
        person = world.people()[int(rng.integers(world.PEOPLE // world.FAME_GROUPS))]
        last = ("home", "trade", "instrument")[int(rng.integers(3))]
        steps, at = [], person
        for _ in range(level - 1):
            steps.append(statement("superior", at))
            at = world.fact("superior", at)
        steps.append(statement(last, at))
        wording = int(rng.integers(len(QUESTIONS[last])))
        asked = "the boss of " * (level - 1) + person
        return Item(
            identity=f"composition {last} {level} {person}",
            level=level,
            question=QUESTIONS[last][wording].format(asked),
            answer=world.fact(last, at),
            working=" ".join(steps),
            choices=world.values(last),
        )
