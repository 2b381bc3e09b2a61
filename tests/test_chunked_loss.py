"""The loss in chunks of tokens: what the plain loss is, in value and gradients, without the logits of all tokens."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from jaxfw.core.errors import InputError
from jaxfw.ops.losses import chunked_log_probs, summed_nll, token_log_probs
from jaxfw.ops.quant import dequantise, quantise
from tests.processes import environment, run_together

B, T, D, V = 2, 7, 8, 33
RNG = np.random.default_rng(0)
X = RNG.normal(size=(B, T, D)).astype(np.float32)
MATRIX = RNG.normal(size=(V, D)).astype(np.float32)
TARGETS = RNG.integers(0, V, (B, T), np.int32)
WEIGHTS = (RNG.random((B, T)) * (RNG.random((B, T)) < 0.8)).astype(np.float32)
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def plain(x, matrix, targets, weights):
    return -jnp.sum(weights * token_log_probs(x @ matrix.T, targets))


def exact(x, matrix, targets, weights):
    """Value and gradients of x, matrix and weights, by formula in float64."""
    x, matrix, weights = (np.asarray(a, np.float64) for a in (x, matrix, weights))
    logits = x @ matrix.T
    log_probs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    is_target = np.eye(V)[targets]
    nll = -np.sum(log_probs * is_target, axis=-1)
    to_logits = (np.exp(log_probs) - is_target) * weights[..., None]
    return np.sum(weights * nll), (to_logits @ matrix, np.einsum("btv,btd->vd", to_logits, x), nll)


def close(ours, theirs, tolerance):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_value_and_gradients_equal_the_formula(chunk):
    """Chunks that divide the tokens and chunks that do not; every gradient has the cotangent in it."""
    run = compiled(jax.value_and_grad(lambda x, m, w: 3 * summed_nll(x, m, TARGETS, w, chunk=chunk), (0, 1, 2)))
    value, gradients = run(X, MATRIX, WEIGHTS)
    wanted, wanted_gradients = exact(X, MATRIX, TARGETS, WEIGHTS)
    close(value, 3 * wanted, 1e-6)
    close(compiled(functools.partial(summed_nll, chunk=chunk))(X, MATRIX, TARGETS, WEIGHTS), wanted, 1e-6)
    for ours, theirs in zip(gradients, wanted_gradients, strict=True):
        close(ours, 3 * theirs, 1e-5)


def test_log_probabilities_and_mapped_models():
    """`vmap` over models gives what each gives alone."""
    log_probs = compiled(functools.partial(chunked_log_probs, chunk=3))(X, MATRIX, TARGETS)
    close(log_probs, token_log_probs(X @ MATRIX.T, TARGETS), 1e-6)
    matrices = np.stack([MATRIX, MATRIX[::-1]])
    loss = jax.value_and_grad(lambda m, x: summed_nll(x, m, TARGETS, WEIGHTS, chunk=3), (0, 1))
    values, gradients = compiled(jax.vmap(loss, (0, None)))(matrices, X)
    for n in range(2):
        wanted, (to_x, to_matrix, _) = exact(X, matrices[n], TARGETS, WEIGHTS)
        close(values[n], wanted, 1e-6)
        close(gradients[0][n], to_matrix, 1e-5)
        close(gradients[1][n], to_x, 1e-5)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_matrix_has_no_gradient_but_x_has(bits):
    matrix = quantise(MATRIX, bits=bits, axis=-1)
    value, to_x = compiled(jax.value_and_grad(lambda x, m: summed_nll(x, m, TARGETS, WEIGHTS, chunk=4)))(X, matrix)
    wanted, (wanted_to_x, _, _) = exact(X, dequantise(matrix), TARGETS, WEIGHTS)
    close(value, wanted, 1e-6)
    close(to_x, wanted_to_x, 1e-5)


def products(f, *arguments):
    """Matrix products in the jaxpr, those of a loop once."""

    def count(jaxpr):
        inner = (count(sub) for eqn in jaxpr.eqns for sub in jaxprs_in_params(eqn.params))
        return sum(eqn.primitive.name == "dot_general" for eqn in jaxpr.eqns) + sum(inner)

    return count(jax.make_jaxpr(f)(*arguments).jaxpr)


def test_three_products_and_none_for_what_is_not_asked():
    loss = functools.partial(summed_nll, targets=TARGETS, weights=WEIGHTS, chunk=3)
    assert products(loss, X, MATRIX) == 1
    assert products(jax.grad(loss, (0, 1)), X, MATRIX) == 3
    assert products(jax.grad(loss), X, MATRIX) == 2  # a frozen matrix
    assert products(jax.grad(jax.jit(lambda x, m: loss(x, m))), X, MATRIX) == 2
    assert products(jax.grad(lambda x: loss(x, quantise(MATRIX, bits=8, axis=-1))), X) == 2


def test_half_precision_sums_in_float32():
    """bfloat16 operands: as near to the formula as their own rounding, gradients in their dtype."""
    x, matrix = jnp.asarray(X, jnp.bfloat16), jnp.asarray(MATRIX, jnp.bfloat16)
    run = compiled(jax.value_and_grad(lambda x, m: summed_nll(x, m, TARGETS, WEIGHTS, chunk=3), (0, 1)))
    value, gradients = run(x, matrix)
    wanted, wanted_gradients = exact(x, matrix, TARGETS, WEIGHTS)
    close(value, wanted, 1e-5)
    assert all(g.dtype == jnp.bfloat16 for g in gradients)
    for ours, theirs in zip(gradients, wanted_gradients[:2], strict=True):
        close(ours, theirs, 1e-2)


def held(f, *arguments):
    found = jax.jit(f).lower(*arguments).compile().memory_analysis()
    return found.temp_size_in_bytes + found.output_size_in_bytes


def test_memory_falls_as_predicted():
    """Results and temporaries: plain, 3 B T V floats and the gradients; chunked, 2 B c V floats and the gradients."""
    B, T, D, V, c = 4, 512, 64, 32_768, 32
    sizes = (B, T, D), (V, D)
    shapes = [jax.ShapeDtypeStruct(s, "float32") for s in sizes]
    targets, weights = jax.ShapeDtypeStruct((B, T), "int32"), jax.ShapeDtypeStruct((B, T), "float32")
    gradients = sum(map(math.prod, sizes))
    for loss, logits in ((functools.partial(summed_nll, chunk=c), 2 * B * c * V), (plain, 3 * B * T * V)):
        found = held(jax.grad(loss, (0, 1)), *shapes, targets, weights)
        assert found == pytest.approx(4 * (logits + gradients), rel=0.1)


def test_a_chunk_that_is_none_is_refused():
    for chunk in (0, -1, 2.5):
        with pytest.raises(InputError, match=r"chunk=.* must be a whole number from 1 on"):
            summed_nll(X, MATRIX, TARGETS, WEIGHTS, chunk=chunk)


def test_on_eight_devices():
    command = ["-m", "pytest", "-x", "-p", "no:cacheprovider", "tests/mesh_losses.py"]
    (done,) = run_together((command, environment(devices=8, JAX_PLATFORMS="cpu")), timeout=120)
    assert done.code == 0, done.out[-6000:] + done.err[-2000:]
    assert " passed" in done.out
