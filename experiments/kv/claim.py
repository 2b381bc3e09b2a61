"""ShotKV's claim on row recall, as bounds on means over seeds: whole units are worth more than as many tokens."""

from collections.abc import Sequence
from typing import Any

import numpy as np

TOKEN_LEVEL = ("snapkv(w=2)", "snapkv(w=2,kernel=1)", "h2o", "tova", "streaming(sinks=1)", "knorm")


def learned(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the models that answer with the full cache: the others were asked nothing else."""
    asked = {(line["task"], line["seed"]) for line in lines if line["method"] != "full"}
    return [line for line in lines if (line["task"], line["seed"]) in asked]


def mean(
    lines: Sequence[dict[str, Any]], task: str, method: str, budget: int | None, protocol: str, what: str
) -> float:
    """Over seeds, of the share of prompts whose first token (or whole answer) is right."""
    found = [
        line[what]["value"] for line in lines
        if (line["task"], line["method"], line["budget"], line["protocol"]) == (task, method, budget, protocol)
    ]  # fmt: skip
    return float(np.mean(found)) if found else float("nan")


def checks(
    lines: Sequence[dict[str, Any]], task: str, budgets: tuple[int, ...], *, models: int
) -> list[dict[str, Any]]:
    """The bounds, at the larger and the smaller of two budgets, over the models that have learned the task."""
    lines = learned(lines)
    methods = {line["method"] for line in lines if line["task"] == task and line["budget"]}
    token_level = [name for name in TOKEN_LEVEL if name in methods]

    def exact(method: str, budget: int | None, protocol: str = "full") -> float:
        return mean(lines, task, method, budget, protocol, "exact")

    def first(method: str, budget: int, protocol: str = "full") -> float:
        return mean(lines, task, method, budget, protocol, "first")

    large, small = budgets
    if not token_level:
        return [{"name": f"{task}: models that learned it", "value": 0, "bound": f">= {models}", "ok": False}]
    best = {budget: max(token_level, key=lambda name: exact(name, budget)) for budget in budgets}
    finds = max(("snapkv(w=2)", "snapkv(w=2,kernel=1)", "tova"), key=lambda name: first(name, small, "refeed"))
    full_first = mean(lines, task, "full", None, "full", "first")
    apart = max(abs(first(name, budget) - full_first) for name in methods for budget in budgets)
    bounds = [
        ("models that learned it", float(len({line["seed"] for line in lines if line["task"] == task})), ">=", models),
        ("full cache, whole answers", exact("full", None), ">=", 0.98),
        (f"ShotKV, {large} tokens", exact("shotkv", large), ">=", 0.85),
        (f"ShotKV before {best[large]}, {large} tokens", exact("shotkv", large) - exact(best[large], large), ">=", 0.3),
        (f"RandomShot, {large} tokens", exact("randomshot", large), "<=", 0.35),
        (
            f"ShotKV before {best[small]}, {small} tokens",
            exact("shotkv", small) - exact(best[small], small),
            ">=",
            0.25,
        ),
        (f"{finds} finds the row through {small} tokens (refeed)", first(finds, small, "refeed"), ">=", 0.9),
        ("... and says all of it", exact(finds, small, "refeed"), "<=", 0.5),
        ("first tokens that differ from the full cache's (full)", apart, "<=", 0.0),
    ]
    return [
        {"name": f"{task}: {name}", "value": value, "bound": f"{sign} {bound}",
         "ok": bool(value >= bound if sign == ">=" else value <= bound)}
        for name, value, sign, bound in bounds
    ]  # fmt: skip
