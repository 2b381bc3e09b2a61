"""The decoder: parts and whole, what may depend on what, precision, published sizes, and what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxfw.core.errors import InputError
from jaxfw.models import (
    DecoderConfig,
    Rope,
    attend_half,
    attention_spec,
    embed,
    first_step,
    forward,
    head,
    init,
    layer,
    mlp_half,
)
from jaxfw.models.cache import Cache, FullCache
from jaxfw.nn.layers import Decoder
from jaxfw.ops.attention import attend
from jaxfw.ops.losses import token_log_probs
from jaxfw.ops.norms import rms_norm
from jaxfw.ops.rope import rotate, rotation

UNTIED = DecoderConfig(
    vocab=41, width=24, ffn=40, layers=2, heads=6, kv_heads=2, head_dim=8, positions=64, init_std=0.3
)
TIED = dataclasses.replace(
    UNTIED, tie_embeddings=True, qkv_bias=True, out_bias=True, mlp_bias=True,
    rope=Rope(kind="llama3", factor=4.0, original_positions=16),
)  # fmt: skip
CONFIGS = pytest.mark.parametrize("config", [UNTIED, TIED], ids=["untied", "tied"])
LENGTHS = np.array([11, 4, 1], np.int32)
TOKENS = np.random.default_rng(0).integers(0, UNTIED.vocab, (3, 11), np.int32)


@functools.cache
def params_of(config):
    """Fresh parameters with every bias and norm scale moved off its neutral value."""
    fresh = jax.jit(init, static_argnums=0)(config, jax.random.key(0))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(x.dtype), fresh)


# Compiling is most of what these tests take, and compiles fastest unoptimised.
_compile = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.partial(_compile, static_argnames=("config", "policy", "room"))
def whole(config, params, tokens, lengths=None, *, policy=None, cache=None, room=0):
    return forward(config, params, tokens, lengths=lengths, policy=policy, cache=cache, room=room)


_embed, _head, _mlp_half = (jax.jit(part, static_argnums=0) for part in (embed, head, mlp_half))
_layer, _attend_half = (
    jax.jit(part, static_argnums=0, static_argnames=("policy", "room")) for part in (layer, attend_half)
)


def layer_step(step, i):
    return dataclasses.replace(step, layer=jnp.int32(i))


# --- parts and whole


@CONFIGS
def test_parts_without_a_cache_equal_the_whole(config):
    params, step = params_of(config), first_step(jnp.asarray(LENGTHS), TOKENS.shape[1])
    x = _embed(config, params, TOKENS)
    for i in range(config.layers):
        weights = params[f"layers_{i}"]
        out = _layer(config, weights, x, layer_step(step, i))
        middle = _attend_half(config, weights, x, layer_step(step, i))
        np.testing.assert_allclose(out.x, _mlp_half(config, weights, middle.x, layer_step(step, i)).x, atol=1e-6)
        assert out.state is None and middle.state is None
        x = out.x
    logits = _head(config, params, x)
    assert logits.shape == (3, 11, config.vocab)
    np.testing.assert_allclose(logits, whole(config, params, TOKENS, LENGTHS).logits, atol=2e-5)


def test_parts_with_a_cache_equal_the_whole():
    config, policy, room = UNTIED, FullCache(), 16
    params, T = params_of(config), TOKENS.shape[1]
    expected = whole(config, params, TOKENS, LENGTHS, policy=policy, room=room)
    step = first_step(jnp.asarray(LENGTHS), T)
    for tokens, lengths, cache in ((TOKENS, LENGTHS, None), (TOKENS[:, :2], np.array([2, 1, 2]), expected.cache)):
        step, states = first_step(jnp.asarray(lengths), tokens.shape[1]), []
        if cache is not None:
            expected = whole(config, params, tokens, lengths, policy=policy, cache=cache)
            step = dataclasses.replace(step, positions=step.positions + cache.seen[:, None])
        x = _embed(config, params, tokens)
        for i in range(config.layers):
            out = _layer(
                config, params[f"layers_{i}"], x, layer_step(step, i), policy=policy.at(i), room=room,
                state=cache.layers[i] if cache else None, previous=states[-1] if states else None,
            )  # fmt: skip
            x = out.x
            states.append(out.state)
        for b, n in enumerate(lengths):
            np.testing.assert_allclose(_head(config, params, x)[b, :n], expected.logits[b, :n], atol=2e-5)
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), Cache(tuple(states)), expected.cache)


@CONFIGS
def test_vjp_layer_by_layer_equals_the_gradient_of_the_whole(config):
    params, step = params_of(config), first_step(jnp.asarray(LENGTHS), TOKENS.shape[1])
    valid = np.arange(1, 11) < LENGTHS[:, None]

    def loss(logits):
        return -jnp.sum(token_log_probs(logits[:, :-1], TOKENS[:, 1:]) * valid) / valid.sum()

    expected = _compile(jax.grad(lambda p: loss(forward(config, p, TOKENS, lengths=LENGTHS).logits)))(params)

    ends = {name: params[name] for name in ("embed", "head")}
    x, from_embed = jax.vjp(lambda p: _embed(config, p, TOKENS), ends)
    back = []
    for i in range(config.layers):
        run_layer = functools.partial(lambda i, p, x: _layer(config, p, x, layer_step(step, i)).x, i)
        x, from_layer = jax.vjp(run_layer, params[f"layers_{i}"], x)
        back.append(from_layer)
    gradient, from_head = jax.vjp(lambda p, x: loss(_head(config, p, x)), ends, x)
    of_ends, of_x = from_head(jnp.ones_like(gradient))
    grads = {}
    for i in reversed(range(config.layers)):
        grads[f"layers_{i}"], of_x = back[i](of_x)
    grads |= jax.tree.map(jnp.add, of_ends, from_embed(of_x)[0])

    def close(ours, theirs):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * float(np.abs(theirs).max()))
        assert np.any(np.asarray(theirs) != 0)

    jax.tree.map(close, grads, dict(expected))


# --- what may depend on what


@CONFIGS
def test_a_later_token_leaves_earlier_logits_bit_equal(config):
    params = params_of(config)
    before = np.asarray(whole(config, params, TOKENS).logits)
    for at in (1, 6, 10):
        changed = TOKENS.copy()
        changed[:, at] = (changed[:, at] + 1) % config.vocab
        after = np.asarray(whole(config, params, changed).logits)
        np.testing.assert_array_equal(before[:, :at], after[:, :at])
        assert np.all(np.abs(before - after)[:, at:].max(axis=-1) > 1e-3), "every later token sees it"


def test_a_long_prompt_is_causal_too():
    """However attention is cut into blocks of queries."""
    config = dataclasses.replace(UNTIED, layers=1, positions=4096)
    tokens = np.random.default_rng(0).integers(0, config.vocab, (1, 1064), np.int32)
    changed, params = tokens.copy(), params_of(config)
    at = 522
    changed[:, at] = (changed[:, at] + 1) % config.vocab
    before, after = (np.asarray(whole(config, params, t).logits) for t in (tokens, changed))
    np.testing.assert_array_equal(before[:, :at], after[:, :at])
    assert np.mean(np.abs(before - after)[:, at:].max(axis=-1) > 0) > 0.99


@pytest.mark.parametrize("kind", ["default", "dynamic"])
def test_padding_changes_nothing(kind):
    """Whatever is behind a row's length, and however much of it; `dynamic` counts a row's own tokens."""
    rope = Rope(kind=kind, factor=4.0, original_positions=8)
    config = dataclasses.replace(UNTIED, rope=rope, positions=8)
    params, logits = params_of(config), []
    for width, junk in ((11, 0), (11, 40), (16, 7)):
        rows = np.full((3, width), junk, np.int32)
        for row, tokens, length in zip(rows, TOKENS, LENGTHS):
            row[:length] = tokens[:length]
        logits.append(np.asarray(whole(config, params, rows, LENGTHS).logits))
    for b, length in enumerate(LENGTHS):
        np.testing.assert_array_equal(logits[0][b, :length], logits[1][b, :length])
        np.testing.assert_allclose(logits[0][b, :length], logits[2][b, :length], atol=2e-5)
    alone = whole(config, params, TOKENS[1:2, : LENGTHS[1]]).logits[0]
    np.testing.assert_allclose(alone, logits[0][1, : LENGTHS[1]], atol=2e-5)


def test_a_long_extension_reads_block_by_block():
    """Attention to a cache, of more queries than a block holds and a remainder, equals one forward."""
    config = dataclasses.replace(UNTIED, layers=1, positions=1024)
    tokens, params = np.random.default_rng(1).integers(0, config.vocab, (2, 320), np.int32), params_of(config)
    cache = whole(config, params, tokens[:, :20], policy=FullCache(), room=320).cache
    out = whole(config, params, tokens[:, 20:], policy=FullCache(), cache=cache)
    np.testing.assert_allclose(out.logits, whole(config, params, tokens).logits[:, 20:], atol=2e-5)


# --- precision


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_computes_in_half_and_keeps_statistics_in_float32(dtype):
    config = dataclasses.replace(UNTIED, dtype=dtype)
    params = params_of(UNTIED)
    logits = np.asarray(whole(config, params, TOKENS).logits)
    assert logits.dtype == jnp.dtype(dtype) and params["embed"]["embedding"].dtype == jnp.float32
    exact = np.asarray(whole(UNTIED, params, TOKENS).logits)
    error = np.abs(logits.astype(np.float32) - exact).max() / exact.std()
    assert 1e-4 < error < 64 * float(jnp.finfo(dtype).eps)


def statistics_of(function, *inputs):
    """Dtypes in which exponentials, logarithms and roots of a traced function are taken."""
    found = set()

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name in ("exp", "exp2", "rsqrt", "sqrt", "reduce_max", "cos"):
                found.add((equation.primitive.name, str(equation.invars[0].aval.dtype)))
            for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    walk(inner)

    walk(jax.make_jaxpr(function)(*inputs).jaxpr)
    return found


def test_no_statistic_is_taken_in_half_precision():
    config = dataclasses.replace(UNTIED, dtype="bfloat16", param_dtype="bfloat16")
    params = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
    assert {str(x.dtype) for x in jax.tree.leaves(params)} == {"bfloat16"}
    taken = statistics_of(lambda p, t: forward(config, p, t).logits, params, TOKENS)
    assert {name for name, _ in taken} >= {"exp", "rsqrt", "cos"}
    assert {dtype for _, dtype in taken} == {"float32"}


def test_softmax_precision_is_the_configs():
    config = dataclasses.replace(UNTIED, dtype="bfloat16", softmax_dtype="bfloat16")
    params = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
    taken = statistics_of(lambda p, t: forward(config, p, t).logits, params, TOKENS)
    assert ("exp", "bfloat16") in taken and ("rsqrt", "float32") in taken


def test_norm_statistics_do_not_overflow_or_vanish():
    """In float16 the square of 300 is infinite, in float32 it is not."""
    large = rms_norm(jnp.full((1, 64), 300.0, jnp.float16), jnp.ones(64, jnp.float16), eps=1e-6)
    np.testing.assert_allclose(large, 1, rtol=1e-3)


# --- Linen declares, NNX bridges


@CONFIGS
def test_the_shell_runs_in_nnx(config):
    """`flax.nnx.bridge.ToNNX` around the Linen shell holds the same parameters and computes the same logits."""
    config = dataclasses.replace(config, layers=1)
    params = params_of(config)
    step = first_step(jnp.asarray(LENGTHS), TOKENS.shape[1])
    spec = attention_spec(config)

    def mix(q, k, v, hidden, w_o):
        cos, sin = rotation(config.rope, step.positions, width=config.head_dim, seq_len=step.lengths)
        keys, values = (jnp.swapaxes(x, 1, 2) for x in (rotate(k, cos, sin), v))
        return attend(rotate(q, cos, sin), keys, values, scale=spec.scale), None

    def shell():
        return nnx.bridge.ToNNX(Decoder(config), rngs=nnx.Rngs(0)).lazy_init(TOKENS, mix)

    model = nnx.jit(shell)()
    held = nnx.state(model, nnx.Param)
    shapes = jax.tree.map(lambda x: x.shape, nnx.to_pure_dict(held))
    assert shapes == jax.tree.map(lambda x: x.shape, params)
    nnx.replace_by_pure_dict(held, params)
    nnx.update(model, held)
    logits = nnx.jit(lambda model: model(TOKENS, mix))(model)
    expected = whole(config, params, TOKENS, LENGTHS).logits
    for b, length in enumerate(LENGTHS):
        np.testing.assert_allclose(logits[b, :length], expected[b, :length], atol=2e-5)


# --- published sizes, without holding them


def llama(vocab, width, ffn, layers, heads, kv_heads, tied=False):
    return DecoderConfig(
        vocab=vocab, width=width, ffn=ffn, layers=layers, heads=heads, kv_heads=kv_heads, head_dim=width // heads,
        positions=4096, tie_embeddings=tied, param_dtype="bfloat16", dtype="bfloat16",
    )  # fmt: skip


PUBLISHED = {
    "Llama-2-7b": (llama(32000, 4096, 11008, 32, 32, 32), 6_738_415_616),
    "Llama-2-13b": (llama(32000, 5120, 13824, 40, 40, 40), 13_015_864_320),
    "Llama-2-70b": (llama(32000, 8192, 28672, 80, 64, 8), 68_976_648_192),
    "Llama-3.1-8B": (llama(128256, 4096, 14336, 32, 32, 8), 8_030_261_248),
    "Llama-3.1-70B": (llama(128256, 8192, 28672, 80, 64, 8), 70_553_706_496),
    "Llama-3.2-1B": (llama(128256, 2048, 8192, 16, 32, 8, tied=True), 1_235_814_400),
    "Llama-3.2-3B": (llama(128256, 3072, 8192, 28, 24, 8, tied=True), 3_212_749_824),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_published_models(name):
    config, count = PUBLISHED[name]
    params = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(params)) == count


@pytest.mark.parametrize("name", ["Llama-2-7b", "Llama-3.2-1B"])
def test_forward_of_a_published_model_is_traced_without_holding_it(name):
    config, _ = PUBLISHED[name]
    params = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((2, 128), jnp.int32)
    out = jax.eval_shape(functools.partial(forward, config, policy=FullCache(), room=256), params, tokens)
    assert out.logits.shape == (2, 128, config.vocab) and out.logits.dtype == jnp.bfloat16
    assert out.cache.nbytes == config.layers * (2 * 2 * config.kv_heads * 256 * config.head_dim * 2 + 2 * 4)


# --- what is refused


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"vocab": 0}, "model.vocab=0 must be a whole number from 1 on"),
        ({"width": -3}, "model.width=-3 must be a whole number"),
        ({"layers": 2.0}, "model.layers=2.0 must be a whole number"),
        ({"positions": "64"}, "model.positions='64' must be a whole number"),
        ({"kv_heads": 4}, "model.heads=6 must be a multiple of model.kv_heads=4"),
        ({"head_dim": 7}, "model.head_dim=7 must be even"),
        ({"dtype": "bf16"}, "model.dtype='bf16' is unknown.*bfloat16"),
        ({"param_dtype": "float64"}, "model.param_dtype='float64' is unknown. Known: float32, bfloat16, float16"),
        ({"softmax_dtype": "int8"}, "model.softmax_dtype='int8' is unknown"),
    ],
)
def test_a_config_that_means_nothing_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(UNTIED, **fields)


def test_configs_are_static_arguments():
    assert hash(dataclasses.replace(UNTIED)) == hash(UNTIED) and dataclasses.replace(UNTIED) == UNTIED
    assert len({UNTIED, TIED, dataclasses.replace(UNTIED)}) == 2


@pytest.mark.parametrize(
    "rope, positions, context",
    [
        (Rope(), 64, 64),
        (Rope(kind="linear", factor=4.0), 64, 64),
        (Rope(kind="dynamic", factor=2.0, original_positions=64), 64, 128),
        (Rope(kind="yarn", factor=4.0, original_positions=32), 128, 128),
        (Rope(kind="yarn", factor=4.0, original_positions=32768), 32768, 131072),
        (Rope(kind="llama3", factor=8.0, original_positions=8192), 131072, 131072),  # Llama 3.1
        (Rope(kind="llama3", factor=32.0, original_positions=8192), 131072, 131072),  # Llama 3.2
    ],
)
def test_context_is_what_is_declared_or_stretched_to(rope, positions, context):
    assert dataclasses.replace(UNTIED, rope=rope, positions=positions).context == context
