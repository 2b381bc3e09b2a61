"""A model on a task: prompts, answers, scores, and how sure they are."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from jaxfw.core.errors import InputError
from jaxfw.core.shapes import Float
from jaxfw.evals.baselines import BASELINES, EXAMPLES, chance
from jaxfw.evals.intervals import wilson
from jaxfw.evals.items import Item, Task, draw, items, right
from jaxfw.evals.shots import Prompt, few_shot
from jaxfw.generate import LM
from jaxfw.report.contents import Interval

SPARE = 8  # tokens beyond the longest right output, for answers that run on
BATCH = 32


@dataclasses.dataclass(frozen=True, eq=False)
class Score:
    """Of N items: how many of their answers are right, of how many, and what was written."""

    task: str
    level: int
    shots: int
    items: Sequence[Item]
    outputs: Sequence[str]
    correct: Float[np.ndarray, "N"]
    asked: Float[np.ndarray, "N"]

    @property
    def shares(self) -> Float[np.ndarray, "N"]:
        """Of each item, the share of its answers that is right: what paired tests compare."""
        return self.correct / self.asked

    @property
    def accuracy(self) -> Interval:
        """Wilson's interval over items; the answers of one are taken to stand and fall together, which is cautious."""
        n, good, asked = len(self.items), int(self.correct.sum()), int(self.asked.sum())
        low, high = wilson(good * n // asked, n).low, wilson(-(-good * n // asked), n).high
        return Interval(good / asked, low, high)


def evaluate(
    lm: LM,
    task: Task,
    *,
    n: int,
    level: int | None = None,
    shots: int = 0,
    seed: int = 0,
    batch: int = BATCH,
    choosing: bool = False,
    **values: Any,
) -> Score:
    """Ask a model `n` test items, greedily.

    Args:
        lm: the model, with its tokenizer.
        task: the ability.
        n: different items.
        level: None is the task's standard one.
        shots: solved training items in front of each question, other ones for each.
        seed: of items and shots.
        batch: prompts that are answered together; those of like length are.
        choosing: take the likeliest of the items' choices, without working, instead of what the model writes.
        values: kv, protocol, policy, taps, router and others of `LM.generate`; units are the examples, and the lines of
            a question's context.

    Raises:
        InputError: a prompt with its answer exceeds the model's context, there are not so many items, or they have no
            choices.
    """
    if shots < 0:
        raise InputError(f"shots={shots} must be 0 or more.")
    if batch < 1:
        raise InputError(f"batch={batch} must be at least 1.")
    level = task.standard if level is None else level
    asked, prompts = questions(task, n=n, level=level, shots=shots, seed=seed)
    if choosing and values.get("protocol") == "ctx":
        raise InputError(
            "protocol='ctx' does not go with choosing=True, which reads prompts as a whole: take 'refeed'."
        )
    if choosing:
        outputs = [
            item.choices[choose(lm, prompt, item, **values)] for item, prompt in zip(asked, prompts, strict=True)
        ]
        return score(task.name, level, shots, asked, outputs)
    outputs = answer(lm, task.name, level, asked, prompts, batch=batch, **values)
    return score(task.name, level, shots, asked, outputs)


def questions(task: Task, *, n: int, level: int, shots: int, seed: int) -> tuple[list[Item], list[Prompt]]:
    """What `evaluate` asks."""
    asked = items(task, n=n, level=level, seed=seed)
    return asked, [few_shot(item, examples(task, level, shots, seed=seed, place=i)) for i, item in enumerate(asked)]


def tokens_needed(lm: LM, task: Task, *, n: int, level: int | None = None, shots: int = 0, seed: int = 0) -> int:
    """Cache slots that the longest of these prompts takes with its right answer: what a smaller cache is half of."""
    asked, prompts = questions(task, n=n, level=task.standard if level is None else level, shots=shots, seed=seed)
    return max(len(lm.tokenizer.encode(prompt.text + item.target)) for item, prompt in zip(asked, prompts, strict=True))


def half_window(lm: LM, tasks: Iterable[Task], *, n: int, seed: int = 0) -> int:
    """Half of the slots that the longest item of these tasks takes at its standard level: one small cache for all."""
    return max(tokens_needed(lm, task, n=n, seed=seed) for task in tasks) // 2


def score(task: str, level: int, shots: int, asked: Sequence[Item], outputs: Sequence[str]) -> Score:
    """What outputs are worth."""
    marks = [right(item, output) for item, output in zip(asked, outputs, strict=True)]
    correct, total = (np.array([f(mark) for mark in marks], np.float64) for f in (sum, len))
    return Score(task, level, shots, asked, outputs, correct, total)


def examples(task: Task, level: int, number: int, *, seed: int, place: int) -> list[Item]:
    """Training items for the question at a place."""
    rng = np.random.default_rng([seed, level, place, 1])
    return [draw(task, rng, level, "train") for _ in range(number)]


def answer(
    lm: LM, task: str, level: int, asked: Sequence[Item], prompts: Sequence[Prompt], *, batch: int, **values: Any
) -> list[str]:
    """The first line that the model writes behind each prompt."""
    sizes = [len(lm.tokenizer.encode(prompt.text)) for prompt in prompts]
    most = max(len(lm.tokenizer.encode(item.target, add_special_tokens=False)) for item in asked) + SPARE
    if max(sizes) + most > lm.config.context:
        raise InputError(
            f"task {task} at level {level} needs {max(sizes) + most} tokens ({max(sizes)} to read, {most} to write), "
            f"more than the model's {lm.config.context} positions: take an easier level or fewer shots."
        )
    order = sorted(range(len(prompts)), key=lambda i: sizes[i])
    outputs = [""] * len(prompts)
    for begin in range(0, len(order), batch):
        here = order[begin : begin + batch]
        texts = [prompts[i].text for i in here]
        texts += texts[-1:] * (batch - len(here))  # a batch of another size would be compiled anew
        units = [prompts[i].units for i in here]
        units += units[-1:] * (batch - len(here))
        made = lm.generate(texts, max_new_tokens=most, stop="\n", units=units, **values)
        for i, text in zip(here, made):
            outputs[i] = text
    return outputs


def choose(lm: LM, prompt: Prompt, item: Item, **values: Any) -> int:
    """The place of the likeliest of an item's choices, by the sum over its tokens; the prompt is read once.

    Raises:
        InputError: the item has no choices.
    """
    if not item.choices:
        raise InputError(f"the item {item.question!r:.60} has no choices: its answers are written, not chosen.")
    prefix = lm.prefix(prompt.text, **values)
    scores = lm.logprobs([f" {choice}\n" for choice in item.choices], prefix=prefix)
    return int(np.argmax([float(found.sum()) for found in scores]))


def baselines(task: Task, *, n: int, level: int | None = None, seed: int = 0) -> dict[str, Score]:
    """The trivial answers to the same items that `evaluate` asks."""
    level = task.standard if level is None else level
    asked = items(task, n=n, level=level, seed=seed)

    def outputs(say: Callable[[Sequence[Item], Item], str]) -> list[str]:
        return [say(examples(task, level, EXAMPLES, seed=seed, place=i), item) for i, item in enumerate(asked)]

    return {name: score(task.name, level, 0, asked, outputs(say)) for name, say in BASELINES.items()}


def row(found: Score, trivial: dict[str, Score]) -> dict[str, Any]:
    """A line of results: JSON values."""
    best = max(trivial, key=lambda name: trivial[name].accuracy.value)
    return {
        "task": found.task, "level": found.level, "shots": found.shots, "n": len(found.items),
        "accuracy": dataclasses.asdict(found.accuracy), "chance": chance(found.items),
        "best_baseline": {"name": best, **dataclasses.asdict(trivial[best].accuracy)},
    }  # fmt: skip
