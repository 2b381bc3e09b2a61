"""What compressing the KV cache does to a model's abilities, and what whole units are worth. Run by configs/kv.py."""

import dataclasses
from pathlib import Path
from typing import Any

import jaxfw
from experiments.kv import claim, observations, page, recall, study
from jaxfw.core.config import to_dataclass
from jaxfw.core.errors import unknown
from jaxfw.weights import model_sha256

PARTS = ("study", "claim")


@dataclasses.dataclass(frozen=True)
class KVConfig:
    """Which part runs, on which model."""

    experiment: str
    part: str
    model: str
    study: study.StudyConfig
    recall: recall.RecallConfig

    def __post_init__(self):
        if self.part not in PARTS:
            raise unknown("config.part", self.part, PARTS)


def describe(config: Any) -> dict[str, Any]:
    """How much will be asked."""
    c = to_dataclass(KVConfig, config)
    if c.part == "claim":
        models = len(c.recall.tasks) * c.recall.models + len(c.recall.relatives)
        return {"models to train, at least": models, "steps each": c.recall.steps}
    cells = len(list(c.study.cells()))
    return {"cells": cells, "answers": cells * c.study.asked}


def run(config: Any, workdir: Path | None = None) -> dict[str, Any]:
    """The study, or the claim."""
    c = to_dataclass(KVConfig, config)
    if c.part == "claim":
        return run_claim(c.recall, workdir and workdir / "cells.jsonl")
    lm = jaxfw.load(c.model)
    lines = study.run_cells(lm, c.study, workdir and workdir / "cells.jsonl")
    judged = observations.judged(lines)
    return {
        "metrics": {"model": c.model, "model_sha256": model_sha256(c.model), "cells": lines, "observations": judged},
        "checks": page.study_checks(lines),
        "report": page.study_page(lm, c.model, c.study, lines, judged),
    }


def run_claim(c: recall.RecallConfig, path: Path | None = None) -> dict[str, Any]:
    """Every model trained and asked."""
    lines = recall.run_models(c, path)
    checks = [
        check for name in c.tasks for check in claim.checks(lines, name, c.budgets(recall.TASKS[name]), models=c.models)
    ]
    return {"metrics": {"cells": lines}, "checks": checks, "report": page.claim_page(c, lines)}
