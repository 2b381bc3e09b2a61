"""Random eviction: a budget of tokens a head, and chance decides which stay. The baseline of every better choice.

Each token draws a priority from its row's key, its layer, head and position. Of n tokens seen a head keeps the newest,
and the `budget` - 1 of highest priority among the others: the same ones whether they came at once or one by one.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxfw.core.errors import InputError
from jaxfw.core.keys import fold
from jaxfw.core.shapes import Array, Float, Int
from jaxfw.models.cache.policy import QKV, AttentionSpec, Cache, Step
from jaxfw.ops.attention import attend
from jaxfw.ops.slots import attend_first, attend_slots, write_slots

EMPTY, HIGHEST = -1, 2**31 - 1  # priorities: of a slot without a token; above every token's


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RandomState:
    """C tokens a head, in any order; an empty slot has position and priority -1."""

    k: Float[Array, "B K C d"]
    v: Float[Array, "B K C d"]
    kept_positions: Int[Array, "B K C"]
    priority: Int[Array, "B K C"]
    seen: Int[Array, "B"]


@dataclasses.dataclass(frozen=True)
class RandomCache:
    """Keeps `budget` tokens a head. A prompt is attended to in full; what it cannot keep is forgotten after it."""

    budget: int
    reads_previous = False

    def __post_init__(self):
        if not isinstance(self.budget, int) or self.budget < 1:
            raise InputError(f"RandomCache.budget={self.budget!r} must be a whole number of tokens from 1 on.")

    def at(self, layer: int) -> "RandomCache":
        """The same policy in every layer."""
        return self

    def empty(self, batch: int, *, spec: AttentionSpec, prompt: int, new: int, dtype) -> RandomState:
        """Zeros [B K C d], C the budget, or prompt + new if that is less."""
        shape = (batch, spec.kv_heads, min(self.budget, prompt + new))
        kv, nothing = jnp.zeros((*shape, spec.head_dim), dtype), jnp.full(shape, EMPTY, jnp.int32)
        return RandomState(kv, kv, nothing, nothing, jnp.zeros(batch, jnp.int32))

    def prefill(self, qkv: QKV, step: Step, *, spec: AttentionSpec, room: int, previous=None):
        """Causal attention over the prompt; then all but `budget` tokens are forgotten."""
        new = _tokens(qkv, step)
        out = attend(qkv.q, new.k, new.v, **spec.options)
        nothing = self.empty(qkv.k.shape[0], spec=spec, prompt=room, new=0, dtype=qkv.k.dtype)
        return out, _pruned(_joined(nothing, new), nothing.k.shape[2])

    def extend(
        self, state: RandomState, qkv: QKV, step: Step, *, spec: AttentionSpec, previous=None, shared=None, write=True
    ):
        """Attention to what is kept and to the new tokens; the first of these takes the slot of lowest priority."""
        C, T = state.k.shape[2], qkv.k.shape[1]
        new, lowest = _tokens(qkv, step), jnp.argmin(state.priority, axis=-1, keepdims=True)
        if T == 1 and write:
            at = jnp.where(step.valid[:, None], lowest, C)
            read = after = _slotwise(lambda old, x: write_slots(old, x, at), state, new)
        else:
            is_left = (jnp.arange(C) != lowest) & (state.kept_positions < step.positions[:, :1, None])
            left = jnp.where(is_left, state.kept_positions, -1)
            read = _joined(dataclasses.replace(state, kept_positions=left), new)
            after = _pruned(_joined(state, new), C)
        if T == 1 and write and spec.window is None:
            out = attend_first(qkv.q, read.k, read.v, jnp.minimum(read.seen, C), **spec.options)
        else:
            out = attend_slots(qkv.q, read.k, read.v, read.kept_positions, step.positions, **spec.options)
        return out, after if write else state

    def finish(self, states: tuple[RandomState, ...], step: Step) -> Cache:
        """Nothing to settle between layers."""
        return Cache(states)


def _tokens(qkv: QKV, step: Step) -> RandomState:
    """The tokens of a call as slots; padding is an empty slot."""
    k, v = (jnp.swapaxes(x, 1, 2) for x in (qkv.k, qkv.v))
    valid = step.valid[:, None]
    positions = jnp.broadcast_to(jnp.where(valid, step.positions[:, None], -1), k.shape[:3])
    return RandomState(k, v, positions, jnp.where(valid, _priority(step, k.shape[1]), EMPTY), step.lengths)


def _priority(step: Step, K: int) -> Int[Array, "B K T"]:
    if step.key is None:
        raise InputError("RandomCache draws which tokens stay: give a key, e.g. key=jax.random.key(0).")

    def draw(key, position):
        return jax.random.randint(jax.random.fold_in(key, position), (K,), 0, HIGHEST)

    of_row = jax.vmap(draw, in_axes=(None, 0), out_axes=1)
    return jax.vmap(of_row)(fold(step.key, step.layer), step.positions)


def _slotwise(function: Callable[..., Array], state: RandomState, *more: RandomState) -> RandomState:
    """`function` of each slot array of the states; rows have seen the tokens of all."""
    names = ("k", "v", "kept_positions", "priority")
    arrays = {name: function(*(getattr(one, name) for one in (state, *more))) for name in names}
    return RandomState(**arrays, seen=sum((one.seen for one in more), state.seen))


def _joined(state: RandomState, new: RandomState) -> RandomState:
    return _slotwise(lambda *x: jnp.concatenate(x, axis=2), state, new)


def _pruned(state: RandomState, C: int) -> RandomState:
    """The newest token and those of highest priority, C in all; empty slots come last."""
    newest = state.kept_positions == state.seen[:, None, None] - 1
    priority = jnp.where(newest, HIGHEST, state.priority)
    # A sort, as a mesh does not partition top_k: it gathers the priorities of all heads.
    index = jnp.argsort(priority, axis=-1, descending=True)[..., :C]

    def take(x):
        return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 3)), axis=2)

    return _slotwise(take, state)
