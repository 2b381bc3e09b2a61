"""What a layer remembers: a prompt's chosen tokens, and what was generated since, in one buffer of slots.

Slots 0..held-1 hold tokens, in any order. A policy that forgets leaves one hole among slots 0..held, `free`, which the
next token fills before it is read: a step always reads slots 0..held, the first ones, in the kernel.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxfw.core.shapes import Array, Bool, Float, Int
from jaxfw.ops.slots import write_slots


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVState:
    """Of one layer.

    Attributes:
        k: keys, rotated at their true positions.
        v: values.
        kept_positions: the true position in each slot, -1 where it is empty.
        held: tokens in the buffer.
        seen: tokens that the row was given.
        prompt: how many of them were its prompt.
        prompt_held: how many of these are held.
        limit: what the whole cache may hold, for policies that keep its size.
        free: the slot of the next token, where something is forgotten; else it is `held`.
        score: summed attention of each token, where this decides.
        waited: steps beyond the limit, where a policy waits.
        sinks: keys of the first tokens before rotation, where their positions are assigned anew.
    """

    k: Float[Array, "B K S d"]
    v: Float[Array, "B K S d"]
    kept_positions: Int[Array, "B K S"]
    held: Int[Array, "B"]
    seen: Int[Array, "B"]
    prompt: Int[Array, "B"]
    prompt_held: Int[Array, "B"]
    limit: Int[Array, "B"]
    free: Int[Array, "B K 1"] | None = None
    score: Float[Array, "B K S"] | None = None
    waited: Int[Array, "B"] | None = None
    sinks: Float[Array, "B K n d"] | None = None

    @property
    def S(self) -> int:
        """Slots."""
        return self.k.shape[2]


def taken(x: Array, positions: Int[Array, "B #K C"]) -> Array:
    """Tokens of x [B K T ...] at positions; -1 gives any."""
    at = jnp.maximum(positions, 0).reshape(*positions.shape, *[1] * (x.ndim - 3))
    return jnp.take_along_axis(x, at, axis=2)


def padded(x: Array, S: int, fill: int = 0) -> Array:
    """Slots [B K C ...] with `fill` up to S slots."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, S - x.shape[2]), *[(0, 0)] * (x.ndim - 3)), constant_values=fill)


def written(state: KVState, k: Array, v: Array, positions: Int[Array, "B T"], valid: Bool[Array, "B T"]) -> KVState:
    """The state with the valid ones of T tokens in its free slots; k and v are [B K T d]."""
    T = k.shape[2]
    count = jnp.sum(valid, axis=1, dtype=jnp.int32)
    first = state.held[:, None, None] if state.free is None else state.free
    at = jnp.where(valid[:, None], first + jnp.arange(T), state.S + jnp.arange(T))
    new = {"k": k, "v": v, "kept_positions": jnp.broadcast_to(positions[:, None], k.shape[:3])}
    if state.score is not None:
        new["score"] = jnp.zeros(k.shape[:3], state.score.dtype)
    slots = {name: write_slots(getattr(state, name), x, at) for name, x in new.items()}
    return dataclasses.replace(state, **slots, held=state.held + count, seen=state.seen + count)
