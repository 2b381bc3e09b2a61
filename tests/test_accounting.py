"""Parameters against the published counts, operations against what XLA counts in the compiled program."""

import jax
import jax.numpy as jnp
import pytest

from jaxfw.models import DecoderConfig, forward, init
from jaxfw.models.accounting import forward_flops, parameter_bytes, parameter_count, train_flops

LLAMA_2_7B = DecoderConfig(
    vocab=32000, width=4096, ffn=11008, layers=32, heads=32, kv_heads=32, head_dim=128, positions=4096,
    param_dtype="bfloat16",
)  # fmt: skip


def xla_count(compiled):
    analysis = compiled.cost_analysis()
    return (analysis[0] if isinstance(analysis, list) else analysis)["flops"]


def test_a_published_count():
    assert parameter_count(LLAMA_2_7B) == 6_738_415_616
    assert parameter_bytes(LLAMA_2_7B) == 2 * 6_738_415_616


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_operations_are_those_that_xla_counts(kv_heads):
    """Matrix products dominate at this size; XLA adds the masked half of the scores, norms and softmax."""
    B, T = 2, 128
    config = DecoderConfig(
        vocab=2048, width=256, ffn=1024, layers=2, heads=4, kv_heads=kv_heads, head_dim=64, positions=T
    )
    params = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((B, T), jnp.int32)
    compiled = jax.jit(lambda params, tokens: forward(config, params, tokens).logits).lower(params, tokens).compile()
    counted = xla_count(compiled)
    masked = 2 * B * config.layers * 2 * config.heads * config.head_dim * T * T // 2
    assert forward_flops(config, batch=B, length=T) + masked == pytest.approx(counted, rel=0.02)


def test_operations_are_about_two_a_parameter_and_token():
    matrices = parameter_count(LLAMA_2_7B) - LLAMA_2_7B.vocab * LLAMA_2_7B.width
    assert forward_flops(LLAMA_2_7B, batch=3, length=64) / (3 * 64) == pytest.approx(2 * matrices, rel=0.01)


@pytest.mark.parametrize("is_base_frozen", [False, True])
def test_operations_of_training_are_those_that_xla_counts(is_base_frozen):
    """A gradient of everything, or of one scale in front of all layers, as of an adapter in the first of them."""
    B, T = 1, 128
    config = DecoderConfig(vocab=1024, width=256, ffn=1024, layers=2, heads=4, kv_heads=4, head_dim=64, positions=T)
    params = jax.eval_shape(lambda: init(config, jax.random.key(0)))

    def loss(scale, params, tokens):
        embed = {"embedding": params["embed"]["embedding"] * scale}
        return jnp.sum(forward(config, params | {"embed": embed}, tokens).logits ** 2)

    gradient = jax.grad(loss, argnums=0 if is_base_frozen else 1)
    compiled = jax.jit(gradient).lower(jnp.float32(1), params, jax.ShapeDtypeStruct((B, T), jnp.int32)).compile()
    counted = xla_count(compiled)
    masked = 3 * 2 * B * config.layers * 2 * config.heads * config.head_dim * T * T // 2
    ours = train_flops(config, batch=B, length=T, is_base_frozen=is_base_frozen)
    assert ours + masked == pytest.approx(counted, rel=0.05)  # the newest XLA counts a little more


def test_a_training_step_is_three_forwards():
    forwards = forward_flops(LLAMA_2_7B, batch=3, length=512)
    assert train_flops(LLAMA_2_7B, batch=3, length=512) == 3 * forwards
    adapters = train_flops(LLAMA_2_7B, batch=3, length=512, is_base_frozen=True)
    assert 2 * forwards < adapters < 2.1 * forwards
