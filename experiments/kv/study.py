"""Methods x budgets x protocols x abilities on one model: what each costs, and what it does to the model's abilities.

Every cell asks the same items, so that differences to the full cache are paired. Cells are written to a file as they
are done, and a run that was stopped goes on behind them.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxfw.core.errors import InputError, unknown
from jaxfw.core.keys import row_keys
from jaxfw.evals import TASKS, paired_difference
from jaxfw.evals.evaluate import baselines, evaluate, questions
from jaxfw.generate import LM, engine, programs
from jaxfw.generate.compression import PROTOCOLS, reading
from jaxfw.generate.prompts import bucket, pack_units
from jaxfw.kv import KVCache, parse
from jaxfw.kv.analysis import kept_share
from jaxfw.models import attention_spec
from jaxfw.models.cache import Cache

FULL = "full cache"


@dataclasses.dataclass(frozen=True)
class Asked:
    """An ability at a level (0: its standard one), with so many shots."""

    task: str
    shots: int
    level: int = 0

    def __post_init__(self):
        if self.task not in TASKS:
            raise unknown("study.task", self.task, TASKS)

    @property
    def name(self) -> str:
        """As in tables."""
        level = f", level {self.level}" if self.level else ""
        return f"{self.task}, {self.shots} shots{level}" if self.shots else f"{self.task}{level}"

    @property
    def key(self) -> tuple[str, int, int]:
        """Task, shots and level, the standard one by its number."""
        return self.task, self.shots, self.level or TASKS[self.task].standard


def ability(line: dict[str, Any]) -> tuple[str, int, int]:
    """The key of what a line measures."""
    return line["task"], line["shots"], line["level"]


def to_asked(text: str) -> Asked:
    """`arithmetic:4` or `arithmetic:4:3`: task, shots, level; `@0.2` behind it is the only budget."""
    task, *numbers = text.partition("@")[0].split(":")
    if not 1 <= len(numbers) <= 2 or not all(number.isdigit() for number in numbers):
        raise InputError(f"study.abilities has {text!r}: write task:shots or task:shots:level, as in arithmetic:4.")
    return Asked(task, *map(int, numbers))


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """What is asked (`abilities`, and `more` by `few` methods only), how it is compressed, and how many items.

    The `few`, as far as they are among the methods, are also those that are measured under the other protocols.

    Abilities are written task:shots, those of `more` also task:shots@keep. `methods` are kv strings with {keep} in
    them. `keeps` are measured under `protocol`, the other protocols at `compared`.
    """

    abilities: tuple[str, ...]
    more: tuple[str, ...]
    methods: tuple[str, ...]
    few: tuple[str, ...]
    keeps: tuple[float, ...]
    compared: float
    protocol: str
    asked: int
    room: int
    seed: int

    def __post_init__(self):
        if self.asked < 1:
            raise InputError(f"study.asked={self.asked} must be at least 1.")
        if self.protocol not in PROTOCOLS:
            raise unknown("study.protocol", self.protocol, PROTOCOLS)
        for text in (*self.abilities, *self.more):
            to_asked(text)
        for method in (*self.methods, *self.few):
            if "{keep}" not in method:
                raise InputError(f"study.methods has {method!r}: write {{keep}} where the share belongs.")
            parse(method.format(keep=self.compared), layers=2)
        if self.compared not in self.keeps:
            raise InputError(f"study.compared={self.compared} must be one of study.keeps={self.keeps}.")

    def cells(self) -> Iterator["Cell"]:
        """All cells, the full caches first of each ability; protocols other than the first at one budget."""
        for text in (*self.abilities, *self.more):
            asked, is_main = to_asked(text), text in self.abilities
            only = text.partition("@")[2]
            yield Cell(asked, None, 1.0, "full")
            for method in self.methods:
                if not is_main and method not in self.few:
                    continue
                for keep in self.keeps:
                    if is_main or not only or keep == float(only):
                        yield Cell(asked, method, keep, self.protocol)
                for protocol in PROTOCOLS if is_main and method in self.few else ():
                    if protocol != self.protocol:
                        yield Cell(asked, method, self.compared, protocol)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One measurement."""

    asked: Asked
    method: str | None
    keep: float
    protocol: str

    @property
    def kv(self) -> str | None:
        """The method with its budget."""
        return None if self.method is None else self.method.format(keep=self.keep)

    @property
    def label(self) -> str:
        """The method as in tables: without the budget."""
        return FULL if self.method is None else label(self.method)


def label(method: str) -> str:
    """`snapkv(w=8)@keep={keep},rd={keep}` -> `snapkv(w=8), rd`."""
    head, _, tail = method.partition("@")
    more = [piece.partition("=") for piece in tail.replace("{keep}", "").split(",")[1:]]
    return ", ".join([head, *(name if name == "rd" else f"{name}={value}" for name, _, value in more)])


def measure(lm: LM, c: StudyConfig, cell: Cell) -> dict[str, Any]:
    """The answers' marks, the accuracy, and what stayed of the prompts."""
    task = TASKS[cell.asked.task]
    level = cell.asked.level or task.standard
    options: dict[str, Any] = {"kv": cell.kv, "protocol": cell.protocol} if cell.kv else {}
    room = c.room if cell.asked in map(to_asked, c.abilities) else None
    found = evaluate(
        lm, task, n=c.asked, level=level, shots=cell.asked.shots, seed=c.seed, batch=c.asked, room=room, **options
    )
    line: dict[str, Any] = {
        "task": cell.asked.task, "shots": cell.asked.shots, "level": level, "method": cell.label, "kv": cell.kv,
        "keep": cell.keep, "protocol": cell.protocol, "n": c.asked,
        "marks": [round(float(share), 6) for share in found.shares],
        "accuracy": dataclasses.asdict(found.accuracy),
    }  # fmt: skip
    if cell.kv:
        cache, lengths = prompt_cache(lm, c, cell)
        kept = kept_share(lm.config, cache, lengths, room=c.room).tokens.mean(axis=1)
        line |= {"kept": float(np.mean(kept)), "kept_by_layer": kept.tolist(), "bytes": byte_share(lm, cell, c)}
    else:
        trivial = baselines(task, n=c.asked, level=level, seed=c.seed)
        best = max(trivial, key=lambda name: trivial[name].accuracy.value)
        line |= {"kept": 1.0, "bytes": 1.0, "trivial": trivial[best].accuracy.value, "trivial_is": best,
                 "tokens": int(max(len(ids) for ids in prompts(lm, c, cell)[0]))}  # fmt: skip
    return line


def prompts(lm: LM, c: StudyConfig, cell: Cell) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids and units of the cell's prompts."""
    task = TASKS[cell.asked.task]
    level = cell.asked.level or task.standard
    _, made = questions(task, n=c.asked, level=level, shots=cell.asked.shots, seed=c.seed)
    ids = [lm.tokenizer.encode(prompt.text) for prompt in made]
    return ids, [lm.tokenizer.unit_ids(prompt.text, prompt.units) for prompt in made]


def prompt_cache(lm: LM, c: StudyConfig, cell: Cell) -> tuple[Cache, np.ndarray]:
    """The cache behind the cell's prompts (of "ctx": behind their contexts), and the lengths of what was compressed."""
    assert cell.kv is not None
    ids, units = prompts(lm, c, cell)
    contexts = reading("ctx", units)["contexts"] if cell.protocol == "ctx" else [len(row) for row in ids]
    ids, units = ([row[:n] for row, n in zip(rows, contexts, strict=True)] for rows in (ids, units))
    policy, T = parse(cell.kv, layers=lm.config.layers), bucket(max(map(len, ids)))
    key = programs.cache_keys(row_keys(jax.random.key(0), len(ids)))
    _, cache = engine.read(
        lm.config, lm.params, ids, policy=policy, room=c.room, new=1, units=pack_units(units, ids, T), key=key
    )
    return cache, np.array(contexts)


def byte_share(lm: LM, cell: Cell, c: StudyConfig) -> float:
    """Bytes of the state behind a prompt, everything counted, against the full cache's; without room for more."""
    assert cell.kv is not None
    policy = parse(cell.kv, layers=lm.config.layers)
    T = bucket(max(len(ids) for ids in prompts(lm, c, cell)[0]))
    return state_bytes(lm, policy, T) / state_bytes(lm, parse("knorm@keep=1", layers=lm.config.layers), T)


def state_bytes(lm: LM, policy: KVCache, T: int) -> int:
    """Keys and values that a prompt of T tokens leaves, and what describes them."""
    spec, dtype = attention_spec(lm.config), lm.config.dtype
    layers = tuple(
        jax.eval_shape(lambda i=i: policy.at(i).empty(1, spec=spec, prompt=T, new=0, dtype=dtype))
        for i in range(lm.config.layers)
    )
    return Cache(layers).nbytes


def run_cells(lm: LM, c: StudyConfig, path: Path | None) -> list[dict[str, Any]]:
    """Every cell's line, those of an earlier run among them; changes to the full cache are added in the end."""
    done: dict[tuple[Any, ...], dict[str, Any]] = {}
    if path is not None and path.is_file():
        for text in path.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            done[_key(line)] = line
    lines = []
    cells = list(c.cells())
    for number, cell in enumerate(cells, 1):
        key = (*cell.asked.key, cell.label, cell.keep, cell.protocol)
        line = done.get(key)
        if line is None or line["n"] != c.asked:
            line = measure(lm, c, cell)
            if path is not None:
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
        lines.append(line)
        print(f"{number:4}/{len(cells)} {cell.asked.name:22} {cell.label:28} keep {cell.keep:<4} {cell.protocol:6} "
              f"{line['accuracy']['value']:.2f} ({line['kept']:.2f} of the tokens)", flush=True)  # fmt: skip
    return with_changes(lines)


def _key(line: dict[str, Any]) -> tuple[Any, ...]:
    return *ability(line), line["method"], line["keep"], line["protocol"]


def with_changes(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines with the paired difference to the full cache, and delta-P: that over the full cache's accuracy."""
    whole = {ability(line): line for line in lines if line["kv"] is None}
    out = []
    for line in lines:
        full = whole[ability(line)]
        if line["kv"] is not None:
            change = paired_difference(np.array(full["marks"]), np.array(line["marks"]))
            base = full["accuracy"]["value"]
            line = line | {"change": dataclasses.asdict(change), "delta_p": change.value / base if base else None}
        out.append(line)
    return out
