"""Key slots that hold tokens of any position: attention to them, and writing to them.

A slot without a token has position -1. Nothing else is asked of a slot's place: a cache may overwrite, evict and
reorder. For slots that hold their own position see `jaxfw.ops.attention.attend`, which reads prompts block by block.
"""

import jax
import jax.numpy as jnp

from jaxfw.core.errors import InputError
from jaxfw.core.shapes import Array, Float, Int
from jaxfw.ops.attention import attend, in_query_blocks
from pallas_kernels import decode_attention


def attend_slots(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B K S d"],
    v: Float[Array, "B K S d"],
    slot_positions: Int[Array, "B K S"],
    positions: Int[Array, "B T"],
    *,
    scale: float,
    softmax_dtype=jnp.float32,
    window: int | None = None,
) -> Float[Array, "B T H d"]:
    """Softmax attention of queries at `positions` to the slots at or before them, H a multiple of K.

    With a `window`, a query reads what lies in its last `window` positions only, its own among them. What a query that
    may read no slot gets means nothing, but is finite.

    Raises:
        InputError: H is no multiple of K.
    """
    H, K = q.shape[2], k.shape[1]
    if H % K:
        raise InputError(f"expected q[B,T,H,d] with H a multiple of K: got H={H}, K={K}.")
    return in_query_blocks(
        lambda q, now: _attend_block(q, k, v, slot_positions, now, scale, softmax_dtype, window), q, positions
    )


def _attend_block(q, k, v, slot_positions, positions, scale, softmax_dtype, window):
    (B, T, H, d), (K, S) = q.shape, k.shape[1:3]
    G = H // K
    grouped = q.reshape(B, T, K, G, d).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, d)
    logits = jnp.einsum("BKMd,BKSd->BKMS", grouped, k, preferred_element_type=softmax_dtype) * scale
    held, now = slot_positions[:, :, None, :], positions[:, None, :, None]
    visible = (held >= 0) & (held <= now) if window is None else (held >= 0) & (held <= now) & (held > now - window)
    logits = jnp.where(visible[:, :, None], logits.reshape(B, K, G, T, S), jnp.finfo(softmax_dtype).min)
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1).reshape(B, K, G * T, 1)
    weights = weights.astype(v.dtype).reshape(B, K, G * T, S)
    out = jnp.einsum("BKMS,BKSd->BKMd", weights, v, preferred_element_type=softmax_dtype) / total
    return out.astype(v.dtype).reshape(B, K, G, T, d).transpose(0, 3, 1, 2, 4).reshape(B, T, H, d)


def attend_first(
    q: Float[Array, "B 1 H d"],
    k: Float[Array, "B K S d"],
    v: Float[Array, "B K S d"],
    lengths: Int[Array, "B"],
    *,
    scale: float,
    softmax_dtype=jnp.float32,
    window: int | None = None,
) -> Float[Array, "B 1 H d"]:
    """Softmax attention of one query a row to the first `lengths` slots, of these the last `window`: a decode step.

    By `pallas_kernels.decode_attention`, whose softmax is in float32; any other goes by `attend`.
    """
    if jnp.dtype(softmax_dtype) != jnp.float32:
        last = lengths[:, None] - 1
        return attend(q, k, v, positions=last, scale=scale, softmax_dtype=softmax_dtype, window=window)
    out = decode_attention(q[:, 0], k, v, lengths=lengths, scale=scale, window=window).out
    return out[:, None]


def write_slots(
    slots: Float[Array, "B K S *d"], new: Float[Array, "B K T *d"], at: Int[Array, "B #K T"]
) -> Float[Array, "B K S *d"]:
    """`new` in the slots `at`, which differ within a row and head; what lies at S or beyond is dropped.

    A scatter mapped over rows and heads, which every mesh partitions without a collective: with rows and heads among
    its indices, XLA may gather the new tokens of all heads first. And no `dynamic_update_slice` (one row, one token),
    which XLA's CPU fusion duplicates into its readers: each step of a decode loop then copies the whole buffer four
    times.
    """

    def write(slots, new, at):
        return slots.at[at].set(new, unique_indices=True)

    at = jnp.broadcast_to(at, new.shape[:3])
    return jax.vmap(jax.vmap(write))(slots, new.astype(slots.dtype), at)
