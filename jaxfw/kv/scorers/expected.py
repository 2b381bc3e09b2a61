"""Expected attention: what queries that are still to come will probably look at (arXiv:2510.00636)."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxfw.core.errors import InputError
from jaxfw.core.shapes import Array, Float
from jaxfw.kv.scorers.base import Context, Scores, wide
from jaxfw.ops.rope import rotate, rotation


@dataclasses.dataclass(frozen=True)
class ExpectedAttention:
    """The mean attention of Gaussian queries with the prompt's mean and covariance, at the next `future` positions.

    Times the norm of the value, to which `epsilon` gives weight where attention is small. The first `sinks` tokens
    stay, and are left out of the statistics.
    """

    future: int = 512
    sinks: int = 4
    epsilon: float = 0.0

    def __post_init__(self):
        if self.future < 1 or self.sinks < 0:
            raise InputError(f"future={self.future} must be at least 1, sinks={self.sinks} at least 0.")

    def __call__(self, c: Context) -> Scores:
        B, T, H, d = c.qkv.q.shape
        K = c.spec.kv_heads
        counted = c.step.valid & (c.positions >= self.sinks)
        mean, covariance = _statistics(wide(c.qkv.q_pre), counted)
        mean, covariance = self._turned(c, mean[:, None])[:, 0], self._turned_covariance(c, covariance)
        mean, covariance = mean.reshape(B, K, H // K, d), covariance.reshape(B, K, H // K, d, d)
        scale = c.spec.scale
        logits = jnp.einsum("BKGd,BKTd->BKGT", mean, c.k, precision="highest") * scale
        turned = jnp.einsum("BKGde,BKTe->BKGTd", covariance, c.k, precision="highest")
        logits += jnp.einsum("BKTd,BKGTd->BKGT", c.k, turned, precision="highest") * scale**2 / 2
        weights = jax.nn.softmax(jnp.where(counted[:, None, None], logits, -jnp.inf), axis=-1)
        value = (jnp.mean(weights, axis=2) + self.epsilon) * jnp.linalg.norm(c.v, axis=-1)
        return Scores(value, c.step.valid & (c.positions < self.sinks))

    def _turned(self, c: Context, x: Float[Array, "B n H d"]) -> Float[Array, "B n H d"]:
        """`x` under the mean rotation of the future positions."""
        if c.spec.rope is None:
            return x
        at = c.step.lengths[:, None] + jnp.arange(self.future)
        cos, sin = rotation(c.spec.rope, at, width=c.spec.head_dim, seq_len=c.step.lengths + self.future)
        cos, sin = (jnp.broadcast_to(part.mean(1, keepdims=True), (*x.shape[:2], part.shape[2])) for part in (cos, sin))
        return rotate(x, cos, sin)

    def _turned_covariance(self, c: Context, x: Float[Array, "B H d d"]) -> Float[Array, "B H d d"]:
        """R x R^T, by turning columns and then rows."""
        for _ in range(2):
            x = jnp.moveaxis(self._turned(c, jnp.moveaxis(x, 3, 1)), 1, 2)
        return x


def _statistics(q: Float[Array, "B T H d"], counted: Array) -> tuple[Float[Array, "B H d"], Float[Array, "B H d d"]]:
    count = jnp.maximum(jnp.sum(counted, axis=1), 1)[:, None, None]
    counted = counted[..., None, None]
    mean = jnp.sum(jnp.where(counted, q, 0), axis=1) / count
    centred = jnp.where(counted, q - mean[:, None], 0)
    return mean, jnp.einsum("BTHd,BTHe->BHde", centred, centred, precision="highest") / count[..., None]
