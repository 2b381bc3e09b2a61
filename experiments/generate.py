"""Ask a Hugging Face directory: continue prompts, say how likely they were, and how fast reading and writing went."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxfw
from jaxfw.core.config import to_dataclass
from jaxfw.core.errors import InputError
from jaxfw.generate import LM
from jaxfw.generate.timing import Speed, measure_speed
from jaxfw.models.accounting import parameter_bytes, parameter_count
from jaxfw.report import Table, Text


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """The directory, the prompts, how to draw, and what to time; empty `dtype` means as stored."""

    experiment: str
    model: str
    dtype: str
    prompts: tuple[str, ...]
    new_tokens: int
    temperature: float
    top_p: float
    seed: int
    timed_batches: tuple[int, ...]
    timed_prompt: int

    def __post_init__(self):
        if not self.model:
            raise InputError("config.model='' is empty: name a Hugging Face directory, as in --config.model=DIR.")
        if not self.prompts:
            raise InputError("config.prompts=() is empty: give at least one text.")


def _load(c: GenerateConfig) -> LM:
    return jaxfw.load(c.model, param_dtype=c.dtype or None, dtype=c.dtype or None)


def describe(config: Any) -> dict[str, Any]:
    """What the model takes."""
    model = _load(to_dataclass(GenerateConfig, config)).config
    return {"parameters": parameter_count(model), "parameter bytes": parameter_bytes(model), "context": model.context}


def run(config: Any, workdir: Path | None = None) -> dict[str, Any]:
    """Continuations, the log-probability of each prompt, and tokens per second."""
    c = to_dataclass(GenerateConfig, config)
    lm = _load(c)
    prompts = list(c.prompts)
    drawing: dict[str, Any] = {"temperature": c.temperature, "top_p": c.top_p} if c.temperature else {}
    texts = lm.generate(prompts, max_new_tokens=c.new_tokens, key=jax.random.key(c.seed), **drawing)
    likelihood = [float(np.mean(values)) if len(values) else None for values in lm.logprobs(prompts)]
    speed = {
        batch: measure_speed(lm.config, lm.params, batch=batch, prompt=c.timed_prompt, new=max(2, c.new_tokens))
        for batch in c.timed_batches
    }
    answers = [
        {"prompt": prompt, "text": text, "mean_logprob": value}
        for prompt, text, value in zip(prompts, texts, likelihood, strict=True)
    ]
    return {
        "metrics": {
            "parameters": parameter_count(lm.config),
            "answers": answers,
            "tokens_per_second": {f"batch {batch}": dataclasses.asdict(rates) for batch, rates in speed.items()},
        },
        "checks": [],
        "report": _report(c, lm, answers, speed),
    }


def _report(c: GenerateConfig, lm: LM, answers: list[dict[str, Any]], speed: dict[int, Speed]) -> dict[str, Any]:
    how = f"drawn at temperature {c.temperature}, top-p {c.top_p}" if c.temperature else "greedy"
    return {
        "title": f"{Path(c.model).name} answers",
        "summary": f"{parameter_count(lm.config) / 1e6:,.1f} M parameters, {lm.config.dtype}; continuations are {how}.",
        "sections": [
            *(Text(answer["prompt"], answer["text"], mono=True) for answer in answers),
            Table(
                "Prompts",
                ("prompt", "mean log-probability (nats per token)"),
                tuple((answer["prompt"], answer["mean_logprob"]) for answer in answers),
                note="Of each token given those before it; the first token has none.",
            ),
            Table(
                "Speed",
                ("batch", "prefill (tokens/s)", "decode (tokens/s)"),
                tuple((batch, rates.prefill, rates.decode) for batch, rates in speed.items()),
                note=f"Prompts of {c.timed_prompt} tokens; medians of 5 runs after compilation.",
            ),
        ],
    }
