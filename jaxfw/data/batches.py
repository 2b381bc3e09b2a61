"""Batches as functions of the step, numbered from 1: nothing to save or to rewind.

A source is called with a step and, in a run of several processes, the rows wanted; `describe()` says what data it is.
Here are windows of the stream of all tokens: documents are not told apart, so that every token of a row is trained on,
and attention and loss run across their borders. `jaxfw.data.packing` keeps them apart.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from jaxfw.core.errors import InputError
from jaxfw.core.shapes import Int
from jaxfw.data.corpus import Corpus, as_corpus

Batch = dict[str, np.ndarray]


class Batches(Protocol):
    """What every source is. A batch is a dict of arrays whose rows are those asked for, by default all.

    `tokens` int32 [B T+1]; if documents are told apart, `segment_ids` int32 [B T+1] (1, 2, ... from the left; 0 is
    padding at the end); if not all tokens count, `weights` float32 [B T+1]: of the prediction of that token.
    """

    @property
    def batch(self) -> int:
        """Rows of a step."""
        ...

    @property
    def length(self) -> int:
        """Tokens that a row predicts at most: it holds one more."""
        ...

    def __call__(self, step: int, rows: range | None = None) -> Batch: ...

    def describe(self) -> dict[str, Any]:
        """JSON values that differ where the batches differ."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class RandomWindows:
    """`batches(step)` draws `batch` windows of `length` + 1 tokens at random places, the same for the same step."""

    tokens: Corpus | Int[np.ndarray, "N"]
    batch: int
    length: int
    seed: int = 0

    def __post_init__(self):
        check_sizes(self.batch, self.length, self.seed)
        _check_room(self.tokens.size, self.length)

    @functools.cached_property
    def _corpus(self) -> Corpus:
        return as_corpus(self.tokens)

    def __call__(self, step: int, rows: range | None = None) -> Batch:
        starts = np.random.default_rng([self.seed, step]).integers(0, self._corpus.size - self.length, self.batch)
        return _windows(self._corpus, [int(starts[row]) for row in checked_rows(rows, self.batch)], self.length)

    def describe(self) -> dict[str, Any]:
        return {"kind": "random windows", "seed": self.seed, **described(self, self._corpus)}


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """The stream of all tokens cut into windows; each epoch reads all of them, in an order of its own.

    Neighbouring windows share a token, so that each is predicted once an epoch, up to a rest shorter than a window; in
    each epoch the rest falls at other places, and with it the cuts.
    """

    tokens: Corpus | Int[np.ndarray, "N"]
    batch: int
    length: int
    seed: int = 0

    def __post_init__(self):
        check_sizes(self.batch, self.length, self.seed)
        _check_room(self._corpus.size, self.length)

    @functools.cached_property
    def _corpus(self) -> Corpus:
        return as_corpus(self.tokens)

    @property
    def rows_per_epoch(self) -> int:
        """Windows of a pass over the stream."""
        return (self._corpus.size - 1) // self.length

    def __call__(self, step: int, rows: range | None = None) -> Batch:
        places = [divmod(number, self.rows_per_epoch) for number in row_numbers(step, rows, self.batch)]
        return _windows(self._corpus, [int(self._starts(epoch)[i]) for epoch, i in places], self.length)

    def describe(self) -> dict[str, Any]:
        more = {"seed": self.seed, "rows_per_epoch": self.rows_per_epoch}
        return {"kind": "windows", "packing": "stream", **more, **described(self, self._corpus)}

    @functools.cached_property
    def _starts(self):
        """Epoch -> the windows' starts in their order; the last few epochs are kept."""

        @functools.lru_cache(maxsize=2)
        def starts(epoch: int) -> Int[np.ndarray, "N"]:
            draw = np.random.default_rng([self.seed, epoch])
            first = draw.integers(0, (self._corpus.size - 1) % self.length + 1)
            return first + draw.permutation(self.rows_per_epoch) * self.length

        return starts


def consecutive_windows(
    tokens: Int[np.ndarray, "N"], *, batch: int, length: int, most: int | None = None
) -> Iterator[Int[np.ndarray, "B T+1"]]:
    """All windows of `length` + 1 tokens one after the other, each starting with the last token of the one before.

    Only whole batches come, `most` of them at the most: every token is predicted once, up to a rest.
    """
    _check_room(len(tokens), length)
    count = (len(tokens) - 1) // length // batch
    if count == 0:
        raise InputError(f"{len(tokens)} tokens do not fill one batch of {batch} windows of {length}: lower the batch.")
    for i in range(count if most is None else min(count, most)):
        starts = (i * batch + np.arange(batch)) * length
        yield tokens[starts[:, None] + np.arange(length + 1)]


def check_sizes(batch: int, length: int, seed: int) -> None:
    """Refuse what gives no rows."""
    for name, value, least in (("batch", batch, 1), ("length", length, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise InputError(f"{name}={value!r} must be a whole number of at least {least}.")


def checked_rows(rows: range | None, batch: int) -> range:
    """The rows that are asked for, by default all."""
    if rows is None:
        return range(batch)
    if not isinstance(rows, range) or rows.step != 1 or not 0 <= rows.start < rows.stop <= batch:
        raise InputError(f"rows={rows!r} must be a range of rows of a batch={batch}, as in range(0, {batch}).")
    return rows


def row_numbers(step: int, rows: range | None, batch: int) -> range:
    """The rows of a step, counted from the run's first."""
    if step < 1:
        raise InputError(f"step={step}: steps are numbered from 1.")
    chosen, first = checked_rows(rows, batch), (step - 1) * batch
    return range(first + chosen.start, first + chosen.stop)


def described(batches: Batches, corpus: Corpus) -> dict[str, Any]:
    """What is said of any batches from a corpus."""
    return {
        "batch": batches.batch,
        "length": batches.length,
        "documents": len(corpus),
        "tokens": corpus.size,
        "fingerprint": corpus.fingerprint,
    }


def _windows(corpus: Corpus, starts: list[int], length: int) -> Batch:
    read = [corpus.read(start, start + length + 1) for start in starts]
    batch = {"tokens": np.stack([tokens for tokens, _ in read])}
    return batch if corpus.weights is None else batch | {"weights": np.stack([weights for _, weights in read])}  # type: ignore


def _check_room(size: int, length: int) -> None:
    if size <= length:
        raise InputError(f"{size} tokens are fewer than one window of length={length} + 1: lower length.")
