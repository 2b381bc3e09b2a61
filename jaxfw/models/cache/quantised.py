"""Keys and values in 8 bits: half of bfloat16's bytes, a quarter of float32's, and everything kept."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxfw.core.shapes import Array, Float, Int
from jaxfw.models.cache.full import append, check_room
from jaxfw.models.cache.policy import QKV, AttentionSpec, Cache, Step
from jaxfw.ops.attention import attend
from jaxfw.ops.slots import attend_first

LARGEST = 127


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8State:
    """Slot s of a row holds its token at position s: whole numbers up to 127, times one scale a token and head."""

    k: Int[Array, "B K S d"]
    v: Int[Array, "B K S d"]
    k_scale: Float[Array, "B K S"]
    v_scale: Float[Array, "B K S"]
    seen: Int[Array, "B"]

    @property
    def kept_positions(self) -> Int[Array, "B K S"]:
        """The true position in each slot, -1 where it is empty."""
        slots = jnp.broadcast_to(jnp.arange(self.k.shape[2]), self.k.shape[:3])
        return jnp.where(slots < self.seen[:, None, None], slots, -1)


@dataclasses.dataclass(frozen=True)
class Int8Cache:
    """Keeps everything, rounded to 1/254 of the largest number of each key and value.

    A prompt is attended to as it is; what follows reads rounded keys and values, its own among them. It saves memory,
    not time: each layer turns its keys and values back before it reads them.
    """

    reads_previous = False

    def at(self, layer: int) -> "Int8Cache":
        """The same policy in every layer."""
        return self

    def empty(self, batch: int, *, spec: AttentionSpec, prompt: int, new: int, dtype) -> Int8State:
        """Zeros: [B K prompt+new d] in int8, scales in float32."""
        shape = (batch, spec.kv_heads, prompt + new)
        whole, scale = jnp.zeros((*shape, spec.head_dim), jnp.int8), jnp.zeros(shape, jnp.float32)
        return Int8State(whole, whole, scale, scale, jnp.zeros(batch, jnp.int32))

    def prefill(self, qkv: QKV, step: Step, *, spec: AttentionSpec, room: int, previous=None):
        """Causal attention over the prompt; its keys and values are rounded into a buffer of `room` slots."""
        k, v = (jnp.swapaxes(x, 1, 2) for x in (qkv.k, qkv.v))
        out = attend(qkv.q, k, v, **spec.options)
        spare = ((0, 0), (0, 0), (0, room - k.shape[2]))
        (k, k_scale), (v, v_scale) = quantise(k), quantise(v)
        k, v = (jnp.pad(x, (*spare, (0, 0))) for x in (k, v))
        return out, Int8State(k, v, jnp.pad(k_scale, spare), jnp.pad(v_scale, spare), step.lengths)

    def extend(
        self, state: Int8State, qkv: QKV, step: Step, *, spec: AttentionSpec, previous=None, shared=None, write=True
    ):
        """Write the new tokens behind the seen ones, then attend to all of them as they were rounded."""
        check_room(state.seen, step.lengths, state.k.shape[2])
        after, dtype = _written(state, qkv, step), qkv.k.dtype
        k, v = dequantise(after.k, after.k_scale, dtype), dequantise(after.v, after.v_scale, dtype)
        if qkv.k.shape[1] == 1:
            out = attend_first(qkv.q, k, v, after.seen, **spec.options)
        else:
            out = attend(qkv.q, k, v, positions=step.positions, **spec.options)
        return out, after if write else state

    def finish(self, states: tuple[Int8State, ...], step: Step) -> Cache:
        """Nothing to settle between layers."""
        return Cache(states)


def quantise(x: Float[Array, "*B d"]) -> tuple[Int[Array, "*B d"], Float[Array, "*B"]]:
    """Whole numbers from -127 to 127 and the scale that turns them back: a 127th of the largest absolute value."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / LARGEST
    return jnp.round(x / jnp.where(scale > 0, scale, 1)[..., None]).astype(jnp.int8), scale


def dequantise(whole: Int[Array, "*B d"], scale: Float[Array, "*B"], dtype) -> Float[Array, "*B d"]:
    """What `quantise` rounded, in `dtype`."""
    return (whole.astype(jnp.float32) * scale[..., None]).astype(dtype)


def _written(state: Int8State, qkv: QKV, step: Step) -> Int8State:
    (k, k_scale), (v, v_scale) = quantise(qkv.k), quantise(qkv.v)
    return Int8State(
        append(state.k, k, state.seen),
        append(state.v, v, state.seen),
        append(state.k_scale, k_scale, state.seen),
        append(state.v_scale, v_scale, state.seen),
        state.seen + step.lengths,
    )
