"""H2O: the attention that a token has received from all queries so far (arXiv:2306.14048)."""

import dataclasses

import jax.numpy as jnp

from jaxfw.core.errors import InputError
from jaxfw.core.shapes import Array, Float
from jaxfw.kv.scorers.base import Context, Scores, rows_mass


@dataclasses.dataclass(frozen=True)
class HeavyHitters:
    """Summed attention over all queries; a `recent` share of the budget goes to the newest tokens.

    With `normalise`, a sum is divided by the number of queries that could see the token, as in kvpress. Later tokens
    have been seen by fewer: the two order tokens differently.
    """

    recent: float = 0.5
    normalise: bool = False

    def __post_init__(self):
        if not 0 <= self.recent <= 1:
            raise InputError(f"recent={self.recent} must lie in [0, 1]: the newest tokens' share of the budget.")

    def __call__(self, c: Context) -> Scores:
        mass = column_mass(c)
        if self.normalise:
            mass = mass / jnp.maximum(c.step.lengths[:, None] - c.positions, 1)[:, None]
        newest = jnp.floor(c.budget * self.recent + 1e-6).astype(jnp.int32)
        return Scores(mass, c.newest(newest))


def column_mass(c: Context) -> Float[Array, "B K T"]:
    """Attention weights of all valid queries on each key, summed over queries, averaged over the heads of a group."""
    return jnp.mean(rows_mass(c, c.qkv.q, jnp.where(c.step.valid, c.positions, -1)), axis=2)
