"""The compiled programs of generation: read a prompt, read more behind a cache, draw a token, decode.

A prompt goes through one compiled layer in a host loop (all layers share it); decoding is a `while_loop` that runs a
chunk of steps and stops by itself when every row is done. What the host reads of them (drawn ids, who is done, whether
logits are finite) is laid out whole on every device of a mesh: each process of a cluster can read it.
"""

import dataclasses
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxfw.core.keys import fold
from jaxfw.core.mesh import BATCH_AXES, constrain
from jaxfw.core.shapes import Array, Bool, Float, Int, PRNGKeyArray, PyTree
from jaxfw.models import DecoderConfig, Edit, embed, finish, first_step, forward, head, layer, trunk
from jaxfw.models.cache import Cache, CachePolicy, Step
from jaxfw.models.routing import Experts, Router
from jaxfw.models.sharding import state_spec
from jaxfw.models.taps import Sites
from jaxfw.ops.losses import token_log_probs
from jaxfw.ops.sampling import Sampling, sample

CHUNK = 32
# A row's key folded with these is its cache policy's, and that of its further samples; tokens are drawn with the
# step's number.
CACHE_STREAM, SAMPLE_STREAM = 2**31 - 1, 2**31 - 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoding:
    """What a decode loop carries.

    Attributes:
        cache: of everything but `token`.
        token: each row's newest.
        is_done: rows that have ended.
        is_finite: turns False, for good, when the logits of a step are not finite.
        keys: that tokens are drawn with.
        cache_keys: that the cache's policy draws with; all samples of a prompt share one.
        step: how many tokens were drawn.
        seen: ids of prompt and output, where there is a repetition penalty.
        logprobs: of the chunk's tokens, where they are asked for.
    """

    cache: Cache
    token: Int[Array, "B"]
    is_done: Bool[Array, "B"]
    is_finite: Bool[Array, ""]
    keys: PRNGKeyArray
    cache_keys: PRNGKeyArray
    step: Int[Array, ""]
    seen: Bool[Array, "B V"] | None = None
    logprobs: Float[Array, "B chunk"] | None = None


@partial(jax.jit, static_argnames="config")
def _embed(config, params, tokens, step, taps):
    return embed(config, params, tokens, positions=step.positions, sites=Sites(taps, step))


_STATIC = ("config", "policy", "room", "write", "router", "experts")
_layer = jax.jit(layer, static_argnames=_STATIC, donate_argnames="x")
_extend_layer = jax.jit(layer, static_argnames=_STATIC, donate_argnames=("x", "state"))
_finish = jax.jit(finish, static_argnums=0, donate_argnums=1)


def _finish_quietly(policy: CachePolicy, states: tuple[Any, ...], step: Step) -> Cache:
    """Donated states that a policy makes smaller are freed all the same, and jax warns that they were not reused."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Some donated buffers were not usable")
        return _finish(policy, states, step)


@partial(jax.jit, static_argnames="T")
def _step(lengths, seen, *, T: int) -> Step:
    step = first_step(lengths, T)
    return step if seen is None else dataclasses.replace(step, positions=step.positions + seen[:, None])


@partial(jax.jit, static_argnames="config")
def _last_logits(config, params, x, step, taps):
    last = jnp.maximum(step.lengths - 1, 0)[:, None]
    step = dataclasses.replace(
        step, positions=jnp.take_along_axis(step.positions, last, axis=1), lengths=jnp.minimum(step.lengths, 1)
    )
    x = jnp.take_along_axis(x, last[..., None], axis=1)
    return head(config, params, x, sites=Sites(taps, step))[:, 0]


def prefill(
    config: DecoderConfig,
    params: PyTree,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    *,
    policy: CachePolicy,
    room: int,
    router: Router | None = None,
    experts: Experts | None = None,
    router_states: PyTree | None = None,
    taps: Sequence[Edit] = (),
    unit_id: Int[Array, "B T"] | None = None,
    key: PRNGKeyArray | None = None,
) -> tuple[Float[Array, "B V"], Cache]:
    """The logits after each row's last valid token, and a cache with `room` slots; one compiled layer, run L times.

    At any time one layer's uncompressed keys and values are alive, beside what the policy keeps of the others.
    The keywords are those of `jaxfw.forward`; `key` is one a row, [B].
    """
    step = dataclasses.replace(_step(lengths, None, T=tokens.shape[1]), tokens=tokens, unit_id=unit_id, key=key)
    options = {"policy": policy, "room": room, "router": router, "experts": experts, "state": router_states}
    return _by_parts(config, params, step, taps, run_layer=_layer, run_finish=_finish_quietly, **options)


def extend(
    config: DecoderConfig,
    params: PyTree,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    cache: Cache,
    *,
    policy: CachePolicy,
    router: Router | None = None,
    experts: Experts | None = None,
    router_states: PyTree | None = None,
    taps: Sequence[Edit] = (),
    unit_id: Int[Array, "B T"] | None = None,
    key: PRNGKeyArray | None = None,
) -> tuple[Float[Array, "B V"], Cache]:
    """`prefill` behind a cache, which is donated; that it has room is for the caller to see to.

    The logits of a row without further tokens mean nothing.
    """
    step = dataclasses.replace(_step(lengths, cache.seen, T=tokens.shape[1]), tokens=tokens, unit_id=unit_id, key=key)
    options = {"policy": policy, "cache": cache, "router": router, "experts": experts, "state": router_states}
    return _by_parts(config, params, step, taps, run_layer=_extend_layer, **options)


def reread(
    config: DecoderConfig,
    params: PyTree,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    cache: Cache,
    *,
    policy: CachePolicy,
    router: Router | None = None,
    experts: Experts | None = None,
    router_states: PyTree | None = None,
    taps: Sequence[Edit] = (),
    key: PRNGKeyArray | None = None,
) -> Float[Array, "B V"]:
    """The logits behind each row's last token, which is read once more: against what the cache holds of the others.

    The cache stays as it is. Where it holds all, these are the logits that there were.
    """
    last, before, one = _last_tokens(tokens, lengths, cache)
    step = dataclasses.replace(_step(one, before.seen, T=1), tokens=last, key=key)
    options = {"policy": policy, "cache": before, "router": router, "experts": experts, "state": router_states}
    ends = {name: params[name] for name in ("embed", "head")}
    x = _embed(config, ends, last, step, taps)
    out = trunk(config, params, x, step, taps=taps, run_layer=_layer, write=False, **options)
    return _last_logits(config, ends, out.x, step, taps)


@jax.jit
def _last_tokens(tokens, lengths, cache: Cache) -> tuple[Array, Cache, Array]:
    """The last token of each row, the cache as if it had not been read, and ones."""
    last = jnp.take_along_axis(tokens, jnp.maximum(lengths - 1, 0)[:, None], axis=1)
    layers = tuple(dataclasses.replace(state, seen=state.seen - 1) for state in cache.layers)
    return last, dataclasses.replace(cache, layers=layers), jnp.ones_like(lengths)


def _by_parts(config, params, step, taps, **options: Any):
    ends = {name: params[name] for name in ("embed", "head")}
    x = _embed(config, ends, step.tokens, step, taps)
    out = trunk(config, params, x, step, taps=taps, **options)
    assert out.cache is not None
    return _last_logits(config, ends, out.x, step, taps), out.cache


@jax.jit
def take_rows(logits: Float[Array, "B V"], cache: Cache, index: Int[Array, "B2"]) -> tuple[Float[Array, "B2 V"], Cache]:
    """The logits and the cache of rows, gathered, reordered or repeated, and laid out like others on a mesh."""
    cache = jax.tree.map(lambda x: constrain(x, *state_spec(x.ndim)), cache.rows(index))
    return constrain(jnp.take(logits, index, axis=0), BATCH_AXES, "tensor"), cache


@jax.jit
def fill_logits(new: Float[Array, "B V"], lengths: Int[Array, "B"], before: Float[Array, "B V"]) -> Array:
    """The logits of rows that were extended, and those from before of rows that were not."""
    return jnp.where(lengths[:, None] > 0, new, before)


@jax.jit
def cache_keys(keys: PRNGKeyArray) -> PRNGKeyArray:
    """The keys that cache policies draw with, one a row."""
    return fold(keys, CACHE_STREAM)


@partial(jax.jit, static_argnames="n")
def sample_keys(keys: PRNGKeyArray, cache_keys: PRNGKeyArray, *, n: int) -> tuple[PRNGKeyArray, PRNGKeyArray]:
    """Both keys of n samples of each row, [B*n]: a row's own to draw with, then others that depend on it alone."""

    def of_row(key):
        others = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
        return jnp.concatenate([key[None], others(jax.random.fold_in(key, SAMPLE_STREAM), jnp.arange(1, n))])

    return jax.vmap(of_row)(keys).reshape(-1), jnp.repeat(cache_keys, n)


@partial(jax.jit, static_argnames="with_logprobs")
def start(
    cache: Cache,
    logits: Float[Array, "B V"],
    keys: PRNGKeyArray,
    cache_keys: PRNGKeyArray,
    sampling: Sampling,
    stop_ids: Int[Array, "n"],
    seen: Bool[Array, "B V"] | None = None,
    *,
    with_logprobs: bool = False,
) -> Decoding:
    """The first token of each row, from the logits behind its prompt."""
    B = logits.shape[0]
    logprobs = jnp.zeros((B, CHUNK), jnp.float32) if with_logprobs else None
    nothing, is_done = jnp.zeros(B, jnp.int32), jnp.zeros(B, bool)
    state = Decoding(cache, nothing, is_done, jnp.bool(True), keys, cache_keys, jnp.int32(0), seen, logprobs)
    return _whole(_advanced(state, cache, logits, sampling, stop_ids, 0))


@partial(jax.jit, static_argnames=("config", "policy", "chunk", "router", "experts"), donate_argnames="state")
def decode(
    config: DecoderConfig,
    policy: CachePolicy,
    params: PyTree,
    state: Decoding,
    sampling: Sampling,
    stop_ids: Int[Array, "n"],
    limit: Int[Array, ""],
    *,
    chunk: int = CHUNK,
    router: Router | None = None,
    experts: Experts | None = None,
    router_states: PyTree | None = None,
    taps: Sequence[Edit] = (),
) -> tuple[Decoding, Int[Array, "B chunk"]]:
    """Draw up to `limit` <= `chunk` tokens a row, fewer when every row is done. Rows that are done yield -1."""
    B = state.token.shape[0]

    def is_running(carry):
        i, state, _ = carry
        return (i < limit) & ~jnp.all(state.is_done)

    def advance(carry):
        i, state, drawn = carry
        lengths = (~state.is_done).astype(jnp.int32)  # a row that is done writes nothing
        out = forward(
            config, params, state.token[:, None], lengths=lengths, policy=policy, cache=state.cache, router=router,
            experts=experts, state=router_states, taps=taps, key=state.cache_keys,
        )  # fmt: skip
        assert out.cache is not None
        after = _advanced(state, out.cache, out.logits[:, 0], sampling, stop_ids, i)
        drawn = drawn.at[:, i].set(jnp.where(state.is_done, -1, after.token))
        return i + 1, after, drawn

    drawn = jnp.full((B, chunk), -1, jnp.int32)
    _, state, drawn = jax.lax.while_loop(is_running, advance, (jnp.int32(0), state, drawn))
    return _whole(state), constrain(drawn, None, None)


def _advanced(state: Decoding, cache: Cache, logits, sampling, stop_ids, column) -> Decoding:
    """The state after drawing a token a row from `logits`; its log-probability goes to a column of `logprobs`."""
    token = sample(logits, sampling, state.keys, step=state.step, seen=state.seen)
    seen, logprobs = state.seen, state.logprobs
    if seen is not None:
        seen = seen | (jnp.arange(seen.shape[1]) == token[:, None])
    if logprobs is not None:
        logprobs = logprobs.at[:, column].set(token_log_probs(logits, token))
    is_finite = jnp.all(jnp.isfinite(jnp.max(logits, axis=-1)))  # a maximum passes NaN on
    is_done = state.is_done | jnp.isin(token, stop_ids)
    return Decoding(
        cache, token, is_done, state.is_finite & is_finite, state.keys, state.cache_keys, state.step + 1, seen, logprobs
    )


def _whole(state: Decoding) -> Decoding:
    """What the host reads and what is small: whole on every device. Rows and vocabulary of `seen` lie as the logits."""
    names = ("token", "is_done", "is_finite", "keys", "cache_keys", "step", "logprobs")
    values = {name: getattr(state, name) for name in names}
    values = jax.tree.map(lambda x: constrain(x, *[None] * x.ndim), values)
    seen = None if state.seen is None else constrain(state.seen, BATCH_AXES, "tensor")
    return dataclasses.replace(state, **values, seen=seen)


@jax.jit
def end_rows(is_done: Bool[Array, "B"], ended: Bool[Array, "B"]) -> Bool[Array, "B"]:
    """Rows that are done, and those that the host ended."""
    return constrain(is_done | ended, None)
