"""Attention rows and summaries equal a float64 softmax over the whole matrix, and never hold one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfw.core.errors import InputError
from jaxfw.ops import attention_rows as module
from jaxfw.ops.attention_rows import attention_lse, attention_rows, attention_summary

T, SCALE = 13, 0.3
LENGTHS = np.array([13, 5, 1], np.int32)
# (H, K), window, queries in a block: T = 13 is no multiple of 4, so that the last block is filled up
CASES = pytest.mark.parametrize(
    "heads, window, block", [((4, 2), None, 4), ((4, 2), 4, 256), ((3, 3), 4, 4), ((5, 1), None, 256)]
)


def queries_and_keys(heads, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    H, K = heads
    return jnp.asarray(rng.normal(size=(3, T, H, 8)) * 2, dtype), jnp.asarray(rng.normal(size=(3, K, T, 8)), dtype)


def softmax_of(q, k, window):
    """The whole [B H T S] matrix in float64, and its log-sum-exp [B T H]."""
    q, k = (np.asarray(x, np.float64) for x in (q, k))
    k = np.repeat(k, q.shape[2] // k.shape[1], axis=1)
    logits = np.einsum("bthd,bhsd->bhts", q, k) * SCALE
    for t in range(T):
        for s in range(T):
            if s > t or (window is not None and s <= t - window):
                logits[:, :, t, s] = -np.inf
    largest = logits.max(axis=-1, keepdims=True)
    total = np.exp(logits - largest).sum(axis=-1, keepdims=True)
    lse = (largest + np.log(total))[..., 0]
    return np.exp(logits - lse[..., None]), lse.swapaxes(1, 2)


@CASES
def test_lse_and_rows(monkeypatch, heads, window, block):
    monkeypatch.setattr(module, "LARGEST_BLOCK", block)
    q, k = queries_and_keys(heads)
    weights, lse = softmax_of(q, k, window)
    ours = attention_lse(q, k, scale=SCALE, window=window)
    np.testing.assert_allclose(ours, lse, atol=2e-6)
    positions = jnp.asarray([[0, 12, -1], [4, -1, 2], [-1, -1, 0]])
    at = jnp.maximum(positions, 0)
    q_at, lse_at = (jnp.stack([x[b, at[b]] for b in range(3)]) for x in (q, ours))
    rows = attention_rows(q_at, k, lse_at, positions=positions, scale=SCALE, window=window)
    assert rows.shape == (3, heads[0], 3, T) and rows.dtype == jnp.float32
    for b, p in np.ndindex(3, 3):
        position = int(positions[b, p])
        expected = weights[b, :, position] if position >= 0 else np.zeros((heads[0], T))
        np.testing.assert_allclose(rows[b, :, p], expected, atol=2e-6)


@CASES
def test_summary(monkeypatch, heads, window, block):
    monkeypatch.setattr(module, "LARGEST_BLOCK", block)
    q, k = queries_and_keys(heads)
    weights, lse = softmax_of(q, k, window)
    valid = np.arange(T) < LENGTHS[:, None]
    weights = weights * valid[:, None, :, None]
    regions = np.random.default_rng(1).integers(-1, 4, (3, T))  # -1 belongs to none, region 3 may be empty
    out = attention_summary(
        q, k, jnp.asarray(lse, jnp.float32), lengths=LENGTHS, scale=SCALE, window=window, regions=regions, n_regions=5
    )
    np.testing.assert_allclose(out.mass, weights.sum(axis=2), atol=1e-5)
    logs = np.log(np.where(weights > 0, weights, 1))
    np.testing.assert_allclose(out.entropy, -(weights * logs).sum(axis=-1), atol=1e-5)
    expected = np.stack([(weights * (regions == r)[:, None, None]).sum(axis=-1) for r in range(5)], axis=-1)
    np.testing.assert_allclose(out.regions, expected, atol=1e-5)
    plain = attention_summary(q, k, jnp.asarray(lse, jnp.float32), lengths=LENGTHS, scale=SCALE, window=window)
    assert plain.regions is None
    np.testing.assert_array_equal(plain.mass, out.mass)


def test_half_precision_inputs_give_float32_weights():
    q, k = queries_and_keys((4, 2), jnp.bfloat16)
    weights, _ = softmax_of(q.astype(jnp.float32), k.astype(jnp.float32), None)
    lse = attention_lse(q, k, scale=SCALE)
    positions = jnp.tile(jnp.arange(T), (3, 1))
    rows = attention_rows(q, k, lse, positions=positions, scale=SCALE)
    assert lse.dtype == rows.dtype == jnp.float32
    np.testing.assert_allclose(rows, weights, atol=2e-6)
    np.testing.assert_allclose(rows.sum(axis=-1), 1, atol=1e-5)


def test_gradients_through_blocks_are_those_of_the_whole_matrix(monkeypatch):
    monkeypatch.setattr(module, "LARGEST_BLOCK", 4)
    q, k = queries_and_keys((4, 2))
    weights = jnp.asarray(np.random.default_rng(2).normal(size=(3, T, 4)), jnp.float32)

    def plain(q, k):
        logits = jnp.einsum("bthd,bhsd->bths", q, jnp.repeat(k, 2, axis=1)) * SCALE
        lse = jax.nn.logsumexp(jnp.where(jnp.tri(T, dtype=bool)[:, None], logits, -jnp.inf), axis=-1)
        return jnp.sum(lse * weights)

    def ours(q, k):
        return jnp.sum(attention_lse(q, k, scale=SCALE) * weights)

    for got, expected in zip(*(jax.jit(jax.grad(f, (0, 1)))(q, k) for f in (ours, plain))):
        np.testing.assert_allclose(got, expected, atol=1e-5)

    @jax.jit
    def entropy(q):
        lse = attention_lse(q, k, scale=SCALE)
        return jnp.sum(attention_summary(q, k, lse, lengths=LENGTHS, scale=SCALE).entropy)

    gradient = jax.jit(jax.grad(entropy))(q)
    step = 1e-2 * jax.random.normal(jax.random.key(0), q.shape)
    difference = (entropy(q + step) - entropy(q - step)) / 2
    np.testing.assert_allclose(jnp.sum(gradient * step), difference, rtol=1e-2)


def largest_array(jaxpr):
    """The most elements of any value of a traced function, inner functions included."""
    found = 0
    for equation in jaxpr.eqns:
        found = max([found, *(np.prod(v.aval.shape, dtype=int) for v in equation.outvars)])
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found = max(found, largest_array(inner))
    return found


@pytest.mark.parametrize("function", ["lse", "summary"])
def test_no_matrix_of_all_queries_and_keys_is_alive(function):
    """At T = 32768 a [T T] of one head is 4 GiB: read off the traced and the compiled program, which is not run."""
    N, H = 32768, 2
    q, k = jax.ShapeDtypeStruct((1, N, H, 8), jnp.bfloat16), jax.ShapeDtypeStruct((1, 1, N, 8), jnp.bfloat16)
    lse, lengths = jax.ShapeDtypeStruct((1, N, H), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
    if function == "lse":
        run, inputs = functools.partial(attention_lse, scale=SCALE), (q, k)
    else:
        regions = jax.ShapeDtypeStruct((1, N), jnp.int32)

        def run(q, k, lse, lengths, regions):
            return attention_summary(q, k, lse, lengths=lengths, scale=SCALE, regions=regions, n_regions=8)

        inputs = (q, k, lse, lengths, regions)
    assert largest_array(jax.make_jaxpr(run)(*inputs).jaxpr) <= H * module.LARGEST_BLOCK * N
    compiled = jax.jit(run).lower(*inputs).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < N * N * 4 / 8


def test_blocks_shrink_where_their_logits_would_be_large():
    q, k = jax.ShapeDtypeStruct((4, 65536, 32, 8), "bfloat16"), jax.ShapeDtypeStruct((4, 8, 65536, 8), "bfloat16")
    assert module._block_size(q, k) == 8


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"k": (3, T, 2, 8)}, r"K a divisor of H=4: got \[3, 13, 2, 8\]. Collected keys are \[B T K d\]: swap"),
        ({"lse": (3, 4, T)}, r"lse has shape \[3, 4, 13\]: give \[B T H\] of the queries = \[3, 13, 4\]"),
        ({"positions": (3, 2)}, r"positions has shape \[3, 2\]: give \[B P\] of the queries = \[3, 13\]"),
        ({"lengths": (3, 1)}, r"lengths has shape \[3, 1\]: give \[B\] = \[3\]"),
        ({"regions": (3, 4), "n_regions": 2}, r"regions has shape \[3, 4\]: give \[B S\] = \[3, 13\]"),
        ({"n_regions": 2}, "regions and n_regions go together: got n_regions=2"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    shapes = {"q": (3, T, 4, 8), "k": (3, 2, T, 8), "lse": (3, T, 4), "lengths": (3,), "positions": (3, T)} | changes
    given = {name: jnp.zeros(shape) if isinstance(shape, tuple) else shape for name, shape in shapes.items()}
    positions, rest = given.pop("positions"), given
    with pytest.raises(InputError, match=message):
        if "positions" in changes:
            attention_rows(rest["q"], rest["k"], rest["lse"], positions=positions, scale=SCALE)
        else:
            attention_summary(rest.pop("q"), rest.pop("k"), rest.pop("lse"), scale=SCALE, **rest)
