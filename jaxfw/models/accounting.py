"""Parameters, floating-point operations and memory of a decoder, from its config alone.

A multiplication and an addition count as two operations. Causal attention counts half of its square; embedding
lookups, norms, softmax and recomputation count nothing (the convention behind model FLOP utilisation). Of a mixture,
the experts that a token is sent to count, and the router.
"""

import jax
import numpy as np

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


def train_memory(
    config: DecoderConfig,
    *,
    rows: int,
    length: int,
    shards: int = 1,
    remat: str | None = None,
    chunk: int | None = None,
) -> dict[str, int]:
    """Bytes that a device needs for a training step with AdamW, by what they are for: arithmetic, nothing is compiled.

    What a layer keeps per token are the results that its gradient reads, in the dtype of arithmetic: with `remat` None
    both norms, queries, keys, values, what attention returns, the residual between the halves, gate, up, activation and
    their product; with the others as `jaxfw.train.language.NextTokenLoss` says. On top comes what the vocabulary needs:
    its table gathered, its gradient, and logits in float32, three of each with `chunk`.

    Args:
        config: the model; parameters, optimiser and gradients are in its `param_dtype`.
        rows: of a device.
        length: tokens of a row.
        shards: devices that parameters, optimiser and gradients are cut over (fsdp).
        remat: None, "products", "attention" or "layer".
        chunk: tokens of a row whose logits exist at once; None is all.
    """
    held, compute = parameter_bytes(config) // shards, np.dtype(config.dtype).itemsize
    tokens, table = rows * length, config.vocab * config.width
    kept = sum(_kept(config, layer, remat) for layer in range(config.layers))
    logits = 4 * rows * config.vocab * (length if chunk is None else 3 * chunk)
    gradient = np.dtype(config.param_dtype).itemsize if chunk is None else 4
    return {
        "parameters": held,
        "optimiser": 2 * held,
        "gradients": held,
        "kept by layers": tokens * compute * kept,
        "vocabulary": table * (compute + gradient) + logits,
    }


def _kept(config: DecoderConfig, layer: int, remat: str | None) -> int:
    """Numbers per token that a layer keeps for its gradient."""
    width, heads = config.width, config.heads * config.head_dim
    projected = heads + 2 * config.kv_heads * config.head_dim
    moe = config.moe
    hidden = config.ffn if moe is None or not moe.is_in(layer) else moe.ffn * moe.per_token + moe.shared
    gates = 2 if config.gated else 1
    return (
        width
        + {
            None: 3 * width + projected + heads + 2 * gates * hidden,
            "products": projected + heads + width + gates * hidden,
            "attention": heads,
            "layer": 0,
        }[remat]
    )
