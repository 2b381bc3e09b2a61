"""One decoder, two ways to run it: `forward` in one go, or `embed`, `layer`, `head` driven part by part.

All are pure functions `(config, params, ...)`; parameters are plain nested dicts, a key per layer (`layers_0`, ...).
The whole is the plain composition of the parts.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxfw.core.errors import InputError
from jaxfw.core.shapes import Array, Float, Int, PRNGKeyArray, PyTree
from jaxfw.models.cache.policy import QKV, AttentionSpec, Cache, CachePolicy, Step
from jaxfw.nn.config import DecoderConfig
from jaxfw.nn.layers import Block, Decoder, Embedding, Head
from jaxfw.ops.attention import attend
from jaxfw.ops.rope import rotate, rotation


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """What a forward returns: logits in the compute dtype, and the cache after these tokens (None without one)."""

    logits: Float[Array, "B T V"]
    cache: Cache | None


def init(config: DecoderConfig, key: PRNGKeyArray) -> PyTree:
    """Fresh parameters: normal(init_std) matrices, unit norms, zero biases. Works under `jax.eval_shape`."""

    def mix(q, k, v, hidden, w_o):
        return q, None

    return Decoder(config).init(key, jnp.zeros((1, 1), jnp.int32), mix)["params"]


def _apply(module: Any, params: PyTree, *arguments: Any, method: str | None = None) -> Any:
    return module.apply({"params": params}, *arguments, method=method)


def attention_spec(config: DecoderConfig) -> AttentionSpec:
    """The static description of every layer's attention."""
    return AttentionSpec(config.kv_heads, config.head_dim, config.head_dim**-0.5, config.rope, config.softmax_dtype)


def embed(config: DecoderConfig, params: PyTree, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """The residual stream before the first layer; `params` is the whole tree."""
    return _apply(Embedding(config), params["embed"], tokens)


def head(config: DecoderConfig, params: PyTree, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """Logits from the residual stream after the last layer; `params` is the whole tree."""
    table = params["embed"]["embedding"] if config.tie_embeddings else None
    return _apply(Head(config), params["head"], x, table)


def attend_half(
    config: DecoderConfig,
    params: PyTree,
    x: Float[Array, "B T D"],
    step: Step,
    *,
    policy: CachePolicy | None = None,
    state: Any = None,
    room: int = 0,
    previous: Any = None,
) -> tuple[Float[Array, "B T D"], Any]:
    """The attention half of a layer; `params` is that layer's tree.

    Without a `policy`, causal attention among these tokens. With one and no `state`, the prefill of a cache with `room`
    slots. With both, the tokens extend the state.
    """
    spec = attention_spec(config)

    def mix(q_pre, k_pre, v, hidden, w_o):
        cos, sin = rotation(
            config.rope, step.positions, width=config.head_dim, seq_len=step.positions[:, 0] + step.lengths
        )
        q, k = rotate(q_pre, cos, sin), rotate(k_pre, cos, sin)
        if policy is None:
            keys, values = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
            dtype = jnp.dtype(spec.softmax_dtype)
            return attend(q, keys, values, scale=spec.scale, softmax_dtype=dtype), None
        qkv = QKV(q, k, v, q_pre, k_pre, hidden, w_o)
        if state is None:
            return policy.prefill(qkv, step, spec=spec, room=room, previous=previous)
        return policy.extend(state, qkv, step, spec=spec, previous=previous)

    return _apply(Block(config), params, x, mix, method="attend_half")


def mlp_half(config: DecoderConfig, params: PyTree, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """The feed-forward half of a layer; `params` is that layer's tree."""
    return _apply(Block(config), params, x, method="mlp_half")


def layer(
    config: DecoderConfig, params: PyTree, x: Float[Array, "B T D"], step: Step, **cache: Any
) -> tuple[Float[Array, "B T D"], Any]:
    """One layer: `attend_half` (with its keywords), then `mlp_half`; `params` is that layer's tree."""
    x, state = attend_half(config, params, x, step, **cache)
    return mlp_half(config, params, x), state


def first_step(lengths: Int[Array, "B"], T: int) -> Step:
    """The step of a prompt: positions 0..T-1 in every row."""
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (lengths.shape[0], T))
    return Step(positions, lengths, jnp.int32(0))


def trunk(
    config: DecoderConfig,
    params: PyTree,
    x: Float[Array, "B T D"],
    step: Step,
    *,
    policy: CachePolicy | None = None,
    cache: Cache | None = None,
    room: int | None = None,
    run_layer: Callable[..., tuple[Array, Any]] | None = None,
) -> tuple[Float[Array, "B T D"], Cache | None]:
    """All layers: the residual stream from `embed` to `head`, and with a `policy` the cache after these tokens.

    `run_layer` stands in for `layer`, its jit for instance: then the layers run part by part.
    """
    if cache is not None and policy is None:
        raise InputError("a cache is given without its policy: give the policy that made it, e.g. FullCache().")
    run_layer, states = run_layer or layer, []
    for i in range(config.layers):
        x, state = run_layer(
            config,
            params[f"layers_{i}"],
            x,
            dataclasses.replace(step, layer=jnp.int32(i)),
            policy=None if policy is None else policy.at(i),
            state=None if cache is None else cache.layers[i],
            room=x.shape[1] if room is None else room,
            previous=states[-1] if states and policy is not None and policy.reads_previous else None,
        )
        states.append(state)
    if policy is None:
        return x, None
    if cache is None:
        return x, Cache(policy.finish(tuple(states), step))
    return x, dataclasses.replace(cache, layers=tuple(states))


def forward(
    config: DecoderConfig,
    params: PyTree,
    tokens: Int[Array, "B T"],
    *,
    lengths: Int[Array, "B"] | None = None,
    policy: CachePolicy | None = None,
    cache: Cache | None = None,
    room: int | None = None,
) -> Output:
    """Logits of every token, in one trace.

    Rows are canonical: valid tokens first, `lengths` of them (all, by default); logits beyond a row's length mean
    nothing. With a `policy`, the result holds a cache: a fresh one with `room` slots (T by default), or the given one
    extended; that it has room is for the caller to see to, as lengths are known only when this runs.
    """
    B, T = tokens.shape
    step = first_step(jnp.full(B, T, jnp.int32) if lengths is None else lengths, T)
    if cache is not None:
        step = dataclasses.replace(step, positions=step.positions + cache.seen[:, None])
    x, cache = trunk(config, params, embed(config, params, tokens), step, policy=policy, cache=cache, room=room)
    return Output(head(config, params, x), cache)
