"""Softmax attention with grouped query heads, in plain XLA, and by cuDNN for prompts on a GPU that has it.

Queries of one key head are laid side by side, so that each key head is one matrix product of [G T, d] with [d, S]:
keys and values are never repeated. Prompts are cut into query blocks that see only the keys before their end, which
nearly halves the work and keeps the logits of one block alive at a time, small enough for a processor's cache.

Rows that hold several documents are masked in the same blocks, by the column at which each query's document begins:
no [B T T] array. jax's public attention takes no such thing (0.10 to 0.12: cuDNN's packed rows, `q_offsets` and
`kv_offsets`, are behind a private name, and a mask array costs most of its speed), so on a GPU too this is XLA's form:
the work of the whole row, whatever its documents' lengths, with the weights of one block in memory at a time.

Weights are normalised after they have met the values, on [T, d] instead of [T, S]. Differentiated, that also turns the
softmax's sum over keys into one over d (as in FlashAttention, arXiv:2205.14135, appendix B.4).
"""

import functools
from collections.abc import Callable

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
    window: int | None = None,
    starts: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T H d"]:
    """Attention of each query to the keys at or before its position, H a multiple of K.

    With `positions` None the queries are the keys' own tokens (T = S). Otherwise key slot s holds position s of its
    row, and a query at position p reads the slots 0..p; slots beyond hold nothing and are ignored. With a `window`, a
    query reads its last `window` positions only. With `starts`, which goes without positions, a query reads no key
    before that column (`jaxfw.ops.segments`): rows of several documents, on XLA's form everywhere.

    Without positions, a program that is lowered for CUDA calls cuDNN if it can do this (half precision, softmax in
    float32, d up to 128), whatever the machine that lowers it; elsewhere XLA's form runs.

    Raises:
        InputError: H is no multiple of K; T differs from S without positions; both positions and starts.
    """
    B, T, H, d = q.shape
    K, S = k.shape[1:3]
    if H % K:
        raise InputError(f"expected q[B,T,H,d] with H a multiple of K: got H={H}, K={K}.")
    if positions is not None:
        if starts is not None:
            raise InputError(
                "positions and starts do not go together: documents are masked among their own tokens only."
            )
        return in_query_blocks(
            lambda q, positions: _attend_block(q, k, v, positions, scale, softmax_dtype, window), q, positions
        )
    if T != S:
        raise InputError(f"expected as many queries as keys without positions: got T={T}, S={S}.")
    if starts is not None:
        return _attend_causal(q, k, v, scale, softmax_dtype, window, starts)
    is_possible = _cudnn_takes(q.shape, K, str(q.dtype), softmax_dtype, window)
    return (_attend_on_platform if is_possible else _attend_causal)(q, k, v, scale, softmax_dtype, window)


def in_query_blocks(
    attend_block: Callable[[Array, Array], Array], q: Float[Array, "B T H d"], positions: Int[Array, "B T"]
) -> Float[Array, "B T H d"]:
    """`attend_block(q, positions)` for a block of queries at a time, so that the logits of one block are alive."""
    B, T = positions.shape
    if T <= SMALLEST_BLOCK:
        return attend_block(q, positions)
    blocks = -(-T // SMALLEST_BLOCK)
    spare = blocks * SMALLEST_BLOCK - T
    q = jnp.pad(q, ((0, 0), (0, spare), (0, 0), (0, 0))).reshape(B, blocks, SMALLEST_BLOCK, *q.shape[2:])
    positions = jnp.pad(positions, ((0, 0), (0, spare)), mode="edge").reshape(B, blocks, SMALLEST_BLOCK)
    outs = jax.lax.map(lambda part: attend_block(*part), (jnp.swapaxes(q, 0, 1), jnp.swapaxes(positions, 0, 1)))
    return jnp.swapaxes(outs, 0, 1).reshape(B, -1, *outs.shape[3:])[:, :T]


def _attend_causal(q, k, v, scale, softmax_dtype, window, starts=None):
    """Causal attention among the keys' own tokens, a block of queries at a time."""
    T = q.shape[1]
    # Gradients recompute a block's weights: kept, they would be [B H T S] in every layer.
    block = jax.checkpoint(_attend_block, static_argnums=(4, 5, 6, 7))
    size = min(max(T // BLOCKS, SMALLEST_BLOCK), LARGEST_BLOCK)
    outs = []
    for start in range(0, T, size):
        end = min(start + size, T)
        first = 0 if window is None else max(0, start - window + 1)
        positions = jnp.arange(start, end)[None, :]
        keys, values = k[:, :, first:end], v[:, :, first:end]
        own = () if starts is None else (starts[:, start:end],)
        outs.append(block(q[:, start:end], keys, values, positions, scale, softmax_dtype, window, first, *own))
    return outs[0] if len(outs) == 1 else jnp.concatenate(outs, axis=1)


def _attend_block(q, k, v, positions, scale, softmax_dtype, window=None, first=0, starts=None):
    """Attention with key slot s, at position first + s, visible to a query at position p when it is at most p, and
    within its window, and not before its start; `positions` is [B T] or [1 T].
    """
    B, T, H, d = q.shape
    K, S = k.shape[1:3]
    G = H // K
    grouped = q.reshape(B, T, K, G, d).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, d)
    logits = jnp.einsum("BKMd,BKSd->BKMS", grouped, k, preferred_element_type=softmax_dtype) * scale
    slots, positions = first + jnp.arange(S)[None, None, :], positions[:, :, None]
    visible = slots <= positions if window is None else (slots <= positions) & (slots > positions - window)
    if starts is not None:
        visible &= slots >= starts[:, :, None]
    logits = jnp.where(visible[:, None, None], logits.reshape(B, K, G, T, S), jnp.finfo(softmax_dtype).min)
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.exp(logits - largest)
    total = jnp.sum(weights, axis=-1).reshape(B, K, G * T, 1)
    weights = weights.astype(v.dtype).reshape(B, K, G * T, S)
    out = jnp.einsum("BKMS,BKSd->BKMd", weights, v, preferred_element_type=softmax_dtype) / total
    out = out.astype(v.dtype).reshape(B, K, G, T, d)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, H, d)


def _attend_cudnn(q, k, v, scale, window):
    k, v = (jnp.swapaxes(x, 1, 2) for x in (k, v))
    local = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=True, local_window_size=local, implementation="cudnn"
    )


@functools.lru_cache(maxsize=256)
def _cudnn_takes(shape: tuple[int, ...], K: int, dtype: str, softmax_dtype, window: int | None) -> bool:
    """Whether cuDNN can do this: found by asking jax for the very call, on shapes alone."""
    B, T, H, d = shape
    # Some GPUs take widths up to 256, but the answer must not hang on the one in the machine that lowers.
    if d > 128 or jnp.dtype(softmax_dtype) != jnp.float32:
        return False
    q, keys = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct((B, K, T, d), dtype)
    try:
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
            jax.eval_shape(lambda q, k, v: _attend_cudnn(q, k, v, 1.0, window), q, keys, keys)
    except (RuntimeError, ValueError, NotImplementedError, TypeError):  # no cuDNN here, or not for these shapes
        return False
    return True


# Each branch takes its own gradient. Differentiated from outside, the choice between platforms would keep what the
# gradients of all of them need.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _attend_on_platform(q, k, v, scale, softmax_dtype, window):
    return jax.lax.platform_dependent(
        q, k, v,
        cuda=lambda q, k, v: _attend_cudnn(q, k, v, scale, window),
        default=lambda q, k, v: _attend_causal(q, k, v, scale, softmax_dtype, window),
    )  # fmt: skip


def _forward_on_platform(q, k, v, scale, softmax_dtype, window):
    return _attend_on_platform(q, k, v, scale, softmax_dtype, window), (q, k, v)


def _backward_on_platform(scale, softmax_dtype, window, residuals, gradient):
    def backward(attend):
        return lambda q, k, v, gradient: jax.vjp(attend, q, k, v)[1](gradient)

    return jax.lax.platform_dependent(
        *residuals, gradient,
        cuda=backward(lambda q, k, v: _attend_cudnn(q, k, v, scale, window)),
        default=backward(lambda q, k, v: _attend_causal(q, k, v, scale, softmax_dtype, window)),
    )  # fmt: skip


_attend_on_platform.defvjp(_forward_on_platform, _backward_on_platform)
