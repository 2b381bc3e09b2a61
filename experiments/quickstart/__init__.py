"""The main job: what the embedded model can do, with its whole cache and with half of it; then a model of one's own.

A small LLaMA is trained on real text, saved as a Hugging Face directory, loaded back, and speaks. Text: documentation
strings of the standard library, every tenth one held out. Baselines on the same held-out tokens: the frequencies of
tokens (unigram) and of pairs of them (bigram). The page shows abilities and losses with 95 % intervals, and speed of
prefill and decoding.
"""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxfw
from experiments.quickstart import abilities
from experiments.quickstart.abilities import AbilitiesConfig
from experiments.quickstart.ngrams import ngram_nll
from jaxfw.core.checkpoint import Checkpoints
from jaxfw.core.config import to_dataclass
from jaxfw.core.errors import InputError, unknown
from jaxfw.core.log import Metrics
from jaxfw.data import RandomWindows, Tokenizer, consecutive_windows, stdlib_docstrings, train_bpe
from jaxfw.generate import LM
from jaxfw.generate.timing import measure_speed
from jaxfw.models import DecoderConfig, forward, init
from jaxfw.models.accounting import forward_flops, parameter_bytes, parameter_count
from jaxfw.report import Curve, Interval, Plot, Table, Text
from jaxfw.train import (
    NextTokenLoss,
    OptimizerConfig,
    TrainState,
    evaluate_tokens,
    init_state,
    make_optimizer,
    make_step,
    train,
)
from jaxfw.weights import model_sha256

HELD_OUT = 10  # every tenth document
TIMED_PROMPT, TIMED_NEW = 256, 64
ANSWER_TOKENS = 80


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Updates, their batches, and how often to look."""

    steps: int
    batch: int
    length: int
    log_every: int
    evaluate_every: int
    save_every: int
    validation_batches: int

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise InputError(f"train.{field.name}={getattr(self, field.name)} must be at least 1.")


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """What the trained model is asked to continue."""

    prompts: tuple[str, ...]
    new_tokens: int
    temperature: float

    def __post_init__(self):
        if not self.prompts:
            raise InputError("generate.prompts=() is empty: give at least one text.")
        if self.new_tokens < 1:
            raise InputError(f"generate.new_tokens={self.new_tokens} must be at least 1.")
        if self.temperature < 0:
            raise InputError(f"generate.temperature={self.temperature} must be 0 (greedy) or above.")


@dataclasses.dataclass(frozen=True)
class QuickstartConfig:
    """The whole job; `documents` = 0 takes all, `baseline` is what the model must beat."""

    experiment: str
    seed: int
    documents: int
    baseline: str
    abilities: AbilitiesConfig
    model: DecoderConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    generate: GenerateConfig

    def __post_init__(self):
        if self.baseline not in ("bigram", "unigram"):
            raise unknown("config.baseline", self.baseline, ("bigram", "unigram"))
        if self.seed < 0 or self.documents < 0:
            raise InputError(f"config.seed={self.seed} and config.documents={self.documents} must be 0 or more.")
        if self.train.length > self.model.context:
            raise InputError(f"train.length={self.train.length} exceeds model.positions={self.model.positions}.")
        if self.train.batch * self.train.validation_batches < 2:
            raise InputError("train.batch=1 with train.validation_batches=1 is one window: an interval needs two.")


def describe(config: Any) -> dict[str, Any]:
    """What the job will take, without running it: parameters, bytes and operations."""
    c = to_dataclass(QuickstartConfig, config)
    parameters = parameter_count(c.model)
    optimizer = make_optimizer(c.optimizer, steps=c.train.steps)
    state = jax.eval_shape(lambda: init_state(init(c.model, jax.random.key(0)), optimizer))
    step = 3 * forward_flops(c.model, batch=c.train.batch, length=c.train.length)
    return {
        "parameters": parameters,
        "parameter bytes": parameter_bytes(c.model),
        "training state bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)),
        "tokens per step": c.train.batch * c.train.length,
        "FLOPs per step": step,
        "FLOPs in all": step * c.train.steps,
    }


def run(config: Any, workdir: Path | None = None) -> dict[str, Any]:
    """The job; `metrics`, `checks` and the contents of the page. Without a workdir nothing is kept."""
    c = to_dataclass(QuickstartConfig, config)
    tokenizer, training, held_out = _data(c)
    _check_prompts(c, tokenizer)
    print(f"{len(training):,} training tokens, {len(held_out):,} held out, {parameter_count(c.model):,} parameters",
          flush=True)  # fmt: skip
    embedded = jaxfw.load(c.abilities.model)
    asked = abilities.measure(embedded, c.abilities, seed=c.seed)
    answer = embedded.chat([{"role": "user", "content": c.abilities.question}], max_new_tokens=ANSWER_TOKENS).strip()
    print(f"{c.abilities.question} -> {answer}", flush=True)
    windows = list(consecutive_windows(held_out, batch=c.train.batch, length=c.train.length,
                                       most=c.train.validation_batches))  # fmt: skip
    trained, history = _train(c, training, windows, workdir)
    nll = {
        "model": evaluate_tokens(c.model, trained.params, windows),
        "bigram": ngram_nll(training, windows, c.model.vocab, order=2),
        "unigram": ngram_nll(training, windows, c.model.vocab, order=1),
    }
    lm = LM(c.model, trained.params, tokenizer, stop_ids=_stop_ids(tokenizer))
    loaded = _round_trip(lm, workdir)
    predicted = np.concatenate(windows)[:, 1:]
    bytes_per_token = sum(len(tokenizer.decode(row).encode()) for row in predicted.tolist()) / predicted.size
    samples = _samples(c, loaded)
    prompt = _timed_prompt(c)
    speed = {
        batch: measure_speed(c.model, loaded.params, batch=batch, prompt=prompt, new=TIMED_NEW, seed=c.seed)
        for batch in (1, 8)
    }
    return {
        "metrics": {
            "model_sha256": model_sha256(c.abilities.model), "abilities": asked,
            "conversation": {"question": c.abilities.question, "answer": answer},
            **_metrics(c, nll, bytes_per_token, speed, history),
        },
        "checks": [abilities.check(asked), *_checks(c, nll, lm, loaded, windows[0][:, :-1], samples)],
        "report": _report(c, nll, bytes_per_token, speed, history, samples,
                          abilities.sections(c.abilities, asked, answer)),
    }  # fmt: skip


def _data(c: QuickstartConfig) -> tuple[Tokenizer, np.ndarray, np.ndarray]:
    """A tokenizer trained on the training documents, and the tokens of both parts."""
    documents = stdlib_docstrings(most=c.documents or None)
    held_out = documents[::HELD_OUT]
    training = [text for i, text in enumerate(documents) if i % HELD_OUT]
    tokenizer = train_bpe(training, vocab_size=c.model.vocab)

    def encode(texts: list[str]) -> np.ndarray:
        ends = _stop_ids(tokenizer)
        return np.array([id_ for text in texts for id_ in (*tokenizer.encode(text), *ends)], np.int32)

    return tokenizer, encode(training), encode(held_out)


def _stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    return () if tokenizer.eos_id is None else (tokenizer.eos_id,)


def _check_prompts(c: QuickstartConfig, tokenizer: Tokenizer) -> None:
    """What generation would refuse, said before the training and not after it."""
    longest = max(len(tokenizer.encode(prompt)) for prompt in c.generate.prompts)
    if longest + c.generate.new_tokens > c.model.context:
        raise InputError(
            f"generate.prompts of {longest} tokens and generate.new_tokens={c.generate.new_tokens} exceed "
            f"model.positions={c.model.positions}: lower new_tokens or raise positions."
        )
    if c.model.context <= TIMED_NEW:
        raise InputError(f"model.positions={c.model.positions} must be above {TIMED_NEW}: so many tokens are timed.")


def _timed_prompt(c: QuickstartConfig) -> int:
    return min(TIMED_PROMPT, c.model.context - TIMED_NEW)


def _train(
    c: QuickstartConfig, tokens: np.ndarray, windows: list[np.ndarray], workdir: Path | None
) -> tuple[TrainState, list[dict[str, Any]]]:
    batches = RandomWindows(tokens, batch=c.train.batch, length=c.train.length, seed=c.seed)
    optimizer = make_optimizer(c.optimizer, steps=c.train.steps)
    step = make_step(NextTokenLoss(c.model), optimizer)
    key = jax.random.key(c.seed)
    state = init_state(init(c.model, jax.random.fold_in(key, 0)), optimizer)
    with Checkpoints(workdir and workdir / "checkpoints") as checkpoints:
        if (newest := checkpoints.latest_step) is not None:
            state = checkpoints.restore(state)
            print(f"resumed from checkpoints/{newest}, {newest} of {c.train.steps} steps are done", flush=True)
        with Metrics(workdir, resume_at=newest or 0) as metrics:
            state = train(
                state,
                step,
                batches,
                jax.random.fold_in(key, 1),
                steps=c.train.steps,
                metrics=metrics,
                checkpoints=checkpoints,
                evaluate=lambda state: {"validation/loss": evaluate_tokens(c.model, state.params, windows).mean()},
                log_every=c.train.log_every,
                evaluate_every=c.train.evaluate_every,
                save_every=c.train.save_every,
            )
    return state, metrics.history


def _round_trip(lm: LM, workdir: Path | None) -> LM:
    """The model from its Hugging Face directory, `workdir/model`, written anew."""
    if workdir is None:
        return lm
    shutil.rmtree(workdir / "model", ignore_errors=True)
    lm.save(workdir / "model")
    return jaxfw.load(workdir / "model")


def _samples(c: QuickstartConfig, lm: LM) -> list[tuple[str, str, str]]:
    """Prompt, greedy continuation, drawn continuation."""
    prompts = list(c.generate.prompts)
    greedy = lm.generate(prompts, max_new_tokens=c.generate.new_tokens)
    drawn = lm.generate(prompts, max_new_tokens=c.generate.new_tokens, temperature=c.generate.temperature,
                        key=jax.random.key(c.seed))  # fmt: skip
    return list(zip(prompts, greedy, drawn, strict=True))


def _interval(values: np.ndarray) -> Interval:
    """The mean over windows with its 95 % interval."""
    half = 1.96 * values.std(ddof=1) / len(values) ** 0.5
    return Interval(float(values.mean()), float(values.mean() - half), float(values.mean() + half))


def _metrics(c, nll, bytes_per_token, speed, history) -> dict[str, Any]:
    losses = {name: _interval(values) for name, values in nll.items()}
    return {
        "parameters": parameter_count(c.model),
        "validation": {
            name: dataclasses.asdict(loss) | {"n": len(nll[name]), "unit": "nats per token, over windows"}
            for name, loss in losses.items()
        },
        "gain_over_bigram": dataclasses.asdict(_interval(nll["bigram"] - nll["model"])),
        "bits_per_byte": losses["model"].value / np.log(2) / bytes_per_token,
        "train_loss": history[-1]["train/loss"] if history else None,
        "tokens_per_second": {f"batch {batch}": dataclasses.asdict(rates) for batch, rates in speed.items()},
    }


def _checks(c, nll, lm, loaded, tokens, samples) -> list[dict[str, Any]]:
    """Whether the model learned, and whether the directory holds the same model."""
    gain = _interval(nll["model"] - nll[c.baseline])
    logits = [np.asarray(forward(one.config, one.params, jnp.asarray(tokens)).logits) for one in (lm, loaded)]
    again = lm.generate(list(c.generate.prompts), max_new_tokens=c.generate.new_tokens)
    difference = float(np.abs(logits[0] - logits[1]).max())
    differing = sum(greedy != text for (_, greedy, _), text in zip(samples, again, strict=True))
    return [
        {"name": f"loss minus that of the {c.baseline} baseline, upper end of the 95 % interval (nats per token)",
         "value": gain.high, "bound": 0.0, "ok": gain.high < 0},
        {"name": "largest difference of logits after saving and loading", "value": difference, "bound": 0.0,
         "ok": difference == 0},
        {"name": "greedy texts that differ after saving and loading", "value": differing, "bound": 0,
         "ok": differing == 0},
    ]  # fmt: skip


def _report(c, nll, bytes_per_token, speed, history, samples, first) -> dict[str, Any]:
    losses = {name: _interval(values) for name, values in nll.items()}
    n = len(nll["model"])
    bits = losses["model"].value / np.log(2) / bytes_per_token
    gain = _interval(nll["bigram"] - nll["model"])
    better = "better" if gain.value > 0 else "worse"
    return {
        "title": f"Quickstart: a LLaMA of {parameter_count(c.model) / 1e6:.1f} M parameters",
        "summary": (
            f"Trained from scratch for {c.train.steps} steps of {c.train.batch * c.train.length} tokens on the "
            f"documentation of Python's standard library, saved as a Hugging Face directory and loaded back. On "
            f"held-out documents it is {abs(gain.value):.2f} nats per token {better} than a bigram model (95 % "
            f"interval of what it gains: {gain.low:.2f} to {gain.high:.2f})."
        ),
        "figures": [
            ("validation loss (nats per token)", losses["model"]),
            ("bits per byte", float(bits)),
            ("decoding, batch 1 (tokens/s)", round(speed[1].decode)),
            ("prefill, batch 1 (tokens/s)", round(speed[1].prefill)),
        ],
        "sections": [
            *first,
            _loss_plot(history, losses),
            Table(
                "Held-out loss",
                ("model", "nats per token", "windows"),
                tuple((name, losses[name], n) for name in ("model", "bigram", "unigram")),
                note=f"Windows of {c.train.length} tokens from every tenth document, none seen in training. The bigram "
                "is smoothed by Witten and Bell's rule.",
            ),
            Table(
                "Speed",
                ("batch", "prefill (tokens/s)", "decode (tokens/s)"),
                tuple((batch, rates.prefill, rates.decode) for batch, rates in speed.items()),
                note=f"Prompts of {_timed_prompt(c)} tokens, {TIMED_NEW} new ones; medians of 5 runs after "
                "compilation, on the machine named under Environment.",
            ),
            *(Text(prompt, f"greedy: {greedy}\n\ndrawn at temperature {c.generate.temperature}: {drawn}", mono=True)
              for prompt, greedy, drawn in samples),
        ],
    }  # fmt: skip


def _loss_plot(history: list[dict[str, Any]], losses: dict[str, Interval]) -> Plot:
    curves = []
    for name, label in (("train/loss", "training"), ("validation/loss", "validation")):
        rows = [row for row in history if name in row]
        curves.append(Curve(label, [row["step"] for row in rows], [row[name] for row in rows]))
    ends = [history[0]["step"], history[-1]["step"]] if history else [0, 1]
    curves += [Curve(name, ends, [losses[name].value] * 2) for name in ("unigram", "bigram")]
    return Plot("Loss", tuple(curves), "step", "nats per token")
