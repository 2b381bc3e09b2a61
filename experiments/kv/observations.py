"""The paper's six observations (arXiv:2502.01941, section 3), each as a statement on our models, and ShotKV's claims.

They were fixed before the study ran. A statement compares two shares of the accuracy that is lost (1 - P/P_full), means
over the same items where both ask them. It held if the 95 % interval of the difference lies above 0, and cannot be
tested where an ability lies less than 20 points above its best trivial answer, or where nothing is lost. The last
statement and that rule came after a first run: a control that it lacked, and a gain that it called a smaller loss.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxfw.core.shapes import Float
from jaxfw.evals import TASKS

LEAST_ABOVE = 0.2
PAPER = ("streaming", "h2o", "snapkv(w=8)", "pyramidkv(w=8,beta=2)", "chunkkv(w=8)")  # the paper's five methods
TOKEN_LEVEL = ("streaming", "h2o", "snapkv(w=8)", "pyramidkv(w=8,beta=2)")


@dataclasses.dataclass(frozen=True)
class Loss:
    """The mean share of accuracy that some methods lose, of one ability."""

    task: str
    shots: int
    methods: tuple[str, ...]
    keep: float
    protocol: str = "refeed"


@dataclasses.dataclass(frozen=True)
class Statement:
    """What the paper saw, and that `more` is larger than `less` here; None where there is nothing to compare."""

    name: str
    paper: str
    here: str
    more: Loss | None = None
    less: Loss | None = None
    why_not: str = ""


STATEMENTS = (
    Statement(
        "1 task", "Arithmetic loses more than world knowledge.",
        "At keep .2, prompts of about 200 tokens, the five methods of the paper: arithmetic (4 shots) loses a larger "
        "share than facts (12 shots).",
        Loss("arithmetic", 4, PAPER, 0.2), Loss("facts", 12, PAPER, 0.2),
    ),
    Statement(
        "2 kind of model", "Models trained to reason lose less than instruction-tuned ones.",
        "Needs two models of one size: run it with --config.model.",
        why_not="one model",
    ),
    Statement(
        "3 shots", "With fewer shots, more is lost.",
        "At keep .2, the same items: arithmetic loses a larger share with 1 shot than with 4.",
        Loss("arithmetic", 1, PAPER, 0.2), Loss("arithmetic", 4, PAPER, 0.2),
    ),
    Statement(
        "4 chunks", "With many shots, keeping chunks loses less than keeping tokens.",
        "At keep .1, arithmetic with 16 shots: the mean of the four token-level methods loses more than ChunkKV.",
        Loss("arithmetic", 16, TOKEN_LEVEL, 0.1), Loss("arithmetic", 16, ("chunkkv(w=8)",), 0.1),
    ),
    Statement(
        "5 prompt gain", "What gains most from its prompt loses most.",
        "At keep .2, the hidden rule, which is learned from the prompt alone, loses a larger share than arithmetic.",
        Loss("rule", 4, PAPER, 0.2), Loss("arithmetic", 4, PAPER, 0.2),
    ),
    Statement(
        "6 reasoning", "At the same length and budget, reasoning loses more than looking up.",
        "At keep .2, prompts of about 200 tokens: arithmetic (4 shots) loses a larger share than retrieval.",
        Loss("arithmetic", 4, PAPER, 0.2), Loss("retrieval", 0, PAPER, 0.2),
    ),
    Statement(
        "ShotKV: attention", "Shots chosen by attention are worth more than random ones.",
        "At keep .4, retrieval with lines as units: RandomShot loses more than ShotKV.",
        Loss("retrieval", 0, ("randomshot",), 0.4), Loss("retrieval", 0, ("shotkv(w=8)",), 0.4),
    ),
    Statement(
        "ShotKV: units", "Whole units are worth more than as many tokens.",
        "At keep .4, retrieval: the mean of SnapKV, H2O and TOVA loses more than ShotKV.",
        Loss("retrieval", 0, ("snapkv(w=8)", "h2o", "tova"), 0.4), Loss("retrieval", 0, ("shotkv(w=8)",), 0.4),
    ),
    Statement(
        "ShotKV: bytes", "Whole units are worth more than as many tokens.",
        "The same of ShotKV with extra=0, whose state has no more slots than those of the token-level methods.",
        Loss("retrieval", 0, ("snapkv(w=8)", "h2o", "tova"), 0.4), Loss("retrieval", 0, ("shotkv(w=8,extra=0)",), 0.4),
    ),
    Statement(
        "ShotKV: two phases", "In long outputs, separate budgets beat one for both phases.",
        "At keep .4, long output: the mean of H2O and StreamingLLM, which keep their size, loses more than ShotKV with "
        "rd=.4.",
        Loss("long_output", 1, ("h2o", "streaming"), 0.4), Loss("long_output", 1, ("shotkv(w=8), rd",), 0.4),
    ),
    Statement(
        "control of the above", "",
        "The same, but RandomShot, which forgets nothing while generating, loses more than ShotKV with rd=.4: if not, "
        "what protects is that whole units and the question stay.",
        Loss("long_output", 1, ("randomshot",), 0.4), Loss("long_output", 1, ("shotkv(w=8), rd",), 0.4),
    ),
)  # fmt: skip


def judged(lines: Sequence[dict[str, Any]], *, seed: int = 0) -> list[dict[str, Any]]:
    """Each statement with both losses, their difference and its interval, and the verdict."""
    return [_judge(statement, lines, seed) for statement in STATEMENTS]


def _judge(statement: Statement, lines: Sequence[dict[str, Any]], seed: int) -> dict[str, Any]:
    found: dict[str, Any] = {"name": statement.name, "paper": statement.paper, "here": statement.here}
    more, less = statement.more, statement.less
    if more is None or less is None:
        return found | {"verdict": f"not testable here: {statement.why_not}"}
    for loss in (more, less):
        full = _line(lines, loss.task, loss.shots, "full cache", 1.0, "full")
        if full is None:
            return found | {"verdict": "not measured in this run"}
        if full["accuracy"]["value"] - full["trivial"] < LEAST_ABOVE:
            return found | {
                "verdict": f"not testable here: {loss.task} is at {full['accuracy']['value']:.2f}, a trivial answer at "
                f"{full['trivial']:.2f}"
            }
    first, second = _lost(lines, more), _lost(lines, less)
    if first is None or second is None:
        return found | {"verdict": "not measured in this run"}
    value, low, high = _difference(first, second, paired=more.task == less.task, seed=seed)
    verdict = "held" if low > 0 else "not held: the reverse" if high < 0 else "not held"
    means = [float(full.mean() - kept.mean()) / float(full.mean()) for full, kept in (first, second)]
    if max(means) <= 0:
        verdict = "not testable here: nothing is lost"
    return found | {"more": means[0], "less": means[1], "value": value, "low": low, "high": high, "verdict": verdict}


def _line(lines, task, shots, method, keep, protocol) -> dict[str, Any] | None:
    wanted = (task, shots, TASKS[task].standard, method, keep, protocol)
    names = ("task", "shots", "level", "method", "keep", "protocol")
    return next((line for line in lines if tuple(line[name] for name in names) == wanted), None)


def _lost(lines, loss: Loss) -> tuple[Float[np.ndarray, "N"], Float[np.ndarray, "N"]] | None:
    """Of each item the mark with the full cache, and the mean mark of the methods."""
    full = _line(lines, loss.task, loss.shots, "full cache", 1.0, "full")
    kept = [_line(lines, loss.task, loss.shots, method, loss.keep, loss.protocol) for method in loss.methods]
    if full is None or any(line is None for line in kept):
        return None
    return np.array(full["marks"]), np.mean([line["marks"] for line in kept if line], axis=0)


def _difference(more, less, *, paired: bool, seed: int, resamples: int = 10_000) -> tuple[float, float, float]:
    """Of the two shares lost, with the percentile bootstrap over items: the same draws where items are the same."""

    def share(pair, index):
        full, kept = pair[0][index].mean(axis=-1), pair[1][index].mean(axis=-1)
        return (full - kept) / np.maximum(full, 1e-9)

    rng = np.random.default_rng(seed)
    N, M = len(more[0]), len(less[0])
    one = rng.integers(N, size=(resamples, N))
    other = one if paired else rng.integers(M, size=(resamples, M))
    drawn = share(more, one) - share(less, other)
    value = share(more, np.arange(N)) - share(less, np.arange(M))
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(value), float(low), float(high)
