"""The pages of the study and of the claim."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.kv import claim, looks
from experiments.kv.recall import PROTOCOLS, RecallConfig
from experiments.kv.study import FULL, StudyConfig, ability, to_asked
from jaxfw.generate import LM
from jaxfw.report import Curve, Interval, Plot, Table, Text

DRAWN = (
    "streaming", "h2o", "snapkv(w=8)", "pyramidkv(w=8,beta=2)", "chunkkv(w=8)", "shotkv(w=8)", "shotkv(w=8,extra=0)",
)  # fmt: skip
# Protected tokens and the best unit stay in any case; a pyramid rounds in each layer.
MAY_EXCEED = ("shotkv", "randomshot", "oracleshot", "pyramidkv")
READING = (
    "Under the protocol full every method has the full cache's first token: it is drawn before anything is forgotten. "
    "Methods that keep tokens still find the row that is asked for, and cannot repeat it; methods that keep it can. "
    "SnapKV's pooling over five neighbours is nearly a row of six. The oracle keeps the row that is asked for by its "
    "number: what it loses is lost whatever is chosen."
)


def study_checks(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What must hold of any model: budgets that are kept, and abilities to lose."""
    over = [line["kept"] - line["keep"] for line in lines if line["kv"] and not line["method"].startswith(MAY_EXCEED)]
    full = [line for line in lines if line["kv"] is None]
    able = sum(line["accuracy"]["low"] > line["trivial"] for line in full)
    return [
        {"name": "largest share of tokens kept beyond the budget", "value": max(over, default=0.0), "bound": "<= 0.005",
         "ok": max(over, default=0.0) <= 0.005},
        {"name": "abilities above their best trivial answer", "value": able, "bound": ">= 1", "ok": able >= 1},
    ]  # fmt: skip


def study_page(
    lm: LM, model: str, c: StudyConfig, lines: Sequence[dict[str, Any]], judged: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Tables with intervals, what was kept, observations, a map of positions, attention."""
    main = [line for line in lines if _is_main(c, line)]
    return {
        "title": f"KV-cache compression: what it does to {model}",
        "summary": f"{len(lines)} cells of {c.asked} items each. Accuracies have Wilson's 95 % intervals; changes to "
        "the full cache are paired over the same items, with bootstrap intervals. What was kept is counted, not "
        "assumed: tokens of the prompt over layers and heads, and bytes with everything that describes them.\n\n"
        "Protocols: full draws the first new token before anything is forgotten; refeed reads the last token of the "
        "prompt again through the compressed cache; ctx compresses the shots or lines alone, and reads the question "
        f"through that. Budgets are compared under {c.protocol}.",
        "sections": [
            _overview(c, main), _observed(judged), *_abilities(c, main), *_curves(c, main), *_protocols(c, main),
            *looks.sections(lm, c),
        ],
        "figures": [
            ("cells", len(lines)), ("items a cell", c.asked),
            ("statements that held", f"{sum(found['verdict'] == 'held' for found in judged)} of {len(judged)}"),
        ],
    }  # fmt: skip


def _is_main(c: StudyConfig, line: dict[str, Any]) -> bool:
    return ability(line) in {to_asked(text).key for text in c.abilities}


def _names(lines: Sequence[dict[str, Any]]) -> dict[tuple[str, int, int], str]:
    """Of each ability: its task, with shots and level where that says too little."""
    keys = list(dict.fromkeys(map(ability, lines)))
    tasks = [task for task, _, _ in keys]
    return {key: key[0] if tasks.count(key[0]) == 1 else "{}, {} shots, level {}".format(*key) for key in keys}


def _methods(lines: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(line["method"] for line in lines if line["kv"]))


def _find(lines, **wanted: Any) -> list[dict[str, Any]]:
    return [line for line in lines if all(line[name] == value for name, value in wanted.items())]


def _overview(c: StudyConfig, lines: Sequence[dict[str, Any]]) -> Table:
    """Accuracy of every method and ability at the budget at which protocols are compared."""
    names = _names(lines)
    full = {ability(line): line for line in _find(lines, kv=None)}
    rows: list[tuple[Any, ...]] = [
        (FULL, 1.0, 1.0, None, *(full[key]["accuracy"]["value"] for key in names)),
        ("best trivial answer", None, None, None, *(full[key]["trivial"] for key in names)),
    ]
    for method in _methods(lines):
        found = {ability(line): line for line in _find(lines, method=method, keep=c.compared, protocol=c.protocol)}
        if set(found) != set(names):
            continue
        lost = [line["delta_p"] for line in found.values() if line["delta_p"] is not None]
        rows.append((
            method, float(np.mean([line["kept"] for line in found.values()])),
            float(np.mean([line["bytes"] for line in found.values()])), float(np.mean(lost)),
            *(found[key]["accuracy"]["value"] for key in names),
        ))  # fmt: skip
    return Table(
        f"Accuracy at keep {c.compared} ({c.protocol})", ("method", "tokens kept", "bytes", "mean ΔP", *names.values()),
        tuple(rows),
        note="ΔP is (P - P_full) / P_full. Methods that keep units keep protected tokens (the question, of long output "
        "most of the prompt) whatever the budget. PyramidKV has equal layers where the last would keep less than w "
        "tokens, as in kvpress: with w=8 and beta=2 below 16 tokens kept. Prompts of "
        + ", ".join(f"{name} {full[key]['tokens']}" for key, name in names.items()) + " tokens at most.",
    )  # fmt: skip


def _observed(judged: Sequence[dict[str, Any]]) -> Table:
    rows = []
    for found in judged:
        difference = Interval(found["value"], found["low"], found["high"]) if "value" in found else None
        rows.append((found["name"], found["here"], found.get("more"), found.get("less"), difference, found["verdict"]))
    return Table(
        "The paper's observations and ShotKV's claims, restated before the run",
        ("statement", "here", "first loses", "second loses", "difference", "verdict"), tuple(rows),
        note="Losses are shares of the accuracy with the full cache. A statement held if the interval of the "
        "difference lies above 0. The control was added after a first run.",
    )  # fmt: skip


def _abilities(c: StudyConfig, lines: Sequence[dict[str, Any]]) -> list[Table]:
    tables = []
    for key, name in _names(lines).items():
        here = [line for line in lines if ability(line) == key]
        (full,) = _find(here, kv=None)
        rows: list[tuple[Any, ...]] = [(FULL, 1.0, 1.0, 1.0, Interval(**full["accuracy"]), None, None)]
        for method in _methods(here):
            for keep in c.keeps:
                for line in _find(here, method=method, keep=keep, protocol=c.protocol):
                    rows.append((method, keep, line["kept"], line["bytes"], Interval(**line["accuracy"]),
                                 Interval(**line["change"]), line["delta_p"]))  # fmt: skip
        tables.append(Table(
            f"{name.partition(',')[0]}, {full['shots']} shots, n = {c.asked} ({c.protocol})",
            ("method", "keep", "tokens kept", "bytes", "accuracy", "change", "ΔP"), tuple(rows),
        ))  # fmt: skip
    return tables


def _curves(c: StudyConfig, lines: Sequence[dict[str, Any]]) -> list[Plot]:
    curves = []
    for method in DRAWN:
        points = []
        for keep in c.keeps:
            found = _find(lines, method=method, keep=keep, protocol=c.protocol)
            if found:
                accuracy = float(np.mean([line["accuracy"]["value"] for line in found]))
                points.append((float(np.mean([line["bytes"] for line in found])), accuracy))
        if points:
            full = float(np.mean([line["accuracy"]["value"] for line in _find(lines, kv=None)]))
            points = sorted([*points, (1.0, full)])
            curves.append(Curve(method, [x for x, _ in points], [y for _, y in points]))
    if not curves:
        return []
    return [Plot(
        "Accuracy against bytes", tuple(curves), x_label="bytes of the cache, of the full one's (log)",
        y_label="mean accuracy over abilities", log_x=True,
    )]  # fmt: skip


def _protocols(c: StudyConfig, lines: Sequence[dict[str, Any]]) -> list[Table]:
    rows = []
    for method in _methods(lines):
        means = [
            [line["accuracy"]["value"] for line in _find(lines, method=method, keep=c.compared, protocol=protocol)]
            for protocol in ("full", "refeed", "ctx")
        ]
        if all(means):
            rows.append((method, *(float(np.mean(values)) for values in means)))
    return [Table(
        f"Protocols at keep {c.compared}: mean accuracy over abilities", ("method", "full", "refeed", "ctx"),
        tuple(rows),
        note="An answer here begins with its working or with a word of several tokens, so that its first token alone "
        "decides little: full and refeed are close. ctx does not know the question.",
    )] if rows else []  # fmt: skip


def claim_page(c: RecallConfig, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Whole answers and first tokens, means over seeds."""
    sections: list[Any] = []
    counted = claim.learned(lines)
    failed = sorted(
        {(line["task"], line["seed"]) for line in lines} - {(line["task"], line["seed"]) for line in counted}
    )
    for task in (*c.tasks, *c.relatives):
        here = _find(counted, task=task)
        seeds = list(dict.fromkeys(line["seed"] for line in here))
        rows = []
        for method, budget in dict.fromkeys((line["method"], line["budget"]) for line in here):
            cells: list[Any] = [method, budget]
            for what in ("first", "exact"):
                for protocol in PROTOCOLS:
                    found = [line[what]["value"] for line in _find(here, method=method, budget=budget,
                                                                   protocol=protocol)]  # fmt: skip
                    cells.append(float(np.mean(found)) if found else None)
            rows.append(tuple(cells))
        sections.append(Table(
            f"{task}: mean of {len(seeds)} seeds, n = {c.asked} each",
            ("method", "budget", "first token, full", "first token, refeed", "whole answer, full",
             "whole answer, refeed"),
            tuple(rows),
        ))  # fmt: skip
    sections.append(Text("What this shows", READING))
    return {
        "title": "Row recall: whole units against as many tokens",
        "summary": f"Small LLaMAs of {c.layers} layers, width {c.width}, trained for {c.steps} steps on rows and "
        "questions about them. Budgets are tokens of the prompt. "
        + (f"Not learned, and asked nothing more: {', '.join(f'{task} seed {seed}' for task, seed in failed)}."
           if failed else "Every model learned its task."),
        "sections": sections,
    }  # fmt: skip
