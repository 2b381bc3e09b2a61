"""The cache that forgets nothing: every key and value, in a buffer with room for what is still to come."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxfw.core.errors import InputError
from jaxfw.core.shapes import Array, Float, Int
from jaxfw.models.cache.policy import QKV, AttentionSpec, Cache, Step
from jaxfw.ops.attention import attend
from jaxfw.ops.slots import attend_first, write_slots


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FullState:
    """Slot s of a row holds its token at position s; slots from `seen` on are empty."""

    k: Float[Array, "B K S d"]
    v: Float[Array, "B K S d"]
    seen: Int[Array, "B"]

    @property
    def kept_positions(self) -> Int[Array, "B K S"]:
        """The true position in each slot, -1 where it is empty."""
        B, K, S, _ = self.k.shape
        slots = jnp.broadcast_to(jnp.arange(S), (B, K, S))
        return jnp.where(slots < self.seen[:, None, None], slots, -1)


@dataclasses.dataclass(frozen=True)
class FullCache:
    """Keeps everything, in the model's compute dtype."""

    reads_previous = False

    def at(self, layer: int) -> "FullCache":
        """The same policy in every layer."""
        return self

    def empty(self, batch: int, *, spec: AttentionSpec, prompt: int, new: int, dtype) -> FullState:
        """Zeros [B K prompt+new d]."""
        shape = (batch, spec.kv_heads, prompt + new, spec.head_dim)
        return FullState(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(batch, jnp.int32))

    def prefill(self, qkv: QKV, step: Step, *, spec: AttentionSpec, room: int, previous=None):
        """Causal attention over the prompt; its keys and values go into a buffer of `room` slots."""
        k, v = (jnp.swapaxes(x, 1, 2) for x in (qkv.k, qkv.v))
        out = attend(qkv.q, k, v, **spec.options)
        spare = ((0, 0), (0, 0), (0, room - k.shape[2]), (0, 0))
        return out, FullState(jnp.pad(k, spare), jnp.pad(v, spare), step.lengths)

    def extend(
        self, state: FullState, qkv: QKV, step: Step, *, spec: AttentionSpec, previous=None, shared=None, write=True
    ):
        """Write the new tokens behind the seen ones, then attend to all of them.

        Raises:
            InputError: too few slots are left, where that can be seen: outside of jit.
        """
        check_room(state.seen, step.lengths, state.k.shape[2])
        k, v = (append(held, new, state.seen) for held, new in ((state.k, qkv.k), (state.v, qkv.v)))
        seen = state.seen + step.lengths
        if qkv.k.shape[1] == 1:
            out = attend_first(qkv.q, k, v, seen, **spec.options)
        else:
            out = attend(qkv.q, k, v, positions=step.positions, **spec.options)
        return out, FullState(k, v, seen) if write else state

    def finish(self, states: tuple[FullState, ...], step: Step) -> Cache:
        """Nothing to settle between layers."""
        return Cache(states)


def check_room(seen: Int[Array, "B"], lengths: Int[Array, "B"], S: int) -> None:
    """Raise an `InputError` if a row has more tokens than slots; values that are traced are not known here."""
    if not any(isinstance(x, Tracer) for x in (seen, lengths)):
        needed = int(jnp.max(seen + lengths))
        if needed > S:
            raise InputError(f"the cache has {S} slots, a row now needs {needed}: give the prompt more room=.")


def append(slots: Float[Array, "B K S *d"], new: Float[Array, "B T K *d"], seen: Int[Array, "B"]) -> Array:
    """`new` in the slots from `seen` on, each row at its own; what would lie beyond S is dropped."""
    return write_slots(slots, jnp.swapaxes(new, 1, 2), seen[:, None, None] + jnp.arange(new.shape[1]))
