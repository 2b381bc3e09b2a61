"""Row recall: a task whose answer needs every token of one unit of the prompt, and its relatives, trained from nothing.

A prompt shows rows "[type value ... SEP]" and asks for one of them, "[Q type]"; the answer is its values. A method that
keeps tokens may find the right row and still lose the rest of it. With one value a row the same is retrieval, where one
token is enough; with `shifts`, the question adds a number to every value, so that nothing can be copied.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.embedded import fresh
from jaxfw.core.checkpoint import Checkpoints
from jaxfw.core.errors import InputError, unknown
from jaxfw.core.log import Metrics
from jaxfw.core.shapes import Bool, Int, PyTree
from jaxfw.evals.intervals import wilson
from jaxfw.generate.engine import generate
from jaxfw.kv import parse
from jaxfw.models import DecoderConfig
from jaxfw.train import NextTokenLoss, OptimizerConfig, init_state, make_optimizer, make_step, train

BOS, SEP, ASK, FIRST_TYPE = range(4)
LEARNED = 0.98  # whole answers with the full cache
PROTOCOLS = ("full", "refeed")


@dataclasses.dataclass(frozen=True)
class RecallTask:
    """`rows` of `values` tokens, of so many `types`, values of an alphabet of `letters`; `asked` rows in a lesson."""

    name: str
    rows: int
    values: int
    types: int
    letters: int
    asked: int
    shifts: bool = False

    @property
    def vocab(self) -> int:
        """Ids: marks, types, values, shifts."""
        return FIRST_TYPE + self.types + self.letters * (2 if self.shifts else 1)

    @property
    def prompt_length(self) -> int:
        """Tokens up to the question's end."""
        return 1 + self.rows * (self.values + 2) + 2 + self.shifts

    def lesson(self, rng: np.random.Generator) -> tuple[Int[np.ndarray, "T"], Bool[np.ndarray, "T"]]:
        """Rows, and questions with their answers up to a fixed length; and which tokens are answers.

        A quarter of the lessons have `rows` rows, the others one to as many, as texts differ in length: else models
        learn to rely on how many there are, and fail on fewer even if these are the right ones.
        """
        count = self.rows if rng.random() < 0.25 else int(rng.integers(1, self.rows + 1))
        types, values = self._rows(rng, count)
        shown = self._shown(types, values)
        tokens, is_answer = [shown], [np.zeros(len(shown), bool)]
        shown_row, asked_row = self.values + 2, self.values + 3 + self.shifts
        for _ in range(self.asked + (self.rows - count) * shown_row // asked_row):
            row = rng.integers(count)
            question, answer = self._question(rng, types[row], values[row])
            tokens += [question, answer, [SEP]]
            is_answer += [np.zeros(len(question), bool), np.ones(self.values, bool), np.zeros(1, bool)]
        flat, flags = np.concatenate(tokens).astype(np.int32), np.concatenate(is_answer)
        spare = 1 + self.rows * shown_row + self.asked * asked_row - len(flat)
        return np.pad(flat, (0, spare), constant_values=SEP), np.pad(flags, (0, spare))

    def prompts(self, n: int, seed: int) -> tuple[Int[np.ndarray, "n P"], Int[np.ndarray, "n v"], Int[np.ndarray, "n"]]:
        """Prompts with one question, the answers, and which row each asks for."""
        rng = np.random.default_rng([seed, 1])
        prompts, answers, asked = [], [], rng.integers(self.rows, size=n)
        for row in asked:
            types, values = self._rows(rng, self.rows)
            question, answer = self._question(rng, types[row], values[row])
            prompts.append(np.concatenate([self._shown(types, values), question]))
            answers.append(answer)
        return np.array(prompts, np.int32), np.array(answers, np.int32), asked

    def unit_ids(self, asked: Int[np.ndarray, "n"]) -> Int[np.ndarray, "n P"]:
        """A row is a unit; the one that is asked for has number 0, which only the oracle reads."""
        size = self.values + 2
        of_row = np.arange(self.prompt_length - 3 - self.shifts) // size
        out = np.full((len(asked), self.prompt_length), -1, np.int32)
        out[:, 1 : 1 + len(of_row)] = (of_row[None] - asked[:, None]) % self.rows
        return out

    def _rows(self, rng: np.random.Generator, count: int) -> tuple[Any, Any]:
        types = FIRST_TYPE + rng.choice(self.types, count, replace=False)
        return types, rng.integers(self.letters, size=(count, self.values))

    def _shown(self, types: Any, values: Any) -> Any:
        first = FIRST_TYPE + self.types
        seps = np.full((len(types), 1), SEP)
        return np.concatenate([[BOS], np.concatenate([types[:, None], first + values, seps], axis=1).ravel()])

    def _question(self, rng: np.random.Generator, type_: int, values: Any) -> tuple[Any, Any]:
        first = FIRST_TYPE + self.types
        if not self.shifts:
            return np.array([ASK, type_]), first + values
        shift = rng.integers(self.letters)
        question = np.array([ASK, type_, first + self.letters + shift])
        return question, first + (values + shift) % self.letters


TASKS = {
    task.name: task
    for task in (
        RecallTask("rows", rows=8, values=4, types=16, letters=12, asked=5),
        RecallTask("long rows", rows=8, values=8, types=16, letters=12, asked=3),
        RecallTask("pairs", rows=16, values=1, types=24, letters=12, asked=12),
        RecallTask("shifts", rows=8, values=4, types=16, letters=12, asked=5, shifts=True),
    )
}


@dataclasses.dataclass(frozen=True)
class RecallConfig:
    """Tasks of the claim, relatives, the model's size, its training, what is asked.

    Of each task the first `models` of the `seeds` count that learn it: small models do so at once or hardly.

    `methods` are kv strings with {budget} in them; budgets are the `shares` of the prompt, rounded down.
    """

    tasks: tuple[str, ...]
    relatives: tuple[str, ...]
    seeds: tuple[int, ...]
    models: int
    steps: int
    batch: int
    learning_rate: float
    width: int
    layers: int
    asked: int
    shares: tuple[float, ...]
    methods: tuple[str, ...]

    def __post_init__(self):
        for name in ("models", "steps", "batch", "asked"):
            if getattr(self, name) < 1:
                raise InputError(f"recall.{name}={getattr(self, name)} must be at least 1.")
        for name in (*self.tasks, *self.relatives):
            if name not in TASKS:
                raise unknown("recall.tasks", name, TASKS)
        if len(self.shares) != 2 or not 1 >= self.shares[0] > self.shares[1] > 0:
            raise InputError(f"recall.shares={self.shares} must be two shares of the prompt, the larger one first.")
        for method in self.methods:
            if "{budget}" not in method:
                raise InputError(f"recall.methods has {method!r}: write {{budget}} where the number belongs.")
            parse(method.format(budget=8), layers=self.layers)

    def budgets(self, task: RecallTask) -> tuple[int, ...]:
        """Tokens, for each share."""
        return tuple(int(share * task.prompt_length) for share in self.shares)

    def model(self, task: RecallTask) -> DecoderConfig:
        """A small LLaMA with grouped heads of width 16."""
        heads = self.width // 16
        return DecoderConfig(
            vocab=-(-task.vocab // 8) * 8, width=self.width, ffn=4 * self.width, layers=self.layers, heads=heads,
            kv_heads=max(1, heads // 2), head_dim=16, positions=256,
            init_std=self.width**-0.5,
        )  # fmt: skip


def trained(c: RecallConfig, task: RecallTask, seed: int) -> PyTree:
    """The parameters after all lessons."""
    config = c.model(task)
    optimizer = make_optimizer(
        OptimizerConfig(learning_rate=c.learning_rate, warmup=min(50, c.steps // 2), final=0.0, weight_decay=0.01),
        steps=c.steps,
    )
    loss, key = NextTokenLoss(config), jax.random.key(seed)

    def batch(step: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng([seed, step, 0])
        made = [task.lesson(rng) for _ in range(c.batch)]
        tokens, weights = (np.stack(part) for part in zip(*made, strict=True))
        return {"tokens": tokens, "weights": weights.astype(np.float32)}

    state = init_state(fresh(config, jax.random.fold_in(key, 0)), optimizer)
    with Checkpoints(None) as checkpoints, Metrics(None) as metrics:
        state = train(
            state, make_step(loss, optimizer), batch, jax.random.fold_in(key, 1), steps=c.steps, metrics=metrics,
            checkpoints=checkpoints, log_every=max(1, c.steps // 8), evaluate_every=c.steps, save_every=c.steps,
        )  # fmt: skip
    return state.params


def asked(
    c: RecallConfig, task: RecallTask, params: PyTree, method: str | None, protocol: str, seed: int
) -> tuple[Bool[np.ndarray, "n"], Bool[np.ndarray, "n"]]:
    """Of each prompt whether the first token is right, and whether all are."""
    config = c.model(task)
    prompts, answers, rows = task.prompts(c.asked, seed)
    policy = None if method is None else parse(method, layers=config.layers)
    units = task.unit_ids(rows)
    out = generate(
        config, params, prompts.tolist(), max_new_tokens=task.values, policy=policy, unit_ids=units.tolist(),
        refeed=protocol == "refeed", key=jax.random.key(seed),
    )  # fmt: skip
    said = np.array(out.tokens)
    return said[:, 0] == answers[:, 0], np.all(said == answers, axis=1)


def measure(c: RecallConfig, task: RecallTask, seed: int) -> list[dict[str, Any]]:
    """Train one model and ask it with every method, budget and protocol; one that has not learned, only once."""
    params, found = trained(c, task, seed), []
    methods = [(None, None), *((method, budget) for method in c.methods for budget in c.budgets(task))]
    for template, budget in methods:
        method = None if template is None else template.format(budget=budget)
        for protocol in PROTOCOLS if template else PROTOCOLS[:1]:
            first, exact = asked(c, task, params, method, protocol, seed)
            found.append({
                "task": task.name, "seed": seed, "method": "full" if template is None else template.split("@")[0],
                "kv": method, "budget": budget, "protocol": protocol, "n": c.asked,
                "first": dataclasses.asdict(wilson(int(first.sum()), c.asked)),
                "exact": dataclasses.asdict(wilson(int(exact.sum()), c.asked)),
            })  # fmt: skip
            line = found[-1]
            print(f"{task.name} seed {seed} {line['method']:28} {budget or '':>4} {protocol:7} first "
                  f"{line['first']['value']:.2f} exact {line['exact']['value']:.2f}", flush=True)  # fmt: skip
        if not has_learned(found):
            break
    return found


def has_learned(lines: Sequence[dict[str, Any]]) -> bool:
    """Whether a model answers with the full cache, so that there is something to lose."""
    return all(line["exact"]["value"] >= LEARNED for line in lines if line["method"] == "full")


def run_models(c: RecallConfig, path: Path | None) -> list[dict[str, Any]]:
    """Of each task of the claim the first `models` seeds that learn it, of each relative one; and those that did not.

    Lines are written to a file, model by model, and a run that was stopped goes on behind them.
    """
    done: dict[tuple[str, int], list[dict[str, Any]]] = {}
    if path is not None and path.is_file():
        for text in path.read_text(encoding="utf-8").splitlines():
            lines = json.loads(text)
            done[lines[0]["task"], lines[0]["seed"]] = lines
    out = []
    for name, wanted in [*((name, c.models) for name in c.tasks), *((name, 1) for name in c.relatives)]:
        learned = 0
        for seed in c.seeds:
            if learned == wanted:
                break
            lines = done.get((name, seed)) or measure(c, TASKS[name], seed)
            if path is not None and (name, seed) not in done:
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(lines) + "\n")
            learned += has_learned(lines)
            out += lines
    return out
