"""What attention looks at, without ever holding a [T S] matrix.

A query's weights are exp(logit - lse), with lse the log of its sum of exponentials (FlashAttention, arXiv:2205.14135):
rows of chosen queries are recomputed from q, k and lse, and sums over all queries from a block of them at a time. Key
slot s holds position s; everything is float32, or q's dtype where that is wider.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxfw.core.errors import InputError
from jaxfw.core.shapes import Array, Bool, Float, Int, PyTree

LARGEST_BLOCK = 256  # queries whose logits are alive at once ...
LARGEST_LOGITS = 2**26  # ... fewer where their number of logits (all rows and heads) would exceed this: 256 MiB


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Summary:
    """What the attention of valid queries comes to; queries that are padding have zeros.

    Attributes:
        mass: of each key, the weights that valid queries give it, summed.
        entropy: of each query's weights, in nats.
        regions: of each query, the weight on each region of keys; None when no regions were given.
    """

    mass: Float[Array, "B H S"]
    entropy: Float[Array, "B H T"]
    regions: Float[Array, "B H T R"] | None


def attention_lse(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B K T d"],
    *,
    scale: float,
    window: int | None = None,
    starts: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T H"]:
    """Log of the sum of exponentials of each query's causal logits, a block of queries at a time.

    With `starts`, a query reads no key before that column: its document's first.
    """
    B, T, H, _ = q.shape

    def block(total, q, positions, own=None):
        logits, visible = _logits(q, k, positions, scale, window)
        if own is not None:
            visible &= (jnp.arange(logits.shape[-1]) >= own[:, :, None])[:, None, None]
        lse = jax.nn.logsumexp(jnp.where(visible, logits, -jnp.inf), axis=-1)
        return total, lse.reshape(B, H, -1).swapaxes(1, 2)

    positions = jnp.arange(T, dtype=jnp.int32)[None, :]
    of_queries = (q, positions) if starts is None else (q, positions, starts)
    _, lse = _over_blocks(block, None, of_queries, size=_block_size(q, k))
    return lse


def attention_rows(
    q: Float[Array, "B P H d"],
    k: Float[Array, "B K S d"],
    lse: Float[Array, "B P H"],
    *,
    positions: Int[Array, "B P"],
    scale: float,
    window: int | None = None,
) -> Float[Array, "B H P S"]:
    """The attention weights of chosen queries, which stand at `positions`; -1 gives zeros.

    `q` and `lse` are those of the chosen queries: what `Collect` with `pos` returns for attn/q and attn/lse. Keys are
    all of the sequence, as attention takes them.

    Raises:
        InputError: shapes that do not go together.
    """
    _check(q, k, lse)
    _check_shape("positions", positions, q.shape[:2], "[B P] of the queries")
    weights, _ = _weights(q, k, lse, positions, scale, window)
    B, P, H, _ = q.shape
    return weights.reshape(B, H, P, -1)


def attention_summary(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B K S d"],
    lse: Float[Array, "B T H"],
    *,
    lengths: Int[Array, "B"],
    scale: float,
    window: int | None = None,
    regions: Int[Array, "B S"] | None = None,
    n_regions: int | None = None,
) -> Summary:
    """Mass of each key, entropy of each query, and its weight on each region, over queries 0..T-1.

    `regions` gives each key's region, 0..n_regions-1; keys with any other number belong to none.

    Raises:
        InputError: shapes that do not go together, regions without their number.
    """
    B, T, H, _ = q.shape
    S = k.shape[2]
    _check(q, k, lse)
    _check_shape("lengths", lengths, (B,), "[B]")
    is_in = _membership(regions, n_regions, (B, S))

    def block(mass, q, lse, positions):
        weights, surprise = _weights(q, k, lse, positions, scale, window)
        entropy = jnp.sum(weights * surprise, axis=-1).reshape(B, H, -1)
        weights = weights.reshape(B, H, -1, S)
        on = None if is_in is None else jnp.einsum("BHTS,BSR->BTHR", weights, is_in, precision="highest")
        return mass + jnp.sum(weights, axis=2), (entropy.swapaxes(1, 2), on)

    at = jnp.arange(T, dtype=jnp.int32)
    positions = jnp.where(at < lengths[:, None], at, -1)
    mass, (entropy, on) = _over_blocks(
        block, jnp.zeros((B, H, S), _wide(q)), (q, lse, positions), size=_block_size(q, k)
    )
    return Summary(mass, entropy.swapaxes(1, 2), None if on is None else on.swapaxes(1, 2))


def _membership(regions, n_regions: int | None, shape: tuple[int, int]) -> Float[Array, "B S R"] | None:
    if regions is None or n_regions is None:
        if regions is not None or n_regions is not None:
            raise InputError(f"regions and n_regions go together: got n_regions={n_regions!r}.")
        return None
    _check_shape("regions", regions, shape, "[B S]")
    return jax.nn.one_hot(regions, n_regions, dtype=jnp.float32)


def _wide(q: Array) -> Any:
    return jnp.promote_types(q.dtype, jnp.float32)


def _logits(q, k, positions, scale, window) -> tuple[Float[Array, "B K G T S"], Bool[Array, "B 1 1 T S"]]:
    """Logits of queries at `positions` [B T] or [1 T] to key slots 0..S-1, and which of them count."""
    B, T, H, d = q.shape
    K, S = k.shape[1:3]
    grouped = q.reshape(B, T, K, H // K, d)
    logits = jnp.einsum(
        "BTKGd,BKSd->BKGTS", grouped, k, preferred_element_type=_wide(q), precision="highest"
    )  # fmt: skip
    slots, positions = jnp.arange(S), positions[:, :, None]
    visible = slots <= positions if window is None else (slots <= positions) & (slots > positions - window)
    return logits * scale, visible[:, None, None]


def _weights(q, k, lse, positions, scale, window) -> tuple[Float[Array, "B K G T S"], Float[Array, "B K G T S"]]:
    """Attention weights, and -log of them (0 where a key does not count)."""
    B, T, H, _ = q.shape
    K = k.shape[1]
    logits, visible = _logits(q, k, positions, scale, window)
    lse = lse.astype(logits.dtype).reshape(B, T, K, H // K).transpose(0, 2, 3, 1)[..., None]
    surprise = jnp.where(visible, lse - logits, 0)
    return jnp.where(visible, jnp.exp(-surprise), 0), surprise


def _block_size(q, k) -> int:
    B, T, H, _ = q.shape
    return max(1, min(LARGEST_BLOCK, T, LARGEST_LOGITS // (B * H * k.shape[2])))


def _over_blocks(
    block: Callable[..., tuple[Any, PyTree]], total: Any, of_queries: tuple[Array, ...], *, size: int
) -> tuple[Any, PyTree]:
    """`block(total, ...)` scanned over blocks of `size` queries (axis 1), its second results side by side again.

    The last block is filled up with zeros, and positions of -1. Gradients recompute a block.
    """
    T = of_queries[0].shape[1]
    n = -(-T // size)

    def cut(x):
        fill = -1 if jnp.issubdtype(x.dtype, jnp.integer) else 0
        x = jnp.pad(x, [(0, 0), (0, n * size - T), *[(0, 0)] * (x.ndim - 2)], constant_values=fill)
        return jnp.moveaxis(x.reshape(x.shape[0], n, size, *x.shape[2:]), 1, 0)

    def join(x):
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], n * size, *x.shape[3:])[:, :T]

    total, outs = jax.lax.scan(
        jax.checkpoint(lambda total, parts: block(total, *parts)), total, tuple(map(cut, of_queries))
    )
    return total, jax.tree.map(join, outs)


def _check(q, k, lse) -> None:
    B, T, H, d = q.shape
    if k.ndim != 4 or (k.shape[0], k.shape[3]) != (B, d) or H % k.shape[1]:
        raise InputError(
            f"expected k[B,K,S,d] with B={B}, d={d} and K a divisor of H={H}: got {list(k.shape)}. "
            "Collected keys are [B T K d]: swap their axes 1 and 2."
        )
    _check_shape("lse", lse, (B, T, H), "[B T H] of the queries")


def _check_shape(name: str, x: Array, wanted: tuple[int, ...], axes: str) -> None:
    if x.shape != wanted:
        raise InputError(f"{name} has shape {list(x.shape)}: give {axes} = {list(wanted)}.")
