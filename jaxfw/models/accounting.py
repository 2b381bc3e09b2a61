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
    """Operations of one forward over `batch` rows of `length` tokens.

    >>> llama_2_7b = DecoderConfig(vocab=32000, width=4096, ffn=11008, layers=32, heads=32, kv_heads=32, head_dim=128,
    ...                            positions=4096)
    >>> round(forward_flops(llama_2_7b, batch=1, length=4096) / 4096 / 1e9, 2)  # GFLOP per token
    14.29
    """
    return batch * (_weight_flops(config, length) + _attention_flops(config, length))


def train_flops(config: DecoderConfig, *, batch: int, length: int, is_base_frozen: bool = False) -> int:
    """Operations of a training step on `batch` rows: the forward, and twice as many for gradients.

    Each product has two gradients, of either factor. Under adapters (`is_base_frozen`) weights need none of their own,
    which leaves two times their share and three times attention's; the adapters themselves count nothing (about R / D).
    Rematerialisation, padding, the router's losses and the optimiser count nothing either.
    """
    weights, attention = _weight_flops(config, length), _attention_flops(config, length)
    return batch * ((2 if is_base_frozen else 3) * weights + 3 * attention)


def _weight_flops(config: DecoderConfig, length: int) -> int:
    weights = sum(_layer_weights(config, i) for i in range(config.layers)) + config.vocab * config.width
    return 2 * length * weights


def _attention_flops(config: DecoderConfig, length: int) -> int:
    """Scores, and their product with the values."""
    pairs = sum(_attended(config.at(i).window, length) for i in range(config.layers))
    return 4 * config.heads * config.head_dim * pairs


def _layer_weights(config: DecoderConfig, layer: int) -> int:
    """Weights that each token is multiplied by in that layer."""
    attention = config.width * config.head_dim * (2 * config.heads + 2 * config.kv_heads)
    matrices, moe = 3 if config.gated else 2, config.moe
    if moe is None or not moe.is_in(layer):
        return attention + matrices * config.width * config.ffn
    experts = matrices * (moe.ffn * moe.per_token + moe.shared) + moe.experts + moe.shared_gate
    return attention + config.width * experts


def _attended(window: int | None, length: int) -> int:
    """Pairs of query and key: half of the square, or of its band."""
    reach = min(window or length, length)
    return reach * length - reach * reach // 2 if window else length * length // 2
