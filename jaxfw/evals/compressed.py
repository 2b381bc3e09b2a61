"""How likely texts are behind prompts whose cache was compressed: what a single forward could never show."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxfw.core.keys import row_keys
from jaxfw.core.mesh import constrain
from jaxfw.core.shapes import Array, Bool, Float, Int, PRNGKeyArray, PyTree
from jaxfw.generate import engine, programs
from jaxfw.generate.compression import reading
from jaxfw.generate.prompts import bucket, default_room, pack_units
from jaxfw.models import DecoderConfig, embed, first_step, head, trunk
from jaxfw.models.cache import Cache, CachePolicy
from jaxfw.ops.losses import token_log_probs


def score_texts(
    config: DecoderConfig,
    params: PyTree,
    contexts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[Sequence[int]]],
    *,
    policy: CachePolicy,
    protocol: str,
    unit_ids: Sequence[Sequence[int]] | None,
) -> tuple[Float[np.ndarray, "B M n"], Bool[np.ndarray, "B M n"]]:
    """Log-probability of each token of up to M texts behind each context, and whether nothing is likelier.

    A context is read and compressed once; every text is read through its cache, which stays as it is. M and n are
    powers of two; entries beyond a text mean nothing.
    """
    B, M = len(contexts), _power(max(map(len, texts)))
    n = _power(max(len(text) for row in texts for text in row))
    targets = np.zeros((B, M, n), np.int32)
    for place, row in enumerate(texts):
        for m, text in enumerate(row):
            targets[place, m, : len(text)] = text
    T = bucket(max(map(len, contexts)))
    key = programs.cache_keys(row_keys(jax.random.key(0), B))
    read = reading(protocol, unit_ids)
    logits, cache = engine.read(
        config, params, contexts, policy=policy, room=default_room(T, n), new=n, key=key,
        units=pack_units(unit_ids, contexts, T), contexts=read["contexts"], refeed=read["refeed"],
    )  # fmt: skip
    scores, best = _behind(config, policy, params, cache, logits, targets, key)
    return np.asarray(scores), np.asarray(best)


@functools.partial(jax.jit, static_argnames=("config", "policy"))
def _behind(
    config: DecoderConfig,
    policy: CachePolicy,
    params: PyTree,
    cache: Cache,
    logits: Float[Array, "B V"],
    targets: Int[Array, "B M n"],
    key: PRNGKeyArray,
) -> tuple[Float[Array, "B M n"], Bool[Array, "B M n"]]:
    B, M, n = targets.shape

    def score(text: Int[Array, "B n"]) -> tuple[Array, Array]:
        found = logits[:, None]
        if n > 1:
            step = first_step(jnp.full(B, n - 1, jnp.int32), n - 1)
            positions = step.positions + cache.seen[:, None]
            step = dataclasses.replace(step, positions=positions, tokens=text[:, :-1], key=key)
            x = embed(config, params, text[:, :-1], positions=step.positions)
            x = trunk(config, params, x, step, policy=policy, cache=cache, write=False).x
            found = jnp.concatenate([found, head(config, params, x)], axis=1)
        return token_log_probs(found, text), jnp.argmax(found, axis=-1) == text

    scores, best = (jnp.swapaxes(x, 0, 1) for x in jax.lax.map(score, jnp.swapaxes(targets, 0, 1)))
    return constrain(scores, None, None, None), constrain(best, None, None, None)


def _power(count: int) -> int:
    return 1 << (count - 1).bit_length()
