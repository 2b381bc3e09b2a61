"""After a step's attention: which tokens go, and the state without them."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxfw.core.shapes import Array, Bool, Float, Int
from jaxfw.kv.decoding import Decode
from jaxfw.kv.state import KVState
from jaxfw.models.cache import AttentionSpec
from jaxfw.ops.slots import attend_slots
from pallas_kernels import decode_attention


def attend_step(
    q: Float[Array, "B 1 H d"],
    state: KVState,
    lengths: Int[Array, "B"],
    at: Int[Array, "B 1"],
    spec: AttentionSpec,
    *,
    with_mass: bool,
) -> tuple[Float[Array, "B 1 H d"], Float[Array, "B K S"] | None]:
    """Attention of one token a row to the first `lengths` slots, and what it gives to each, summed over a group."""
    if spec.window is None and jnp.dtype(spec.softmax_dtype) == jnp.float32:
        found = decode_attention(q[:, 0], state.k, state.v, lengths=lengths, scale=spec.scale, return_mass=with_mass)
        return found.out[:, None], found.mass
    out = attend_slots(q, state.k, state.v, state.kept_positions, at, **spec.options)
    return out, _mass(q, state, at, spec) if with_mass else None


def _mass(q: Array, state: KVState, at: Array, spec: AttentionSpec) -> Float[Array, "B K S"]:
    """Where the kernel cannot say it: layers with a window, or a softmax of another dtype."""
    B, _, H, d = q.shape
    grouped = q.reshape(B, spec.kv_heads, H // spec.kv_heads, d).astype(jnp.float32)
    logits = jnp.einsum("BKGd,BKSd->BKGS", grouped, state.k.astype(jnp.float32), precision="highest") * spec.scale
    visible = (state.kept_positions >= 0)[:, :, None]
    if spec.window is not None:
        visible &= (state.kept_positions > at[..., None] - spec.window)[:, :, None]
    return jnp.sum(jax.nn.softmax(jnp.where(visible, logits, -jnp.inf), axis=-1), axis=2)


def forget(state: KVState, decode: Decode, mass: Float[Array, "B K S"] | None, valid: Bool[Array, "B"]) -> KVState:
    """The state after one token was written and attended by; rows that are not valid stay as they are.

    `mass` is what the token's queries gave to each slot, summed over the heads of a group.
    """
    if state.score is not None and mass is not None:
        added = jnp.where(valid[:, None, None], mass, 0)
        state = dataclasses.replace(state, score=state.score + added)
    value, may_go = _candidates(state, decode, mass)
    region = state.held if decode.region == "all" else state.held - state.prompt_held
    over = region - decode.limit(state.seen - state.prompt, state.limit)
    if decode.wait:
        return _cut_back(state, decode, value, may_go, jnp.where(valid, over, -1))
    goes = valid & (over > 0) & jnp.any(may_go, axis=(1, 2))
    victim = jnp.argmin(jnp.where(may_go, value, jnp.inf), axis=-1, keepdims=True).astype(jnp.int32)
    held = state.held - goes
    # What was written filled the hole; without a victim, the next token goes behind the others.
    free = jnp.where(goes[:, None, None], victim, state.held[:, None, None])
    slots = jnp.arange(state.S)
    is_hole = goes[:, None, None] & (slots == victim)
    kept_positions = jnp.where(is_hole, -1, state.kept_positions)
    assert state.free is not None
    free = jnp.where(valid[:, None, None], free, state.free)
    return dataclasses.replace(state, held=held, free=free, kept_positions=kept_positions)


def _candidates(state: KVState, decode: Decode, mass: Array | None) -> tuple[Array, Bool[Array, "B K S"]]:
    """The score of each slot (of all heads the same, where they share a choice), and which slots may be emptied."""
    at = state.kept_positions
    if decode.score == "age":
        value: Array = at.astype(jnp.float32)
    else:
        found = state.score if decode.score == "sum" else mass
        assert found is not None
        value = found
    if decode.is_shared:
        value = jnp.broadcast_to(jnp.sum(value, axis=1, keepdims=True), value.shape)
    # A cache as small as the sinks gives up the last of these: the newest token needs a place.
    sinks = jnp.minimum(decode.sinks, state.limit - 1)
    first = (state.prompt if decode.region == "generated" else sinks)[:, None, None]
    newest = decode.newest(state.limit)[:, None, None]
    return value, (at >= first) & (at < state.seen[:, None, None] - newest)


def _cut_back(state: KVState, decode: Decode, value: Array, may_go: Array, over: Int[Array, "B"]) -> KVState:
    """Nothing, until the region has been full for `wait` steps; then all that is over its limit goes at once."""
    assert state.waited is not None
    is_full = over >= 0
    is_due = is_full & (state.waited >= decode.wait)
    waited = jnp.where(is_due, 0, state.waited + is_full)
    state = dataclasses.replace(state, waited=waited)

    def cut(state: KVState) -> KVState:
        lowest = jnp.argsort(jnp.argsort(jnp.where(may_go, value, jnp.inf), axis=-1), axis=-1)
        goes = is_due[:, None, None] & may_go & (lowest < over[:, None, None])
        kept = jnp.where(goes, -1, state.kept_positions)
        order = jnp.argsort(kept < 0, axis=-1, stable=True)

        def moved(x: Array) -> Array:
            return jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 3)), axis=2)

        slots = {"k": moved(state.k), "v": moved(state.v), "kept_positions": moved(kept)}
        return dataclasses.replace(state, **slots, held=state.held - jnp.where(is_due, over, 0))

    state = jax.lax.cond(jnp.any(is_due), cut, lambda state: state, state)
    return dataclasses.replace(state, free=jnp.broadcast_to(state.held[:, None, None], (*may_go.shape[:2], 1)))
