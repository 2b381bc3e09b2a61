"""What a prompt's last queries look at."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from jaxfw.core.errors import InputError, unknown
from jaxfw.core.shapes import Array, Float
from jaxfw.kv.scorers.base import Context, Scores, last_mass

POOLS = ("avg", "max")


@dataclasses.dataclass(frozen=True)
class SnapKV:
    """SnapKV (arXiv:2404.14469): attention of the last `w` queries, smoothed over `kernel` neighbours; these `w` stay.

    Pooling is done per query head, before heads of a group are averaged, as in kvpress.
    """

    w: int = 32
    kernel: int = 5
    pool: Literal["avg", "max"] = "avg"

    def __post_init__(self):
        check_window(self.w)
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise InputError(f"kernel={self.kernel} must be an odd number of tokens from 1 on.")
        if self.pool not in POOLS:
            raise unknown("pool", self.pool, POOLS)

    def __call__(self, c: Context) -> Scores:
        protected = c.newest(self.w)
        rows = jnp.maximum(jnp.minimum(c.step.lengths, self.w), 1)[:, None, None, None]
        seen = last_mass(c, self.w) / rows
        seen = jnp.where(protected[:, None, None], 0, seen)
        return Scores(jnp.mean(self._pooled(seen), axis=2), protected)

    def _pooled(self, x: Float[Array, "B K G T"]) -> Float[Array, "B K G T"]:
        if self.pool == "max":
            start, combine, divisor = -jnp.inf, jax.lax.max, 1
        else:
            start, combine, divisor = 0.0, jax.lax.add, self.kernel
        shape = (1, 1, 1, self.kernel)
        return jax.lax.reduce_window(x, jnp.asarray(start, x.dtype), combine, shape, (1,) * 4, "SAME") / divisor


@dataclasses.dataclass(frozen=True)
class LastQuery:
    """TOVA (arXiv:2401.06104): the attention of the last query, averaged over all heads; one choice for all of them.

    The last token stays, as in kvpress.
    """

    def __call__(self, c: Context) -> Scores:
        return Scores(jnp.mean(last_mass(c, 1), axis=(1, 2))[:, None], c.newest(1))


@dataclasses.dataclass(frozen=True)
class QuestionMass:
    """ShotKV (arXiv:2502.01941, eq. 2-4): the attention of the last `w` queries, summed over heads.

    Only queries behind the last unit count, where anything follows it: the question, not the shots.
    AMBIGUOUS: the paper does not say how many queries "accumulate"; `w`=32 is SnapKV's.
    """

    w: int = 32

    def __post_init__(self):
        check_window(self.w)

    def __call__(self, c: Context) -> Scores:
        return Scores(jnp.sum(last_mass(c, self.w, begin=c.suffix), axis=(1, 2))[:, None])


def check_window(w: int) -> None:
    """Raise an `InputError` unless `w` is a number of queries."""
    if w < 1:
        raise InputError(f"w={w} must be at least 1: the number of last queries that score the prompt.")
