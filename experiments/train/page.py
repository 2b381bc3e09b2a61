"""What a training run says: figures, checks and the page; and before it runs, what it will take."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.train.evaluation import Scored
from experiments.train.reading import Data
from experiments.train.settings import TrainingConfig
from jaxfw.models import DecoderConfig
from jaxfw.models.accounting import parameter_bytes, parameter_count, train_flops
from jaxfw.report import Curve, Interval, Plot, Table, ratio_interval


def describe_run(c: TrainingConfig, config: DecoderConfig) -> dict[str, Any]:
    """Parameters, bytes and operations."""
    step = train_flops(config, batch=c.train.batch, length=c.train.length, is_base_frozen=c.lora is not None)
    found = {
        "parameters": parameter_count(config),
        "parameter bytes": parameter_bytes(config),
        "tokens per step": c.train.batch * c.train.length,
        "FLOPs per step": step,
    }
    return found | ({"FLOPs in all": step * c.train.steps} if c.train.steps else {})


def summarise(
    c: TrainingConfig,
    config: DecoderConfig,
    data: Data,
    history: list[dict[str, Any]],
    before: Scored | None,
    after: Scored,
    *,
    seconds: float,
    saved: Path | None,
) -> dict[str, Any]:
    """`metrics`, `checks` and `report` of a finished run."""
    losses = ({"before": ratio_interval(*before)} if before else {}) | {"after": ratio_interval(*after)}
    change = None if before is None else ratio_interval(after.nll - before.nll, after.weights)
    speed = [row["perf/tokens_per_s"] for row in history if "perf/tokens_per_s" in row]
    used = [row["perf/mfu"] for row in history if "perf/mfu" in row]
    metrics = {
        "parameters": parameter_count(config),
        "steps": data.steps,
        "tokens": data.steps * c.train.batch * c.train.length,
        "validation": {name: dataclasses.asdict(loss) for name, loss in losses.items()},
        "change": change and dataclasses.asdict(change),
        "rows": len(after.nll),
        "perplexity": math.exp(min(losses["after"].value, 700.0)),
        "train_loss": next((row["train/loss"] for row in reversed(history) if "train/loss" in row), None),
        "tokens_per_second": float(np.median(speed)) if speed else None,
        "mfu": float(np.median(used)) if used else None,
        "seconds": seconds,
        "saved": saved and saved.name,
    }
    return {"metrics": metrics, "checks": _checks(change), "report": _report(c, metrics, losses, change, history)}


def _checks(change: Interval | None) -> list[dict[str, Any]]:
    if change is None:
        return []
    name = "held-out loss did not surely rise: its change, lower end of the paired 95 % interval (nats per token)"
    return [{"name": name, "value": change.low, "bound": 0.0, "ok": change.low < 0}]


def _report(c: TrainingConfig, metrics: dict[str, Any], losses, change, history) -> dict[str, Any]:
    start = Path(c.init)
    name = start.resolve().parent.name if start.name == "model" else start.name  # of a workdir's model, the workdir's
    what = f"adapters on {name}" if c.lora else f"{name}, fine-tuned" if c.init else "a fresh decoder"
    paired = "" if change is None else (
        f" The change, paired over rows: {change.value:+.3f} (95 % interval {change.low:+.3f} to {change.high:+.3f})."
    )  # fmt: skip
    rate = metrics["tokens_per_second"]
    figures = [
        ("held-out loss (nats per token)", losses["after"]),
        ("perplexity", metrics["perplexity"]),
        *([("tokens/s", round(rate))] if rate else []),
        *([("model FLOP utilisation", metrics["mfu"])] if metrics["mfu"] else []),
    ]
    return {
        "title": f"Training: {what}",
        "summary": (
            f"{metrics['parameters']:,} parameters, {metrics['steps']} steps of "
            f"{c.train.batch * c.train.length:,} tokens of {c.data}, on {jax.device_count()} device(s).{paired}"
        ),
        "figures": figures,
        "sections": [
            _loss_plot(history),
            Table(
                "Held-out loss",
                ("when", "nats per token", "perplexity", "rows"),
                tuple((name, loss, math.exp(min(loss.value, 700.0)), metrics["rows"]) for name, loss in losses.items()),
                note=f"Rows of {c.train.length} tokens that were not trained on.",
            ),
        ],
    }


def _loss_plot(history: list[dict[str, Any]]) -> Plot:
    curves = []
    for name, label in (("train/loss", "training"), ("validation/loss", "validation")):
        rows = [row for row in history if name in row]
        curves.append(Curve(label, [row["step"] for row in rows], [row[name] for row in rows]))
    return Plot("Loss", tuple(curves), "step", "nats per token")
