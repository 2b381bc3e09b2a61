"""Rows that hold several documents: where each one begins and how long it is, from the numbers of its tokens.

A document begins wherever the number changes, so that documents are contiguous by construction and "in the same
document" is a comparison of two columns, not of numbers. Padding (0, at the end of a row) is a document of its own.
"""

import jax
import jax.numpy as jnp

from jaxfw.core.shapes import Array, Int


def starts(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The column at which each token's document begins.

    >>> starts(jnp.array([[1, 1, 2, 2, 2, 0]])).tolist()
    [[0, 0, 2, 2, 2, 5]]
    """
    columns = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    return jax.lax.cummax(jnp.where(_changes(segment_ids), columns, 0), axis=1)


def document_lengths(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """How many tokens each token's document has.

    >>> document_lengths(jnp.array([[1, 1, 2, 2, 2, 0]])).tolist()
    [[2, 2, 3, 3, 3, 1]]
    """
    T = segment_ids.shape[1]
    ends = jnp.arange(1, T + 1, dtype=jnp.int32)
    is_last = jnp.concatenate([_changes(segment_ids)[:, 1:], jnp.ones_like(segment_ids[:, :1], bool)], axis=1)
    return jax.lax.cummin(jnp.where(is_last, ends, T), axis=1, reverse=True) - starts(segment_ids)


def _changes(segment_ids: Int[Array, "B T"]) -> Array:
    """Whether a token is the first of its document, but for the row's first."""
    before = jnp.concatenate([segment_ids[:, :1], segment_ids[:, :-1]], axis=1)
    return segment_ids != before
