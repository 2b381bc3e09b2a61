"""Random keys, one a row: what a row draws does not depend on the rows beside it."""

import jax
import jax.numpy as jnp

from jaxfw.core.errors import InputError
from jaxfw.core.shapes import Int, PRNGKeyArray

fold_rows = jax.jit(jax.vmap(jax.random.fold_in, in_axes=(None, 0)))


def row_keys(key: PRNGKeyArray, B: int) -> PRNGKeyArray:
    """`key` folded with each row's number, or the B keys themselves.

    Raises:
        InputError: it is no random key, or one for another number of rows.
    """
    is_key = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not is_key or key.shape not in ((), (B,)):
        raise InputError(f"key={key!r} must be a random key such as jax.random.key(0), or one for each of {B} rows.")
    return key if key.shape else fold_rows(key, jnp.arange(B))


def fold(keys: PRNGKeyArray, number: Int) -> PRNGKeyArray:
    """Every row's key folded with one number: a stream of its own."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number)
