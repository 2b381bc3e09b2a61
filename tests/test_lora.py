"""Adapters beside a model against float64 arithmetic, apart and stacked, quantised, trained, refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxfw.core.errors import InputError
from jaxfw.models import DecoderConfig, MoEConfig, default_router, forward, init, stack_layers
from jaxfw.models.lora import KERNELS, TARGETS, LoRAConfig, adapt, adapter_pairs, init_adapters, merge
from jaxfw.nn.layers import Block
from jaxfw.ops.adapted import Adapted, added, whole
from jaxfw.ops.quant import Quantised, dequantise, quantise
from jaxfw.train import Aux, NextTokenLoss, init_state, make_step
from jaxfw.train.lora import LoRALoss
from jaxfw.train.step import FROZEN, trained_part
from jaxfw.weights import quantise_params
from tests import numpy_decoder

CONFIG = DecoderConfig(
    vocab=40, width=16, ffn=24, layers=2, heads=4, kv_heads=2, head_dim=8, positions=64, init_std=0.3, qkv_bias=True
)
MIXED = dataclasses.replace(CONFIG, layers=1, moe=MoEConfig(experts=4, per_token=2, ffn=16, shared=8, shared_gate=True))
LORA = LoRAConfig(rank=3, alpha=6.0, targets="all")
TOKENS = np.random.default_rng(0).integers(0, 40, (2, 12), np.int32)
BATCH = {"tokens": np.random.default_rng(1).integers(0, 40, (4, 13), np.int32)}
# Compiling is most of what these tests do, and compiles fastest unoptimised.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
logits = jit(lambda params, tokens: forward(CONFIG, params, tokens).logits)


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda: init(CONFIG, jax.random.key(0)))()


def moved(adapters, size=0.3):
    """Adapters that count: with b apart from zero."""
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: np.float32(size * rng.standard_normal(x.shape)), adapters)


@pytest.fixture(scope="module")
def adapters(params):
    return moved(init_adapters(LORA, params, jax.random.key(1)))


def float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def summed(params, adapters, scale):
    """W + scale * a @ b in float64, by this test's own arithmetic."""
    flat, pairs = flatten_dict(float64(params)), flatten_dict(float64(adapters))
    for path in {path[:-1] for path in pairs}:
        flat[path] = flat[path] + scale * pairs[*path, "a"] @ pairs[*path, "b"]
    tree = {}
    for path, leaf in flat.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return tree


def apart(a, b):
    """The largest difference in units of b's deviation."""
    return float(np.abs(np.asarray(a, np.float64) - b).max() / np.std(b))


# --- the arithmetic


def test_adapted_and_merged_models_are_the_sum(params, adapters):
    plain = np.asarray(logits(params, TOKENS))
    truth = numpy_decoder.run(CONFIG, summed(params, adapters, 2.0), TOKENS, [12, 12])
    assert apart(plain, truth) > 0.5
    assert apart(logits(adapt(params, adapters, LORA), TOKENS), truth) < 1e-5
    assert apart(logits(merge(params, adapters, LORA), TOKENS), truth) < 1e-5


def test_fresh_adapters_change_nothing(params):
    fresh = init_adapters(LORA, params, jax.random.key(1))
    assert np.array_equal(logits(adapt(params, fresh, LORA), TOKENS), logits(params, TOKENS))
    for path, pair in adapter_pairs(fresh).items():
        D, bound = pair["a"].shape[0], pair["a"].shape[0] ** -0.5
        assert not pair["b"].any() and pair["a"].dtype == pair["b"].dtype == jnp.float32
        assert 0.8 * bound < np.abs(pair["a"]).max() < bound, path
        # That of a uniform distribution; 6 standard errors.
        assert abs(np.std(pair["a"]) - bound / 3**0.5) < 6 * bound * (0.1 / pair["a"].size) ** 0.5, D
    sides = {np.asarray(pair["a"]).tobytes() for pair in adapter_pairs(fresh).values()}
    assert len(sides) == 14


def test_adapters_have_the_nesting_of_the_parameters(params):
    made = init_adapters(LoRAConfig(rank=2, targets=r"layers_1/attn/[qo]/kernel"), params, jax.random.key(0))
    q, o = {"a": (16, 2), "b": (2, 32)}, {"a": (32, 2), "b": (2, 16)}
    assert jax.tree.map(jnp.shape, made) == {"layers_1": {"attn": {"q": {"kernel": q}, "o": {"kernel": o}}}}
    shapes = jax.eval_shape(lambda: init(CONFIG, jax.random.key(0)))
    again = init_adapters(LoRAConfig(rank=2, targets=r"layers_1/attn/[qo]/kernel"), shapes, jax.random.key(0))
    assert jax.tree.all(jax.tree.map(np.array_equal, made, again))


@pytest.mark.parametrize("targets", TARGETS)
def test_names_of_targets(params, targets):
    paths = LoRAConfig(targets=targets).paths(params)
    assert len(paths) == {"qv": 4, "attention": 8, "all": 14}[targets]
    assert all(KERNELS.fullmatch(path) for path in paths)


def test_the_scale():
    assert LoRAConfig(rank=16, alpha=8.0).scale == 0.5
    assert LoRAConfig(rank=16, alpha=8.0, rank_stabilised=True).scale == 2.0


def test_shared_experts_and_their_gate():
    mixed = jit(lambda: init(MIXED, jax.random.key(0)))()
    lora = LoRAConfig(rank=2, alpha=4.0, targets=r"layers_0/moe/(shared/\w+|shared_gate)/kernel")
    adapters = moved(init_adapters(lora, mixed, jax.random.key(0)))
    assert len(adapter_pairs(adapters)) == 4
    x = np.random.default_rng(0).standard_normal((2, 3, 16)).astype(np.float32)

    def run(params):
        block = Block(MIXED, default_router(MIXED))
        return np.asarray(block.apply({"params": params["layers_0"]}, x, method="shared_expert"))

    joined, merged = run(adapt(mixed, adapters, lora)), run(merge(mixed, adapters, lora))
    assert apart(joined, merged) < 1e-5 < 0.1 < apart(run(mixed), merged)


def test_stacked_layers_are_the_same(params, adapters):
    lora = dataclasses.replace(LORA, dropout=0.5)
    key = jax.random.key(4)
    one = logits(adapt(params, adapters, lora, key), TOKENS)
    stacked = stack_layers(params)
    assert apart(logits(adapt(stacked, stack_layers(adapters), lora, key), TOKENS), np.asarray(one)) < 1e-5
    fresh = init_adapters(lora, stacked, key)
    expected = stack_layers(init_adapters(lora, params, key))
    assert jax.tree.all(jax.tree.map(np.array_equal, fresh, expected))


# --- quantised models


def test_a_quantised_model_with_adapters_is_the_sum(params, adapters):
    small = jit(functools.partial(quantise_params, quantise="int4"))(params)
    is_small = lambda x: isinstance(x, Quantised)  # noqa: E731
    wide = jax.tree.map(lambda x: dequantise(x) if is_small(x) else x, small, is_leaf=is_small)
    wide["head"]["lm_head"] = np.asarray(wide["head"]["lm_head"])
    truth = numpy_decoder.run(CONFIG, summed(wide, adapters, 2.0), TOKENS, [12, 12])
    assert apart(logits(adapt(small, adapters, LORA), TOKENS), truth) < 2e-5
    assert apart(logits(small, TOKENS), truth) > 0.5
    with pytest.raises(InputError, match=r"layers_0/attn/./kernel is quantised.*without quantise="):
        merge(small, adapters, LORA)


@given(st.integers(0, 2**31), st.sampled_from([None, 4, 8]), st.floats(0.1, 4.0))
@settings(max_examples=15, deadline=None)
def test_products_equal_those_of_the_whole_matrix(seed, bits, scale):
    rng = np.random.default_rng(seed)
    w, a, b, x = (np.float32(rng.standard_normal(s)) for s in ((8, 6), (8, 2), (2, 6), (5, 8)))
    kernel = jnp.asarray(w) if bits is None else quantise(jnp.asarray(w), bits=bits)
    matrix = Adapted(kernel, jnp.asarray(a), jnp.asarray(b), None, scale, 0.0)
    w = w if bits is None else np.asarray(dequantise(kernel))
    np.testing.assert_allclose(whole(matrix, jnp.float32), w + scale * a @ b, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(added(jnp.asarray(x), matrix), scale * x @ a @ b, rtol=1e-4, atol=1e-4)


# --- dropout


def test_dropped_inputs_are_zero_and_the_others_larger():
    one = jnp.eye(16)
    x = jnp.arange(1.0, 16 * 500 + 1).reshape(500, 16)
    got = added(x, Adapted(one, one, one, jax.random.key(0), 1.0, 0.25)) / x
    kept = np.asarray(got) != 0
    np.testing.assert_allclose(got[kept], 1 / 0.75, rtol=1e-6)
    assert abs(kept.mean() - 0.75) < 6 * (0.25 * 0.75 / kept.size) ** 0.5
    assert len({row.tobytes() for row in kept}) > 400  # 2^16 masks, few of them likely


def test_every_module_drops_its_own(params, adapters):
    lora = dataclasses.replace(LORA, dropout=0.5)
    joined = flatten_dict(adapt(params, adapters, lora, jax.random.key(3)))
    keys = [jax.random.key_data(leaf.key).tobytes() for leaf in joined.values() if isinstance(leaf, Adapted)]
    assert len(keys) == len(set(keys)) == 14


def test_nothing_is_dropped_without_a_key(params, adapters):
    lora = dataclasses.replace(LORA, dropout=0.5)
    sure = logits(adapt(params, adapters, LORA), TOKENS)
    assert np.array_equal(logits(adapt(params, adapters, lora), TOKENS), sure)
    assert np.array_equal(logits(adapt(params, adapters, LORA, jax.random.key(0)), TOKENS), sure)
    assert apart(logits(adapt(params, adapters, lora, jax.random.key(0)), TOKENS), np.asarray(sure)) > 0.1


# --- training


def nbytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.fixture(scope="module")
def trained(params):
    """A step on an int4 model, before and after 8 batches, and what the compiled program says of its memory."""
    lora = dataclasses.replace(LORA, dropout=0.1)
    small = jit(functools.partial(quantise_params, quantise="int4"))(params)
    loss, optimizer = LoRALoss(NextTokenLoss(CONFIG), lora), optax.adam(2e-2)
    fresh = init_adapters(lora, small, jax.random.key(0))
    begin = init_state(fresh, optimizer, state=loss.init_state(small))
    step = make_step(loss, optimizer, compiler_options={"xla_backend_optimization_level": 0})
    run = step.lower(begin, BATCH, jax.random.key(0)).compile()
    memory = run.memory_analysis()
    state, losses = jax.tree.map(jnp.copy, begin), []
    addresses = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state.state)]
    for _ in range(8):
        state, metrics = run(state, BATCH, jax.random.key(0))
        losses.append(float(metrics["train/loss"]))
    return begin, state, losses, memory, addresses


def test_only_adapters_have_optimiser_state(trained):
    begin, state, _, _, _ = trained
    # By hand: q 16+32, k and v 16+16, o 32+16, three of the feed-forward 16+24; rank 3, two layers, float32.
    size = 4 * 3 * 2 * (48 + 32 + 32 + 48 + 3 * 40)
    assert nbytes(begin.params) == size
    assert nbytes(state.opt_state) == 2 * size + 4  # two moments and a count
    assert nbytes(trained_part(state)) == 3 * size + 4 + 4


def test_adapters_learn_and_the_model_stays(trained):
    begin, state, losses, _, _ = trained
    assert losses[-1] < 0.8 * losses[0]
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(np.any(a != b)), begin.params, state.params))
    same = jax.tree.map(np.array_equal, begin.state[FROZEN], state.state[FROZEN])
    assert jax.tree.all(same)


def test_the_model_passes_through_a_step_without_a_copy(trained):
    begin, state, _, memory, addresses = trained
    assert memory.alias_size_in_bytes == nbytes(begin)
    assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state.state)] == addresses


def test_gradients_are_those_of_the_sum(params, adapters):
    """d/da = scale * dW b^T, d/db = scale * a^T dW, with dW from a plain model."""
    inner = NextTokenLoss(CONFIG)
    loss = LoRALoss(inner, LORA)
    key = jax.random.key(0)

    @jit
    def both(params, adapters):
        ours = jax.grad(lambda x: loss(x, BATCH, key, state={FROZEN: params})[0])(adapters)
        return ours, jax.grad(lambda x: inner(x, BATCH, key, state={})[0])(merge(params, adapters, LORA))

    ours, dense = both(params, adapters)
    pairs, given_pairs, full = adapter_pairs(ours), adapter_pairs(adapters), flatten_dict(dense, sep="/")
    for path, pair in pairs.items():
        a, b, w = given_pairs[path]["a"], given_pairs[path]["b"], np.asarray(full[path], np.float64)
        assert apart(pair["a"], 2.0 * w @ b.T) < 1e-4 and apart(pair["b"], 2.0 * a.T @ w) < 1e-4, path


def test_the_loss_keeps_the_rest_of_the_state():
    def counting(params, batch, key, *, state):
        assert set(state) == {"seen"}
        return jnp.sum(params["layers_0"]["attn"]["q"]["kernel"].a), Aux({}, {"seen": state["seen"] + 1})

    frozen = {"layers_0": {"attn": {"q": {"kernel": jnp.ones((4, 4))}}}}
    lora = LoRAConfig(rank=2)
    loss = LoRALoss(counting, lora)
    assert loss.init_state(frozen) == {FROZEN: frozen}
    adapters = init_adapters(lora, frozen, jax.random.key(0))
    _, aux = loss(adapters, {}, jax.random.key(0), state={"seen": 3, FROZEN: frozen})
    assert aux.state["seen"] == 4 and aux.state[FROZEN] is frozen


def test_training_drops_by_the_step_and_apart_from_the_loss():
    seen = []

    def look(params, batch, key, *, state):
        seen.extend((key, params["layers_0"]["attn"]["q"]["kernel"].key))
        return jnp.float32(0), Aux({}, state)

    frozen = {"layers_0": {"attn": {"q": {"kernel": jnp.ones((4, 4))}}}}
    lora = LoRAConfig(rank=2, dropout=0.5)
    adapters = init_adapters(lora, frozen, jax.random.key(0))
    for step in (0, 1, 0):
        LoRALoss(look, lora)(adapters, {}, jax.random.key(step), state={FROZEN: frozen})
    first, second, again = (tuple(jax.random.key_data(key).tobytes() for key in seen[i : i + 2]) for i in (0, 2, 4))
    assert len({*first, *second}) == 4 and first == again


# --- refusals


@pytest.mark.parametrize(
    "values, message",
    [
        ({"rank": 0}, "lora.rank=0 must be a whole number of at least 1"),
        ({"rank": 1.5}, "lora.rank=1.5"),
        ({"alpha": 0.0}, "lora.alpha=0.0 must be above 0"),
        ({"alpha": float("nan")}, "lora.alpha=nan"),
        ({"dropout": 1.0}, r"lora.dropout=1.0 must be in \[0, 1\)"),
        ({"dropout": -0.1}, "lora.dropout=-0.1"),
        ({"targets": "attn/(q"}, r"lora.targets='attn/\(q' is no regular expression"),
    ],
)
def test_wrong_values_are_named(values, message):
    with pytest.raises(InputError, match=message):
        LoRAConfig(**values)


@pytest.mark.parametrize(
    "targets, message",
    [
        ("q_proj", "'q_proj' matches no parameter. It is one of qv, attention, all, .*layers_0/attn/q/kernel"),
        (".*norm/scale", "norm/scale, which is no matrix"),
        (r".*attn/q/.*", "matches layers_0/attn/q/bias, which is no matrix"),
        ("embed/embedding", "matches embed/embedding, a table of the vocabulary, which is not adapted"),
        ("head/lm_head", "a table of the vocabulary"),
        (r"layers_0/moe/experts/\w+", "matrices of experts, which are not adapted.*targets='all'"),
        (r".*/kernel", "matches layers_0/moe/router/kernel, a router"),
    ],
)
def test_targets_that_are_no_kernels_are_named(targets, message):
    shapes = jax.eval_shape(lambda: init(MIXED, jax.random.key(0)))
    with pytest.raises(InputError, match=message):
        init_adapters(LoRAConfig(targets=targets), shapes, jax.random.key(0))


def test_adapters_of_another_model_are_named(params, adapters):
    with pytest.raises(InputError, match=r"hold layers_1/attn/./kernel, which the model lacks"):
        adapt({name: part for name, part in params.items() if name != "layers_1"}, adapters, LORA)
    wide = jax.eval_shape(lambda: init(dataclasses.replace(CONFIG, width=32), jax.random.key(0)))
    with pytest.raises(InputError, match=r"the kernel \[32 16\] wants \(32, 3\) and \(3, 16\)"):
        adapt(wide, adapters, LORA)
    with pytest.raises(InputError, match="these are no adapters"):
        adapt(params, params, LORA)
    with pytest.raises(InputError, match="these are no adapters"):
        merge(params, {}, LORA)
    with pytest.raises(InputError, match="has an adapter already"):
        adapt(adapt(params, adapters, LORA), adapters, LORA)
