"""What a run reads: the tokenizer, batches as functions of the step, held-out ones, and how many steps that makes."""

import dataclasses
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from experiments.train.settings import TrainingConfig
from jaxfw.core.distributed import barrier, current
from jaxfw.core.errors import InputError
from jaxfw.core.hardware import peak_flops
from jaxfw.data import (
    Corpus,
    Packed,
    Tokenizer,
    Windows,
    encode_documents,
    find_documents,
    load_tokenizer,
    read_corpus,
    save_tokenizer,
    stdlib_docstrings,
    train_bpe,
)
from jaxfw.models import DecoderConfig
from jaxfw.models.accounting import train_flops
from jaxfw.train.loop import Work
from jaxfw.weights.exporting import model_folder

DOCUMENTATION = "documentation"  # of Python's standard library: text that is at hand
TRAIN = "train"


@dataclasses.dataclass(frozen=True)
class Data:
    """Batches to train on, held-out ones, and the number of steps."""

    tokenizer: Tokenizer
    batches: Packed | Windows
    held_out: list[dict[str, np.ndarray]]
    steps: int

    @property
    def said(self) -> str:
        """What there is, for the terminal."""
        found = self.batches.describe()
        padding = f", {100 * found['padding']:.1f} % padding" if "padding" in found else ""
        read = f"{found['tokens']:,} tokens of {found['documents']:,} documents"
        held_out = sum(len(batch["tokens"]) for batch in self.held_out)
        return f"{read}, {self.batches.rows_per_epoch:,} rows a pass{padding}; {held_out:,} rows held out"

    def work(self, c: TrainingConfig, config: DecoderConfig, mesh: Mesh) -> Work:
        """What a step does, and the peak of the mesh's devices where it is known."""
        flops = train_flops(config, batch=c.train.batch, length=c.train.length, is_base_frozen=c.lora is not None)
        return Work(c.train.batch * c.train.length, flops, peak_flops(list(mesh.devices.flat), config.dtype))


def read(c: TrainingConfig, config: DecoderConfig, workdir: Path | None) -> Data:
    """Tokenise, or map tokens; every process does the same.

    Raises:
        InputError: no such files, a tokenizer with more ids than the model, nothing that could be held out.
    """
    tokenizer = _tokenizer(c, config, workdir)
    if tokenizer.vocab_size > config.vocab:
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model a vocabulary of {config.vocab}: give the one "
            "that belongs to the model (config.tokenizer), or a larger model.vocab."
        )
    if c.train.length > config.context:
        raise InputError(f"train.length={c.train.length} exceeds the model's {config.context} positions: lower it.")
    training, held_out = _corpora(c, tokenizer)
    batches = _batches(c, training, c.train.batch)
    size = min(c.train.batch, _batches(c, held_out, 1).rows_per_epoch)
    kept = _batches(c, held_out, size)
    count = min(c.train.validation_batches, kept.rows_per_epoch // size)
    return Data(tokenizer, batches, [kept(step) for step in range(1, count + 1)], _steps(c, batches))


def _tokenizer(c: TrainingConfig, config: DecoderConfig, workdir: Path | None) -> Tokenizer:
    if c.tokenizer != TRAIN:
        return load_tokenizer(c.tokenizer or model_folder(Path(c.init)))
    folder = workdir and workdir / "tokenizer"
    if folder is None:
        return train_bpe(_texts(c), vocab_size=config.vocab)
    if current().is_main and not folder.exists():
        save_tokenizer(folder, train_bpe(_texts(c), vocab_size=config.vocab))
    barrier("tokenizer")
    return load_tokenizer(folder)


def _texts(c: TrainingConfig):
    if c.data == DOCUMENTATION:
        return stdlib_docstrings()
    if c.reading.chat:
        raise InputError("config.tokenizer='train' makes one from texts, not from conversations: give a directory.")
    return (text for text in find_documents(c.data, column=c.reading.column) if isinstance(text, str))


def _corpora(c: TrainingConfig, tokenizer: Tokenizer) -> tuple[Corpus, Corpus]:
    """What is trained on, and what is held out."""

    def read_one(source: str) -> Corpus:
        if source == DOCUMENTATION:
            return Corpus.of(encode_documents(stdlib_docstrings(), tokenizer), vocab_size=tokenizer.vocab_size)
        return read_corpus(source, tokenizer, column=c.reading.column, chat=c.reading.chat)

    corpus = read_one(c.data)
    if c.validation:
        return corpus, read_one(c.validation)
    if len(corpus) < 2 * c.reading.held_out:  # a book, say: its pages are held out
        corpus = corpus.cut(c.train.length + 1)
    return corpus.split(c.reading.held_out)


def _batches(c: TrainingConfig, corpus: Corpus, batch: int) -> Packed | Windows:
    kind = Packed if c.reading.packing == "documents" else Windows
    return kind(corpus, batch=batch, length=c.train.length, seed=c.seed)


def _steps(c: TrainingConfig, batches: Packed | Windows) -> int:
    """As asked, or those of so many passes over the data; whole updates."""
    if c.train.steps:
        return c.train.steps
    steps = max(round(c.train.epochs * batches.rows_per_epoch / c.train.batch), 1)
    return -(-steps // c.optimizer.accumulate) * c.optimizer.accumulate
