"""Token ids of many lengths as arrays of few shapes, and what of them cannot be run."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxfw.core.errors import InputError
from jaxfw.core.shapes import Int
from jaxfw.models import DecoderConfig, Edit
from jaxfw.models.cache import CachePolicy
from jaxfw.models.taps import validate

SHORTEST_BUCKET = 32
STOP_IDS = 8  # stop ids are padded to a multiple of this: their number does not recompile


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


def cache_room(policy: CachePolicy, room: int, *, T: int, new: int) -> int:
    """Slots to ask a policy for: a prompt padded to T and `new` more tokens are to fit.

    One that keeps a part of the prompt (`keeps_part`) counts what may follow from the padded width on.
    """
    return max(room, T + new) if getattr(policy, "keeps_part", False) else max(room, T)


def pack(rows: Sequence[Sequence[int]], T: int, *, spare: int = 0) -> tuple[Any, Any]:
    """Rows [B T] side by side, each from slot 0 on with `spare` behind it, and their lengths [B].

    They are arrays of the host, which a jitted function on a mesh of several processes takes where each has the same.

    >>> pack([[5], [6, 7]], 3)[0].tolist()
    [[5, 0, 0], [6, 7, 0]]
    """
    out = np.full((len(rows), T), spare, np.int32)
    for row, given in zip(out, rows, strict=True):
        row[: len(given)] = given
    return out, np.asarray([len(given) for given in rows], np.int32)


def pack_units(unit_ids: Sequence[Sequence[int]] | None, prompts: Sequence[Sequence[int]], T: int) -> Any:
    """The numbers of units [B T], -1 behind them; None for None.

    Raises:
        InputError: they are not as many as the prompts' tokens, or no numbers of units.
    """
    if unit_ids is None:
        return None
    sizes, wanted = [len(row) for row in unit_ids], [len(prompt) for prompt in prompts]
    if sizes != wanted:
        raise InputError(f"unit_ids have {sizes} numbers a row, the prompts {wanted} tokens: give one for each token.")
    for i, row in enumerate(unit_ids):
        if min(row, default=0) < -1 or max(row, default=-1) >= len(row):
            raise InputError(
                f"unit_ids[{i}] holds {min(row) if min(row) < -1 else max(row)}: units are numbered from 0 on, fewer "
                f"than the row's {len(row)} tokens, and -1 is for tokens of none."
            )
    return pack(unit_ids, T, spare=-1)[0]


def pack_stop_ids(stop_ids: Sequence[int]) -> Int[np.ndarray, "n"]:
    """The ids, without repeats, padded by -1 to a multiple of 8.

    Raises:
        InputError: one is no whole number.
    """
    if isinstance(stop_ids, str) or not all(isinstance(id_, int | np.integer) for id_ in stop_ids):
        raise InputError(f"stop_ids={stop_ids!r:.80} must be token ids; texts that stop are LM.generate's stop=.")
    ids = sorted(set(stop_ids))
    return np.asarray(ids + [-1] * (-len(ids) % STOP_IDS or STOP_IDS * (not ids)), np.int32)


def check_whole(name: str, value: object) -> int:
    """`value` as an int.

    Raises:
        InputError: it is no whole number, or below 1.
    """
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name}={value!r} must be at least 1, a whole number.")
    return int(value)


def check_prompts(config: DecoderConfig, prompts: Sequence[Sequence[int]], *, may_be_empty: bool = False) -> int:
    """The longest prompt's length.

    Raises:
        InputError: no prompts, an empty one, or an id that is none of the model's.
    """
    if not len(prompts):
        raise InputError("prompts is empty: give at least one.")
    if isinstance(prompts, str):
        raise InputError(f"prompts={prompts!r:.60} {_LIST}")
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, int | np.integer | str):
            raise InputError(f"prompts[{i}]={prompt!r:.60} {_LIST}")
        if len(prompt):
            _check_ids(config, prompt, f"prompt {i}")
        elif not may_be_empty:
            raise InputError(f"prompt {i} is empty: give at least one token (the beginning-of-text id will do).")
    return max(len(prompt) for prompt in prompts)


_LIST = "must be a list of token ids: prompts is a list of such lists."


def _check_ids(config: DecoderConfig, ids: Sequence[int], name: str) -> None:
    if not np.issubdtype(np.asarray(ids).dtype, np.integer):
        raise InputError(f"{name} is {list(ids)!r:.60}: token ids are whole numbers.")
    low, high = min(ids), max(ids)
    if low < 0 or high >= config.vocab:
        raise InputError(
            f"{name} holds token id {low if low < 0 else high}, outside the model's vocabulary of "
            f"{config.vocab}: is this the model's own tokenizer?"
        )


def check_context(config: DecoderConfig, prompt: int, new: int) -> None:
    """Raise an `InputError` if `prompt` tokens (a prefix among them) and `new` ones exceed the model's positions."""
    if prompt + new > config.context:
        raise InputError(
            f"prompt + new tokens = {prompt} + {new} exceed the model's {config.context} positions: "
            "shorten the prompt or lower max_new_tokens."
        )


def check_contexts(contexts: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
    """Raise an `InputError` unless each prompt has a context, and something behind it."""
    if len(contexts) != len(prompts):
        raise InputError(f"contexts has {len(contexts)} lengths for {len(prompts)} prompts: give one for each.")
    for i, (n, prompt) in enumerate(zip(contexts, prompts, strict=True)):
        if not isinstance(n, int | np.integer) or not 0 <= n < len(prompt):
            raise InputError(
                f"contexts[{i}]={n!r} must be a number of tokens from 0 to {len(prompt) - 1}: something of the prompt "
                "has to be read behind its context."
            )


def check_taps(config: DecoderConfig, taps: Sequence[Edit], B: int) -> None:
    """Edits that hold for prompts of any length and for single tokens: values without an axis of T."""
    for i, tap in enumerate(taps):
        if not isinstance(tap, Edit):
            raise InputError(f"taps[{i}]={tap!r:.80} must be an Edit: what generation returns is tokens.")
    validate(config, taps, B, 1)
