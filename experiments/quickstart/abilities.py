"""What a model can do with its whole cache and with half of it, and one turn of a conversation."""

import dataclasses
from typing import Any

from jaxfw.core.errors import InputError, unknown
from jaxfw.evals import ABILITIES, paired_difference
from jaxfw.evals.evaluate import baselines, evaluate, half_window, row
from jaxfw.generate import LM
from jaxfw.models.cache import RingCache
from jaxfw.report import Interval, Table, Text


@dataclasses.dataclass(frozen=True)
class AbilitiesConfig:
    """Which model is asked, how many items of each task at its standard level, and one question in a conversation."""

    model: str
    tasks: tuple[str, ...]
    asked: int
    question: str

    def __post_init__(self):
        for name in self.tasks:
            if name not in ABILITIES:
                raise unknown("abilities.tasks", name, ABILITIES)
        if self.asked < 1 or not self.tasks:
            raise InputError(f"abilities.asked={self.asked} of {len(self.tasks)} abilities.tasks: give one or more.")


def measure(lm: LM, c: AbilitiesConfig, *, seed: int) -> list[dict[str, Any]]:
    """Of each task the accuracy beside its trivial answers, that of a sliding half cache, and what this changes."""
    rows, n = [], c.asked
    window = half_window(lm, [ABILITIES[name] for name in c.tasks], n=n, seed=seed)
    for name in c.tasks:
        task = ABILITIES[name]
        full = evaluate(lm, task, n=n, seed=seed)
        half = evaluate(lm, task, n=n, seed=seed, policy=RingCache(window))
        change = paired_difference(full.shares, half.shares)
        rows.append(row(full, baselines(task, n=n, seed=seed)) | {
            "window": window, "half_cache": dataclasses.asdict(half.accuracy), "change": dataclasses.asdict(change),
        })  # fmt: skip
        print(f"{name:12} {full.accuracy.value:.2f}, with half the cache {half.accuracy.value:.2f}", flush=True)
    return rows


def check(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Whether each ability is one."""
    above = sum(found["accuracy"]["low"] > found["best_baseline"]["high"] for found in rows)
    return {"name": "abilities whose interval lies above that of the best trivial answer", "value": above,
            "bound": len(rows), "ok": above == len(rows)}  # fmt: skip


def sections(c: AbilitiesConfig, rows: list[dict[str, Any]], answer: str) -> list[Any]:
    """The page's part."""

    def interval(found: dict[str, Any]) -> Interval:
        return Interval(found["value"], found["low"], found["high"])

    table = Table(
        f"Abilities of {c.model}, with the whole cache and with half of it",
        ("ability", "accuracy", "trivial answer", "half the cache", "change"),
        tuple((found["task"], interval(found["accuracy"]), interval(found["best_baseline"]),
               interval(found["half_cache"]), interval(found["change"])) for found in rows),
        note=f"{c.asked} items of each at its standard level, none of which was trained on. The half cache slides over "
        f"the last {rows[0]['window']} tokens, half of what the longest item takes; its change is paired over items.",
    )  # fmt: skip
    return [table, Text(f"A turn of conversation with {c.model}", f"{c.question}\n{answer}", mono=True)]
