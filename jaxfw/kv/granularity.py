"""In which pieces a prompt is cut: tokens, chunks of a fixed size, or units that mean something (shots, lines).

A piece's score is the mean over its tokens of what the scorer gave them. Chunks and units are chosen for all heads of a
layer together.
"""

import dataclasses
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxfw.core.errors import InputError, unknown
from jaxfw.core.shapes import Array, Bool, Float, Int
from jaxfw.kv.scorers.base import Scores
from jaxfw.kv.scorers.place import units_of
from jaxfw.kv.selection import highest, of_mask
from jaxfw.models.cache import Step

RULES, FILLS, SCOPES = ("fill", "count"), ("skip", "stop"), ("layer", "global")


class Granularity(Protocol):
    """How scores become the positions that stay."""

    def rounded(self, wanted: Float[np.ndarray, "n"], table: Int[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
        """`table`, the wanted tokens of prompts of 0..n-1 in whole numbers, or what whole pieces make of them."""
        ...

    def slots(self, table: Int[np.ndarray, "n"]) -> int:
        """Room for what stays of prompts of up to n - 1 tokens, of which `table[length]` are to stay."""
        ...

    def choose(self, scores: Scores, step: Step, budget: Int[Array, "B"], C: int) -> Int[Array, "B #K C"]:
        """Positions that stay, in ascending order, -1 behind them."""
        ...


@dataclasses.dataclass(frozen=True)
class Tokens:
    """One by one, each head for itself."""

    def rounded(self, wanted: Float[np.ndarray, "n"], table: Int[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
        """As it is."""
        return table

    def slots(self, table: Int[np.ndarray, "n"]) -> int:
        """The largest budget."""
        return max(1, int(table.max()))

    def choose(self, scores: Scores, step: Step, budget: Int[Array, "B"], C: int) -> Int[Array, "B #K C"]:
        """The highest scores."""
        return highest(scores.value, scores.protected, step.lengths, budget, C)


@dataclasses.dataclass(frozen=True)
class Chunks:
    """ChunkKV (arXiv:2502.00299): `size` neighbours stay or go together.

    With `rule` "fill", protected tokens stay and chunks fill the rest of the budget, the last of them cut where it ends
    (the paper's rule, without keeping any token twice). With "count", that share of the number of chunks stays, whole,
    and protected tokens count as the highest score of all, as in kvpress. Of `reuse` layers, the first chooses for all.
    """

    size: int = 10
    rule: Literal["fill", "count"] = "fill"
    reuse: int = 1

    def __post_init__(self):
        if self.size < 1 or self.reuse < 1:
            raise InputError(f"size={self.size} and reuse={self.reuse} must be at least 1.")
        if self.rule not in RULES:
            raise unknown("rule", self.rule, RULES)

    def rounded(self, wanted: Float[np.ndarray, "n"], table: Int[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
        """By the rule "count", the tokens of that share of the number of chunks, rounded down, at least one."""
        if self.rule == "fill":
            return table
        length = np.arange(len(table))
        count = np.floor(wanted * -(-length // self.size) / np.maximum(length, 1) + 1e-9).astype(np.int64)
        return np.minimum(np.maximum(count, 1) * self.size, length)

    def slots(self, table: Int[np.ndarray, "n"]) -> int:
        """The largest budget."""
        return max(1, int(table.max()))

    def choose(self, scores: Scores, step: Step, budget: Int[Array, "B"], C: int) -> Int[Array, "B 1 C"]:
        """The chunks of highest mean score."""
        value = jnp.sum(self._raised(scores), axis=1)
        T, lengths = value.shape[1], step.lengths
        pieces = -(-T // self.size)
        valid = step.valid

        def total(x: Array) -> Float[Array, "B pieces"]:
            return jnp.pad(x, ((0, 0), (0, pieces * self.size - T))).reshape(len(x), pieces, self.size).sum(axis=2)

        mean = total(jnp.where(valid, value, 0)) / jnp.maximum(total(valid.astype(value.dtype)), 1)
        if self.rule == "fill":
            of_token = jnp.repeat(mean, self.size, axis=1)[:, None, :T]
            return highest(of_token, scores.protected, lengths, budget, C)
        chunks = -(-lengths // self.size)
        best = highest(mean[:, None], None, chunks, -(-budget // self.size), pieces)[:, 0]
        kept = jnp.any(best[..., None] == jnp.arange(pieces), axis=1)
        return of_mask(jnp.repeat(kept, self.size, axis=1)[:, :T] & valid, C)

    def _raised(self, scores: Scores) -> Float[Array, "B K T"]:
        if scores.protected is None or self.rule == "fill":
            return scores.value
        most = jnp.max(scores.value, axis=(1, 2), keepdims=True)
        return jnp.where(scores.protected[:, None], most + 1, scores.value)


@dataclasses.dataclass(frozen=True)
class Units:
    """ShotKV (arXiv:2502.01941): a unit stays whole or goes; tokens of no unit (-1: instruction, question) stay.

    So do tokens that a scorer protects, whatever becomes of the rest of their unit.

    Units are taken in the order of their scores, as far as they fit into what protected tokens leave of the budget:
    `fill` "skip" passes over one that does not fit, "stop" ends there. If none fits, the best one that finds room in
    `extra` further slots stays all the same, and so do protected tokens beyond the budget, the newest of them.

    AMBIGUOUS: the paper gives neither the rule for what does not fit nor what protected tokens cost.

    `scope` "layer" chooses in each layer, "global" once, by the scores of all layers: then every layer's whole prompt
    is held until the last has been read.
    """

    scope: Literal["layer", "global"] = "layer"
    fill: Literal["skip", "stop"] = "skip"
    extra: int = 64

    def __post_init__(self):
        if self.scope not in SCOPES:
            raise unknown("scope", self.scope, SCOPES)
        if self.fill not in FILLS:
            raise unknown("fill", self.fill, FILLS)
        if self.extra < 0:
            raise InputError(f"extra={self.extra} must be 0 or more slots.")

    def rounded(self, wanted: Float[np.ndarray, "n"], table: Int[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
        """As it is."""
        return table

    def slots(self, table: Int[np.ndarray, "n"]) -> int:
        """The largest budget and `extra`, at most the prompt."""
        return max(1, min(int(table.max()) + self.extra, len(table) - 1))

    def choose(self, scores: Scores, step: Step, budget: Int[Array, "B"], C: int) -> Int[Array, "B 1 C"]:
        """The units of highest mean score."""
        units = units_of(step)
        valid = step.valid
        is_in = valid & (units >= 0)
        if scores.protected is not None:
            is_in &= ~scores.protected
        size, total = _by_unit(units, is_in, is_in.astype(jnp.int32), jnp.sum(scores.value, axis=1))
        mean = jnp.where(size > 0, total / jnp.maximum(size, 1), -jnp.inf)
        order = jnp.argsort(jnp.where(jnp.isnan(mean), -jnp.inf, mean), axis=1, descending=True, stable=True)
        fixed = jnp.sum(valid & ~is_in, axis=1)
        left = jnp.maximum(budget - fixed, 0)
        taken = _fitting(jnp.take_along_axis(size, order, axis=1), left, stops=self.fill == "stop")
        room = jnp.minimum(budget + self.extra, C)  # by the row's own length, whatever it is padded to
        rescued = _first_fitting(jnp.take_along_axis(size, order, axis=1), jnp.maximum(room - fixed, 0))
        taken = jnp.where(jnp.any(taken, axis=1, keepdims=True), taken, rescued)
        kept = jnp.zeros_like(taken).at[jnp.arange(len(taken))[:, None], order].set(taken)
        chosen = jnp.take_along_axis(kept, jnp.maximum(units, 0), axis=1)
        return of_mask(valid & jnp.where(is_in, chosen, True), C, room)


def _by_unit(units: Int[Array, "B T"], is_in: Bool[Array, "B T"], *values: Array) -> list[Array]:
    """The sum of each [B T] over the tokens of each unit [B T]: as many units as tokens at most."""
    T = units.shape[1]

    def of_row(units, x):
        return jnp.zeros(T, x.dtype).at[units].add(x, mode="drop")

    at = jnp.where(is_in, units, T)
    return [jax.vmap(of_row)(at, x) for x in values]


def _fitting(sizes: Int[Array, "B U"], left: Int[Array, "B"], *, stops: bool) -> Bool[Array, "B U"]:
    """Which units are taken, in their order, until nothing is left."""
    most = jnp.max(jnp.sum(sizes > 0, axis=1))

    def take(carry):
        i, left, is_open, taken = carry
        size = jax.lax.dynamic_index_in_dim(sizes, i, axis=1, keepdims=False)
        fits = (size > 0) & (size <= left) & is_open
        is_open = (is_open & fits) if stops else is_open
        return i + 1, left - jnp.where(fits, size, 0), is_open, taken | (fits[:, None] & (at == i))

    at = jnp.arange(sizes.shape[1])
    start = (jnp.int32(0), left, jnp.ones_like(left, bool), jnp.zeros_like(sizes, bool))
    return jax.lax.while_loop(lambda carry: carry[0] < most, take, start)[3]


def _first_fitting(sizes: Int[Array, "B U"], room: Int[Array, "B"]) -> Bool[Array, "B U"]:
    """The first unit that is no larger than the room."""
    fits = (sizes > 0) & (sizes <= room[:, None])
    return fits & (jnp.cumsum(fits, axis=1) == 1)
