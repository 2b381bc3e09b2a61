"""Losses over a vocabulary."""

import jax
import jax.numpy as jnp

from jaxfw.core.shapes import Array, Float, Int


def token_log_probs(logits: Float[Array, "*B V"], targets: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """Log-probability of each target, float32.

    >>> token_log_probs(jnp.zeros((1, 4)), jnp.array([2])).tolist()
    [-1.3862943649291992]
    """
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)
