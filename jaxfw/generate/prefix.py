"""A beginning that many prompts share, read once: its tokens, and the cache behind them as a value."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxfw.core.errors import InputError
from jaxfw.core.keys import row_keys
from jaxfw.core.shapes import Array, Float, PRNGKeyArray, PyTree
from jaxfw.generate import programs
from jaxfw.generate.prompts import (
    SHORTEST_BUCKET,
    bucket,
    cache_room,
    check_context,
    check_prompts,
    check_taps,
    default_room,
    pack,
    pack_units,
)
from jaxfw.models import DecoderConfig
from jaxfw.models.cache import Cache, CachePolicy, FullCache

SPARE_ROOM = 512  # for what follows a prefix, where no room is given


@dataclasses.dataclass(frozen=True, eq=False)
class Prefix:
    """Tokens that were read, the cache of one row behind them, and the logits of what may come next.

    It is never changed: any number of prompts can go on from it, in any batch. It holds on to the parameters that read
    it, and is refused beside others. `room` is what prefix, prompt and new tokens may come to; `text` is what the
    tokens were encoded from, where they were.
    """

    tokens: tuple[int, ...] = dataclasses.field(repr=False)
    room: int
    policy: CachePolicy
    cache: Cache = dataclasses.field(repr=False)
    logits: Float[Array, "1 V"] = dataclasses.field(repr=False)
    config: DecoderConfig = dataclasses.field(repr=False)
    params: PyTree = dataclasses.field(repr=False)
    text: str = ""

    def check(
        self, config: DecoderConfig, params: PyTree, policy: CachePolicy | None = None, room: int | None = None
    ) -> None:
        """Raise an `InputError` unless this was read by the same model and policy, and `room` was left open."""
        pairs = zip(jax.tree.leaves(self.params), jax.tree.leaves(params), strict=False)
        if self.config != config or not all(mine is theirs for mine, theirs in pairs):
            raise InputError("the prefix was read by another model, or with other parameters: read it with this one.")
        if policy not in (None, self.policy):
            raise InputError(f"the prefix was read with policy={self.policy!r}, not {policy!r}: leave out policy=.")
        if room is not None:
            raise InputError(f"room={room} is given beside a prefix, whose cache has room={self.room}: give it there.")

    def check_room(self, longest: int, new: int) -> None:
        """Raise an `InputError` if a prompt of `longest` tokens and `new` ones do not fit behind the prefix."""
        check_context(self.config, len(self.tokens) + longest, new)
        if len(self.tokens) + longest + new > self.room:
            raise InputError(
                f"the prefix has room={self.room}, below prefix + prompt + new tokens = "
                f"{len(self.tokens)} + {longest} + {new}: read it with more room=."
            )

    def extended(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        units: Any = None,
        key: PRNGKeyArray | None = None,
        **values: Any,
    ) -> tuple[Float[Array, "B V"], Cache]:
        """The logits behind prefix and prompt, a row a prompt, and the cache: what a prefill of both would give."""
        logits, cache = programs.take_rows(self.logits, self.cache, np.zeros(len(prompts), np.int32))
        longest = max(len(prompt) for prompt in prompts)
        if not longest:
            return logits, cache
        tokens, lengths = pack(prompts, bucket(longest))
        new, cache = programs.extend(
            self.config, self.params, tokens, lengths, cache, policy=self.policy, unit_id=units, key=key, **values
        )
        return programs.fill_logits(new, lengths, logits), cache


def read_prefix(
    config: DecoderConfig,
    params: PyTree,
    tokens: Sequence[int],
    *,
    room: int | None = None,
    policy: CachePolicy | None = None,
    unit_ids: Sequence[int] | None = None,
    key: PRNGKeyArray | None = None,
    text: str = "",
    refeed: bool = False,
    **values: Any,
) -> Prefix:
    """Read tokens that prompts will share.

    Args:
        config: the model.
        params: its parameters.
        tokens: ids, at least one.
        room: slots of the cache for prefix, prompt and new tokens together; None leaves 512 or more behind the prefix.
        policy: what the cache keeps; None keeps everything. One that evicts does so behind the prefix, before it sees
            a prompt: that is another text than prefix and prompt read at once.
        unit_ids: the unit of each token, -1 for none.
        key: for policies that draw; None is key 0.
        text: what the tokens were encoded from.
        refeed: the last token is read once more, through the cache: see `generate`.
        values: router, experts, router_states and taps, as in `generate`; give the same to what continues it.

    Raises:
        InputError: no tokens, ids outside the vocabulary, more tokens than positions or `room`.
    """
    policy, size = policy or FullCache(), check_prompts(config, [tokens])
    check_context(config, size, 1)
    keeps_part = getattr(policy, "keeps_part", False)
    if room is None:
        room = size + SPARE_ROOM if keeps_part else default_room(size, SPARE_ROOM)
    if not isinstance(room, int | np.integer) or room <= size:
        raise InputError(f"room={room!r} must be a whole number above the prefix's {size} tokens: raise room.")
    check_taps(config, values.get("taps", ()), 1)
    keys = programs.cache_keys(row_keys(jax.random.key(0) if key is None else key, 1))
    packed, lengths = pack([tokens], bucket(size))
    units = pack_units(None if unit_ids is None else [unit_ids], [tokens], bucket(size))
    new = -(-(int(room) - size) // SHORTEST_BUCKET) * SHORTEST_BUCKET
    slots = cache_room(policy, int(room), T=bucket(size), new=new)
    logits, cache = programs.prefill(
        config, params, packed, lengths, policy=policy, room=slots, unit_id=units, key=keys, **values,
    )  # fmt: skip
    if refeed:
        logits = programs.reread(config, params, packed, lengths, cache, policy=policy, key=keys, **values)
    return Prefix(tuple(map(int, tokens)), int(room), policy, cache, logits, config, params, text)
