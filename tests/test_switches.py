"""What families differ by: each switch of `DecoderConfig` against plain numpy, whole and beside a cache."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxfw.core.errors import InputError
from jaxfw.models import DecoderConfig, MoEConfig, forward, init, stack_layers
from jaxfw.models.cache import FullCache
from jaxfw.ops.rope import Rope
from tests import numpy_decoder

BASE = DecoderConfig(
    vocab=41, width=16, ffn=24, layers=3, heads=4, kv_heads=2, head_dim=6, positions=32, init_std=0.4, norm_eps=1e-5
)
GPT2 = {
    "kv_heads": 4, "rope": None, "learned_positions": True, "norm": "layer", "gated": False, "activation": "gelu_tanh",
    "qkv_bias": True, "out_bias": True, "mlp_bias": True, "tie_embeddings": True,
}  # fmt: skip
SWITCHES = {
    "all of GPT-2's": GPT2,
    "no rotation, odd heads": {"rope": None, "head_dim": 5},
    "exact gelu, gated": {"activation": "gelu"},
    "norms of heads": {"qk_norm": "head"},
    "norms of projections": {"qk_norm": "projection"},
    "a window in some layers": {"window": 4, "full_attention": (0, 2)},
    "shared expert, gated": {"moe": MoEConfig(4, 2, 10, shared=14, shared_gate=True)},
    "shared expert, dense layers": {"moe": MoEConfig(4, 2, 10, first=1, dense=(2,), shared=14)},
}
LENGTHS = np.array([13, 9], np.int32)
_forward = jax.jit(forward, static_argnums=0, static_argnames=("policy", "room"))


def drawn(config):
    """Parameters of which none is at its neutral value."""
    params = init(config, jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(tree, [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)])


@pytest.mark.parametrize("name", SWITCHES)
def test_equals_numpy_whole_and_beside_a_cache(name):
    config = dataclasses.replace(BASE, **SWITCHES[name])
    params = drawn(config)
    tokens = np.random.default_rng(0).integers(0, config.vocab, (2, 13)).astype(np.int32)
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    expected = numpy_decoder.run(config, wide, tokens, LENGTHS)
    scale = expected.std()
    assert np.isfinite(scale) and scale > 0.5
    valid = np.arange(13) < LENGTHS[:, None]
    whole = _forward(config, params, tokens, lengths=LENGTHS).logits
    assert np.abs(whole - expected)[valid].max() / scale < 5e-5
    first = _forward(config, params, tokens[:, :7], policy=FullCache(), room=13)
    rest = _forward(config, params, tokens[:, 7:], lengths=LENGTHS - 7, policy=FullCache(), cache=first.cache)
    both = np.concatenate([first.logits, rest.logits], axis=1)
    assert np.abs(both - expected)[valid].max() / scale < 5e-5


def test_layers_of_one_kind_share_a_configuration():
    config = dataclasses.replace(BASE, window=4, full_attention=(0, 2))
    assert config.at(0) == config.at(2) != config.at(1)
    assert BASE.at(0) is BASE


def test_learned_positions_are_where_a_cache_ends():
    config = dataclasses.replace(BASE, **GPT2)
    assert config.context == config.positions == 32


WRONG = {
    "norm": ("batch", "Known: rms, layer"),
    "activation": ("relu", "Known: silu, gelu, gelu_tanh"),
    "qk_norm": ("heads", "Did you mean 'head'"),
    "moe": (MoEConfig(2, 1, 4, first=3), "beyond the last of 3 layers"),
}


@pytest.mark.parametrize("field", WRONG)
def test_unknown_values_are_refused(field):
    value, message = WRONG[field]
    with pytest.raises(InputError, match=message):
        dataclasses.replace(BASE, **{field: value})


def test_what_experts_cannot_be_is_refused():
    with pytest.raises(InputError, match=r"model.gated=False with model.activation='silu' is not built for experts"):
        dataclasses.replace(BASE, gated=False, moe=MoEConfig(2, 1, 4))
    with pytest.raises(InputError, match=r"shared_gate=True gates nothing"):
        MoEConfig(2, 1, 4, shared_gate=True)


def test_rotation_needs_even_heads_and_stacked_layers_one_kind():
    with pytest.raises(InputError, match="must be even"):
        dataclasses.replace(BASE, head_dim=5, rope=Rope())
    config = dataclasses.replace(BASE, window=4, full_attention=(1,))
    with pytest.raises(InputError, match=r"full_attention=\(1,\) lifts the window"):
        forward(config, stack_layers(init(config, jax.random.key(0))), np.zeros((1, 4), np.int32))
