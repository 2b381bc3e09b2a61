"""The cache policy whose prompts lie in a pool: heads keep unequal numbers of tokens, or hold them in few bits."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from jaxfw.core.errors import InputError
from jaxfw.core.shapes import Array, Bool, Float, Int
from jaxfw.kv import pool
from jaxfw.kv.cache import KVCache
from jaxfw.kv.forgetting import forget
from jaxfw.kv.granularity import Tokens
from jaxfw.kv.heads import Even, HeadBudget
from jaxfw.kv.pool import (
    PoolState,
    attend_pool,
    attend_pool_step,
    check_attention,
    pool_shape,
    pooled,
    split,
)
from jaxfw.kv.scorers import Context
from jaxfw.kv.selection import marked
from jaxfw.kv.state import KVState, padded, taken, written
from jaxfw.kv.stores import Full, Store
from jaxfw.models.cache import QKV, AttentionSpec, Step

EVEN, FULL = Even(), Full()


@dataclasses.dataclass(frozen=True)
class PooledCache(KVCache):
    """`KVCache` with two more axes: `heads`, how heads share a layer's budget, and `store`, in how many bits."""

    heads: HeadBudget = EVEN
    store: Store = FULL

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.heads, Even) and not isinstance(self.granularity, Tokens):
            raise InputError(
                f"heads={self.heads} lets heads keep unequal numbers of tokens, and {self.granularity} chooses pieces "
                "for all heads together: take by=tokens, or heads=even."
            )
        if self.decode.region == "all":
            raise InputError(
                f"{self.decode} forgets tokens of the prompt, whose pool never changes (heads={self.heads}, "
                f"kv={self.store}): take decode=grow, or one that forgets generated tokens, such as rd=0.4."
            )

    def empty(self, batch: int, *, spec: AttentionSpec, prompt: int, new: int, dtype) -> PoolState:
        """Nothing seen: a pool for what stays of `prompt` tokens, and slots for the residual and for `new` more."""
        B, K, d, C = batch, spec.kv_heads, spec.head_dim, self._slots(prompt)
        R, P = pool_shape(K, C, self._surely_beside(C))
        S = min(self.store.residual, C) + self.decode.room(new)
        nothing, zero, beside = jnp.zeros((B, R, 1, d), dtype), jnp.zeros(B, jnp.int32), jnp.zeros((B, K, S, d), dtype)
        tail = KVState(beside, beside, jnp.full((B, K, S), -1, jnp.int32), zero, zero, zero, zero, zero)
        tail, none = self._with_extras(tail, jnp.zeros((B, K, S), jnp.float32), None), jnp.zeros((B, K), jnp.int32)
        index = jnp.zeros((B, R, P), jnp.int32)
        keys, values = self.store.keys(nothing, index), self.store.values(nothing, index)
        return PoolState(keys, values, index - 1, none, none, tail, zero)

    def prefill(self, qkv: QKV, step: Step, *, spec: AttentionSpec, room: int, previous: Any = None):
        """Causal attention over the prompt; then what is chosen of it stays, in the pool and beside it."""
        check_attention(spec, self.store)
        return super().prefill(qkv, step, spec=spec, room=room, previous=previous)

    def _held(self, c: Context, k: Array, v: Array, new: int, previous: Any) -> PoolState:
        if isinstance(self.heads, Even):
            return self._compacted(k, v, self._chosen(c, previous), c.step, new, None, self._sums(c))
        scores = self.scorer(c)
        if scores.value.shape[1] != k.shape[1]:
            raise InputError(f"{self.scorer} scores all heads alike: heads={self.heads} has nothing to share out.")
        keep = self.heads.choose(scores, c.step, c.budget, pool.shards_of(k.shape[1]))
        return self._parted(k, v, keep, c.step, self._slots(k.shape[2]), new, self._sums(c))

    def _compacted(
        self, k: Array, v: Array, positions: Int[Array, "B #K C"], step: Step, new: int, k_pre: Array | None,
        sums: Array | None = None,
    ) -> PoolState:  # fmt: skip
        keep = marked(jnp.broadcast_to(positions, (*k.shape[:2], positions.shape[2])), k.shape[2])
        return self._parted(k, v, keep, step, positions.shape[2], new, sums)

    def _parted(
        self, k: Array, v: Array, keep: Bool[Array, "B K T"], step: Step, C: int, new: int, sums: Array | None
    ) -> PoolState:
        """The state that holds the tokens of a prompt that are to stay, C of each head in the mean at most."""
        in_tail = min(self.store.residual, C)
        S = in_tail + self.decode.room(new)
        ordered, count, beside = split(keep, in_tail)
        length = count - beside[:, None]
        slots = jnp.arange(in_tail)
        at = jnp.take_along_axis(ordered, jnp.minimum(length[..., None] + slots, ordered.shape[2] - 1), axis=2)
        at = jnp.where(slots < beside[:, None, None], at, -1)
        k_beside, v_beside = (padded(taken(x, at), S) for x in (k, v))
        tail = KVState(k_beside, v_beside, padded(at, S, -1), beside, step.lengths, step.lengths, beside, beside)
        score = jnp.zeros((*k.shape[:2], S), jnp.float32) if sums is None else padded(taken(sums, at), S)
        tail = self._with_extras(tail, score.astype(jnp.float32), None)
        shape = pool_shape(k.shape[1], C, self._surely_beside(C))
        keys, values, positions, start = pooled(k, v, ordered, length, self.store, shape)
        return PoolState(keys, values, positions, start, length, tail, step.lengths)

    def _surely_beside(self, C: int) -> int:
        """Tokens of each head that lie beside the pool when a layer keeps C of each in the mean."""
        return min(self.store.residual, self.heads.least(C))

    def _appended(
        self, state: PoolState, new: QKV, k: Array, v: Array, step: Step, spec: AttentionSpec, write: bool
    ) -> tuple[Float[Array, "B T H d"], PoolState]:
        tail, at = state.tail, step.positions
        if not write:
            return attend_pool(new.q, state, _beside(tail, k, v, at), at, spec), state
        after = written(tail, k, v, at, step.valid)
        if k.shape[2] == 1:
            out, _ = attend_pool_step(new.q, state, after, tail.held + 1, spec, with_mass=False)
        else:
            out = attend_pool(new.q, state, after, at, spec)
        return out, dataclasses.replace(state, tail=after, seen=after.seen)

    def _stepped(
        self, state: PoolState, q: Array, k: Array, v: Array, k_pre: Array, at: Int[Array, "B 1"],
        valid: Bool[Array, "B 1"], spec: AttentionSpec, write: bool,
    ) -> tuple[Float[Array, "B 1 H d"], PoolState]:  # fmt: skip
        if not write:
            return attend_pool(q, state, _beside(state.tail, k, v, at), at, spec), state
        after = written(state.tail, k, v, at, valid)
        out, mass = attend_pool_step(q, state, after, state.tail.held + 1, spec, with_mass=self.decode.score != "age")
        tail = forget(after, self.decode, mass, valid[:, 0])
        return out, dataclasses.replace(state, tail=tail, seen=tail.seen)


def _beside(tail: KVState, k: Array, v: Array, at: Int[Array, "B T"]) -> KVState:
    """What lies beside the pool before the first of some new tokens, and these, which are not to be written."""
    held = jnp.where(tail.kept_positions < at[:, :1, None], tail.kept_positions, -1)
    positions = jnp.concatenate([held, jnp.broadcast_to(at[:, None], k.shape[:3])], axis=2)
    k, v = (jnp.concatenate(pair, axis=2) for pair in ((tail.k, k), (tail.v, v)))
    return dataclasses.replace(tail, k=k, v=v, kept_positions=positions)
