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
from jaxfw.models.accounting import forward_flops, parameter_bytes, parameter_count
from jaxfw.report import Table, Text
from jaxfw.weights import load_config, model_sha256


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
        if self.seed < 0:
            raise InputError(f"config.seed={self.seed} must be 0 or more.")
        if not all(batch >= 1 for batch in (*self.timed_batches, self.timed_prompt)):
            raise InputError(
                f"config.timed_batches={self.timed_batches} and timed_prompt={self.timed_prompt} must be >= 1."
            )


def _load(c: GenerateConfig) -> LM:
    return jaxfw.load(c.model, param_dtype=c.dtype or None, dtype=c.dtype or None)


def describe(config: Any) -> dict[str, Any]:
    """What the model takes; no tensor is read."""
    c = to_dataclass(GenerateConfig, config)
    model = load_config(c.model, param_dtype=c.dtype or None, dtype=c.dtype or None)
    return {
        "parameters": parameter_count(model),
        "parameter bytes": parameter_bytes(model),
        "context": model.context,
        f"FLOPs of a prompt of {c.timed_prompt}": forward_flops(model, batch=1, length=c.timed_prompt),
    }


def run(config: Any, workdir: Path | None = None) -> dict[str, Any]:
    """Continuations, the log-probability of each prompt, and tokens per second."""
    c = to_dataclass(GenerateConfig, config)
    lm = _load(c)
    timed_new = max(2, c.new_tokens)
    if c.timed_prompt + timed_new > lm.config.context:
        raise InputError(
            f"config.timed_prompt={c.timed_prompt} and {timed_new} new tokens exceed the model's {lm.config.context} "
            "positions: lower timed_prompt."
        )
    prompts = list(c.prompts)
    texts = lm.generate(
        prompts, max_new_tokens=c.new_tokens, temperature=c.temperature, top_p=c.top_p if c.top_p != 1 else None,
        key=jax.random.key(c.seed),
    )  # fmt: skip
    for prompt, text in zip(prompts, texts, strict=True):
        print(f"{prompt!r} -> {text!r}", flush=True)
    likelihood = [float(np.mean(values)) if len(values) else None for values in lm.logprobs(prompts)]
    speed = {
        batch: measure_speed(lm.config, lm.params, batch=batch, prompt=c.timed_prompt, new=timed_new)
        for batch in c.timed_batches
    }
    answers = [
        {"prompt": prompt, "text": text, "prompt_mean_logprob": value}
        for prompt, text, value in zip(prompts, texts, likelihood, strict=True)
    ]
    return {
        "metrics": {
            "parameters": parameter_count(lm.config),
            "model_sha256": model_sha256(c.model),
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
                tuple((answer["prompt"], answer["prompt_mean_logprob"]) for answer in answers),
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
