"""Several sources in one batch, by shares that hold exactly at every step."""

import dataclasses
import functools
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from jaxfw.core.errors import InputError
from jaxfw.data.batches import Batch, Batches, check_sizes, row_numbers

LEAST = 1e-6  # the smallest share of a source


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
    """Rows of the sources, interleaved evenly: each has always given its share of the rows so far, to within a few.

    A source is read in its own order and nothing of it is skipped, so that its epochs stay whole. Their own batch sizes
    do not matter. A row of a source that does not tell documents apart is one document.
    """

    sources: Sequence[Batches]
    shares: Sequence[float]
    batch: int

    def __post_init__(self):
        check_sizes(self.batch, 1, 0)
        if not self.sources or len(self.sources) != len(self.shares):
            raise InputError(f"{len(self.sources)} sources and {len(self.shares)} shares: give one of each for each.")
        total = sum(self.shares)
        if not all(share / total >= LEAST for share in self.shares):
            raise InputError(f"shares={tuple(self.shares)} must be positive, each at least {LEAST:g} of their sum.")
        lengths = {source.length for source in self.sources}
        if len(lengths) > 1:
            raise InputError(f"the sources have lengths {sorted(lengths)}: rows of a batch have one length.")

    @property
    def length(self) -> int:
        """That of the sources."""
        return self.sources[0].length

    def __call__(self, step: int, rows: range | None = None) -> Batch:
        found = [self._row(number) for number in row_numbers(step, rows, self.batch)]
        names = {name for row in found for name in row} | self._extra
        return {name: np.concatenate([row.get(name, _ones(row, name)) for row in found]) for name in sorted(names)}

    def describe(self) -> dict[str, Any]:
        sources = {str(i): source.describe() for i, source in enumerate(self.sources)}
        shares = [float(share) for share in self.shares]
        return {"kind": "mixture", "batch": self.batch, "length": self.length, "shares": shares, "sources": sources}

    def place(self, number: int) -> tuple[int, int]:
        """Which source gives the row `number` of the run, and which of its rows, both counted from 0."""
        for i, part in enumerate(self._parts):
            before, behind = number * part // 1, (number + 1) * part // 1
            if behind > before:
                return i, int(before)
            number -= int(before)
        raise AssertionError("the last part is everything that is left")

    @functools.cached_property
    def _parts(self) -> list[Fraction]:
        """Of each source, its share of the rows that those before it leave."""
        shares = [Fraction(share / sum(self.shares)).limit_denominator(10**8) for share in self.shares]
        return [share / sum(shares[i:]) for i, share in enumerate(shares)]

    @functools.cached_property
    def _extra(self) -> set[str]:
        """Every batch holds the same arrays, whichever sources its rows come from: else it is compiled anew."""
        return {name for source in self.sources for name in source(1, range(1))} - {"tokens"}

    def _row(self, number: int) -> Batch:
        which, row = self.place(number)
        source = self.sources[which]
        step, place = divmod(row, source.batch)
        return source(step + 1, range(place, place + 1))


def _ones(row: Batch, name: str) -> np.ndarray:
    """What an array that is absent means: one document, and all of it counts."""
    return np.ones(row["tokens"].shape, np.int32 if name == "segment_ids" else np.float32)
