"""Documents as token ids: one array of tokens, in memory or on a disk, and where each document lies in it."""

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from jaxfw.core.errors import InputError
from jaxfw.core.shapes import Float, Int


class Document(NamedTuple):
    """Token ids, and which of them to train on (1) or only to read (0); None trains on all."""

    tokens: Sequence[int] | Int[np.ndarray, "T"]
    weights: Sequence[int] | Int[np.ndarray, "T"] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """Document i is `tokens[starts[i]:ends[i]]`; a selection of documents shares the arrays.

    `Corpus.of(documents)` makes one in memory, `jaxfw.data.open_tokens` one that lies on a disk. The *stream* is all
    documents one behind the other, in their order.

    Attributes:
        tokens: ids, unsigned.
        starts: of each document.
        ends: likewise, exclusive.
        weights: of each token, 1 (trained on) or 0; None: all are.
        vocab_size: every id is below it.
        fingerprint: changes with the content: with any token, weight or border.
        tokenizer: `vocabulary_fingerprint` of what made the ids; empty where it is not known.
    """

    tokens: Int[np.ndarray, "A"]
    starts: Int[np.ndarray, "N"]
    ends: Int[np.ndarray, "N"]
    weights: Int[np.ndarray, "A"] | None
    vocab_size: int
    fingerprint: str
    tokenizer: str = ""

    @classmethod
    def of(cls, documents: Iterable[Document | Sequence[int]], *, vocab_size: int | None = None, tokenizer: str = ""):
        """A corpus in memory.

        Raises:
            InputError: no documents, an empty one, ids that are negative or beyond the vocabulary, or weights that are
                not 0 or 1 for every token of every document.

        >>> corpus = Corpus.of([[5, 6, 7], [8, 9]])
        >>> len(corpus), corpus.size, corpus.lengths.tolist()
        (2, 5, [3, 2])
        """
        found = [checked(document, i, vocab_size) for i, document in enumerate(documents)]
        if not found:
            raise InputError("a corpus of no documents: give at least one.")
        check_weighted([document.weights is not None for document in found])
        joined = np.concatenate([document.tokens for document in found])
        size = vocab_size or int(joined.max()) + 1
        tokens = joined.astype(token_dtype(size))
        weights = None if found[0].weights is None else np.concatenate([np.asarray(d.weights) for d in found])
        ends = np.cumsum([len(document.tokens) for document in found], dtype=np.int64)
        digests = [sha256(tokens), "" if weights is None else sha256(weights)]
        return cls(tokens, starts_of(ends), ends, weights, size, content_fingerprint(digests, ends), tokenizer)

    def __len__(self) -> int:
        """The number of documents."""
        return len(self.ends)

    @property
    def lengths(self) -> Int[np.ndarray, "N"]:
        """Tokens of each document."""
        return self.ends - self.starts

    @functools.cached_property
    def size(self) -> int:
        """Tokens of all documents."""
        return int(self.lengths.sum())

    def document(self, i: int) -> Document:
        """One document; its arrays are views."""
        place = slice(int(self.starts[i]), int(self.ends[i]))
        return Document(self.tokens[place], None if self.weights is None else self.weights[place])

    def read(self, first: int, last: int) -> tuple[Int[np.ndarray, "T"], Float[np.ndarray, "T"] | None]:
        """Tokens (int32) and weights (float32, if there are any) of the places `first` to `last` of the stream."""
        if self._is_whole:
            places = [slice(int(self.starts[0]) + first, int(self.starts[0]) + last)]
        else:
            begins = self._begins
            documents = range(int(np.searchsorted(begins, first, "right")) - 1, int(np.searchsorted(begins, last)))
            places = [
                slice(
                    int(self.starts[i]) + max(first - int(begins[i]), 0),
                    int(min(self.starts[i] + last - begins[i], self.ends[i])),
                )
                for i in documents
            ]
        return gather(self.tokens, places, np.int32), gather(self.weights, places, np.float32)

    def select(self, which: Sequence[int] | Int[np.ndarray, "N"]) -> "Corpus":
        """The documents with these numbers, in this order."""
        return self._with(self.starts[which], self.ends[which])

    def split(self, every: int) -> tuple["Corpus", "Corpus"]:
        """Documents to train on, and every `every`-th, which is held out.

        Raises:
            InputError: there are not as many documents; `cut` makes more of long ones.
        """
        if every < 2 or len(self) < every:
            raise InputError(
                f"every {every}-th of {len(self)} document{'s' * (len(self) > 1)} leaves none to hold out: hold out "
                "more often (at least every 2nd), cut long documents first (Corpus.cut), or give files for validation."
            )
        held_out = np.arange(len(self)) % every == every - 1
        return self.select(np.flatnonzero(~held_out)), self.select(np.flatnonzero(held_out))

    def cut(self, longest: int) -> "Corpus":
        """Documents of more than `longest` tokens cut into several; the last has up to one more, as one is no document.

        >>> Corpus.of([range(7)]).cut(3).lengths.tolist()
        [3, 4]
        """
        if longest < 2:
            raise InputError(f"longest={longest} must be at least 2: one token predicts nothing.")
        lengths = self.lengths
        counts = np.maximum(1, (lengths + longest - 2) // longest)  # a rest of one token stays with the piece before
        document = np.repeat(np.arange(len(self)), counts)
        number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
        starts = self.starts[document] + number * longest
        is_last = number == counts[document] - 1
        return self._with(starts, np.where(is_last, self.ends[document], starts + longest))

    def _with(self, starts: np.ndarray, ends: np.ndarray) -> "Corpus":
        if np.array_equal(starts, self.starts) and np.array_equal(ends, self.ends):
            return self
        mark = hashlib.sha256(self.fingerprint.encode() + little(starts) + little(ends)).hexdigest()
        return dataclasses.replace(self, starts=starts, ends=ends, fingerprint=mark)

    @functools.cached_property
    def _begins(self) -> Int[np.ndarray, "N"]:
        """Where each document begins in the stream."""
        return np.cumsum(self.lengths) - self.lengths

    @functools.cached_property
    def _is_whole(self) -> bool:
        return bool(np.array_equal(self.starts[1:], self.ends[:-1]))


def as_corpus(tokens: Corpus | Int[np.ndarray, "A"]) -> Corpus:
    """An array of tokens is a corpus of one document."""
    return tokens if isinstance(tokens, Corpus) else Corpus.of([Document(np.asarray(tokens))])


def checked(document: Document | Sequence[int], i: int, vocab_size: int | None) -> Document:
    """The document with integer arrays; refuses what is no list of token ids."""
    tokens, weights = document if isinstance(document, Document) else Document(document)
    array = np.asarray(tokens)
    if array.ndim != 1 or not len(array) or array.dtype.kind not in "iu":
        raise InputError(f"document {i} is {tokens!r:.60}: give a list of at least one whole number, its token ids.")
    if array.min() < 0 or (vocab_size is not None and array.max() >= vocab_size):
        bad = int(array.min() if array.min() < 0 else array.max())
        raise InputError(f"document {i} holds the token id {bad}, not one of 0 .. {(vocab_size or 0) - 1 or '?'}.")
    if weights is None:
        return Document(array)
    mask = np.asarray(weights)
    if mask.shape != array.shape or not np.isin(mask, (0, 1)).all():
        raise InputError(
            f"document {i}: weights {weights!r:.60} must be 0 or 1 for each of its {len(array)} tokens, to train on or "
            "not."
        )
    return Document(array, mask.astype(np.uint8))


def check_weighted(has_weights: Sequence[bool]) -> None:
    """Either all documents say what to train on, or none."""
    if len(set(has_weights)) > 1:
        raise InputError(
            f"document {list(has_weights).index(not has_weights[0])} has weights and document 0 has none, or the other "
            "way round: give them for all or for none (ones train on every token)."
        )


def token_dtype(vocab_size: int) -> np.dtype:
    """2 bytes a token where the vocabulary allows it, else 4."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def starts_of(ends: Int[np.ndarray, "N"]) -> Int[np.ndarray, "N"]:
    """The starts of documents that lie one behind the other."""
    return np.concatenate([np.zeros(1, np.int64), ends[:-1]])


def gather(array: np.ndarray | None, places: Sequence[slice], dtype: type) -> np.ndarray:
    """These places one behind the other; None of nothing."""
    return None if array is None else np.concatenate([array[place] for place in places]).astype(dtype)  # type: ignore


def sha256(array: np.ndarray) -> str:
    """Of the array's bytes as a file holds them."""
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def content_fingerprint(digests: Sequence[str], ends: Int[np.ndarray, "N"]) -> str:
    """From the sums of tokens and weights, and the documents' ends: the same in memory and on a disk."""
    return hashlib.sha256("\n".join(digests).encode() + little(ends)).hexdigest()


def little(array: Int[np.ndarray, "N"]) -> bytes:
    """Little-endian bytes, on every machine."""
    return np.ascontiguousarray(array, "<i8").tobytes()
