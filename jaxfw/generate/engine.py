"""Generation on token ids: prefill part by part, then a decode loop that stays on the device.

Prompts are padded to a bucket length. The cache gets `room` slots, which by default depend on that bucket and on
`max_new_tokens`: for one `max_new_tokens`, prompts of 1 to 4096 tokens compile at most 8 programs. Decoding hands a
chunk of tokens at a time to the host: one program for all prompts that share a batch size and a `room`.

On a mesh, call it under `jax.set_mesh(mesh)` with parameters that are laid out there. Rows are spread over the axes of
the batch that divide their number, and the results are whole on every process.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxfw.core.errors import InputError, RunError
from jaxfw.core.keys import row_keys
from jaxfw.core.shapes import Array, Bool, Float, Int, PRNGKeyArray, PyTree
from jaxfw.generate import programs
from jaxfw.generate.prefix import Prefix, read_prefix
from jaxfw.generate.programs import CACHE_STREAM, CHUNK, Decoding, decode, extend, prefill, reread
from jaxfw.generate.prompts import (
    SHORTEST_BUCKET,
    bucket,
    cache_room,
    check_context,
    check_contexts,
    check_prompts,
    check_taps,
    check_whole,
    default_room,
    pack,
    pack_stop_ids,
    pack_units,
)
from jaxfw.models import DecoderConfig, Edit
from jaxfw.models.cache import Cache, CachePolicy, FullCache
from jaxfw.models.routing import Experts, Router
from jaxfw.ops.sampling import Sampling

__all__ = [
    "CACHE_STREAM", "CHUNK", "SHORTEST_BUCKET", "Decoding", "Generation", "Prefix", "bucket", "decode", "default_room",
    "extend", "generate", "prefill", "read_prefix",
]  # fmt: skip

# Called with each chunk of new ids, -1 where a row is done; rows for which it returns True end with that chunk.
OnTokens = Callable[[Int[np.ndarray, "B n"]], Bool[np.ndarray, "B"] | None]


@dataclasses.dataclass(frozen=True)
class Generation:
    """What was generated, a row a prompt; with n samples a prompt, row b * n + j is sample j of prompt b.

    Attributes:
        tokens: new ids, the stop id included.
        stopped: rows that met a stop id, or that `on_tokens` ended.
        prefill_seconds: until the first token was there.
        decode_seconds: of all others.
        logprobs: of each token, float32, in the model's own distribution: before penalty, temperature and filters.
            None unless asked for.
    """

    tokens: tuple[tuple[int, ...], ...]
    stopped: tuple[bool, ...]
    prefill_seconds: float
    decode_seconds: float
    logprobs: tuple[Float[np.ndarray, "n"], ...] | None = None


def generate(
    config: DecoderConfig,
    params: PyTree,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    sampling: Sampling | None = None,
    key: PRNGKeyArray | None = None,
    n: int = 1,
    logprobs: bool = False,
    prefix: Prefix | None = None,
    policy: CachePolicy | None = None,
    room: int | None = None,
    unit_ids: Sequence[Sequence[int]] | None = None,
    contexts: Sequence[int] | None = None,
    refeed: bool = False,
    router: Router | None = None,
    experts: Experts | None = None,
    router_states: PyTree | None = None,
    taps: Sequence[Edit] = (),
    on_tokens: OnTokens | None = None,
) -> Generation:
    """Continue each prompt by up to `max_new_tokens` tokens.

    Args:
        config: the model.
        params: its parameters.
        prompts: token ids, of any lengths.
        max_new_tokens: at most this many a row.
        stop_ids: a row ends with the first of these that it draws.
        sampling: how to choose tokens; None is greedy. A repetition penalty holds for prefix, prompt and output.
        key: row b draws with `fold_in(key, b)`; None is key 0. Or a key a row, of shape [B].
        n: samples of each prompt, which is read once. The first is what n=1 draws; none depends on other rows.
        logprobs: return the log-probability of each new token.
        prefix: what all prompts go on from, as `read_prefix` gives it; the prompts may then be empty.
        policy: what the cache keeps; None keeps everything.
        room: slots of the cache, at least prompt + new. Calls with equal `room` and batch size share one compiled
            decode loop, and one compiled prefill for each bucket of prompts. None takes `default_room`, a function
            of the longest prompt's bucket and `max_new_tokens`; give one `room` to share the loop between buckets.
        unit_ids: which unit (a shot, a sentence) each token of each prompt belongs to, -1 for none: for policies that
            keep whole units.
        contexts: so many first tokens of each prompt are its context: the cache is made from them alone, and the rest
            is read through it. None reads each prompt at once.
        refeed: the last token of each prompt is read once more, through the cache, for the first new one. Without it,
            that one is drawn before a policy has forgotten anything.
        router: who decides which experts a token goes to; None is the config's.
        experts: who runs them; None is `Sorted()`.
        router_states: what the routers remember of training, as `Output.state` holds it; generation does not move it.
        taps: edits of the prompt and of every new token, by true positions (steering, ablation).
        on_tokens: called on the host with each chunk of new ids; -1 where a row is done. It may return which rows end
            with this chunk, booleans [B].

    Raises:
        InputError: an empty prompt, an id outside the vocabulary, more tokens than positions or `room`, a tap that is
            no edit or does not fit, a prefix of another model or policy, a context that is not part of its prompt.
        RunError: logits that are not finite.
    """
    new, n = check_whole("max_new_tokens", max_new_tokens), check_whole("n", n)
    sampling = _checked(sampling or Sampling(), n)
    if prefix:
        prefix.check(config, params, policy, room)
    longest = check_prompts(config, prompts, may_be_empty=prefix is not None)
    policy, room = prefix.policy if prefix else policy or FullCache(), _room(config, prefix, longest, new, room)
    check_taps(config, taps, len(prompts))
    units, stop = pack_units(unit_ids, prompts, bucket(longest)), pack_stop_ids(stop_ids)
    # A copy: the decode loop donates what it is given.
    keys = jnp.copy(row_keys(jax.random.key(0) if key is None else key, len(prompts)))
    values = {"router": router, "experts": experts, "router_states": router_states, "taps": tuple(taps)}
    seen = None
    if sampling.repetition_penalty is not None:
        seen = np.repeat(_seen_ids(config, prefix, prompts), n, axis=0)

    taken, started = _Taken(on_tokens), time.perf_counter()
    cache_keys = programs.cache_keys(keys)
    if prefix:
        logits, cache = prefix.extended(prompts, units=units, key=cache_keys, **values)
    else:
        options = {"policy": policy, "room": room, "new": new, "key": cache_keys, **values}
        logits, cache = read(config, params, prompts, contexts=contexts, refeed=refeed, units=units, **options)
    if n > 1:
        logits, cache = programs.take_rows(logits, cache, np.repeat(np.arange(len(prompts), dtype=np.int32), n))
        keys, cache_keys = programs.sample_keys(keys, cache_keys, n=n)
    state = programs.start(cache, logits, keys, cache_keys, sampling, stop, seen, with_logprobs=logprobs)
    del cache, logits  # the loop takes the cache's place
    state, drawn = taken.take(state, np.asarray(state.token)[:, None], 1), 1
    prefilled = time.perf_counter()
    while drawn < new and not np.asarray(state.is_done).all():
        limit = min(CHUNK, new - drawn)
        state, ids = decode(config, policy, params, state, sampling, stop, np.int32(limit), **values)
        state = taken.take(state, ids, limit)
        drawn += limit
    stopped = tuple(np.asarray(state.is_done).tolist())
    return Generation(taken.tokens(), stopped, prefilled - started, time.perf_counter() - prefilled, taken.logprobs())


def read(
    config: DecoderConfig,
    params: PyTree,
    prompts: Sequence[Sequence[int]],
    *,
    policy: CachePolicy,
    room: int,
    new: int,
    units: Any = None,
    contexts: Sequence[int] | None = None,
    refeed: bool = False,
    **values: Any,
) -> tuple[Float[Array, "B V"], Cache]:
    """The logits behind each prompt, and a cache with room for `new` tokens: the beginning of `generate`.

    `units` are packed as the prompts are, to the bucket of the longest.
    """
    if contexts is None:
        tokens, lengths = pack(prompts, bucket(max(map(len, prompts))))
        room = cache_room(policy, room, T=tokens.shape[1], new=new)
        logits, cache = prefill(config, params, tokens, lengths, policy=policy, room=room, unit_id=units, **values)
        if refeed:
            logits = reread(config, params, tokens, lengths, cache, policy=policy, **values)
        return logits, cache
    check_contexts(contexts, prompts)
    first = [prompt[:n] for prompt, n in zip(prompts, contexts, strict=True)]
    rest = [prompt[n:] for prompt, n in zip(prompts, contexts, strict=True)]
    more = bucket(max(map(len, rest)))
    tokens, lengths = pack(first, bucket(max(map(len, first))))
    room = max(room, tokens.shape[1] + more + new)
    units = None if units is None else units[:, : tokens.shape[1]]
    _, cache = prefill(config, params, tokens, lengths, policy=policy, room=room, unit_id=units, **values)
    tokens, lengths = pack(rest, more)
    return extend(config, params, tokens, lengths, cache, policy=policy, **values)


class _Taken:
    """What has come to the host so far."""

    def __init__(self, on_tokens: OnTokens | None):
        self._on_tokens, self._ids, self._logprobs = on_tokens, [], []

    def take(self, state: Decoding, ids: Any, count: int) -> Decoding:
        """Keep the first `count` new ids of each row and hand them to the caller, who may end rows."""
        if not bool(np.asarray(state.is_finite)):
            raise RunError(
                "the model's logits are NaN or infinite: its parameters are damaged, or too large for its dtype "
                "(load it with dtype='float32')."
            )
        self._ids.append(np.asarray(ids)[:, :count])
        if state.logprobs is not None:
            self._logprobs.append(np.asarray(state.logprobs)[:, :count])
        ended = self._on_tokens(self._ids[-1]) if self._on_tokens else None
        if ended is None or not np.any(ended):
            return state
        return dataclasses.replace(state, is_done=programs.end_rows(state.is_done, np.asarray(ended, bool)))

    def tokens(self) -> tuple[tuple[int, ...], ...]:
        """The ids of each row."""
        return tuple(tuple(id_ for id_ in row if id_ >= 0) for row in np.concatenate(self._ids, axis=1).tolist())

    def logprobs(self) -> tuple[Float[np.ndarray, "n"], ...] | None:
        """Their log-probabilities; None if they were not asked for."""
        if not self._logprobs:
            return None
        ids, values = np.concatenate(self._ids, axis=1), np.concatenate(self._logprobs, axis=1)
        return tuple(row[is_drawn] for row, is_drawn in zip(values, ids >= 0, strict=True))


def _checked(sampling: Sampling, n: int) -> Sampling:
    sampling.validate()
    if n > 1 and sampling.temperature is None:
        raise InputError(f"n={n} samples of greedy decoding would all be alike: give temperature, e.g. 1.0.")
    return sampling.typed()


def _room(config: DecoderConfig, prefix: Prefix | None, longest: int, new: int, room: int | None) -> int:
    if prefix:
        prefix.check_room(longest, new)
        return prefix.room
    check_context(config, longest, new)
    room = default_room(longest, new) if room is None else room
    if room < longest + new:
        raise InputError(f"room={room} is below prompt + new tokens = {longest} + {new}: raise room.")
    return room


def _seen_ids(config: DecoderConfig, prefix: Prefix | None, prompts: Sequence[Any]) -> Bool[np.ndarray, "B V"]:
    seen = np.zeros((len(prompts), config.vocab), bool)
    for row, prompt in zip(seen, prompts, strict=True):
        row[[*(prefix.tokens if prefix else ()), *prompt]] = True
    return seen
