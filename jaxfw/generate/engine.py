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

from jaxfw.core.errors import InputError, RunError
from jaxfw.core.keys import fold, row_keys
from jaxfw.core.shapes import Array, Bool, Float, Int, PRNGKeyArray, PyTree
from jaxfw.models import DecoderConfig, Edit, embed, first_step, forward, head, layer, trunk
from jaxfw.models.cache import Cache, CachePolicy, FullCache
from jaxfw.models.routing import Experts, Router
from jaxfw.models.taps import Sites, validate
from jaxfw.ops.sampling import Sampling, sample

SHORTEST_BUCKET = 32
CHUNK = 32
CACHE_STREAM = 2**31 - 1  # a row's key folded with this is its cache policy's; tokens are drawn with the step's number
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
    """What a decode loop carries. `token` is each row's newest, not yet in the cache; `step` counts drawn tokens.

    `is_finite` turns False, for good, when the logits of a step are not finite.
    """

    cache: Cache
    token: Int[Array, "B"]
    is_done: Bool[Array, "B"]
    is_finite: Bool[Array, ""]
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


@partial(jax.jit, static_argnames="config")
def _embed(config, params, tokens, step, taps):
    return embed(config, params, tokens, positions=step.positions, sites=Sites(taps, step))


_layer = jax.jit(layer, static_argnames=("config", "policy", "room", "write", "router", "experts"), donate_argnames="x")
_finish = jax.jit(lambda policy, states, step: policy.finish(states, step), static_argnums=0, donate_argnums=1)


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
    ends = {name: params[name] for name in ("embed", "head")}
    step = dataclasses.replace(first_step(lengths, tokens.shape[1]), tokens=tokens, unit_id=unit_id, key=key)
    x = _embed(config, ends, tokens, step, taps)
    out = trunk(
        config, params, x, step, policy=policy, room=room, router=router, experts=experts, state=router_states,
        taps=taps, run_layer=_layer, run_finish=_finish,
    )  # fmt: skip
    assert out.cache is not None
    return _last_logits(config, ends, out.x, step, taps), out.cache


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
            experts=experts, state=router_states, taps=taps, key=fold(state.keys, CACHE_STREAM),
        )  # fmt: skip
        assert out.cache is not None
        token, is_stop, is_finite = _draw(out.logits[:, 0], sampling, state.keys, state.step, stop_ids)
        drawn = drawn.at[:, i].set(jnp.where(state.is_done, -1, token))
        return (
            i + 1,
            Decoding(
                out.cache, token, state.is_done | is_stop, state.is_finite & is_finite, state.keys, state.step + 1
            ),
            drawn,
        )

    drawn = jnp.full((B, chunk), -1, jnp.int32)
    _, state, drawn = jax.lax.while_loop(is_running, advance, (jnp.int32(0), state, drawn))
    return state, drawn


@jax.jit
def _draw(logits, sampling, keys, step, stop_ids):
    """A token a row, whether it is a stop id, and whether all logits are finite (a maximum passes NaN on)."""
    token = sample(logits, sampling, keys, step=step)
    return token, jnp.isin(token, stop_ids), jnp.all(jnp.isfinite(jnp.max(logits, axis=-1)))


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
    unit_ids: Sequence[Sequence[int]] | None = None,
    router: Router | None = None,
    experts: Experts | None = None,
    router_states: PyTree | None = None,
    taps: Sequence[Edit] = (),
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
        key: row b draws with `fold_in(key, b)`; None is key 0. Or a key a row, of shape [B].
        policy: what the cache keeps; None keeps everything.
        room: slots of the cache, at least prompt + new. Calls with equal `room` and batch size share one compiled
            decode loop, and one compiled prefill for each bucket of prompts. None takes `default_room`, a function
            of the longest prompt's bucket and `max_new_tokens`; give one `room` to share the loop between buckets.
        unit_ids: which unit (a shot, a sentence) each token of each prompt belongs to, -1 for none: for policies that
            keep whole units.
        router: who decides which experts a token goes to; None is the config's.
        experts: who runs them; None is `Sorted()`.
        router_states: what the routers remember of training, as `Output.state` holds it; generation does not move it.
        taps: edits of the prompt and of every new token, by true positions (steering, ablation).
        on_tokens: called on the host with each chunk of new ids; -1 where a row is done.

    Raises:
        InputError: an empty prompt, an id outside the vocabulary, more tokens than positions or `room`, a tap that is
            no edit or does not fit.
        RunError: logits that are not finite.
    """
    sampling, policy = sampling or Sampling(), policy or FullCache()
    sampling.validate()
    longest, max_new_tokens = _check(config, prompts, max_new_tokens), int(max_new_tokens)
    needed = longest + max_new_tokens
    room = default_room(longest, max_new_tokens) if room is None else room
    if room < needed:
        raise InputError(f"room={room} is below prompt + new tokens = {longest} + {max_new_tokens}: raise room.")
    tokens, lengths = _pack(prompts, bucket(longest), spare=0)
    units = None if unit_ids is None else _pack_units(unit_ids, prompts, bucket(longest))
    _check_taps(config, taps, len(prompts))
    # A copy: the decode loop donates what it is given.
    keys = jnp.copy(row_keys(jax.random.key(0) if key is None else key, len(prompts)))
    stop = _padded_stop_ids(stop_ids)
    values = {"router": router, "experts": experts, "router_states": router_states, "taps": tuple(taps)}

    started = time.perf_counter()
    logits, cache = prefill(
        config, params, tokens, lengths, policy=policy, room=max(room, tokens.shape[1]),
        unit_id=units, key=_cache_keys(keys), **values,
    )  # fmt: skip
    token, is_done, is_finite = _draw(logits, sampling, keys, jnp.int32(0), stop)
    state, drawn = Decoding(cache, token, is_done, is_finite, keys, jnp.int32(1)), 1
    chunks = [_taken(state, token[:, None], 1, on_tokens)]
    prefilled = time.perf_counter()
    while drawn < max_new_tokens and not bool(jnp.all(state.is_done)):
        limit = min(CHUNK, max_new_tokens - drawn)
        state, ids = decode(config, policy, params, state, sampling, stop, jnp.int32(limit), **values)
        chunks.append(_taken(state, ids, limit, on_tokens))
        drawn += limit
    rows = tuple(tuple(int(id_) for id_ in row if id_ >= 0) for row in np.concatenate(chunks, axis=1))
    stopped = tuple(bool(x) for x in np.asarray(state.is_done))
    return Generation(rows, stopped, prefilled - started, time.perf_counter() - prefilled)


def _pack_units(unit_ids, prompts, T: int) -> Int[Array, "B T"]:
    sizes, wanted = [len(row) for row in unit_ids], [len(prompt) for prompt in prompts]
    if sizes != wanted:
        raise InputError(f"unit_ids have {sizes} numbers a row, the prompts {wanted} tokens: give one for each token.")
    return _pack(unit_ids, T, spare=-1)[0]


def _pack(prompts: Sequence[Sequence[int]], T: int, *, spare: int) -> tuple[Int[Array, "B T"], Int[Array, "B"]]:
    """Rows side by side, each from slot 0 on with `spare` behind it, and their lengths."""
    tokens = np.full((len(prompts), T), spare, np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return jnp.asarray(tokens), jnp.asarray([len(prompt) for prompt in prompts], jnp.int32)


_cache_keys = jax.jit(lambda keys: fold(keys, CACHE_STREAM))


def _check_taps(config: DecoderConfig, taps: Sequence[Edit], B: int) -> None:
    """Edits that hold for prompts of any length and for single tokens: values without an axis of T."""
    for i, tap in enumerate(taps):
        if not isinstance(tap, Edit):
            raise InputError(f"taps[{i}]={tap!r:.80} must be an Edit: what generation returns is tokens.")
    validate(config, taps, B, 1)


def _padded_stop_ids(stop_ids: Sequence[int]) -> Int[Array, "n"]:
    ids = sorted(set(stop_ids))
    return jnp.asarray(ids + [-1] * (-len(ids) % STOP_IDS or STOP_IDS * (not ids)), jnp.int32)


def _taken(state: Decoding, ids: Int[Array, "B chunk"], count: int, on_tokens) -> Int[np.ndarray, "B n"]:
    """The first `count` new ids of each row, on the host, after handing them to the caller."""
    if not bool(state.is_finite):
        raise RunError(
            "the model's logits are NaN or infinite: its parameters are damaged, or too large for its dtype "
            "(load it with dtype='float32')."
        )
    chunk = np.asarray(ids)[:, :count]
    if on_tokens:
        on_tokens(chunk)
    return chunk


def _check(config: DecoderConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> int:
    """The longest prompt's length, after checking that every prompt can be run."""
    if not prompts:
        raise InputError("prompts is empty: give at least one.")
    if not isinstance(max_new_tokens, int | np.integer) or max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens!r} must be at least 1, a whole number.")
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, int | np.integer | str):
            raise InputError(
                f"prompts[{i}]={prompt!r:.60} must be a list of token ids: prompts is a list of such lists."
            )
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
