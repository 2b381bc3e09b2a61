"""Whole documents packed into rows and told apart by `segment_ids`: attention and loss stay inside each.

Which lengths share a row is settled once, by best fit in order of falling length (O(N log N); what little stays empty
is padding). Each epoch draws anew which of the documents of equal length goes where, and the order of the rows. So all
epochs have as many rows, and any row of any epoch is found without the ones before.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import numpy as np

from jaxfw.core.errors import InputError
from jaxfw.core.shapes import Int
from jaxfw.data.batches import Batch, check_sizes, described, row_numbers
from jaxfw.data.corpus import Corpus


class _Pieces(NamedTuple):
    """What is packed, by falling size: where each begins in the corpus's array, its tokens, and its row."""

    starts: Int[np.ndarray, "P"]
    sizes: Int[np.ndarray, "P"]
    rows: Int[np.ndarray, "P"]


class _Epoch(NamedTuple):
    """Which piece takes each place, and the order of the rows."""

    pieces: Int[np.ndarray, "P"]
    order: Int[np.ndarray, "rows"]


@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
    """Rows of `length` + 1 tokens that hold whole documents; one longer than a row is cut into pieces.

    Pieces of a document share a token, so that each of its tokens but the first is predicted exactly once an epoch.
    What has nothing to predict is left out: documents of one token, and pieces without a token to train on.
    """

    corpus: Corpus
    batch: int
    length: int
    seed: int = 0

    def __post_init__(self):
        check_sizes(self.batch, self.length, self.seed)
        if not len(self._pieces.sizes):
            raise InputError(
                f"none of the {len(self.corpus)} documents has a token to predict and to train on: a document needs at "
                "least 2 tokens, and a weight that is not 0 beyond its first."
            )

    @property
    def rows_per_epoch(self) -> int:
        """Rows of a pass over all documents."""
        return len(self._first_of_row) - 1

    @property
    def padding(self) -> float:
        """The share of all places in rows that no token fills."""
        return 1 - float(self._pieces.sizes.sum()) / (self.rows_per_epoch * (self.length + 1))

    def __call__(self, step: int, rows: range | None = None) -> Batch:
        numbers = row_numbers(step, rows, self.batch)
        shape = (len(numbers), self.length + 1)
        batch: Batch = {"tokens": np.zeros(shape, np.int32), "segment_ids": np.zeros(shape, np.int32)}
        if self.corpus.weights is not None:
            batch["weights"] = np.zeros(shape, np.float32)
        for i, number in enumerate(numbers):
            self._fill({name: array[i] for name, array in batch.items()}, *divmod(number, self.rows_per_epoch))
        return batch

    def describe(self) -> dict[str, Any]:
        more = {"seed": self.seed, "rows_per_epoch": self.rows_per_epoch, "padding": round(self.padding, 6)}
        return {"kind": "packed", "packing": "documents", **more, **described(self, self.corpus)}

    def _fill(self, row: Batch, epoch: int, number: int) -> None:
        drawn = self._epoch(epoch)
        which = int(drawn.order[number])
        end = 0
        for segment, place in enumerate(range(*self._first_of_row[which : which + 2]), start=1):
            piece = drawn.pieces[self._places[place]]
            start, size = int(self._pieces.starts[piece]), int(self._pieces.sizes[piece])
            here, there = slice(end, end + size), slice(start, start + size)
            row["tokens"][here], row["segment_ids"][here] = self.corpus.tokens[there], segment
            if self.corpus.weights is not None:
                row["weights"][here] = self.corpus.weights[there]
            end += size

    @functools.cached_property
    def _pieces(self) -> _Pieces:
        starts, sizes = _cut(self.corpus, self.length)
        order = np.argsort(-sizes, kind="stable")
        return _Pieces(starts[order], sizes[order], best_fit(sizes[order], self.length + 1))

    @functools.cached_property
    def _places(self) -> Int[np.ndarray, "P"]:
        """Places by row."""
        return np.argsort(self._pieces.rows, kind="stable")

    @functools.cached_property
    def _first_of_row(self) -> Int[np.ndarray, "rows+1"]:
        """Where in `_places` each row begins, and the end of the last."""
        return np.concatenate([[0], np.cumsum(np.bincount(self._pieces.rows))])

    @functools.cached_property
    def _epoch(self):
        @functools.lru_cache(maxsize=2)
        def epoch(number: int) -> _Epoch:
            draw = np.random.default_rng([self.seed, number])
            shuffled = draw.permutation(len(self._pieces.sizes))
            # Sorted by size again: pieces have only changed places with others of their size.
            pieces = shuffled[np.argsort(-self._pieces.sizes[shuffled], kind="stable")]
            return _Epoch(pieces, draw.permutation(self.rows_per_epoch))

        return epoch


def _cut(corpus: Corpus, length: int) -> tuple[Int[np.ndarray, "P"], Int[np.ndarray, "P"]]:
    """Starts and sizes of the pieces, 2 to `length` + 1 tokens each, that have something to train on."""
    counts = -(-(corpus.lengths - 1) // length)
    document = np.repeat(np.arange(len(corpus)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = corpus.starts[document] + number * length
    sizes = np.minimum(corpus.ends[document] - starts, length + 1)
    if corpus.weights is None:
        return starts, sizes
    trained = np.fromiter((corpus.weights[a + 1 : a + n].any() for a, n in zip(starts, sizes)), bool, len(starts))
    return starts[trained], sizes[trained]


def best_fit(sizes: Int[np.ndarray, "P"], room: int) -> Int[np.ndarray, "P"]:
    """The row of each piece, taken in their order: the fullest that still has room for it, or a new one.

    >>> best_fit(np.array([6, 4, 3, 3, 2]), room=9).tolist()
    [0, 1, 0, 1, 1]
    """
    rows = np.empty(len(sizes), np.int64)
    by_space: list[list[int]] = [[] for _ in range(room + 1)]
    spaces, count = 0, 0  # a bit for each space that some row has: the lowest bit above `size` is the best fit
    for i, size in enumerate(sizes.tolist()):
        fitting = spaces >> size
        if fitting:
            space = size + (fitting & -fitting).bit_length() - 1
            row = by_space[space].pop()
            if not by_space[space]:
                spaces ^= 1 << space
        else:
            row, space, count = count, room, count + 1
        rows[i], left = row, space - size
        if left > 1:  # no piece is smaller than 2
            by_space[left].append(row)
            spaces |= 1 << left
    return rows
