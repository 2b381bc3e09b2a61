"""Rotary embedding against closed forms in float64, and what must hold for any of them."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxfw.core.errors import InputError
from jaxfw.ops.rope import KINDS, Rope, attention_factor, inverse_frequencies, rotate, rotation

settings.register_profile("rope", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("rope")

THETAS = st.sampled_from([100.0, 10000.0, 500000.0, 1e6])
FACTORS = st.floats(1.0, 64.0)
ORIGINALS = st.sampled_from([32, 512, 2048, 8192])
WIDTHS = st.sampled_from([4, 16, 64, 96, 128])


def plain(theta, width):
    return theta ** (-2 * np.arange(width // 2) / width)


@given(THETAS, FACTORS, WIDTHS)
def test_default_linear_and_unstretched_dynamic(theta, factor, width):
    expected = plain(theta, width)
    for rope, divisor in (
        (Rope(theta), 1.0),
        (Rope(theta, "linear", factor), factor),
        (Rope(theta, "dynamic", factor, original_positions=64), 1.0),
    ):
        got = inverse_frequencies(rope, width)
        assert got.dtype == np.float32 and got.shape == (width // 2,)
        np.testing.assert_allclose(got, expected / divisor, rtol=1e-6)


@given(THETAS, FACTORS, WIDTHS, ORIGINALS, st.floats(0.5, 2.0), st.floats(2.5, 8.0))
def test_llama3(theta, factor, width, original, low, high):
    """Turns over the original context: above `high` untouched, below `low` slowed by the factor, linear between."""
    rope = Rope(theta, "llama3", factor, original_positions=original, low_freq_factor=low, high_freq_factor=high)
    fast = plain(theta, width)
    turns = original * fast / (2 * math.pi)
    weight = np.clip((turns - low) / (high - low), 0, 1)
    expected = weight * fast + (1 - weight) * fast / factor
    np.testing.assert_allclose(inverse_frequencies(rope, width), expected, rtol=2e-5)


@given(THETAS, FACTORS, WIDTHS, ORIGINALS, st.floats(8.0, 64.0), st.floats(0.5, 2.0), st.booleans())
def test_yarn(theta, factor, width, original, fast_turns, slow_turns, truncate):
    """Pairs that make many turns over the original context are kept, those with few are slowed; a ramp between."""
    rope = Rope(
        theta, "yarn", factor, original_positions=original, beta_fast=fast_turns, beta_slow=slow_turns,
        truncate=truncate,
    )  # fmt: skip
    # theta**(-2 i / width) * original = 2 pi turns, solved for i.
    first, last = (width / 2 * math.log(original / (2 * math.pi * turns), theta) for turns in (fast_turns, slow_turns))
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    pairs = np.arange(width // 2)
    slowed = np.clip((pairs - first) / (last - first or 0.001), 0, 1)
    expected = plain(theta, width) * ((1 - slowed) + slowed / factor)
    np.testing.assert_allclose(inverse_frequencies(rope, width), expected, rtol=2e-5, atol=1e-9)


def test_the_yarn_ramp_is_met_at_both_ends():
    """Example by hand: width 128, theta 1e4, context 4096: pairs to 20 are kept, from 46 on divided by 16."""
    rope = Rope(10000.0, "yarn", 16.0, original_positions=4096)
    ratio = plain(10000.0, 128) / inverse_frequencies(rope, 128)
    np.testing.assert_allclose(ratio[:21], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[46:], 16, rtol=1e-6)
    assert np.all(np.diff(ratio[20:47]) > 0)


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({}, 0.1 * math.log(16) + 1),
        ({"factor": 1.0}, 1.0),
        ({"attention_factor": 1.25}, 1.25),
        ({"mscale": 2.0, "mscale_all_dim": 0.5}, (0.2 * math.log(16) + 1) / (0.05 * math.log(16) + 1)),
        ({"mscale": 2.0}, 0.1 * math.log(16) + 1),
    ],
)
def test_yarn_attention_factor(fields, expected):
    rope = Rope(kind="yarn", original_positions=64, **{"factor": 16.0} | fields)
    assert attention_factor(rope) == pytest.approx(expected, rel=1e-12)
    cos, sin = rotation(rope, jnp.arange(5)[None], width=8, seq_len=jnp.array([5]))
    np.testing.assert_allclose(np.hypot(cos, sin), expected, rtol=1e-6)


@given(THETAS, st.floats(1.5, 8.0), st.integers(65, 1000), st.sampled_from([4, 16, 64]))
def test_dynamic_stretches_each_row_by_its_own_length(theta, factor, length, width):
    """arXiv:2309.00071, appendix: theta grows so that the slowest pair is slowed by the stretch s, the fastest not."""
    rope = Rope(theta, "dynamic", factor, original_positions=64)
    positions = jnp.broadcast_to(jnp.arange(3), (3, 3))
    cos, _ = rotation(rope, positions, width=width, seq_len=jnp.array([5, 64, length]))
    stretch = factor * length / 64 - (factor - 1)
    stretched = plain(theta * stretch ** (width / (width - 2)), width)
    assert stretched[-1] * stretch == pytest.approx(plain(theta, width)[-1])
    for row, frequencies in zip(np.asarray(cos), (plain(theta, width), plain(theta, width), stretched)):
        np.testing.assert_allclose(row, np.cos(np.arange(3)[:, None] * frequencies), atol=2e-6)


def make(kind):
    return Rope(kind=kind, factor=4.0, original_positions=16, theta=100.0, beta_fast=2.0)


@given(st.sampled_from(KINDS), st.integers(0, 2**32 - 1), st.integers(0, 200))
def test_rotation_keeps_norms(kind, seed, position):
    rope, width = make(kind), 16
    x = jnp.asarray(np.random.default_rng(seed).standard_normal((1, 4, 2, width)), jnp.float32)
    positions = jnp.full((1, 4), position)
    turned = rotate(x, *rotation(rope, positions, width=width, seq_len=jnp.array([position + 1])))
    pairs, before = (np.stack(np.split(np.asarray(y), 2, axis=-1)) for y in (turned, x))
    expected = np.linalg.norm(before, axis=0) * attention_factor(rope)
    np.testing.assert_allclose(np.linalg.norm(pairs, axis=0), expected, rtol=1e-5, atol=1e-6)


@given(
    st.sampled_from(KINDS), st.integers(0, 2**32 - 1), st.integers(0, 60), st.integers(0, 60),
    st.integers(1, 60),
)  # fmt: skip
def test_only_the_distance_of_query_and_key_counts(kind, seed, at_query, at_key, shift):
    rope, width, seq_len = make(kind), 16, jnp.array([128])
    rng = np.random.default_rng(seed)
    q, k = (jnp.asarray(rng.standard_normal((1, 1, 1, width)), jnp.float32) for _ in "qk")

    def product(query_position, key_position):
        turned = (
            rotate(x, *rotation(rope, jnp.array([[p]]), width=width, seq_len=seq_len))
            for x, p in ((q, query_position), (k, key_position))
        )
        query, key = turned
        return float(jnp.sum(query * key))

    here = product(at_query, at_key)
    assert product(at_query + shift, at_key + shift) == pytest.approx(here, abs=2e-4)


def test_the_distance_does_count():
    q = jnp.ones((1, 1, 1, 16))
    rope = Rope()
    near, far = (rotate(q, *rotation(rope, jnp.array([[p]]), width=16, seq_len=jnp.array([9]))) for p in (0, 8))
    assert abs(float(jnp.sum(q * near) - jnp.sum(q * far))) > 1


def test_pairs_are_halves_not_neighbours():
    x = jnp.zeros((1, 1, 1, 4)).at[..., 0].set(1.0)
    turned = rotate(x, *rotation(Rope(), jnp.array([[1]]), width=4, seq_len=jnp.array([2])))
    np.testing.assert_allclose(turned[0, 0, 0], [math.cos(1), 0, math.sin(1), 0], rtol=1e-6)


def test_rotation_keeps_the_dtype():
    cos, sin = rotation(Rope(), jnp.arange(3)[None], width=4, seq_len=jnp.array([3]))
    assert cos.dtype == sin.dtype == jnp.float32
    assert rotate(jnp.ones((1, 3, 2, 4), jnp.bfloat16), cos, sin).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"kind": "lama3"}, "rope.kind='lama3' is unknown.*Did you mean 'llama3'"),
        ({"theta": 1.0}, "rope.theta=1.0 must be above 1"),
        ({"kind": "linear", "factor": 0.5}, "rope.factor=0.5 must be at least 1"),
        *(
            ({"kind": kind, "factor": 2.0}, f"rope.original_positions=None is needed by rope.kind='{kind}'")
            for kind in ("dynamic", "yarn", "llama3")
        ),
        (
            {"kind": "llama3", "original_positions": 64, "low_freq_factor": 4.0},
            "rope.high_freq_factor=4.0 must be above rope.low_freq_factor=4.0",
        ),
    ],
)
def test_a_rope_that_means_nothing_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        Rope(**fields)
