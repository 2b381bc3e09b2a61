"""Activations of a feed-forward, by the names that configurations use."""

import functools

import jax

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),  # "gelu_new" of GPT-2
}
