"""How the heads of a layer share its budget: the same for all, or as much as each one's scores deserve."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxfw.core.errors import InputError
from jaxfw.core.shapes import Array, Bool, Int
from jaxfw.kv.scorers.base import Scores
from jaxfw.kv.selection import highest, marked
from jaxfw.models.cache import Step


@dataclasses.dataclass(frozen=True)
class Even:
    """As many tokens in every head: the granularity chooses them."""

    def least(self, C: int) -> int:
        """Tokens that each head keeps at least, of C in the mean: as many."""
        return C


@dataclasses.dataclass(frozen=True)
class Ada:
    """Ada-KV (arXiv:2407.11550): the highest scores of all heads of a layer stay, whichever heads they are in.

    Each head keeps at least the `floor` share of an even budget. With heads cut over R devices, those of a device share
    its part of the budget.
    """

    floor: float = 0.2

    def __post_init__(self):
        if not 0 <= self.floor <= 1:
            raise InputError(f"floor={self.floor} must lie in [0, 1]: the share of an even budget of each head.")

    def least(self, C: int) -> int:
        """Tokens that each head keeps at least, of C in the mean."""
        return max(1, int(C * self.floor)) if self.floor else 0

    def choose(self, scores: Scores, step: Step, budget: Int[Array, "B"], R: int) -> Bool[Array, "B K T"]:
        """What each head keeps anyway, then protected tokens, then by score; a tie goes to the lower head."""
        B, K, T = scores.value.shape
        each = K // R
        # 1e-6: float32's products of whole numbers and decimal shares, which double precision would round down alike.
        least = jnp.floor(budget * self.floor + 1e-6).astype(jnp.int32)
        least = jnp.minimum(jnp.maximum(least, 1), budget) if self.floor else jnp.zeros_like(budget)
        is_safe = marked(highest(scores.value, scores.protected, step.lengths, least, T), T)
        protected = jnp.zeros((B, 1, T), bool) if scores.protected is None else scores.protected[:, None]
        position = jnp.arange(T, dtype=jnp.int32)
        kind = jnp.where(is_safe, 0, jnp.where(protected, 1, 2))
        kind = jnp.where(step.valid[:, None], kind, 3).astype(jnp.int32)
        order = jnp.where(jnp.isnan(scores.value), jnp.inf, -scores.value)
        order = jnp.where(kind == 2, order, jnp.where(kind == 1, -position, 0))
        flat = [x.reshape(B, R, each * T) for x in (kind, order)]
        index = jnp.broadcast_to(jnp.arange(each * T, dtype=jnp.int32), flat[0].shape)
        *_, best = jax.lax.sort((*flat, index), num_keys=2, is_stable=True)
        count = (each * jnp.minimum(budget, step.lengths))[:, None, None]
        best = jnp.where(index < count, best, -1)
        return marked(best, each * T).reshape(B, K, T)


HeadBudget = Even | Ada
