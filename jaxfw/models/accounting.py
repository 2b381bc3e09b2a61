"""Parameters and floating-point operations of a decoder, from its config alone.

A multiplication and an addition count as two operations. Causal attention counts half of its square; embedding
lookups, norms, softmax and recomputation count nothing (the convention behind model FLOP utilisation). Of a mixture,
the experts that a token is sent to count, and the router.
"""

import jax

from jaxfw.models.decoder import init
from jaxfw.nn.config import DecoderConfig


def parameter_count(config: DecoderConfig) -> int:
    """All parameters, a tied embedding once."""
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(lambda: init(config, jax.random.key(0)))))


def parameter_bytes(config: DecoderConfig) -> int:
    """Bytes of the parameters in their `param_dtype`."""
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def forward_flops(config: DecoderConfig, *, batch: int, length: int) -> int:
    """Operations of one forward over `batch` rows of `length` tokens; a training step takes three times as many.

    >>> llama_2_7b = DecoderConfig(vocab=32000, width=4096, ffn=11008, layers=32, heads=32, kv_heads=32, head_dim=128,
    ...                            positions=4096)
    >>> round(forward_flops(llama_2_7b, batch=1, length=4096) / 4096 / 1e9, 2)  # GFLOP per token
    14.29
    """
    attention = config.width * config.head_dim * (2 * config.heads + 2 * config.kv_heads)
    moe = config.moe
    sparse = sum(moe.is_in(i) for i in range(config.layers)) if moe else 0
    weights = config.layers * attention + (config.layers - sparse) * 3 * config.width * config.ffn
    if moe:
        weights += sparse * config.width * (3 * moe.ffn * moe.per_token + moe.experts)
    weights += config.vocab * config.width
    scores = config.layers * 2 * config.heads * config.head_dim * length // 2
    return 2 * batch * length * (weights + scores)
