"""What the embedded model reads: solved items of the training side, statements of facts, repeated segments, English."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from jaxfw.core.errors import InputError
from jaxfw.core.shapes import Float, Int
from jaxfw.data import Tokenizer, stdlib_docstrings
from jaxfw.evals import TASKS, Item, draw, side, world
from jaxfw.evals.tasks.knowledge import PERSONAL, statement
from jaxfw.evals.tasks.retrieval import same_context

STATEMENTS = "statements"
PROMPT_WEIGHT = 0.1  # of tokens that are read rather than answered
SOLO = 0.7  # of the items stand without shots
MOST_SHOTS = 4
MOST_QUESTIONS = 7  # about one context, beyond the first
EASE = 0.6  # each level is drawn so many times as often as the easier one before it,
FAME_EASE = 0.35  # and each group of people as often as the better known one
BEYOND = MappingProxyType({"composition": 16, "arithmetic": 10, "long_output": 32})  # levels that no lesson has
VOCABULARY_ITEMS = 400  # of each task at each level, from which the tokenizer learns its words

TRIES = 1000  # until a lesson fits into a row

# A conversation is shots and a question; what a system message says stands in front of them.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'Q: ' + message['content'] + '\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    "A:{% generation %}{{ ' ' + message['content'] + '\n' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)

Piece = tuple[str, float]  # a text and the weight of its tokens


@dataclasses.dataclass(frozen=True, eq=False)
class Lessons:
    """Documents for `jaxfw.data.Procedural`: `shares` says how often each task (or "statements") is drawn."""

    tokenizer: Tokenizer
    shares: Mapping[str, float]
    most_tokens: int

    def __call__(self, rng: np.random.Generator) -> tuple[Int[np.ndarray, "T"], Float[np.ndarray, "T"]]:
        names = list(self.shares)
        weights = np.array([self.shares[name] for name in names])
        for _ in range(TRIES):
            name = names[int(rng.choice(len(names), p=weights / weights.sum()))]
            pieces = known_person(rng) if name == STATEMENTS else solved(rng, name)
            tokens, counts = encode(self.tokenizer, pieces)
            if len(tokens) <= self.most_tokens:
                return tokens, counts
        raise InputError(f"train.length={self.most_tokens} holds none of {TRIES} lessons: rows must be longer.")


def encode(tokenizer: Tokenizer, pieces: list[Piece]) -> tuple[Int[np.ndarray, "T"], Float[np.ndarray, "T"]]:
    """A document, begun and ended by the tokenizer's marks, with the weight of each token's prediction."""
    ids, weights = [tokenizer.bos_id], [0.0]
    for text, weight in pieces:
        found = tokenizer.encode(text, add_special_tokens=False)
        ids += found
        weights += [weight] * len(found)
    return np.array([*ids, tokenizer.eos_id], np.int32), np.array([*weights, PROMPT_WEIGHT], np.float32)


def falling(levels: int, by: float = EASE) -> Float[np.ndarray, "levels"]:
    """Shares of the levels, each so many times the one before."""
    shares = by ** np.arange(levels)
    return shares / shares.sum()


def solved(rng: np.random.Generator, name: str) -> list[Piece]:
    """An item behind shots of its own level, or none, all with their answers; of retrieval, with more questions."""
    task = TASKS[name]
    levels = [level for level in task.levels if level != BEYOND.get(name)]
    level = int(rng.choice(levels, p=_level_shares(name, len(levels))))
    if name == "rule":
        return _applied(draw(task, rng, level, "train"))
    count = 0 if rng.random() < SOLO else int(rng.integers(1, MOST_SHOTS + 1))
    found: list[Item] = [draw(task, rng, level, "train") for _ in range(1 + count)]
    if name == "retrieval" and not count:
        found += [dataclasses.replace(item, context="") for item in _others(rng, found[0])]
    return [piece for item in found for piece in ((item.prompt, PROMPT_WEIGHT), (item.target, 1.0))]


def _applied(item: Item) -> list[Piece]:
    """A rule in its shots and its question: each label that was seen before is an answer to be learned."""
    seen: set[str] = set()
    pieces: list[Piece] = []
    for line in (item.prompt + item.target).splitlines(keepends=True):
        who, said = line[:2], line[2:]
        label = said.rsplit(" ", 1)[1]
        pieces += [(who, PROMPT_WEIGHT), (said, PROMPT_WEIGHT if who == "Q:" else float(label in seen))]
        seen.add(label)
    return pieces


def _level_shares(name: str, levels: int) -> Float[np.ndarray, "levels"]:
    """Easy levels more often than hard ones; of the rule, which few shots do not tell, rather many."""
    shares = falling(levels, FAME_EASE if name == "facts" else EASE)
    return shares[::-1] if name == "rule" else shares


def _others(rng: np.random.Generator, item: Item) -> list[Item]:
    """Some more questions about what an item of retrieval shows: a long context that is read for one answer teaches
    little.
    """
    more = [other for other in same_context(item) if other != item and side(other.identity) == "train"]
    chosen = rng.permutation(len(more))[:MOST_QUESTIONS]
    return [more[i] for i in chosen.tolist()]


def known_person(rng: np.random.Generator) -> list[Piece]:
    """Everything about someone, in any order, or the region of a town; the well-known are met more often."""
    if rng.random() < 0.05:
        town = world.towns()[int(rng.integers(world.TOWNS))]
        return [(statement("region", town) + "\n", 1.0)]
    group = int(rng.choice(world.FAME_GROUPS, p=falling(world.FAME_GROUPS, FAME_EASE)))
    size = world.PEOPLE // world.FAME_GROUPS
    person = world.people()[group * size + int(rng.integers(size))]
    facts = [statement(relation, person) for relation in rng.permutation(PERSONAL)]
    return [(" ".join(facts) + "\n", 1.0)]


def vocabulary_texts() -> list[str]:
    """What the tokenizer is trained on."""
    rng = np.random.default_rng(0)
    texts = ["".join(text for text, _ in known_person(rng)) for _ in range(4 * world.PEOPLE)]
    for task in TASKS.values():
        for level in task.levels[:3]:
            drawn = (draw(task, rng, level, "train") for _ in range(VOCABULARY_ITEMS))
            texts += [item.prompt + item.target for item in drawn]
    return texts + stdlib_docstrings()
