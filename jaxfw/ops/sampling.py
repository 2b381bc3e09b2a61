"""Choosing the next token from logits: repetition penalty, temperature, top-k, top-p, min-p, a key per row.

They run in the order of transformers (penalty, temperature, top-k, top-p, min-p), each on what the one before left.
A filter keeps every token whose logit ties with the last one that it keeps.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxfw.core.errors import InputError
from jaxfw.core.shapes import Array, Bool, Float, Int, PRNGKeyArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to choose a token. `temperature` None is greedy; what is None is off and costs nothing.

    `repetition_penalty` holds for greedy decoding too. A pytree: other values do not recompile, another set of filters
    does.
    """

    temperature: Any = None
    top_k: Any = None
    top_p: Any = None
    min_p: Any = None
    repetition_penalty: Any = None

    def validate(self) -> None:
        """Raise an `InputError` for a value outside its range (host values only)."""
        accepted = {
            "temperature": (self.temperature, lambda x: x > 0, "above 0 (leave it out for greedy decoding)"),
            "top_k": (self.top_k, lambda x: x >= 1 and x == int(x), "a whole number from 1 on"),
            "top_p": (self.top_p, lambda x: 0 < x <= 1, "in (0, 1]"),
            "min_p": (self.min_p, lambda x: 0 <= x <= 1, "in [0, 1]"),
            "repetition_penalty": (
                self.repetition_penalty,
                lambda x: 0 < x < math.inf,
                "above 0 (1 changes nothing, more avoids repeats)",
            ),
        }
        for name, (value, fits, range_) in accepted.items():
            if value is not None and not (isinstance(value, int | float | np.number) and fits(value)):
                raise InputError(f"{name}={value!r} must be {range_}.")
        if self.temperature is None and (self.top_k, self.top_p, self.min_p) != (None, None, None):
            raise InputError("top_k, top_p and min_p filter random draws: give temperature as well, e.g. 1.0.")

    def typed(self) -> "Sampling":
        """The same with one dtype a field, so that 1 and 1.0 share a program (host values only)."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        dtypes = {name: np.int32 if name == "top_k" else np.float32 for name in values}
        return Sampling(**{name: None if x is None else dtypes[name](x) for name, x in values.items()})


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


def penalise(logits: Float[Array, "B V"], penalty: Any, seen: Bool[Array, "B V"]) -> Float[Array, "B V"]:
    """Make the tokens that were `seen` less likely (penalty > 1): positive logits divided, others multiplied; float32.

    Keskar et al. 2019 (CTRL), section 4.1, with the sign as in transformers.

    >>> penalise(jnp.array([[3.0, -1.0, 3.0]]), 1.5, jnp.array([[True, True, False]])).tolist()
    [[2.0, -1.5, 3.0]]
    """
    logits = logits.astype(jnp.float32)
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def sample(
    logits: Float[Array, "B V"],
    sampling: Sampling,
    keys: PRNGKeyArray,
    *,
    step: Int[Array, ""] | int = 0,
    seen: Bool[Array, "B V"] | None = None,
) -> Int[Array, "B"]:
    """One token a row: the largest logit, or a draw with the row's own key folded with `step`.

    A row draws the same tokens alone and in any batch. `seen` are the ids that a repetition penalty holds for.

    Raises:
        InputError: there is a repetition penalty, and `seen` is None.
    """
    if sampling.repetition_penalty is not None:
        if seen is None:
            raise InputError("a repetition penalty needs the ids that were seen: give seen=, booleans [B V].")
        logits = penalise(logits, sampling.repetition_penalty, seen)
    if sampling.temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = filter_logits(logits, sampling)
    return jax.vmap(lambda key, row: jax.random.categorical(jax.random.fold_in(key, step), row))(keys, logits).astype(
        jnp.int32
    )
