"""Critical-KV: what a value does to the layer's output, beside how much it is attended to (arXiv:2502.03805)."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxfw.core.errors import InputError
from jaxfw.core.shapes import Array, Float
from jaxfw.kv.scorers.base import Context, Scores, wide
from jaxfw.kv.scorers.window import SnapKV
from jaxfw.kv.selection import highest, marked

BLOCK = 32


@dataclasses.dataclass(frozen=True)
class Critical(SnapKV):
    """The `first` share of a budget by SnapKV's scores; the rest by these, `epsilon` added, times |W_o v|_1.

    The norm of a value through its heads' part of the output projection is averaged over the heads of a group.
    """

    first: float = 0.5
    epsilon: float = 1e-4

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.first <= 1:
            raise InputError(f"first={self.first} must lie in [0, 1]: the share of the budget by scores alone.")

    def __call__(self, c: Context) -> Scores:
        scores = super().__call__(c)
        count = jnp.floor(c.budget * self.first + 1e-6).astype(jnp.int32)
        count = jnp.maximum(count, 1) if self.first else count
        T = scores.value.shape[2]
        is_first = marked(highest(scores.value, scores.protected, c.step.lengths, count, T), T)
        value = (scores.value + self.epsilon) * output_norm(c)
        return Scores(jnp.where(is_first, jnp.inf, value), scores.protected)


def output_norm(c: Context) -> Float[Array, "B K T"]:
    """|W_o v|_1 of each token, averaged over the heads of a group: `BLOCK` tokens at a time, [B K G BLOCK D]."""
    B, K, T, d = c.v.shape
    w_o = wide(c.qkv.w_o)
    w_o = w_o.reshape(K, -1, d, w_o.shape[-1])

    def of_block(v: Float[Array, "B K t d"]) -> Float[Array, "B K t"]:
        out = jnp.einsum("BKtd,KGdD->BKGtD", v, w_o, precision="highest")
        return jnp.mean(jnp.sum(jnp.abs(out), axis=-1), axis=2)

    blocks = -(-T // BLOCK)
    v = jnp.pad(c.v, ((0, 0), (0, 0), (0, blocks * BLOCK - T), (0, 0))).reshape(B, K, blocks, BLOCK, d)
    return jnp.moveaxis(jax.lax.map(of_block, jnp.moveaxis(v, 2, 0)), 0, 2).reshape(B, K, -1)[..., :T]
