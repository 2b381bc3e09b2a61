"""What the page of the study shows of one prompt, of neighbouring layers, and of the model's attention."""

from collections.abc import Sequence
from typing import Any

from experiments.kv.study import Asked, Cell, StudyConfig, prompt_cache, prompts, to_asked
from jaxfw.generate import LM
from jaxfw.generate.prompts import bucket, pack
from jaxfw.kv.analysis import attention_profile, kept_map, layer_jaccard, summary
from jaxfw.report import Curve, HeatMap, Plot, Table

SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
LAST, ROWS = 32, 16  # queries where nothing follows the last unit; prompts whose attention is looked at


def sections(lm: LM, c: StudyConfig) -> list[Any]:
    """Sections of the page."""
    abilities = [to_asked(text) for text in c.abilities]
    shown = max(abilities, key=lambda asked: asked.task == "arithmetic")
    profiles = {asked.name: profile(lm, c, asked) for asked in abilities}
    return [*positions(lm, c, shown), *attention(profiles)]


def positions(lm: LM, c: StudyConfig, asked: Asked) -> list[Any]:
    """Which tokens of the first prompt every method keeps, and how much of a layer's choice the next one shares."""
    ids, units = prompts(lm, c, Cell(asked, None, 1.0, "full"))
    values, agreement = [], []
    for method in c.methods:
        cell = Cell(asked, method, c.compared, c.protocol)
        cache, lengths = prompt_cache(lm, c, cell)
        values.append(kept_map(cache, int(lengths[0])).tolist())
        agreement.append((cell.label, layer_jaccard(cache, lengths)))
    first = units[0]
    return [
        HeatMap(
            f"What stays of a prompt: {asked.name}, keep {c.compared}", tuple(name for name, _ in agreement), values,
            x_label="position in the prompt",
            ends=("kept in 0 %", "100 % of layers and heads"),
            boundaries=tuple(i for i in range(1, len(ids[0])) if first[i] != first[i - 1]),
            note="The share of layers and heads that hold the token; rules stand where shots and the question begin.",
        ),
        Table(
            f"Agreement of neighbouring layers: {asked.name}, keep {c.compared}", ("method", "Jaccard index"),
            tuple(agreement),
            note="Of the kept positions of adjacent layers, the share of their union that is in both; mean over "
            "layers, heads and prompts.",
        ),
    ]  # fmt: skip


def profile(lm: LM, c: StudyConfig, asked: Asked) -> Any:
    """Attention of the questions of the first prompts."""
    ids, units = prompts(lm, c, Cell(asked, None, 1.0, "full"))
    ids, units = ids[:ROWS], units[:ROWS]
    T = bucket(max(map(len, ids)))
    tokens, lengths = pack(ids, T)
    behind = [max((i + 1 for i, unit in enumerate(row) if unit >= 0), default=0) for row in units]
    begins = [
        begin if 0 < begin < len(row) else max(0, len(row) - LAST) for begin, row in zip(behind, ids, strict=True)
    ]
    most = max(len(row) - begin for begin, row in zip(begins, ids, strict=True))
    queries, _ = pack([range(begin, len(row)) for begin, row in zip(begins, ids, strict=True)], most, spare=-1)
    # 0: before the first unit, 1: units, 2: the question.
    regions, _ = pack([_regions(row, begin) for row, begin in zip(units, begins, strict=True)], T, spare=-1)
    return attention_profile(
        lm.config, lm.params, tokens, lengths, regions, n_regions=3, queries=queries, shares=SHARES
    )


def _regions(units: Sequence[int], question: int) -> list[int]:
    return [1 if unit >= 0 else 2 if i >= question else 0 for i, unit in enumerate(units)]


def attention(profiles: dict[str, Any]) -> list[Any]:
    """Curves without the first tokens, and numbers with intervals over prompts."""
    curves = []
    for name, found in profiles.items():
        points = [summary(found.curve[..., i]) for i in range(len(SHARES))]
        curves.append(Curve(name, [100 * share for share in SHARES], [point.value for point in points],
                            [point.low for point in points], [point.high for point in points]))  # fmt: skip
    rows = [
        (name, summary(found.entropy), summary(found.area), summary(found.curve_all[..., 0]),
         *(summary(found.regions_all[..., region]) for region in range(3)))
        for name, found in profiles.items()
    ]  # fmt: skip
    return [
        Plot(
            "Where the question looks, without the first four tokens", tuple(curves), x_label="share of the tokens (%)",
            y_label="cumulative attention, most attended first", log_x=True,
        ),
        Table(
            "Attention of the question's tokens",
            ("ability", "entropy", "area under the curve", "mass of the top 1 %, all tokens", "on what comes first",
             "on shots or lines", "on the question"),
            tuple(rows),
            note="Means over layers, heads and prompts; entropy over ln of the number of tokens, without the first "
            "four. A flat attention has entropy 1 and area 0.5.",
        ),
    ]  # fmt: skip
