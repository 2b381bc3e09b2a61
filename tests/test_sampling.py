"""Choosing tokens: the filters against brute force in float64, draws against their distribution, rows apart."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from jaxfw.core.errors import InputError
from jaxfw.ops.sampling import Sampling, filter_logits, sample

BRUTE = settings(deadline=None, max_examples=100, derandomize=True)
DRAWS = 20_000
# Draws are fixed by their keys: a correct sampler passes for good, a wrong one is off by far more.
LEAST_P_VALUE = 1e-3
SLACK = 1e-5  # float32 sums of at most 12 probabilities, with room to spare

# Quarters are exact in float32 and often tie.
ROWS = st.sampled_from([1, 5, 12]).flatmap(
    lambda size: st.lists(st.integers(-12, 12).map(lambda n: n / 4), min_size=size, max_size=size)
)
TEMPERATURES = st.sampled_from([0.5, 0.7, 1.0, 1.5, 4.0])
OPTIONAL_K = st.none() | st.integers(1, 6) | st.just(15)
OPTIONAL_P = st.none() | st.floats(0.01, 1.0)
OPTIONAL_MIN_P = st.none() | st.floats(0.0, 1.0)


def softmax(values):
    exponentials = np.exp(np.asarray(values, np.float64) - np.max(values))
    return exponentials / exponentials.sum()


def kept_by_hand(row, temperature, top_k, top_p, min_p):
    """The tokens that survive, one filter after the other, each by its definition."""
    value = {token: logit / temperature for token, logit in enumerate(row)}

    def with_ties(some):
        return {token: value[token] for token in value if value[token] >= min(some.values())}

    if top_k is not None:
        value = with_ties(dict(sorted(value.items(), key=lambda item: -item[1])[:top_k]))
    if top_p is not None:
        some, mass = {}, 0.0
        order = sorted(value, key=lambda token: -value[token])
        for token, prob in zip(order, softmax([value[token] for token in order])):
            if mass < top_p or not some:
                some[token] = value[token]
            mass += prob
        value = with_ties(some)
    if min_p is not None:
        probs = softmax(list(value.values()))
        value = {token: value[token] for token, prob in zip(value, probs) if prob >= min_p * probs.max()}
    return set(value)


def survivors(row, **sampling):
    filtered = filter_logits(jnp.asarray([row], jnp.float32), Sampling(**sampling))[0]
    return {int(token) for token in np.flatnonzero(np.isfinite(filtered))}


@BRUTE
@given(ROWS, TEMPERATURES, OPTIONAL_K, OPTIONAL_P, OPTIONAL_MIN_P)
@example([1.0, 2.0, 2.0, 0.0], 1.0, 1, None, None)
@example([2.0, 1.0, 1.0, 1.0, 0.0], 1.0, 2, 0.5, None)
@example([0.0, 0.0, 0.0], 1.0, None, 0.01, 1.0)
def test_filters_keep_what_brute_force_keeps(row, temperature, top_k, top_p, min_p):
    """Where rounding can decide, the two neighbouring answers bracket ours; elsewhere all three are one."""
    shifts = (-SLACK, SLACK)
    fewest, most = (
        kept_by_hand(
            row,
            temperature,
            top_k,
            None if top_p is None else top_p + shift,
            None if min_p is None else min_p * (1 - shift),
        )
        for shift in shifts
    )
    kept = survivors(row, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    assert fewest <= kept <= most
    assert int(np.argmax(row)) in kept


@BRUTE
@given(ROWS, TEMPERATURES, OPTIONAL_K, OPTIONAL_P)
def test_what_is_kept_is_the_logit_over_the_temperature(row, temperature, top_k, top_p):
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    filtered = np.asarray(filter_logits(jnp.asarray([row], jnp.bfloat16), sampling))[0]
    assert filtered.dtype == np.float32
    expected = np.asarray(row, np.float32) / np.float32(temperature)
    np.testing.assert_allclose(filtered[np.isfinite(filtered)], expected[np.isfinite(filtered)], rtol=1e-6)
    assert np.all(np.isneginf(filtered[~np.isfinite(filtered)]))


@BRUTE
@given(ROWS, st.integers(1, 20), st.randoms(use_true_random=False))
def test_filters_do_not_depend_on_the_order_of_tokens(row, top_k, random):
    order = list(range(len(row)))
    random.shuffle(order)
    options = {"temperature": 1.0, "top_k": top_k, "top_p": 0.8}
    moved = survivors([row[i] for i in order], **options)
    assert {order[i] for i in moved} == survivors(row, **options)


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"top_k": 2, "top_p": 0.5}, {0}),  # top-k first: 0.4 of 0.7 is already above one half
        ({"top_p": 0.5}, {0, 1}),
        ({"top_p": 0.4 + 1e-3}, {0, 1}),
        ({"top_p": 0.4 - 1e-3}, {0}),
        ({"top_p": 1e-6}, {0}),
        ({"min_p": 0.5 - 1e-3}, {0, 1, 2}),  # 0.2 is half of 0.4
        ({"min_p": 0.5 + 1e-3}, {0, 1}),
        ({"temperature": 0.5, "min_p": 0.5}, {0, 1}),  # squares: 0.16, 0.09, 0.04, 0.01
        ({"top_k": 3}, {0, 1, 2}),
        ({}, {0, 1, 2, 3}),
    ],
)
def test_filters_on_four_tokens(options, expected):
    row = np.log([0.4, 0.3, 0.2, 0.1])
    assert survivors(row, **{"temperature": 1.0} | options) == expected


@pytest.mark.parametrize("options", [{"top_p": 1.0}, {"min_p": 0.0}, {"top_k": 10**6}])
@pytest.mark.parametrize("spread", [0.0, 0.1, 3.0])
@pytest.mark.parametrize("seed", range(4))
def test_filters_that_are_wide_open_drop_nothing(options, spread, seed):
    """At a vocabulary's size, where sums of probabilities round."""
    row = np.random.default_rng(seed).standard_normal(128_256).astype(np.float32) * spread
    assert len(survivors(row, temperature=1.0, **options)) == row.size


def test_min_p_of_one_keeps_the_largest_and_its_ties():
    assert survivors([3.0, 1.0, 3.0, 2.75], temperature=1.0, min_p=1.0) == {0, 2}


def keys_of(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


def counts(logits, sampling, seed=0):
    drawn = sample(jnp.broadcast_to(logits, (DRAWS, len(logits))), sampling, keys_of(DRAWS, seed))
    return np.bincount(np.asarray(drawn), minlength=len(logits))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature):
    logits = np.array([0.3, -1.0, 1.5, 0.0, 2.0, -0.5], np.float32)
    seen = counts(logits, Sampling(temperature=temperature))
    assert stats.chisquare(seen, DRAWS * softmax(logits / temperature)).pvalue > LEAST_P_VALUE
    other = DRAWS * softmax(logits / (1.1 * temperature))
    assert stats.chisquare(seen, other).pvalue < 1e-6, "10 % of temperature would show"


@pytest.mark.parametrize(
    "options, kept", [({"top_k": 3}, 3), ({"top_p": 0.6}, 2), ({"min_p": 0.3}, 3), ({"top_k": 4, "min_p": 0.3}, 3)]
)
def test_draws_follow_what_the_filters_leave(options, kept):
    probs = np.array([0.4, 0.3, 0.15, 0.1, 0.05])
    seen = counts(np.log(probs).astype(np.float32), Sampling(temperature=1.0, **options))
    assert np.all(seen[:kept] > 0) and np.all(seen[kept:] == 0)
    expected = DRAWS * probs[:kept] / probs[:kept].sum()
    assert stats.chisquare(seen[:kept], expected).pvalue > LEAST_P_VALUE


def test_the_steps_of_one_key_are_independent_draws():
    logits = jnp.array([[0.0, 1.0, 0.5]])
    draw = jax.vmap(lambda step: sample(logits, Sampling(temperature=1.0), keys_of(1, seed=7), step=step)[0])
    drawn = np.asarray(draw(jnp.arange(DRAWS)))
    expected = DRAWS * softmax(np.asarray(logits[0]))
    assert stats.chisquare(np.bincount(drawn, minlength=3), expected).pvalue > LEAST_P_VALUE
    pairs = np.zeros((3, 3))
    np.add.at(pairs, (drawn[0::2], drawn[1::2]), 1)
    assert stats.chi2_contingency(pairs).pvalue > LEAST_P_VALUE


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.9, "min_p": 0.01}])
def test_a_row_draws_the_same_alone_and_in_any_batch(options):
    rng = np.random.default_rng(3)
    logits, keys = jnp.asarray(rng.standard_normal((16, 50)) * 2, jnp.float32), keys_of(16)
    sampling = Sampling(temperature=0.9, **options)
    for step in (0, 5):
        together = np.asarray(sample(logits, sampling, keys, step=step))
        alone = [int(sample(logits[b : b + 1], sampling, keys[b : b + 1], step=step)[0]) for b in range(16)]
        assert together.tolist() == alone
        order = rng.permutation(16)
        moved = np.asarray(sample(logits[order], sampling, keys[order], step=step))
        assert moved.tolist() == together[order].tolist()
    assert len(set(together.tolist())) > 4


def test_other_keys_and_other_steps_draw_other_tokens():
    logits, sampling = jnp.zeros((64, 1000)), Sampling(temperature=1.0)
    first = np.asarray(sample(logits, sampling, keys_of(64), step=0))
    assert len(set(first.tolist())) > 50
    for other in (
        sample(logits, sampling, keys_of(64), step=1),
        sample(logits, sampling, keys_of(64, seed=1), step=0),
    ):
        assert np.mean(first == np.asarray(other)) < 0.1
    assert first.tolist() == np.asarray(sample(logits, sampling, keys_of(64), step=0)).tolist()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_greedy_is_argmax_whatever_the_keys(dtype):
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((32, 40)), dtype)
    for seed in (0, 1):
        drawn = sample(logits, Sampling(), keys_of(32, seed))
        assert drawn.dtype == jnp.int32
        assert drawn.tolist() == np.argmax(np.asarray(logits, np.float32), axis=-1).tolist()
    assert int(sample(jnp.array([[1.0, 2.0, 2.0]]), Sampling(), keys_of(1))[0]) == 1, "the first of equals"


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-4}, {"min_p": 1.0}, {}])
def test_draws_from_one_token_are_greedy(options):
    logits = jnp.asarray(np.random.default_rng(0).permuted(np.tile(np.arange(40.0), (32, 1)), axis=1))
    sampling = Sampling(temperature=1.0 if options else 1e-3, **options)
    assert sample(logits, sampling, keys_of(32)).tolist() == jnp.argmax(logits, axis=-1).tolist()


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.0}])
def test_a_forbidden_token_is_never_drawn(options):
    logits = jnp.array([-jnp.inf, 0.0, -jnp.inf, 0.5])
    seen = counts(logits, Sampling(temperature=1.0, **options))
    assert seen[0] == seen[2] == 0 and seen[1] > 0 and seen[3] > 0


def test_other_values_do_not_retrace():
    draw = jax.jit(chex.assert_max_traces(n=1)(lambda logits, sampling, keys: sample(logits, sampling, keys)))
    for temperature, top_k, top_p, min_p in [(1.0, 5, 0.9, 0.1), (0.3, 40, 0.5, 0.0), (2.0, 1, 1.0, 1.0)]:
        draw(jnp.zeros((2, 9)), Sampling(temperature, top_k, top_p, min_p), keys_of(2))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": 0.0}, "temperature=0.0 must be above 0 .*greedy"),
        ({"temperature": -1.0}, "temperature=-1.0 must be above 0"),
        ({"temperature": float("nan")}, "temperature=nan must be above 0"),
        ({"temperature": 1.0, "top_k": 0}, "top_k=0 must be a whole number from 1 on"),
        ({"temperature": 1.0, "top_k": 2.5}, "top_k=2.5 must be a whole number"),
        ({"temperature": 1.0, "top_p": 0.0}, r"top_p=0.0 must be in \(0, 1\]"),
        ({"temperature": 1.0, "top_p": 1.1}, r"top_p=1.1 must be in \(0, 1\]"),
        ({"temperature": 1.0, "min_p": -0.1}, r"min_p=-0.1 must be in \[0, 1\]"),
        ({"temperature": 1.0, "min_p": 1.5}, r"min_p=1.5 must be in \[0, 1\]"),
        ({"top_k": 5}, "give temperature as well"),
        ({"top_p": 0.9}, "give temperature as well"),
        ({"min_p": 0.1}, "give temperature as well"),
    ],
)
def test_values_that_mean_nothing_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Sampling(**options).validate()


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1e-3, "top_k": 1, "top_p": 1.0, "min_p": 0.0}, {"temperature": 1, "min_p": 1}]
)
def test_values_at_the_ends_of_their_ranges_are_taken(options):
    Sampling(**options).validate()
