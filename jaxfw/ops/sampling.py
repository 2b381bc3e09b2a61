"""Choosing the next token from logits: temperature, top-k, top-p, min-p, a key per row.

The filters run in the order of transformers (temperature, top-k, top-p, min-p), each on what the one before left.
A filter keeps every token whose logit ties with the last one that it keeps.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxfw.core.errors import InputError
from jaxfw.core.shapes import Array, Float, Int, PRNGKeyArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to choose a token. `temperature` None is greedy; a filter that is None is off and costs nothing.

    A pytree: other values do not recompile, another set of filters does.
    """

    temperature: Any = None
    top_k: Any = None
    top_p: Any = None
    min_p: Any = None

    def validate(self) -> None:
        """Raise an `InputError` for a value outside its range (host values only)."""
        accepted = {
            "temperature": (self.temperature, lambda x: x > 0, "above 0 (leave it out for greedy decoding)"),
            "top_k": (self.top_k, lambda x: x >= 1 and x == int(x), "a whole number from 1 on"),
            "top_p": (self.top_p, lambda x: 0 < x <= 1, "in (0, 1]"),
            "min_p": (self.min_p, lambda x: 0 <= x <= 1, "in [0, 1]"),
        }
        for name, (value, fits, range_) in accepted.items():
            if value is not None and not (isinstance(value, int | float | np.number) and fits(value)):
                raise InputError(f"{name}={value!r} must be {range_}.")
        if self.temperature is None and (self.top_k, self.top_p, self.min_p) != (None, None, None):
            raise InputError("top_k, top_p and min_p filter random draws: give temperature as well, e.g. 1.0.")


def filter_logits(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Scale by the temperature and set the logits that the filters drop to -inf, float32.

    >>> filter_logits(jnp.array([[0.0, 2.0, 1.0]]), Sampling(temperature=1.0, top_k=2)).tolist()
    [[-inf, 2.0, 1.0]]
    """
    logits = logits.astype(jnp.float32) / sampling.temperature
    if sampling.top_k is not None or sampling.top_p is not None:
        descending = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
        if sampling.top_k is not None:
            rank = jnp.minimum(sampling.top_k, logits.shape[-1]) - 1
            smallest = jnp.take(descending, rank, axis=-1)[:, None]
            logits = jnp.where(logits < smallest, -jnp.inf, logits)
            descending = jnp.where(descending < smallest, -jnp.inf, descending)
        if sampling.top_p is not None:
            probs = jax.nn.softmax(descending, axis=-1)
            # The mass above a token decides: the token that crosses top_p is kept, and so the first always is.
            # Rounding lets the sum reach 1 before the last tokens: at top_p = 1 all are kept whatever it says.
            kept = (jnp.cumsum(probs, axis=-1) - probs < sampling.top_p) | (sampling.top_p >= 1)
            smallest = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)
            logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if sampling.min_p is not None:
        probs = jax.nn.softmax(logits, axis=-1)
        floor = sampling.min_p * jnp.max(probs, axis=-1, keepdims=True)
        logits = jnp.where(probs < floor, -jnp.inf, logits)
    return logits


def sample(
    logits: Float[Array, "B V"], sampling: Sampling, keys: PRNGKeyArray, *, step: Int[Array, ""] | int = 0
) -> Int[Array, "B"]:
    """One token a row: the largest logit, or a draw with the row's own key folded with `step`.

    A row draws the same tokens alone and in any batch.
    """
    if sampling.temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = filter_logits(logits, sampling)
    return jax.vmap(lambda key, row: jax.random.categorical(jax.random.fold_in(key, step), row))(keys, logits).astype(
        jnp.int32
    )
