"""Documents that a function makes, without end: the same batch for the same step, and nothing on a disk."""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxfw.core.errors import InputError
from jaxfw.core.shapes import Float, Int
from jaxfw.data.batches import Batch, check_sizes, checked_rows

Generate = Callable[[np.random.Generator], tuple[Int[np.ndarray, "T"], Float[np.ndarray, "T"] | None]]


@dataclasses.dataclass(frozen=True, eq=False)
class Procedural:
    """Each row is filled with documents of `generate`, told apart by `segment_ids`; the last one is cut at its end.

    `generate(rng)` gives the tokens of a document and the weights of their predictions (None: 1), and draws from `rng`
    alone, which is a function of seed, step and row.
    """

    generate: Generate
    batch: int
    length: int
    seed: int = 0

    def __post_init__(self):
        check_sizes(self.batch, self.length, self.seed)

    def __call__(self, step: int, rows: range | None = None) -> Batch:
        made = [self._row(step, row) for row in checked_rows(rows, self.batch)]
        return {name: np.stack([row[name] for row in made]) for name in made[0]}

    def describe(self) -> dict[str, Any]:
        """The generator by its name and settings, and by what it makes: the fingerprint is of the first step's rows."""
        name = getattr(self.generate, "__qualname__", None) or repr(self.generate)
        digest = hashlib.sha256()
        for array in self(1, range(min(self.batch, 4))).values():
            digest.update(array.tobytes())
        return {
            "kind": "procedural", "packing": "documents", "generate": name, "seed": self.seed, "batch": self.batch,
            "length": self.length, "fingerprint": digest.hexdigest(),
        }  # fmt: skip

    def _row(self, step: int, number: int) -> Batch:
        draw = np.random.default_rng([self.seed, step, number])
        row: Batch = {
            "tokens": np.zeros(self.length + 1, np.int32),
            "segment_ids": np.zeros(self.length + 1, np.int32),
            "weights": np.zeros(self.length + 1, np.float32),
        }
        begin = 0
        for segment in range(1, self.length + 2):
            tokens, weights = self._document(draw)
            here = slice(begin, begin + len(tokens))
            room = self.length + 1 - begin
            row["tokens"][here], row["segment_ids"][here], row["weights"][here] = tokens[:room], segment, weights[:room]
            begin += len(tokens)
            if begin > self.length:
                break
        return row

    def _document(self, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        made = self.generate(draw)
        if not isinstance(made, tuple) or len(made) != 2:
            raise InputError(f"generate gave {made!r:.80}: give (tokens, weights), or (tokens, None).")
        tokens = np.asarray(made[0])
        if tokens.ndim != 1 or not len(tokens) or tokens.dtype.kind not in "iu" or tokens.min() < 0:
            raise InputError(f"generate gave the tokens {made[0]!r:.80}: give at least one whole number from 0 on.")
        weights = np.ones(len(tokens), np.float32) if made[1] is None else np.asarray(made[1], np.float32)
        if weights.shape != tokens.shape:
            raise InputError(
                f"generate gave {len(tokens)} tokens and weights of shape {list(weights.shape)}: one each."
            )
        return tokens, weights


@dataclasses.dataclass(frozen=True)
class Repeated:
    """A random segment said again and again: what a model must look up in what it has read (induction).

    The segment's length is drawn from `period` (least, most), and it is said `times` times. Nothing tells its first
    saying beforehand: only repetitions are trained on. With `least_distinct`, it is made of so many different tokens or
    more, few as often as many: where few come up often, the one before does not tell which comes next, the last three
    do.

    >>> tokens, weights = Repeated(vocab_size=100, period=(3, 3))(np.random.default_rng(0))
    >>> tokens.tolist(), weights.tolist()
    ([85, 63, 51, 85, 63, 51], [0.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    """

    vocab_size: int
    period: tuple[int, int] = (8, 32)
    times: int = 2
    least_distinct: int | None = None

    def __post_init__(self):
        if self.vocab_size < 2:
            raise InputError(f"vocab_size={self.vocab_size} must be at least 2: one token needs no looking up.")
        if not 1 <= self.period[0] <= self.period[1]:
            raise InputError(f"period={self.period} must be (least, most) with 1 <= least <= most.")
        if self.least_distinct is not None and not 2 <= self.least_distinct <= self.vocab_size:
            raise InputError(f"least_distinct={self.least_distinct} must be from 2 to vocab_size={self.vocab_size}.")
        if self.times < 2:
            raise InputError(f"times={self.times} must be at least 2: what is said once is not repeated.")

    def __call__(self, rng: np.random.Generator) -> tuple[Int[np.ndarray, "T"], Float[np.ndarray, "T"]]:
        period = int(rng.integers(self.period[0], self.period[1] + 1))
        if self.least_distinct is None:
            segment = rng.integers(0, self.vocab_size, period)
        else:
            count = int(np.exp(rng.uniform(np.log(self.least_distinct), np.log(self.vocab_size))))
            segment = rng.choice(rng.integers(0, self.vocab_size, count), period)
        tokens = np.tile(segment, self.times)
        return tokens, (np.arange(len(tokens)) >= period).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Recall:
    """Keys are given values, again and again, and asked for the last one: associative recall with many queries.

    The layout of a document is one of random tokens: `prefix`, key, `gap`, value, the same each time; how many keys
    there are, and how long each part is, is drawn for each document (least, most). Only values that are asked for are
    trained on. With a gap, the token before a value tells nothing of its key (Arora et al. 2023, arXiv:2312.04927,
    whose pairs have none).
    """

    vocab_size: int
    length: int
    keys: tuple[int, int] = (2, 32)
    prefix: tuple[int, int] = (0, 3)
    gap: tuple[int, int] = (0, 3)
    value: tuple[int, int] = (1, 3)
    renewed: float = 0.3  # of the times that a known key comes up

    def __post_init__(self):
        for name, least in (("keys", 1), ("prefix", 0), ("gap", 0), ("value", 1)):
            low, high = getattr(self, name)
            if not least <= low <= high:
                raise InputError(f"{name}=({low}, {high}) must be (least, most) with {least} <= least <= most.")
        if not 0 <= self.renewed < 1:
            raise InputError(f"renewed={self.renewed} must be from 0 to below 1: else nothing is asked for.")
        if self.vocab_size < self.keys[1]:
            raise InputError(f"vocab_size={self.vocab_size} must hold keys={self.keys[1]} different tokens.")
        if self.length < 1:
            raise InputError(f"length={self.length} must be at least 1.")

    def __call__(self, rng: np.random.Generator) -> tuple[Int[np.ndarray, "T"], Float[np.ndarray, "T"]]:
        def some(least: int, most: int) -> list[int]:
            return rng.integers(0, self.vocab_size, rng.integers(least, most + 1)).tolist()

        low, high = np.log(self.keys[0]), np.log(self.keys[1] + 1)
        keys = rng.choice(self.vocab_size, size=int(np.exp(rng.uniform(low, high))), replace=False).tolist()
        prefix, gap, size = some(*self.prefix), some(*self.gap), int(rng.integers(self.value[0], self.value[1] + 1))
        held: dict[int, list[int]] = {}
        tokens: list[int] = []
        weights: list[float] = []
        while len(tokens) < self.length:
            key = keys[int(rng.integers(len(keys)))]
            is_new = key not in held or rng.random() < self.renewed
            if is_new:
                held[key] = some(size, size)
            tokens += [*prefix, key, *gap, *held[key]]
            weights += [0.0] * (len(prefix) + 1 + len(gap)) + [float(not is_new)] * size
        return np.array(tokens[: self.length], np.int32), np.array(weights[: self.length], np.float32)
