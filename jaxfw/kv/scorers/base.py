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


def last_rows(c: Context, w: int, *, begin: Int[Array, "B"] | None = None) -> Float[Array, "B K G w T"]:
    """Attention weights of the last `w` queries of each row, over all of its keys; zeros for queries before `begin`.

    [B H w T] numbers, where w is small.
    """
    B, T, H, d = c.qkv.q.shape
    K = c.spec.kv_heads
    at = c.step.lengths[:, None] - w + jnp.arange(w)
    first = jnp.zeros_like(c.step.lengths) if begin is None else begin
    is_row = at >= first[:, None]
    rows = jnp.take_along_axis(c.qkv.q, jnp.maximum(at, 0)[:, :, None, None], axis=1)
    rows = wide(rows).reshape(B, w, K, H // K, d)
    logits = jnp.einsum("BwKGd,BKTd->BKGwT", rows, c.k, precision="highest") * c.spec.scale
    visible = c.positions <= at[..., None]
    if c.spec.window is not None:
        visible &= c.positions > at[..., None] - c.spec.window
    visible &= is_row[..., None]
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], logits, -jnp.inf), axis=-1)
    return jnp.where(visible[:, None, None], weights, 0)
