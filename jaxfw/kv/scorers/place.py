"""Choices that look at no key: by place, and by chance."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxfw.core.errors import InputError
from jaxfw.core.keys import fold
from jaxfw.core.shapes import Array, Float, Int, PRNGKeyArray
from jaxfw.kv.scorers.base import Context, Scores, wide
from jaxfw.models.cache import Step


@dataclasses.dataclass(frozen=True)
class Sinks:
    """StreamingLLM (arXiv:2309.17453): the first `sinks` tokens and the newest."""

    sinks: int = 4

    def __post_init__(self):
        if self.sinks < 0:
            raise InputError(f"sinks={self.sinks} must be 0 or more first tokens.")

    def __call__(self, c: Context) -> Scores:
        # The first tokens beat the newest, but for one.
        sinks = jnp.minimum(self.sinks, c.budget - 1)[:, None]
        value = jnp.where(c.positions < sinks, len(c.positions) + self.sinks - c.positions, c.positions)
        return Scores(wide(value)[:, None])


@dataclasses.dataclass(frozen=True)
class Random:
    """Uniform draws, one for each layer, head and token."""

    def __call__(self, c: Context) -> Scores:
        keys = fold(_keys(c), c.step.layer)
        return Scores(jnp.swapaxes(_draws(keys, c.step.positions, c.spec.kv_heads), 1, 2))


@dataclasses.dataclass(frozen=True)
class RandomUnits:
    """Uniform draws, one for each unit of a row, the same in all layers: what choosing units by attention is worth."""

    def __call__(self, c: Context) -> Scores:
        return Scores(jnp.swapaxes(_draws(_keys(c), units_of(c.step), 1), 1, 2))


@dataclasses.dataclass(frozen=True)
class FirstUnits:
    """Units in the order of their numbers: an oracle, where the caller numbers those that matter first."""

    def __call__(self, c: Context) -> Scores:
        return Scores(-wide(units_of(c.step))[:, None])


def units_of(step: Step) -> Int[Array, "B T"]:
    """The unit of each token.

    Raises:
        InputError: there are none.
    """
    if step.unit_id is None:
        raise InputError(
            "this method keeps whole units (shots, lines, sentences), and the prompt came without any: give units= to "
            "LM.generate, unit_ids= to generate_tokens, unit_id= to forward."
        )
    return step.unit_id


def _keys(c: Context) -> PRNGKeyArray:
    if c.step.key is None:
        raise InputError("this method draws which tokens stay: give a key, e.g. key=jax.random.key(0).")
    return c.step.key


def _draws(keys: PRNGKeyArray, numbers: Array, K: int) -> Float[Array, "B T K"]:
    """A row of K draws for each number, from the row's key and that number alone."""

    def draw(key, number):
        return jax.random.uniform(jax.random.fold_in(key, number), (K,))

    return jax.vmap(jax.vmap(draw, in_axes=(None, 0)))(keys, numbers)
