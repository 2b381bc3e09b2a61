"""Train the embedded model: seven abilities and some English, in stages, each from the weights of the one before.

Run by configs/embedded.py. What comes out is a Hugging Face directory (`WORKDIR/model`) and the accuracies at the
standard levels, beside those of trivial answers.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from experiments.embedded.lessons import CHAT_TEMPLATE, Lessons, vocabulary_texts
from jaxfw.core.checkpoint import Checkpoints
from jaxfw.core.config import to_dataclass
from jaxfw.core.errors import InputError
from jaxfw.core.log import Metrics
from jaxfw.core.preemption import Preemption
from jaxfw.core.shapes import PyTree
from jaxfw.data import (
    Corpus,
    Mixture,
    Packed,
    Prefetch,
    Procedural,
    Recall,
    Repeated,
    Tokenizer,
    encode_documents,
    stdlib_docstrings,
    train_bpe,
)  # fmt: skip
from jaxfw.evals import ABILITIES
from jaxfw.evals.evaluate import baselines, evaluate, row
from jaxfw.generate import LM, load
from jaxfw.models import DecoderConfig, init
from jaxfw.models.accounting import parameter_count, train_flops
from jaxfw.report import Curve, Interval, Plot, Table
from jaxfw.train import NextTokenLoss, OptimizerConfig, init_state, make_optimizer, make_step, train
from jaxfw.train.loop import Work
from jaxfw.train.resume import resume
from jaxfw.weights import model_sha256

HELD_OUT = 10  # every tenth document of English
EMBEDDING_STD, OUT_SCALE = 0.5, 0.5  # without these induction forms late, if at all


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """Updates and their batches, how often to save, to ask `asked` items of each ability, and `final` in the end."""

    steps: int
    batch: int
    length: int
    log_every: int
    evaluate_every: int
    save_every: int
    asked: int
    final: int

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise InputError(f"train.{field.name}={getattr(self, field.name)} must be at least 1.")


@dataclasses.dataclass(frozen=True)
class RowShares:
    """Of the rows of a batch."""

    lessons: float
    repeated: float
    recall: float
    english: float


@dataclasses.dataclass(frozen=True)
class LessonShares:
    """Of the documents in rows of lessons."""

    statements: float
    facts: float
    composition: float
    arithmetic: float
    code: float
    safety: float
    retrieval: float
    long_output: float
    rule: float


@dataclasses.dataclass(frozen=True)
class EmbeddedConfig:
    """A stage: from the workdir or model directory `init`, or from nothing.

    `period` is the least and the largest number of tokens that a repeated segment has, `least_distinct` how many
    different ones at least (0: nothing is asked).
    """

    experiment: str
    seed: int
    init: str
    period: tuple[int, int]
    least_distinct: int
    rows: RowShares
    lessons: LessonShares
    model: DecoderConfig
    optimizer: OptimizerConfig
    train: LoopConfig

    def __post_init__(self):
        if self.train.length > self.model.positions:
            raise InputError(f"train.length={self.train.length} exceeds model.positions={self.model.positions}.")


def describe(config: Any) -> dict[str, Any]:
    """Parameters, tokens and operations."""
    c = to_dataclass(EmbeddedConfig, config)
    return {
        "parameters": parameter_count(c.model),
        "tokens in all": c.train.steps * c.train.batch * c.train.length,
        "FLOPs in all": c.train.steps * train_flops(c.model, batch=c.train.batch, length=c.train.length),
    }


def run(config: Any, workdir: Path | None = None) -> dict[str, Any]:
    """Train a stage and measure it."""
    c = to_dataclass(EmbeddedConfig, config)
    begun = load(_model_folder(c.init)) if c.init else None
    if begun and begun.config != c.model:
        raise InputError(f"config.init={c.init!r} holds another model than config.model: stages share one.")
    tokenizer = begun.tokenizer if begun else _tokenizer(c)
    lm = LM(c.model, {}, tokenizer, (tokenizer.eos_id or 0,))
    source, optimizer = batches(c, tokenizer), make_optimizer(c.optimizer, steps=c.train.steps)
    loss = NextTokenLoss(c.model)
    key = jax.random.key(c.seed)

    def first() -> Any:
        params = begun.params if begun else fresh(c.model, jax.random.fold_in(key, 0))
        return init_state(params, optimizer, state=loss.init_state())

    with Checkpoints(workdir and workdir / "checkpoints") as checkpoints:
        like = jax.eval_shape(first)
        state = resume(checkpoints, like, data=source.describe()) or first()
        done = int(state.step)
        with (
            Metrics(workdir, resume_at=done) as metrics,
            Preemption() as preemption,
            Prefetch(source, jax.device_put, first=done + 1, steps=c.train.steps) as prefetched,
        ):
            state = train(
                state, make_step(loss, optimizer), prefetched, jax.random.fold_in(key, 1), steps=c.train.steps,
                metrics=metrics, checkpoints=checkpoints, notes={"data": source.describe()},
                evaluate=lambda state: _accuracies(dataclasses.replace(lm, params=state.params), c.train.asked),
                stops_at=preemption.stops_at,
                work=Work(c.train.batch * c.train.length,
                          train_flops(c.model, batch=c.train.batch, length=c.train.length)),
                log_every=c.train.log_every, evaluate_every=c.train.evaluate_every, save_every=c.train.save_every,
            )  # fmt: skip
    lm = dataclasses.replace(lm, params=state.params)
    if workdir is not None and not (workdir / "model").exists():
        lm.save(workdir / "model")
    sha256 = model_sha256(workdir / "model") if workdir is not None else None
    rows = [row(evaluate(lm, task, n=c.train.final), baselines(task, n=c.train.final)) for task in ABILITIES.values()]
    return {
        "metrics": {"model_sha256": sha256, "abilities": rows, "tokenizer": tokenizer.vocab_size},
        "checks": [],
        "report": report(rows, metrics.history),
    }


def fresh(config: DecoderConfig, key: Any) -> PyTree:
    """Initial parameters with large embeddings and small output projections."""

    def scaled(path: tuple[str, ...], x: Any) -> Any:
        if path[0] == "embed":
            return x * (EMBEDDING_STD / config.init_std)
        return x * OUT_SCALE if path[-2] in ("o", "down") else x

    params = jax.jit(lambda: init(config, key))()
    return unflatten_dict({path: jnp.asarray(scaled(path, x)) for path, x in flatten_dict(params).items()})


def batches(c: EmbeddedConfig, tokenizer: Tokenizer) -> Mixture:
    """Rows of lessons, repeated segments, keys with values and English, by their shares."""
    size, length = c.train.batch, c.train.length
    lessons = Lessons(tokenizer, dataclasses.asdict(c.lessons), length)
    read = [text for i, text in enumerate(stdlib_docstrings()) if i % HELD_OUT]
    repeated = Repeated(tokenizer.vocab_size, c.period, least_distinct=c.least_distinct or None)
    english = Corpus.of(encode_documents(read, tokenizer), vocab_size=tokenizer.vocab_size)
    # A value is one token right behind its key, as in the lessons: looking further behind is much harder to learn.
    recall = Recall(tokenizer.vocab_size, length - 1, prefix=(0, 2), gap=(0, 0), value=(1, 1))
    sources = {
        "lessons": Procedural(lessons, size, length, c.seed),
        "recall": Procedural(recall, size, length, c.seed),
        "repeated": Procedural(repeated, size, length, c.seed),
        "english": Packed(english, size, length, c.seed),
    }
    shares = {name: share for name, share in dataclasses.asdict(c.rows).items() if share}
    return Mixture([sources[name] for name in shares], list(shares.values()), size)


def _tokenizer(c: EmbeddedConfig) -> Tokenizer:
    return train_bpe(vocabulary_texts(), vocab_size=c.model.vocab, single_digits=True, chat_template=CHAT_TEMPLATE)


def _model_folder(init: str) -> Path:
    path = Path(init)
    return path / "model" if (path / "model").is_dir() else path


def _accuracies(lm: LM, n: int) -> dict[str, float]:
    return {f"accuracy/{name}": evaluate(lm, task, n=n).accuracy.value for name, task in ABILITIES.items()}


def report(rows: list[dict[str, Any]], history: list[dict[str, Any]]) -> dict[str, Any]:
    """The page: accuracies beside trivial answers, and how they came."""
    table = Table(
        "Abilities at their standard levels", ("ability", "level", "items", "accuracy", "best trivial answer", "is"),
        tuple((found["task"], found["level"], found["n"], Interval(**found["accuracy"]),
               Interval(**{k: found["best_baseline"][k] for k in ("value", "low", "high")}),
               found["best_baseline"]["name"]) for found in rows),
    )  # fmt: skip
    seen = [line for line in history if any(name.startswith("accuracy/") for name in line)]
    curves = [
        Curve(name, [line["step"] for line in seen], [line[f"accuracy/{name}"] for line in seen]) for name in ABILITIES
    ]
    plot = Plot("Accuracy while training", tuple(curves), x_label="step", y_label="accuracy")
    return {
        "title": "The embedded model",
        "summary": "Accuracies on items of the test side, with 95 % intervals; none was trained on.",
        "sections": [table, plot],
    }
