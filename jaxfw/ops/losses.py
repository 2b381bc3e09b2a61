"""Losses over a vocabulary."""

import jax
import jax.numpy as jnp

from jaxfw.core.shapes import Array, Float, Int


@jax.custom_jvp
def token_log_probs(logits: Float[Array, "*B V"], targets: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """Log-probability of each target, float32.

    >>> token_log_probs(jnp.zeros((1, 4)), jnp.array([2])).tolist()
    [-1.3862943649291992]
    """
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


@token_log_probs.defjvp
def _token_log_probs_jvp(primals, tangents):
    # One pass over the vocabulary: what autodiff makes of the lookup is a scatter into an array of all logits.
    logits, targets = primals
    log_probs = token_log_probs(logits, targets)
    wide = logits.astype(jnp.float32)
    probs = jnp.exp(wide - jax.nn.logsumexp(wide, axis=-1, keepdims=True))
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    return log_probs, jnp.sum((is_target - probs) * tangents[0].astype(jnp.float32), axis=-1)
