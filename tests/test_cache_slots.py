"""Attention to slots of any position, and writing to slots, against loops in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfw.core.errors import InputError
from jaxfw.ops.attention import attend
from jaxfw.ops.slots import attend_first, attend_slots, write_slots
from tests.numpy_attention import attention

B, K, G, S, d, SCALE = 2, 2, 3, 12, 8, 0.3


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def cache():
    """Keys and values, and positions up to 19 in no order; slots 3 and 7 of head 1 are empty."""
    positions = np.stack([np.random.default_rng(i).permutation(20)[:S] for i in range(B * K)]).reshape(B, K, S)
    positions[:, 1, [3, 7]] = -1
    return draw(B, K, S, d, seed=1), draw(B, K, S, d, seed=2), positions.astype(np.int32)


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("T", [1, 4])
def test_a_query_reads_the_slots_at_or_before_it(T, window):
    k, v, held = cache()
    q, now = draw(B, T, K * G, d), np.array([[10], [19]], np.int32) - np.arange(T, dtype=np.int32)
    call = jax.jit(functools.partial(attend_slots, scale=SCALE, window=window))
    ours = call(q, k, v, held, now)
    for b in range(B):
        age = now[b][None, :, None] - held[b][:, None, :]
        visible = (age >= 0) & (held[b][:, None, :] >= 0) & (age < (window or 99))
        expected = attention(q[b], k[b], v[b], visible, SCALE)
        reads = np.repeat(visible.any(axis=2), G, axis=0).T
        np.testing.assert_allclose(ours[b][reads], expected[reads], atol=2e-6)
    assert np.all(np.isfinite(ours))


def test_slots_in_order_are_read_as_by_attend():
    k, v, _ = cache()
    q, now = draw(B, 4, K * G, d), np.array([[3, 4, 5, 6], [8, 9, 10, 11]], np.int32)
    held = np.broadcast_to(np.arange(S, dtype=np.int32), (B, K, S))
    for dtype in (jnp.float32, jnp.bfloat16):
        args = [jnp.asarray(x, dtype) for x in (q, k, v)]
        ours = attend_slots(*args, held, now, scale=SCALE, window=6)
        expected = attend(*args, positions=now, scale=SCALE, window=6)
        assert ours.dtype == expected.dtype == dtype
        np.testing.assert_allclose(np.float32(ours), np.float32(expected), atol=1e-6)


def test_where_a_slot_lies_does_not_matter():
    k, v, held = cache()
    q, now = draw(B, 1, K * G, d), np.full((B, 1), 15, np.int32)
    order = np.random.default_rng(3).permutation(S)
    ours = attend_slots(q, k[:, :, order], v[:, :, order], held[:, :, order], now, scale=SCALE)
    np.testing.assert_allclose(ours, attend_slots(q, k, v, held, now, scale=SCALE), atol=1e-6)


@pytest.mark.parametrize("window", [None, 4])
def test_one_query_reads_the_first_slots(window):
    k, v, _ = cache()
    q, lengths = draw(B, 1, K * G, d), np.array([1, 9], np.int32)
    ours = jax.jit(functools.partial(attend_first, scale=SCALE, window=window))(q, k, v, lengths)
    for b, length in enumerate(lengths):
        visible = np.zeros((K, 1, S), bool)
        visible[:, :, max(0, length - (window or S)) : length] = True
        np.testing.assert_allclose(ours[b], attention(q[b], k[b], v[b], visible, SCALE), atol=2e-6)


def test_a_softmax_of_another_precision_is_that_of_attend():
    q, (k, v, _), lengths = draw(B, 1, K * G, d), cache(), np.array([5, 12], np.int32)
    args = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    ours = attend_first(*args, lengths, scale=SCALE, softmax_dtype=jnp.bfloat16)
    expected = attend(*args, positions=lengths[:, None] - 1, scale=SCALE, softmax_dtype=jnp.bfloat16)
    np.testing.assert_array_equal(np.float32(ours), np.float32(expected))
    assert np.any(np.float32(ours) != np.float32(attend_first(*args, lengths, scale=SCALE)))


@pytest.mark.parametrize("trailing", [(), (d,)])
@pytest.mark.parametrize("heads", [1, K])
def test_tokens_are_written_where_they_belong_and_dropped_beyond_the_last_slot(trailing, heads):
    slots, new = draw(B, K, S, *trailing), draw(B, K, 3, *trailing, seed=1)
    at = np.stack([np.random.default_rng(i).permutation(S + 6)[:3] for i in range(B * heads)]).reshape(B, heads, 3)
    expected = slots.copy()
    for b, k, t in np.ndindex(B, K, 3):
        if at[b, k % heads, t] < S:
            expected[b, k, at[b, k % heads, t]] = new[b, k, t]
    assert np.any(at >= S)
    np.testing.assert_array_equal(jax.jit(write_slots)(slots, new, at), expected)


def test_heads_that_do_not_divide_are_refused():
    k, v, held = cache()
    with pytest.raises(InputError, match=r"H a multiple of K: got H=5, K=2"):
        attend_slots(draw(B, 1, 5, d), k, v, held, np.zeros((B, 1), np.int32), scale=SCALE)
