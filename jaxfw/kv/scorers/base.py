"""What a scorer is given, what it returns, and the attention of a prompt's last queries.

A scorer is a frozen dataclass that is called with a `Context` and returns `Scores`: higher stays. It never cuts
anything itself; how many tokens stay, in which pieces and in which layers, are other axes.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from jaxfw.core.shapes import Array, Bool, Float, Int
from jaxfw.models.cache import QKV, AttentionSpec, Step
from pallas_kernels import column_mass


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scores:
    """Of every key head (or one for all of them), and tokens that stay whatever their score: newest first."""

    value: Float[Array, "B #K T"]
    protected: Bool[Array, "B T"] | None = None


@dataclasses.dataclass(frozen=True)
class Context:
    """A layer's prompt: its queries, keys and values, its tokens, and how many of each row are to stay."""

    qkv: QKV
    step: Step
    spec: AttentionSpec
    budget: Int[Array, "B"]

    @property
    def k(self) -> Float[Array, "B K T d"]:
        """Keys, heads first, in float32 or wider."""
        return wide(jnp.swapaxes(self.qkv.k, 1, 2))

    @property
    def v(self) -> Float[Array, "B K T d"]:
        """Values, heads first, in float32 or wider."""
        return wide(jnp.swapaxes(self.qkv.v, 1, 2))

    @property
    def positions(self) -> Int[Array, "T"]:
        return jnp.arange(self.qkv.k.shape[1], dtype=jnp.int32)

    def newest(self, count: int | Int[Array, "B"]) -> Bool[Array, "B T"]:
        """Which tokens are among the last `count` of their row."""
        count = jnp.broadcast_to(jnp.asarray(count), self.step.lengths.shape)
        return self.step.valid & (self.positions >= (self.step.lengths - count)[:, None])

    @property
    def suffix(self) -> Int[Array, "B"]:
        """Where what follows the last unit begins; 0 without units, or if nothing follows."""
        if self.step.unit_id is None:
            return jnp.zeros_like(self.step.lengths)
        is_in = (self.step.unit_id >= 0) & self.step.valid
        behind = jnp.max(jnp.where(is_in, self.positions + 1, 0), axis=1)
        return jnp.where(behind < self.step.lengths, behind, 0)


class Scorer(Protocol):
    """Which tokens of a prompt are worth keeping."""

    def __call__(self, c: Context) -> Scores:
        """Scores in float32 or wider."""
        ...


def wide(x: Array) -> Array:
    """`x` in float32, or in its own dtype where that is wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def last_mass(c: Context, w: int, *, begin: Int[Array, "B"] | None = None) -> Float[Array, "B K G T"]:
    """Attention weights of the last `w` queries of each row on its keys, summed over queries from `begin` on."""
    at = c.step.lengths[:, None] - w + jnp.arange(w)
    rows = jnp.take_along_axis(c.qkv.q, jnp.maximum(at, 0)[:, :, None, None], axis=1)
    first = jnp.zeros_like(c.step.lengths) if begin is None else begin
    return rows_mass(c, rows, jnp.where(at >= first[:, None], at, -1))


def rows_mass(c: Context, q: Float[Array, "B W H d"], positions: Int[Array, "B W"]) -> Float[Array, "B K G T"]:
    """Attention weights of queries at `positions` on each key, summed over queries; -1 is none."""
    k = jnp.swapaxes(c.qkv.k, 1, 2)
    mass = column_mass(q, k, positions=positions, scale=c.spec.scale, window=c.spec.window)
    return mass.reshape(len(q), c.spec.kv_heads, -1, k.shape[2])
