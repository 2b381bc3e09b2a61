"""A sliding window in a ring buffer: the token at position p lives in slot p % C, over the one that it outlives."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxfw.core.errors import InputError
from jaxfw.core.shapes import Array, Float, Int
from jaxfw.models.cache.policy import QKV, AttentionSpec, Cache, Step
from jaxfw.ops.attention import attend
from jaxfw.ops.slots import attend_first, attend_slots, write_slots


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RingState:
    """The last C tokens of each row; which they are follows from how many it has seen."""

    k: Float[Array, "B K C d"]
    v: Float[Array, "B K C d"]
    seen: Int[Array, "B"]

    @property
    def kept_positions(self) -> Int[Array, "B K C"]:
        """The true position in each slot, -1 where it is empty."""
        B, K, C, _ = self.k.shape
        newest = self.seen[:, None] - 1
        held = newest - (newest - jnp.arange(C)) % C
        return jnp.broadcast_to(jnp.maximum(held, -1)[:, None], (B, K, C))


@dataclasses.dataclass(frozen=True)
class RingCache:
    """Keeps the last `window` tokens, and lets a query read no others, in prompts too.

    Exact for a model with that window (`DecoderConfig.window`, or this one if it is smaller).
    """

    window: int
    reads_previous = False

    def __post_init__(self):
        if not isinstance(self.window, int) or self.window < 1:
            raise InputError(f"RingCache.window={self.window!r} must be a whole number of tokens from 1 on.")

    def at(self, layer: int) -> "RingCache":
        """The same policy in every layer."""
        return self

    def empty(self, batch: int, *, spec: AttentionSpec, prompt: int, new: int, dtype) -> RingState:
        """Zeros [B K C d], C the window, or prompt + new if that is less."""
        shape = (batch, spec.kv_heads, min(self._reach(spec), prompt + new), spec.head_dim)
        return RingState(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(batch, jnp.int32))

    def prefill(self, qkv: QKV, step: Step, *, spec: AttentionSpec, room: int, previous=None):
        """Causal attention within the window; the last C tokens of each row stay."""
        k, v = (jnp.swapaxes(x, 1, 2) for x in (qkv.k, qkv.v))
        out = attend(qkv.q, k, v, **dataclasses.replace(spec, window=self._reach(spec)).options)
        state = self.empty(k.shape[0], spec=spec, prompt=room, new=0, dtype=k.dtype)
        held = dataclasses.replace(state, seen=step.lengths).kept_positions[..., None]
        k, v = (jnp.take_along_axis(x, jnp.maximum(held, 0), axis=2) for x in (k, v))
        return out, RingState(k, v, step.lengths)

    def extend(
        self, state: RingState, qkv: QKV, step: Step, *, spec: AttentionSpec, previous=None, shared=None, write=True
    ):
        """Attention to the last tokens kept and to the new ones.

        Several new tokens overwrite what the first of them still read: these are read beside the old ones.
        """
        k, v = (jnp.swapaxes(x, 1, 2) for x in (qkv.k, qkv.v))
        after = self._written(state, k, v, step)
        if k.shape[2] == 1:
            held = jnp.minimum(after.seen, after.k.shape[2])
            out = attend_first(qkv.q, after.k, after.v, held, **dataclasses.replace(spec, window=None).options)
        else:
            new = jnp.broadcast_to(step.positions[:, None], k.shape[:3])
            held = jnp.concatenate([state.kept_positions, new], axis=2)
            k, v = jnp.concatenate([state.k, k], axis=2), jnp.concatenate([state.v, v], axis=2)
            reach = dataclasses.replace(spec, window=self._reach(spec))
            out = attend_slots(qkv.q, k, v, held, step.positions, **reach.options)
        return out, after if write else state

    def finish(self, states: tuple[RingState, ...], step: Step) -> Cache:
        """Nothing to settle between layers."""
        return Cache(states)

    def _reach(self, spec: AttentionSpec) -> int:
        return self.window if spec.window is None else min(self.window, spec.window)

    def _written(self, state: RingState, k: Array, v: Array, step: Step) -> RingState:
        """The state after the valid tokens; of those that share a slot the last."""
        C, T = state.k.shape[2], k.shape[2]
        seen = state.seen + step.lengths
        stays = step.valid & (step.positions >= seen[:, None] - C)
        at = jnp.where(stays, step.positions % C, C + jnp.arange(T))[:, None]
        return RingState(write_slots(state.k, k, at), write_slots(state.v, v, at), seen)
