"""Generation on token ids: prefill part by part, then a decode loop that stays on the device.

The prompt goes through one compiled layer in a host loop (all layers share it), padded to a bucket length. The cache
gets `room` slots, which by default depend on that bucket and on `max_new_tokens`: for one `max_new_tokens`, prompts of
1 to 4096 tokens compile at most 8 programs. Decoding is a `while_loop` that runs a chunk of steps, stops by itself
when every row has met a stop id, and hands the chunk to the host: one program for all prompts that share a batch size
and a `room`.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxfw.core.errors import InputError
from jaxfw.core.shapes import Array, Bool, Float, Int, PRNGKeyArray, PyTree
from jaxfw.models import DecoderConfig, embed, first_step, forward, head, layer
from jaxfw.models.cache import Cache, CachePolicy, FullCache
from jaxfw.ops.sampling import Sampling, sample

SHORTEST_BUCKET = 32
CHUNK = 32
STOP_IDS = 8  # stop ids are padded to a multiple of this: their number does not recompile


@dataclasses.dataclass(frozen=True)
class Generation:
    """New token ids of each row (the stop id included), which rows met a stop id, and the seconds of both phases."""

    tokens: tuple[tuple[int, ...], ...]
    stopped: tuple[bool, ...]
    prefill_seconds: float
    decode_seconds: float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoding:
    """What a decode loop carries. `token` is each row's newest, not yet in the cache; `step` counts drawn tokens."""

    cache: Cache
    token: Int[Array, "B"]
    is_done: Bool[Array, "B"]
    keys: PRNGKeyArray
    step: Int[Array, ""]


def bucket(length: int) -> int:
    """The padded length of a prompt: the next power of two, at least 32.

    >>> [bucket(n) for n in (1, 33, 4096)]
    [32, 64, 4096]
    """
    return max(SHORTEST_BUCKET, 1 << (length - 1).bit_length())


def default_room(prompt: int, new: int) -> int:
    """Cache slots for prompts of up to `prompt` tokens and `new` more: one number for all prompts of a bucket.

    Fewer than 32 of them, or a quarter, stay empty behind a full bucket: each decode step reads them all.

    >>> [default_room(prompt, 64) for prompt in (1, 33, 64, 4096)]
    [96, 128, 128, 5120]
    """
    needed = bucket(prompt) + new
    step = max(SHORTEST_BUCKET, bucket(needed) // 8)
    return -(-needed // step) * step


_embed = jax.jit(embed, static_argnums=0)


@partial(jax.jit, static_argnames=("config", "policy", "room"), donate_argnames="x")
def _prefill_layer(config, policy, params, x, step, previous, *, room):
    return layer(config, params, x, step, policy=policy, room=room, previous=previous)


@partial(jax.jit, static_argnames="config")
def _last_logits(config, params, x, lengths):
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
    return head(config, params, last)[:, 0]


def prefill(
    config: DecoderConfig,
    params: PyTree,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    *,
    policy: CachePolicy,
    room: int,
) -> tuple[Float[Array, "B V"], Cache]:
    """The logits after each row's last valid token, and a cache with `room` slots; one compiled layer, run L times.

    At any time one layer's uncompressed keys and values are alive, beside what the policy keeps of the others.
    """
    step = first_step(lengths, tokens.shape[1])
    ends = {name: params[name] for name in ("embed", "head")}
    x, states = _embed(config, ends, tokens), []
    for i in range(config.layers):
        numbered = dataclasses.replace(step, layer=jnp.int32(i))
        previous = states[-1] if states and policy.reads_previous else None
        x, state = _prefill_layer(config, policy.at(i), params[f"layers_{i}"], x, numbered, previous, room=room)
        states.append(state)
    cache = Cache(policy.finish(tuple(states), step))
    return _last_logits(config, ends, x, lengths), cache


@partial(jax.jit, static_argnames=("config", "policy", "chunk"), donate_argnames="state")
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
) -> tuple[Decoding, Int[Array, "B chunk"]]:
    """Draw up to `limit` <= `chunk` tokens a row, fewer when every row is done. Rows that are done yield -1."""
    B = state.token.shape[0]

    def is_running(carry):
        i, state, _ = carry
        return (i < limit) & ~jnp.all(state.is_done)

    def advance(carry):
        i, state, drawn = carry
        lengths = (~state.is_done).astype(jnp.int32)  # a row that is done writes nothing
        out = forward(config, params, state.token[:, None], lengths=lengths, policy=policy, cache=state.cache)
        assert out.cache is not None
        token = sample(out.logits[:, 0], sampling, state.keys, step=state.step)
        drawn = drawn.at[:, i].set(jnp.where(state.is_done, -1, token))
        is_done = state.is_done | jnp.isin(token, stop_ids)
        return i + 1, Decoding(out.cache, token, is_done, state.keys, state.step + 1), drawn

    drawn = jnp.full((B, chunk), -1, jnp.int32)
    _, state, drawn = jax.lax.while_loop(is_running, advance, (jnp.int32(0), state, drawn))
    return state, drawn


@jax.jit
def _first_token(logits, sampling, keys, stop_ids):
    token = sample(logits, sampling, keys, step=0)
    return token, jnp.isin(token, stop_ids)


_row_keys = jax.jit(jax.vmap(jax.random.fold_in, in_axes=(None, 0)))


def _padded_stop_ids(stop_ids: Sequence[int]) -> Int[Array, "n"]:
    ids = sorted(set(stop_ids))
    return jnp.asarray(ids + [-1] * (-len(ids) % STOP_IDS or STOP_IDS * (not ids)), jnp.int32)


def generate(
    config: DecoderConfig,
    params: PyTree,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    sampling: Sampling | None = None,
    key: PRNGKeyArray | None = None,
    policy: CachePolicy | None = None,
    room: int | None = None,
    on_tokens: Callable[[Int[np.ndarray, "B n"]], None] | None = None,
) -> Generation:
    """Continue each prompt by up to `max_new_tokens` tokens.

    Args:
        config: the model.
        params: its parameters.
        prompts: token ids, of any lengths.
        max_new_tokens: at most this many a row.
        stop_ids: a row ends with the first of these that it draws.
        sampling: how to choose tokens; None is greedy.
        key: row b draws with `fold_in(key, b)`; None is key 0.
        policy: what the cache keeps; None keeps everything.
        room: slots of the cache, at least prompt + new. Calls with equal `room` and batch size share one compiled
            decode loop, and one compiled prefill for each bucket of prompts. None takes `default_room`, a function
            of the longest prompt's bucket and `max_new_tokens`; give one `room` to share the loop between buckets.
        on_tokens: called on the host with each chunk of new ids; -1 where a row is done.

    Raises:
        InputError: an empty prompt, an id outside the vocabulary, or more tokens than positions or `room`.
    """
    sampling, policy = sampling or Sampling(), policy or FullCache()
    sampling.validate()
    longest = _check(config, prompts, max_new_tokens)
    needed = longest + max_new_tokens
    room = default_room(longest, max_new_tokens) if room is None else room
    if room < needed:
        raise InputError(f"room={room} is below prompt + new tokens = {longest} + {max_new_tokens}: raise room.")
    T = bucket(longest)
    tokens = np.zeros((len(prompts), T), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    lengths = jnp.asarray([len(prompt) for prompt in prompts], jnp.int32)
    key = jax.random.key(0) if key is None else key
    keys = _row_keys(key, jnp.arange(len(prompts)))
    stop = _padded_stop_ids(stop_ids)

    started = time.perf_counter()
    logits, cache = prefill(config, params, jnp.asarray(tokens), lengths, policy=policy, room=max(room, T))
    token, is_done = _first_token(logits, sampling, keys, stop)
    chunks = [np.asarray(token)[:, None]]
    prefilled = time.perf_counter()
    if on_tokens:
        on_tokens(chunks[0])
    state = Decoding(cache, token, is_done, keys, jnp.int32(1))
    drawn = 1
    while drawn < max_new_tokens and not bool(jnp.all(state.is_done)):
        limit = min(CHUNK, max_new_tokens - drawn)
        state, ids = decode(config, policy, params, state, sampling, stop, jnp.int32(limit))
        chunks.append(np.asarray(ids)[:, :limit])
        drawn += limit
        if on_tokens:
            on_tokens(chunks[-1])
    rows = tuple(tuple(int(id_) for id_ in row if id_ >= 0) for row in np.concatenate(chunks, axis=1))
    return Generation(
        rows,
        tuple(bool(x) for x in np.asarray(state.is_done)),
        prefilled - started,
        time.perf_counter() - prefilled,
    )


def _check(config: DecoderConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> int:
    """The longest prompt's length, after checking that every prompt can be run."""
    if not prompts:
        raise InputError("prompts is empty: give at least one.")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens} must be at least 1.")
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise InputError(f"prompt {i} is empty: give at least one token (the beginning-of-text id will do).")
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= config.vocab:
            raise InputError(
                f"prompt {i} holds token id {low if low < 0 else high}, outside the model's vocabulary of "
                f"{config.vocab}: is this the model's own tokenizer?"
            )
    longest = max(len(prompt) for prompt in prompts)
    if longest + max_new_tokens > config.context:
        raise InputError(
            f"prompt + new tokens = {longest} + {max_new_tokens} exceed the model's {config.context} positions: "
            "shorten the prompt or lower max_new_tokens."
        )
    return longest
