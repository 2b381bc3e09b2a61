"""LagKV: how tokens stand out against the part of the text that follows them (arXiv:2504.04704)."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxfw.core.errors import InputError
from jaxfw.core.shapes import Array, Float
from jaxfw.kv.scorers.base import Context, Scores


@dataclasses.dataclass(frozen=True)
class LagKV:
    """Parts of `lag` tokens behind the first `sinks`, each scaled by the range of the next; the last parts stay.

    A token's score is the rank, in its part, of the deviation over channels of its scaled key and value. Prompts too
    short for two parts keep the newest tokens.
    """

    lag: int = 128
    sinks: int = 4

    def __post_init__(self):
        if self.lag < 2 or self.sinks < 0:
            raise InputError(f"lag={self.lag} must be at least 2 tokens, sinks={self.sinks} at least 0.")

    def __call__(self, c: Context) -> Scores:
        T = len(c.positions)
        parts = max((T - self.sinks) // self.lag, 1)
        end = self.sinks + parts * self.lag
        value = (self._standing_out(c.k, parts) + self._standing_out(c.v, parts)) / 2
        rank = jnp.argsort(jnp.argsort(value, axis=-1), axis=-1) / self.lag
        rank = jnp.pad(rank.reshape(*rank.shape[:2], -1), ((0, 0), (0, 0), (self.sinks, max(0, T - end))))[..., :T]
        whole = jnp.maximum(c.step.lengths - self.sinks, 0) // self.lag  # parts that this row fills
        behind = self.sinks + (whole - 1) * self.lag  # the last full part has none to be compared with
        is_long = (whole >= 2)[:, None]
        protected = (c.positions < self.sinks) | (is_long & (c.positions >= behind[:, None]))
        recency = c.positions / jnp.maximum(T, 1)
        return Scores(jnp.where(is_long[:, None], rank, recency), protected & c.step.valid)

    def _standing_out(self, x: Float[Array, "B K T d"], parts: int) -> Float[Array, "B K P L"]:
        B, K, T, d = x.shape
        end = self.sinks + parts * self.lag
        x = jnp.pad(x, ((0, 0), (0, 0), (0, max(0, end - T)), (0, 0)))[:, :, self.sinks : end]
        x = x.reshape(B, K, parts, self.lag, d)
        following = jnp.roll(x, -1, axis=2)
        low, high = jnp.min(following, axis=3, keepdims=True), jnp.max(following, axis=3, keepdims=True)
        scaled = (x - low) / jnp.where(high > low, high - low, 1)
        return jax.nn.softmax(jnp.std(scaled, axis=-1, ddof=1), axis=-1)
