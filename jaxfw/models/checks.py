"""Whether what a forward is given fits together: shapes and kinds, and of tokens that are not traced, their values."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxfw.core.errors import InputError
from jaxfw.core.shapes import PyTree
from jaxfw.models.decoder import attention_spec, default_router, router_states
from jaxfw.nn.config import DecoderConfig


def check_tokens(config: DecoderConfig, tokens: Any, lengths: Any, unit_id: Any, segment_ids: Any = None) -> None:
    """Raise an `InputError` unless these are integer arrays [B T], [B], [B T] and [B T]; the last three may be None.

    Tokens that are no traced values must be of the vocabulary: under jit, one beyond it makes the row's logits NaN.
    """
    if not isinstance(config, DecoderConfig):
        raise InputError(f"config={type(config).__name__} must be a DecoderConfig: forward(config, params, tokens).")
    _check_integers("tokens", tokens, None, "token ids [B T]; one row is tokens[None]")
    B, T = tokens.shape
    if not B * T:
        raise InputError(f"tokens has shape {tokens.shape}: give at least one token.")
    if not isinstance(tokens, Tracer):
        _check_vocabulary(config, tokens)
    if lengths is not None:
        _check_integers("lengths", lengths, (B,), f"a number of valid tokens for each of {B} rows")
    if unit_id is not None:
        _check_integers("unit_id", unit_id, (B, T), f"a number for each of the tokens [{B} {T}], -1 for none")
    if segment_ids is not None:
        _check_integers(
            "segment_ids", segment_ids, (B, T), f"a document's number for each of the tokens [{B} {T}], 0 for padding"
        )


def _check_vocabulary(config: DecoderConfig, tokens: Any) -> None:
    if isinstance(tokens, jax.Array) and not tokens.is_fully_addressable:
        return
    ids = np.asarray(tokens)  # also where a trace closes over them
    least, most = int(ids.min()), int(ids.max())
    if least < 0 or most >= config.vocab:
        odd = least if least < 0 else most
        raise InputError(
            f"tokens holds {odd}, the model's vocabulary 0 to {config.vocab - 1}: use the tokenizer of this model."
        )


def _check_integers(name: str, x: Any, shape: tuple[int, ...] | None, wanted: str) -> None:
    given = getattr(x, "shape", None)
    if given is None or not hasattr(x, "dtype"):
        raise InputError(f"{name}={x!r:.60} must be an array: give {wanted}.")
    fits = len(given) == 2 if shape is None else given == shape
    if not fits or not jnp.issubdtype(x.dtype, jnp.integer):
        raise InputError(f"{name} is {x.dtype} of shape {list(given)}: give integers, {wanted}.")


def check_layers(config: DecoderConfig, params: PyTree) -> None:
    """Raise an `InputError` unless the layers of `params` are as many, and of the kinds, that the config says."""
    kinds = [config.moe is not None and config.moe.is_in(i) for i in range(config.layers)]
    if "layers" in params:
        if len(set(kinds)) > 1 or ("moe" in params["layers"]) != kinds[0]:
            raise InputError(
                f"stacked layers are of one kind, config.moe={config.moe} says otherwise: see stack_layers."
            )
        if len({config.at(i) for i in range(config.layers)}) > 1:
            raise InputError(
                f"stacked layers are of one kind, but config.full_attention={config.full_attention} lifts the window "
                "of some: use unstacked parameters."
            )
        return
    for i, has_experts in enumerate(kinds):
        name = f"layers_{i}"
        if name not in params:
            raise InputError(f"params have no {name}, but config.layers={config.layers}: are they of another model?")
        if ("moe" in params[name]) != has_experts:
            held = "experts" if "moe" in params[name] else "a dense feed-forward"
            raise InputError(
                f"{name} holds {held}, config.moe={config.moe} says otherwise: give the params' own config."
            )


def check_cache(config: DecoderConfig, shape: tuple[int, ...], policy: Any, cache: Any, room: int | None) -> None:
    """Raise an `InputError` for what is no policy, for a cache of another policy or batch, for too little room."""
    (B, T), known = shape, "a value such as FullCache(), RingCache(1024) or Int8Cache()"
    if policy is None:
        if cache is not None:
            raise InputError("a cache is given without its policy: give the policy that made it, e.g. FullCache().")
        return
    if isinstance(policy, type) or not hasattr(policy, "extend"):
        raise InputError(f"policy={policy!r} is no cache policy: give {known}.")
    if cache is None:
        if room is not None and (not isinstance(room, int) or room < T):
            raise InputError(f"room={room!r} must be a whole number, of at least the prompt's {T} tokens with padding.")
        return
    if cache.seen.shape != (B,):
        raise InputError(f"the cache has {cache.seen.shape[0]} rows, the tokens {B}: see Cache.rows.")
    spec, dtype = attention_spec(config.at(0)), jnp.dtype(config.dtype)
    fresh = jax.eval_shape(lambda: policy.at(0).empty(B, spec=spec, prompt=T, new=1, dtype=dtype))
    if type(fresh) is not type(cache.layers[0]):
        raise InputError(f"a cache of {type(cache.layers[0]).__name__}s was not made by {policy!r}: give its policy.")


def check_packing(policy: Any, router: Any, taps: Any) -> None:
    """Raise an `InputError` for what would join the documents of a packed row, or cannot tell them apart."""
    if policy is not None:
        raise InputError(
            f"segment_ids cannot be given beside a cache (policy={policy!r}): a row of a cache is one document. "
            "Give each document a row of its own."
        )
    if not getattr(router, "is_causal", True):
        raise InputError(
            f"router={router!r} mixes the documents of a packed row, which segment_ids keep apart: give rows of one "
            "document each, or a router by which tokens choose."
        )
    for i, tap in enumerate(taps):
        if tap.pos is not None:
            raise InputError(
                f"taps[{i}].pos names true positions, which every document of a packed row has: leave out pos= or "
                "segment_ids=."
            )


def check_mixture(config: DecoderConfig, policy: Any, router: Any, experts: Any, state: PyTree | None) -> None:
    """Raise an `InputError` for a router, experts or a state that this model, or generation, must not take."""
    for name, value, known in (("router", router, "TokenChoice(2)"), ("experts", experts, "Sorted()")):
        if value is None:
            continue
        if isinstance(value, type) or not callable(value):
            raise InputError(f"{name}={value!r} is none: give a value such as {known} of jaxfw.models.routing.")
        if config.moe is None:
            raise InputError(f"{name}={value!r} is given, but config.moe is None: this model has no experts.")
    if config.moe is None:
        return
    router = router or default_router(config)
    k = getattr(router, "k", config.moe.per_token)
    if k != config.moe.per_token:
        raise InputError(f"router.k={k} and model.moe.per_token={config.moe.per_token} differ: set both alike.")
    _check_state(config, router, policy, state)
    if not getattr(router, "is_causal", True) and (policy is not None or not config.moe.allow_noncausal):
        raise InputError(
            f"router={router!r} looks at later tokens, which a language model must not: "
            + ("it cannot run beside a cache." if policy else "set model.moe.allow_noncausal=True to allow it.")
        )
    if policy is not None and getattr(experts, "capacity", None) is not None:
        raise InputError(
            f"experts={experts!r} drop what exceeds their capacity, but generation is dropless: a row would depend on "
            "its neighbours. Give experts with capacity=None beside a cache."
        )


def _check_state(config: DecoderConfig, router: Any, policy: Any, state: PyTree | None) -> None:
    remembers = set(router_states(config, router))
    if state and set(state) != remembers:
        raise InputError(
            f"state has {', '.join(sorted(state))}, but {router!r} remembers {', '.join(sorted(remembers)) or None}: "
            "give what router_states(config, router) or a forward gave."
        )
    if policy is not None and remembers and not state:
        raise InputError(
            f"{router!r} remembers what it learned in training: beside a cache, give that too, as state= "
            "(of generate: router_states=)."
        )
