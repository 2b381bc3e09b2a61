"""Normalisation over the last axis. Statistics are float32 whatever the input's dtype."""

import jax
import jax.numpy as jnp

from jaxfw.core.shapes import Array, Float


def rms_norm(x: Float[Array, "*B D"], scale: Float[Array, "D"], *, eps: float) -> Float[Array, "*B D"]:
    """Divide by the root mean square, then scale (Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4).

    The normalised value is rounded to `x.dtype` before it is scaled, as the LLaMA reference does.

    >>> rms_norm(jnp.array([3.0, 4.0]), jnp.ones(2), eps=0.0).tolist()
    [0.8485281467437744, 1.13137...]
    """
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * inverse).astype(x.dtype) * scale.astype(x.dtype)


def layer_norm(
    x: Float[Array, "*B D"], scale: Float[Array, "D"], bias: Float[Array, "D"], *, eps: float
) -> Float[Array, "*B D"]:
    """Subtract the mean, divide by the deviation, scale and shift (Ba et al. 2016, arXiv:1607.06450); float32 inside.

    >>> layer_norm(jnp.array([1.0, 3.0]), jnp.full(2, 2.0), jnp.ones(2), eps=0.0).tolist()
    [-1.0, 3.0]
    """
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    normalised = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (normalised * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)
