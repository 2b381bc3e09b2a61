"""Softmax attention with grouped query heads, in plain XLA.

Queries of one key head are laid side by side, so that each key head is one matrix product of [G T, d] with [d, S]:
keys and values are never repeated. Long prompts are cut into query blocks that see only the keys before their end,
which halves the work and keeps the logits of one block alive at a time.
"""

import jax
import jax.numpy as jnp

from jaxfw.core.errors import InputError
from jaxfw.core.shapes import Array, Float, Int

QUERY_BLOCK = 512


def attend(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B K S d"],
    v: Float[Array, "B K S d"],
    *,
    positions: Int[Array, "B T"] | None = None,
    scale: float,
    softmax_dtype=jnp.float32,
) -> Float[Array, "B T H d"]:
    """Attention of each query to the keys at or before its position, H a multiple of K.

    With `positions` None the queries are the keys' own tokens (T = S). Otherwise key slot s holds position s of its
    row, and a query at position p reads the slots 0..p; slots beyond hold nothing and are ignored.
    """
    B, T, H, d = q.shape
    K, S = k.shape[1:3]
    if H % K:
        raise InputError(f"expected q[B,T,H,d] with H a multiple of K: got H={H}, K={K}.")
    if positions is not None:
        return _attend_block(q, k, v, positions, scale, softmax_dtype)
    if T != S:
        raise InputError(f"expected as many queries as keys without positions: got T={T}, S={S}.")
    blocks = [
        _attend_block(
            q[:, start : start + QUERY_BLOCK],
            k[:, :, : start + QUERY_BLOCK],
            v[:, :, : start + QUERY_BLOCK],
            jnp.arange(start, min(start + QUERY_BLOCK, T))[None, :],
            scale,
            softmax_dtype,
        )
        for start in range(0, T, QUERY_BLOCK)
    ]
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=1)


def _attend_block(q, k, v, positions, scale, softmax_dtype):
    """Attention with key slot s visible to a query at position p when s <= p; `positions` is [B T] or [1 T]."""
    B, T, H, d = q.shape
    K, S = k.shape[1:3]
    G = H // K
    grouped = q.reshape(B, T, K, G, d).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, d)
    logits = jnp.einsum("BKMd,BKSd->BKMS", grouped, k, preferred_element_type=softmax_dtype) * scale
    visible = jnp.arange(S)[None, None, :] <= positions[:, :, None]
    logits = jnp.where(visible[:, None, None], logits.reshape(B, K, G, T, S), jnp.finfo(softmax_dtype).min)
    probs = jax.nn.softmax(logits, axis=-1).astype(v.dtype).reshape(B, K, G * T, S)
    out = jnp.einsum("BKMS,BKSd->BKMd", probs, v)
    return out.reshape(B, K, G, T, d).transpose(0, 3, 1, 2, 4).reshape(B, T, H, d)
