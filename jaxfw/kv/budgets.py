"""How many tokens of a prompt each layer keeps: a table over prompt lengths, made on the host in double precision.

A row's own length is known only when a program runs, so that budgets are looked up in `table[length]`; the largest
entry is the number of slots.
"""

import dataclasses
from typing import Protocol

import numpy as np

from jaxfw.core.errors import InputError
from jaxfw.core.shapes import Float, Int


class LayerBudget(Protocol):
    """How the wanted mean is shared out to the layers."""

    @property
    def by_layer(self) -> bool:
        """Whether layers differ. If not, they share one compiled program."""
        ...

    def table(self, wanted: Float[np.ndarray, "n"], *, layer: int, layers: int) -> Int[np.ndarray, "n"]:
        """Tokens that a layer keeps of prompts of 0, 1, ... tokens, of which `wanted` are to stay in the mean."""
        ...


@dataclasses.dataclass(frozen=True)
class Uniform:
    """The same in every layer, rounded down."""

    by_layer = False

    def table(self, wanted: Float[np.ndarray, "n"], *, layer: int, layers: int) -> Int[np.ndarray, "n"]:
        """`wanted`, rounded down."""
        return np.floor(wanted + 1e-9).astype(np.int64)


@dataclasses.dataclass(frozen=True)
class Pyramid:
    """Lower layers keep more (PyramidKV, arXiv:2406.02069, section 4.2), falling evenly from layer to layer.

    The last layer has a `beta`-th of the mean, the first what is then left, at most all but the `w` tokens of the
    window. Where that would leave the last layer less than these, all have the same.
    """

    beta: float = 20.0
    w: int = 32
    by_layer = True

    def __post_init__(self):
        if self.beta < 1:
            raise InputError(f"beta={self.beta} must be at least 1: the last layer keeps 1/beta of the mean.")
        if self.w < 0:
            raise InputError(f"w={self.w} must be 0 or more tokens.")

    def table(self, wanted: Float[np.ndarray, "n"], *, layer: int, layers: int) -> Int[np.ndarray, "n"]:
        """The layer's place on the line from the first to the last."""
        length = np.arange(len(wanted))
        last, room = wanted / self.beta, length - self.w
        first = 2 * wanted - last
        last = np.where(first >= room, 2 * wanted - room, last)
        first = np.minimum(first, room)
        is_possible = (length >= first) & (first >= last) & (last >= self.w)
        steps = (first - last) / max(layers - 1, 1)
        return np.round(np.where(is_possible, first - layer * steps, wanted)).astype(np.int64)


def wanted(keep: float | None, budget: int | None, T: int) -> Float[np.ndarray, "T+1"]:
    """Tokens to keep of prompts of 0..T tokens: a share of them, or a number at most."""
    length = np.arange(T + 1, dtype=np.float64)
    if keep is not None:
        return length * keep
    return length if budget is None else np.minimum(length, budget)
