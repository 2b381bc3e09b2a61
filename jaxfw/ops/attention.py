"""Softmax attention with grouped query heads, in plain XLA.

Queries of one key head are laid side by side, so that each key head is one matrix product of [G T, d] with [d, S]:
keys and values are never repeated. Prompts are cut into query blocks that see only the keys before their end, which
nearly halves the work and keeps the logits of one block alive at a time, small enough for a processor's cache.

Weights are normalised after they have met the values, on [T, d] instead of [T, S]. Differentiated, that also turns the
softmax's sum over keys into one over d (as in FlashAttention, arXiv:2205.14135, appendix B.4).
"""

import jax
import jax.numpy as jnp

from jaxfw.core.errors import InputError
from jaxfw.core.shapes import Array, Float, Int

SMALLEST_BLOCK, LARGEST_BLOCK, BLOCKS = 128, 512, 8


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
    # Gradients recompute a block's weights: kept, they would be [B H T S] in every layer.
    block = jax.checkpoint(_attend_block, static_argnums=(4, 5))
    size = min(max(T // BLOCKS, SMALLEST_BLOCK), LARGEST_BLOCK)
    outs = []
    for start in range(0, T, size):
        end = min(start + size, T)
        positions = jnp.arange(start, end)[None, :]
        outs.append(block(q[:, start:end], k[:, :, :end], v[:, :, :end], positions, scale, softmax_dtype))
    return outs[0] if len(outs) == 1 else jnp.concatenate(outs, axis=1)


def _attend_block(q, k, v, positions, scale, softmax_dtype):
    """Attention with key slot s visible to a query at position p when s <= p; `positions` is [B T] or [1 T]."""
    B, T, H, d = q.shape
    K, S = k.shape[1:3]
    G = H // K
    grouped = q.reshape(B, T, K, G, d).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, d)
    logits = jnp.einsum("BKMd,BKSd->BKMS", grouped, k, preferred_element_type=softmax_dtype) * scale
    visible = jnp.arange(S)[None, None, :] <= positions[:, :, None]
    logits = jnp.where(visible[:, None, None], logits.reshape(B, K, G, T, S), jnp.finfo(softmax_dtype).min)
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.exp(logits - largest)
    total = jnp.sum(weights, axis=-1).reshape(B, K, G * T, 1)
    weights = weights.astype(v.dtype).reshape(B, K, G * T, S)
    out = jnp.einsum("BKMS,BKSd->BKMd", weights, v, preferred_element_type=softmax_dtype) / total
    out = out.astype(v.dtype).reshape(B, K, G, T, d)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, H, d)
