"""Quantised weights: the closed-form bound on each of them, and models that run on them."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jaxfw.core.errors import InputError
from jaxfw.core.mesh import abstract_mesh
from jaxfw.core.sharding import shardings, table
from jaxfw.generate import generate
from jaxfw.models import DecoderConfig, MoEConfig, forward, init
from jaxfw.models.accounting import parameter_count
from jaxfw.models.routing import Dense, Sorted
from jaxfw.models.sharding import decoder_rules
from jaxfw.ops import quant
from jaxfw.ops.quant import Quantised, dequantise, product, quantise
from jaxfw.weights import abstract_params, quantise_params

DENSE = DecoderConfig(
    vocab=64, width=16, ffn=24, layers=1, heads=4, kv_heads=2, head_dim=4, positions=64, init_std=0.3, qkv_bias=True
)
MIXED = dataclasses.replace(
    DENSE, qkv_bias=False, moe=MoEConfig(experts=4, per_token=2, ffn=8, shared=12, shared_gate=True)
)
ANY = st.floats(-(2.0**100), 2.0**100, allow_subnormal=False, width=32)
SHAPES = {-2: (12, 6), -1: (6, 12)}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("axis", [-2, -1])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_weight_is_off_by_more_than_half_a_step(bits, axis, data):
    """|error| <= max|w of the group| / 254, or / 14: the division and product round by parts in 10^7."""
    w = data.draw(arrays(np.float32, SHAPES[axis], elements=ANY))
    q = quantise(w, bits=bits, axis=axis)
    inputs_last = np.moveaxis(w, axis, -1).astype(np.float64)
    groups = inputs_last.reshape(6, -1, 12 if bits == 8 else 4)
    step = np.abs(groups).max(axis=-1, keepdims=True) / (127 if bits == 8 else 7)
    found = np.moveaxis(np.asarray(dequantise(q), np.float64), axis, -1).reshape(groups.shape)
    assert (np.abs(found - groups) <= step / 2 * (1 + 1e-5) + 1e-36).all()
    assert q.shape == w.shape and q.group == (12 if bits == 8 else 4)


@pytest.mark.parametrize("bits, largest", [(8, 127), (4, 7)])
def test_multiples_of_the_scale_come_back_exactly(bits, largest):
    steps = np.random.default_rng(0).integers(-largest, largest + 1, (256, 4))
    steps[::128] = largest
    w = np.float32(0.25) * steps
    assert (dequantise(quantise(w, bits=bits)) == w).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_zeros_stay_zeros(bits):
    assert (dequantise(quantise(np.zeros((8, 2), np.float32), bits=bits)) == 0).all()


@pytest.mark.parametrize("inputs, group", [(4096, 128), (14336, 128), (96, 32), (10, 2), (128, 128), (64, 64)])
def test_groups_are_the_largest_power_of_two_that_divides(inputs, group):
    assert quant.group_of(inputs, 4) == group
    assert quant.group_of(inputs, 8) == inputs


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape, axis", [((96, 6), -2), ((6, 96), -1), ((3, 96, 6), -2)])
@pytest.mark.parametrize("T", [2, 20])
def test_a_product_is_that_with_the_matrix(bits, shape, axis, T):
    """With few rows and with many: int4 has a form for each."""
    rng = np.random.default_rng(0)
    kernel = quantise(rng.standard_normal(shape).astype(np.float32), bits=bits, axis=axis)
    w = np.asarray(dequantise(kernel), np.float64)
    w = w.swapaxes(-1, -2) if axis == -1 else w
    x = rng.standard_normal((*shape[:-2], 2, T, 96)).astype(np.float32)
    expected = np.einsum("...btd,...df->...btf", x, w) if w.ndim == 2 else np.einsum("ebtd,edf->ebtf", x, w)
    np.testing.assert_allclose(product(jnp.asarray(x), kernel), expected, rtol=1e-5, atol=5e-5)
    assert product(jnp.asarray(x, jnp.bfloat16), kernel).dtype == jnp.bfloat16


def test_what_has_no_form_is_refused():
    with pytest.raises(InputError, match=r"a matrix \[4, 9\] has no int4 form.*give quantise='int8'"):
        quantise(np.ones((4, 9), np.float32), bits=4)
    with pytest.raises(InputError, match=r"quantise='int5' is unknown\. Known: int8, int4"):
        quantise_params({}, "int5")


# --- models


def params_of(config):
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    return jax.tree.map(lambda x: np.float32((x.ndim == 1) + 0.3 * rng.standard_normal(x.shape)), shapes)


def is_kernel(leaf):
    return isinstance(leaf, Quantised)


def widened(params):
    return jax.tree.map(lambda x: dequantise(x) if is_kernel(x) else x, params, is_leaf=is_kernel)


@pytest.mark.parametrize(
    "config, experts, name",
    [(DENSE, None, "int8"), (DENSE, None, "int4"), (MIXED, Dense(), "int8"), (MIXED, Sorted(), "int4")],
)
def test_a_forward_is_that_of_the_dequantised_model(config, experts, name):
    params, tokens = quantise_params(params_of(config), name), np.arange(12)[None] % 64
    run = jax.jit(lambda params: forward(config, params, tokens, experts=experts).logits)
    expected, found = run(widened(params)), run(params)
    assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()


def test_what_is_quantised():
    paths = jax.tree_util.tree_leaves_with_path(quantise_params(params_of(MIXED), "int8"), is_leaf=is_kernel)
    kinds = {jax.tree_util.keystr(path, simple=True, separator="/"): is_kernel(leaf) for path, leaf in paths}
    whole = {path for path, is_small in kinds.items() if not is_small}
    assert whole == {
        "embed/embedding", "head/norm/scale", "layers_0/attn_norm/scale", "layers_0/mlp_norm/scale",
        "layers_0/moe/router/kernel", "layers_0/moe/shared_gate/kernel",
    }  # fmt: skip
    assert len(kinds) - len(whole) == 4 + 3 + 3 + 1


@pytest.mark.parametrize("config, name", [(DENSE, "int4"), (MIXED, "int8")], ids=["dense", "experts"])
def test_generation_runs(config, name):
    """Greedy tokens of the quantised model are those of the dequantised one."""
    params = quantise_params(params_of(config), name)
    found, expected = (
        generate(config, params, [[1, 2, 3], [4]], max_new_tokens=4).tokens for params in (params, widened(params))
    )
    assert found == expected and len(found[0]) == 4


def test_training_on_them_is_refused():
    params = quantise_params(params_of(DENSE), "int8")
    with pytest.raises(TypeError, match="int8"):
        jax.grad(lambda params: forward(DENSE, params, np.ones((1, 2), np.int32)).logits.sum())(params)


def test_a_matrix_of_another_size_is_refused():
    params = quantise_params(params_of(DENSE), "int4")
    params["layers_0"]["attn"]["q"]["kernel"] = params["layers_0"]["mlp"]["gate"]["kernel"]
    with pytest.raises(InputError, match=re.escape("the quantised kernel is [16, 24], the config asks for [16, 16]")):
        forward(DENSE, params, np.ones((1, 2), np.int32))


@pytest.mark.parametrize("name, expected", [("int8", 1 + 4 / 16), ("int4", 0.5 + 4 / 16)])
def test_bytes(name, expected):
    """Of a matrix with 16 inputs, which are one group."""
    shapes = abstract_params(DENSE, quantise=name)
    kernel = shapes["layers_0"]["attn"]["q"]["kernel"]
    assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kernel)) == expected * 16 * 16
    params = jax.eval_shape(lambda: quantise_params(init(DENSE, jax.random.key(0)), name))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
    assert sum(int(np.prod(x.shape)) for x in jax.tree.leaves(shapes, is_leaf=is_kernel)) == parameter_count(DENSE)


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("sizes", [{"tensor": 2}, {"fsdp": 2, "tensor": 2}, {"expert": 2}, {"tensor": 4}])
def test_both_parts_have_a_layout(name, sizes):
    """Values lie as the matrix does; scales as far as they divide."""
    for config in (DENSE, MIXED):
        mesh, rules = abstract_mesh(**sizes), decoder_rules(config)
        whole = shardings(rules, mesh, abstract_params(config))
        parts = shardings(rules, mesh, abstract_params(config, quantise=name))
        for layer in ("attn/q", "attn/k", "attn/o", *(["mlp/down"] if config is DENSE else [])):
            part, kind = layer.split("/")
            assert parts["layers_0"][part][kind]["kernel"].values.spec == whole["layers_0"][part][kind]["kernel"].spec
        assert table(rules, mesh, abstract_params(config, quantise=name)).bytes_per_device > 0
