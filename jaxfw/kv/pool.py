"""A prompt's kept tokens in a pool, where heads keep unequal numbers of them or hold them in few bits.

What is generated, and the newest tokens of a prompt if a store leaves them in full width, lie beside the pool in a
state of slots (`jaxfw.kv.state`); attention to both is merged by the logs of their sums of exponentials. A pool never
changes.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxfw.core.errors import InputError
from jaxfw.core.shapes import Array, Bool, Float, Int
from jaxfw.kv.state import KVState
from jaxfw.kv.stores import Pool, Store
from jaxfw.models.cache import AttentionSpec
from pallas_kernels import decode_attention, ragged_decode
from pallas_kernels.ragged_decode import BLOCK, block_heads, is_held, pool_size, starts

QUERIES = 64  # of a key head that read a pool at once: a block of logits of several tokens stays small


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PoolState:
    """Of one layer.

    Attributes:
        k: keys, rotated at their true positions, [B R P d] or packed; heads lie in R shards.
        v: values.
        positions: the true position in each slot, -1 where it is empty.
        start: where each head begins in its shard.
        length: its tokens.
        tail: the other tokens; `prompt_held` of them are of the prompt.
        seen: tokens that the row was given.
    """

    k: Pool
    v: Pool
    positions: Int[Array, "B R P"]
    start: Int[Array, "B K"]
    length: Int[Array, "B K"]
    tail: KVState
    seen: Int[Array, "B"]

    @property
    def kept_positions(self) -> Int[Array, "B K S"]:
        """The true position in each slot of the pool and behind it, -1 where a slot is empty or another head's."""
        (B, R, P), K = self.positions.shape, self.start.shape[1]
        own = _slot_heads(self.start, R, P)[:, :, None] == jnp.arange(K // R)[:, None]
        of_pool = jnp.where(own, self.positions[:, :, None], -1).reshape(B, K, P)
        return jnp.concatenate([of_pool, self.tail.kept_positions], axis=2)


def shards_of(heads: int) -> int:
    """Shards of a pool: as many as the mesh of the moment cuts this number of heads into."""
    mesh = jax.sharding.get_abstract_mesh()
    count = dict(mesh.shape).get("tensor", 1) if mesh is not None else 1
    return count if heads % count == 0 else 1


def pool_shape(K: int, C: int, beside: int) -> tuple[int, int]:
    """(R, P) of a pool for C tokens a head in the mean, of which so many lie beside it."""
    R = shards_of(K)
    return R, pool_size(K // R * max(C - beside, 0), K // R)


def check_attention(spec: AttentionSpec, store: Store) -> None:
    """Raise an `InputError` where attention to a pool is not what the model wants."""
    if spec.window is not None:
        raise InputError(
            f"this model's layers look at a window of {spec.window} tokens, which pools do not have: take heads=even "
            "and kv=full."
        )
    if jnp.dtype(spec.softmax_dtype) != jnp.float32:
        raise InputError(f"pools have their softmax in float32, the model in {spec.softmax_dtype}: set softmax_dtype.")
    store.check(spec.head_dim)


def split(keep: Bool[Array, "B K T"], in_tail: int) -> tuple[Int[Array, "B K T"], Int[Array, "B K"], Int[Array, "B"]]:
    """Kept positions in ascending order with T behind them, how many there are, and how many of them go beside a pool.

    These are the newest, in all heads the same number.
    """
    T = keep.shape[2]
    ordered = jnp.sort(jnp.where(keep, jnp.arange(T, dtype=jnp.int32), T), axis=2)
    count = jnp.sum(keep, axis=2, dtype=jnp.int32)
    return ordered, count, jnp.minimum(jnp.min(count, axis=1), in_tail)


def pooled(
    k: Float[Array, "B K T d"], v: Float[Array, "B K T d"], ordered: Int[Array, "B K T"], length: Int[Array, "B K"],
    store: Store, shape: tuple[int, int],
) -> tuple[Pool, Pool, Int[Array, "B R P"], Int[Array, "B K"]]:  # fmt: skip
    """The pool of each head's first `length` positions, their positions, and where heads begin."""
    (B, K, T, d), (R, P) = k.shape, shape
    start = starts(length, R)
    head = _slot_heads(start, R, P)
    of_head = [jnp.take_along_axis(x.reshape(B, R, K // R), head, axis=2) for x in (start, length)]
    rank = jnp.clip(jnp.arange(P) - of_head[0], 0, jnp.maximum(of_head[1] - 1, 0))  # the last token fills its block
    at = jnp.take_along_axis(ordered.reshape(B, R, -1), head * T + rank, axis=2)
    at = jnp.minimum(at, T - 1)
    k, v = (x.reshape(B, R, -1, d) for x in (k, v))
    positions = jnp.where(is_held(start, length, R, P), at, -1)
    return store.keys(k, head * T + at), store.values(v, head * T + at), positions, start


def attend_pool(
    q: Float[Array, "B T H d"], state: PoolState, tail: KVState, at: Int[Array, "B T"], spec: AttentionSpec
) -> Float[Array, "B T H d"]:
    """Attention of queries at positions `at` to the pool, and to the tokens of `tail` at or before them.

    A token of the pool at the first of these positions is not read: it is given once more.
    """
    length = state.length - ((state.length > 0) & (_last(state) >= at[:, :1]))
    B, T, H, d = q.shape
    K = spec.kv_heads
    size = max(1, QUERIES // (H // K))

    def some(q: Array, at: Array) -> Array:
        n = q.shape[1]
        side_by_side = q.reshape(B, n, K, H // K, d).swapaxes(1, 2).reshape(B, n * H, d)
        first = ragged_decode(side_by_side, state.k, state.v, start=state.start, lengths=length, scale=spec.scale)
        grouped = q.reshape(B, n, K, H // K, d)
        logits = jnp.einsum("BnKGd,BKSd->BKnGS", grouped, tail.k, preferred_element_type=jnp.float32)
        held = tail.kept_positions[:, :, None]
        visible = ((held >= 0) & (held <= at[:, None, :, None]))[:, :, :, None]
        out, lse = _attended(logits * spec.scale, visible, tail.v)
        merged = _merged(first.out.reshape(out.shape), first.lse.reshape(lse.shape), out, lse)
        return merged.swapaxes(1, 2).reshape(B, n, H, d).astype(q.dtype)

    if size >= T:
        return some(q, at)
    blocks = -(-T // size)
    q = jnp.pad(q, ((0, 0), (0, blocks * size - T), (0, 0), (0, 0))).reshape(B, blocks, size, H, d)
    at = jnp.pad(at, ((0, 0), (0, blocks * size - T)), mode="edge").reshape(B, blocks, size)
    outs = jax.lax.map(lambda part: some(*part), (q.swapaxes(0, 1), at.swapaxes(0, 1)))
    return outs.swapaxes(0, 1).reshape(B, blocks * size, H, d)[:, :T]


def attend_pool_step(
    q: Float[Array, "B 1 H d"], state: PoolState, tail: KVState, lengths: Int[Array, "B"], spec: AttentionSpec, *,
    with_mass: bool,
) -> tuple[Float[Array, "B 1 H d"], Float[Array, "B K S"] | None]:  # fmt: skip
    """Attention of one token a row to the pool and to the first `lengths` slots of `tail`, by kernels.

    The mass is what each of these slots receives, summed over the heads of a group.
    """
    pool = ragged_decode(q[:, 0], state.k, state.v, start=state.start, lengths=state.length, scale=spec.scale)
    beside = decode_attention(q[:, 0], tail.k, tail.v, lengths=lengths, scale=spec.scale)
    out = _merged(pool.out, pool.lse, beside.out, beside.lse).astype(q.dtype)[:, None]
    if not with_mass:
        return out, None
    B, _, H, d = q.shape
    grouped = q.reshape(B, spec.kv_heads, -1, d).astype(jnp.float32)
    logits = jnp.einsum("BKGd,BKSd->BKGS", grouped, tail.k.astype(jnp.float32), precision="highest") * spec.scale
    total = jnp.logaddexp(pool.lse, beside.lse).reshape(B, spec.kv_heads, -1)[..., None]
    is_first = (jnp.arange(tail.S) < lengths[:, None])[:, None, None]
    return out, jnp.sum(jnp.where(is_first, jnp.exp(logits - total), 0), axis=2)


def _attended(logits: Float[Array, "B K n G S"], visible: Bool[Array, "B K n 1 S"], v: Float[Array, "B K S d"]):
    """Outputs [B K n G d] in float32, and their logs of sums of exponentials; of nothing visible, 0 and -inf."""
    logits = jnp.where(visible, logits, jnp.finfo(logits.dtype).min)
    largest = jnp.max(logits, axis=-1, keepdims=True, initial=jnp.finfo(logits.dtype).min)
    weights = jnp.where(visible, jnp.exp(logits - largest), 0)
    total = jnp.sum(weights, axis=-1)
    out = jnp.einsum("BKnGS,BKSd->BKnGd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    safe = jnp.where(total > 0, total, 1)
    return out / safe[..., None], jnp.where(total > 0, jnp.log(safe) + largest[..., 0], -jnp.inf)


def _merged(one: Array, one_lse: Array, other: Array, other_lse: Array) -> Array:
    """Two outputs [... d], each normalised over its own keys, as one over both; float32."""
    total = jnp.logaddexp(one_lse, other_lse)
    total = jnp.where(jnp.isfinite(total), total, 0)
    parts = ((one, one_lse), (other, other_lse))
    return jnp.sum(jnp.stack([x.astype(jnp.float32) * jnp.exp(lse - total)[..., None] for x, lse in parts]), axis=0)


def _last(state: PoolState) -> Int[Array, "B K"]:
    """The position of each head's last token in the pool."""
    B, R, _ = state.positions.shape
    at = jnp.maximum(state.start + state.length - 1, 0).reshape(B, R, -1)
    return jnp.take_along_axis(state.positions, at, axis=2).reshape(B, -1)


def _slot_heads(start: Int[Array, "B K"], R: int, P: int) -> Int[Array, "B R P"]:
    """Which of its shard's heads each slot belongs to."""
    return jnp.repeat(block_heads(start, R, P), BLOCK, axis=2)
