"""Batches of token windows from one array in memory, as functions of the step: nothing to save or to rewind."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from jaxfw.core.errors import InputError
from jaxfw.core.shapes import Int


@dataclasses.dataclass(frozen=True, eq=False)
class RandomWindows:
    """`batches(step)` draws `batch` windows of `length` + 1 tokens at random places, the same for the same step."""

    tokens: Int[np.ndarray, "N"]
    batch: int
    length: int
    seed: int = 0

    def __post_init__(self):
        _check_room(self.tokens, self.length)

    def __call__(self, step: int) -> dict[str, Int[np.ndarray, "B T+1"]]:
        starts = np.random.default_rng([self.seed, step]).integers(0, len(self.tokens) - self.length, self.batch)
        return {"tokens": self.tokens[starts[:, None] + np.arange(self.length + 1)]}


def consecutive_windows(
    tokens: Int[np.ndarray, "N"], *, batch: int, length: int, most: int | None = None
) -> Iterator[Int[np.ndarray, "B T+1"]]:
    """All windows of `length` + 1 tokens one after the other, each starting with the last token of the one before.

    Only whole batches come, `most` of them at the most: every token is predicted once, up to a rest.
    """
    _check_room(tokens, length)
    count = (len(tokens) - 1) // length // batch
    if count == 0:
        raise InputError(f"{len(tokens)} tokens do not fill one batch of {batch} windows of {length}: lower the batch.")
    for i in range(count if most is None else min(count, most)):
        starts = (i * batch + np.arange(batch)) * length
        yield tokens[starts[:, None] + np.arange(length + 1)]


def _check_room(tokens: np.ndarray, length: int) -> None:
    if len(tokens) <= length:
        raise InputError(f"{len(tokens)} tokens are fewer than one window of length={length} + 1: lower length.")
