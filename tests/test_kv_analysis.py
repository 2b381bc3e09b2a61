"""What attention looks at, against a float64 decoder in numpy and closed forms; and what caches keep, against sets."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfw.core.errors import InputError
from jaxfw.kv import analysis, parse
from jaxfw.kv.analysis import (
    SHARES,
    attention_profile,
    concentration,
    jaccard,
    kept_map,
    kept_share,
    layer_jaccard,
    summary,
)
from jaxfw.models import DecoderConfig, forward, init
from jaxfw.models.cache import Cache, FullCache
from tests import numpy_decoder
from tests.test_attention_rows import largest_array

B, T, R = 3, 14, 3
LENGTHS = np.array([14, 9, 6], np.int32)
CONFIG = DecoderConfig(
    vocab=31, width=16, ffn=12, layers=3, heads=4, kv_heads=2, head_dim=4, positions=64, init_std=0.6
)
WINDOWED = dataclasses.replace(CONFIG, window=5, full_attention=(1,))
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, CONFIG.vocab, (B, T), np.int32)
REGIONS = RNG.integers(-1, R, (B, T), np.int32)
QUERIES = np.array([[13, 9, -1, 11], [-1, -1, 8, -1], [3, 5, -1, -1]], np.int32)
QUERIES = np.pad(QUERIES, ((0, 0), (0, 28)), constant_values=-1)  # as many as by default: one program
LAST = np.array([[t - 32 + length for t in range(32)] for length in LENGTHS])


@functools.cache
def params():
    fresh = init(CONFIG, jax.random.key(0))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + 0.05 * rng.standard_normal(x.shape).astype(x.dtype), fresh)


def weights64(config):
    """[L][B H T T] by numpy alone."""
    seen = {}

    def hook(site, layer, x):
        if site in ("attn/q", "attn/k"):
            seen[site, layer] = x
        return x

    numpy_decoder.run(config, jax.tree.map(lambda x: np.asarray(x, np.float64), params()), TOKENS, LENGTHS, hook)
    found = []
    for i in range(config.layers):
        q, k = seen["attn/q", i], np.repeat(seen["attn/k", i], config.heads // config.kv_heads, axis=2)
        logits = np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(config.head_dim)
        window = None if i in config.full_attention else config.window
        t, s = np.arange(T)[:, None], np.arange(T)
        visible = (s <= t) if window is None else (s <= t) & (s > t - window)
        weights = np.where(visible, np.exp(logits - logits.max(-1, keepdims=True)), 0)
        found.append(weights / weights.sum(-1, keepdims=True))
    return found


def curve_of(p, shares):
    """Mass of the most attended shares of the tokens, linear between whole numbers, and the area below."""
    cumulative = np.concatenate([[0], np.cumsum(np.sort(p)[::-1])])
    x = np.linspace(0, 1, len(p) + 1)
    return np.interp(shares, x, cumulative), np.trapezoid(cumulative, x)


@pytest.mark.parametrize("config", [CONFIG, WINDOWED], ids=["causal", "windows"])
@pytest.mark.parametrize("queries, sinks", [(QUERIES, 4), (None, 4), (QUERIES, 0), (QUERIES, 1)])
def test_profiles_equal_numpy(config, queries, sinks):
    found = attention_profile(
        config, params(), TOKENS, LENGTHS, REGIONS, n_regions=R, queries=queries, sinks=sinks, shares=SHARES
    )
    assert found.entropy.shape == (3, B, 4) and found.curve.shape == (3, B, 4, len(SHARES))
    whole = weights64(config)
    for i, b, h in np.ndindex(config.layers, B, config.heads):
        spans = LAST if queries is None else queries
        p = whole[i][b, h, [t for t in spans[b] if t >= 0], : LENGTHS[b]].mean(axis=0)
        regions = REGIONS[b, : LENGTHS[b]]
        rest = p[sinks:] / p[sinks:].sum() if p[sinks:].sum() > 0 else np.full(LENGTHS[b] - sinks, np.nan)
        logs = np.log(np.where(rest > 0, rest, 1))
        curve, area = curve_of(rest, SHARES)
        expected = {
            "entropy": -np.sum(rest * logs) / np.log(len(rest)),
            "area": area,
            "curve": curve,
            "curve_all": curve_of(p, SHARES)[0],
            "regions": [rest[regions[sinks:] == r].sum() for r in range(R)],
            "regions_all": [p[regions == r].sum() for r in range(R)],
        }
        for name, value in expected.items():
            np.testing.assert_allclose(getattr(found, name)[i, b, h], value, atol=1e-5, err_msg=f"{name} {i} {b} {h}")


def test_attention_to_all_tokens_alike_has_entropy_1_and_a_straight_curve():
    """Without queries' weights, every logit is 0; the last token sees all."""
    flat = jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.zeros_like(x) if "'q'" in jax.tree_util.keystr(path) else x, params()
    )
    regions = np.tile(np.arange(T) >= 10, (B, 1)).astype(np.int32)
    last = LENGTHS[:, None] - 1
    found = attention_profile(CONFIG, flat, TOKENS, LENGTHS, regions, n_regions=2, queries=last)
    np.testing.assert_allclose(found.entropy, 1, atol=1e-6)
    np.testing.assert_allclose(found.area, 0.5, atol=1e-6)
    for curve in (found.curve, found.curve_all):
        np.testing.assert_allclose(curve, np.broadcast_to(SHARES, curve.shape), atol=1e-6)
    behind = np.maximum(LENGTHS - 10, 0)[:, None]
    np.testing.assert_allclose(
        found.regions[..., 1], np.broadcast_to(behind / (LENGTHS[:, None] - 4), (3, B, 4)), atol=1e-6
    )
    np.testing.assert_allclose(
        found.regions_all[..., 1], np.broadcast_to(behind / LENGTHS[:, None], (3, B, 4)), atol=1e-6
    )


def test_attention_to_one_token_or_two_has_the_entropy_of_one_or_two():
    N, counts = 8, np.arange(12) < 8
    one, two, even = np.zeros(12), np.zeros(12), np.where(counts, 0.125, 99.0)
    one[5], two[[2, 7]] = 0.3, 0.1  # divided by their sum
    run = jax.jit(concentration, static_argnums=2)
    entropy, area, curve = run(np.array([one, two, even]), counts, (1 / 16, 1 / 8, 1 / 4, 1))
    np.testing.assert_allclose(entropy, [0, np.log(2) / np.log(N), 1], atol=1e-6)
    np.testing.assert_allclose(area, [1 - 1 / 16, 1 - 2 / 16, 0.5], atol=1e-6)
    np.testing.assert_allclose(curve, [[0.5, 1, 1, 1], [0.25, 0.5, 1, 1], [1 / 16, 1 / 8, 1 / 4, 1]], atol=1e-6)
    assert all(np.isnan(x).all() for x in run(np.zeros(12), counts, SHARES))


def test_other_numbers_do_not_compile_again():
    run = functools.partial(attention_profile, CONFIG, params(), n_regions=R)
    run(TOKENS, LENGTHS, REGIONS, queries=QUERIES)
    before = analysis._profile._cache_size()
    run(TOKENS[::-1], LENGTHS - 1, REGIONS[:, ::-1], queries=np.minimum(QUERIES, 4), sinks=2, shares=SHARES[::-1])
    assert analysis._profile._cache_size() == before


def test_no_matrix_of_all_queries_and_keys_is_alive():
    """Of one layer they would be 2 GiB: read off the traced program. Logits of all tokens are not made either."""
    N, H, P = 8192, 8, 32
    config = dataclasses.replace(CONFIG, heads=H, layers=2, positions=N, vocab=10_000)
    shapes = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1, N), (1,), (1, N), (1, P))]
    abstract = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    traced = analysis._profile.trace(config, abstract, *shapes, jnp.int32(4), jnp.zeros(7), n_regions=R)
    assert largest_array(traced.jaxpr.jaxpr) <= H * 512 * N


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lengths": LENGTHS - [0, 0, 1]}, "row 2 has 5 tokens: give at least two more than the first sinks=4"),
        ({"queries": np.array([[3], [-1], [3]])}, r"row 1 has 9 tokens and queries at \[-1\]: give some of 0..8"),
        ({"queries": np.array([[3], [9], [3]])}, r"row 1 has 9 tokens and queries at \[9\]"),
        ({"queries": np.array([3, 3, 3])}, r"queries has shape \[3\]: give \[B P\] = \[3, P\]"),
        ({"shares": (0.1, 10)}, r"shares=\(0.1, 10\) must lie in \[0, 1\]"),
    ],
)
def test_what_cannot_be_profiled_is_refused(changes, message):
    given = {"tokens": TOKENS, "lengths": LENGTHS, "regions": REGIONS, "queries": QUERIES} | changes
    with pytest.raises(InputError, match=message):
        attention_profile(CONFIG, params(), **given, n_regions=R)


def test_a_summary_is_the_mean_with_its_interval_over_rows():
    rng = np.random.default_rng(2)
    of_rows = rng.normal(size=200)
    values = of_rows[None, :, None] + rng.normal(size=(6, 1, 4))
    values -= values.mean(axis=(0, 2), keepdims=True) - of_rows[None, :, None]
    found = summary(values)
    half = 1.96 * of_rows.std() / np.sqrt(200)
    np.testing.assert_allclose(
        [found.value, found.low, found.high], of_rows.mean() + np.array([0, -half, half]), atol=0.15 * half
    )
    assert found == summary(values) != summary(values, seed=1)
    values[0, 0, 0] = np.nan
    assert np.isfinite(summary(values).value), "the row's other heads count"
    one = summary(np.array([[[0.25, 0.75]]]))
    assert (one.value, one.low, one.high) == (0.5, 0.5, 0.5)


# --- caches


@functools.cache
def cache_of(kv):
    policy = FullCache() if kv is None else parse(kv, layers=CONFIG.layers)
    key = jax.random.key(3)
    run = jax.jit(forward, static_argnums=0, static_argnames=("policy", "room"))
    return run(CONFIG, params(), TOKENS, lengths=LENGTHS, policy=policy, room=T, key=key).cache


def as_sets(cache):
    """[L][B][K] sets of positions."""
    kept = [np.asarray(state.kept_positions) for state in cache.layers]
    return [[[{int(t) for t in slots if t >= 0} for slots in row] for row in layer] for layer in kept]


def test_jaccard_of_sets():
    rng = np.random.default_rng(4)
    one, other = (np.stack([rng.permutation(20)[:n] for _ in range(6)]).reshape(2, 3, n) for n in (7, 10))
    one[0, 0, 3:], other[1, 1, :8] = -1, -1
    one[0, 1], other[0, 1] = -1, -1
    for at in np.ndindex(2, 3):
        a, b = ({int(t) for t in x[at] if t >= 0} for x in (one, other))
        expected = len(a & b) / len(a | b) if a | b else 1
        assert jaccard(one, other)[at] == jaccard(other, one)[at] == pytest.approx(expected)
    assert jaccard(one[0, 0], one[0, 0]) == 1 and jaccard(np.array([1]), np.array([2])) == 0


@pytest.mark.parametrize("kv", ["random@keep=0.5", "pyramidkv(w=2)@keep=0.5", "snapkv(w=2)@budget=5", None])
def test_neighbouring_layers_and_the_map_count_sets(kv):
    cache = cache_of(kv)
    kept = as_sets(cache)
    pairs = [
        len(kept[i][b][k] & kept[i + 1][b][k]) / len(kept[i][b][k] | kept[i + 1][b][k])
        for i, b, k in np.ndindex(CONFIG.layers - 1, B, CONFIG.kv_heads)
    ]
    assert layer_jaccard(cache, LENGTHS) == pytest.approx(np.mean(pairs))
    assert kv is not None or layer_jaccard(cache, LENGTHS) == 1
    for b, length in enumerate(LENGTHS):
        expected = np.mean([[t in slots for t in range(length)] for layer in kept for slots in layer[b]], axis=0)
        np.testing.assert_allclose(kept_map(cache, int(length), row=b), expected)
    with pytest.raises(InputError, match="the cache has one layer"):
        layer_jaccard(Cache(cache.layers[:1]), LENGTHS)


@pytest.mark.parametrize("kv", ["random@keep=0.5", "pyramidkv(w=2)@keep=0.5", None])
def test_the_share_that_is_kept_and_its_bytes(kv):
    cache = cache_of(kv)
    found = kept_share(CONFIG, cache, LENGTHS, room=T)
    expected = [
        [np.mean([len(slots) for slots in row]) / n for row, n in zip(layer, LENGTHS)] for layer in as_sets(cache)
    ]
    np.testing.assert_allclose(found.tokens, expected)
    full = sum(x.nbytes for x in jax.tree.leaves(cache_of(None)))
    assert found.full_nbytes == full and found.nbytes == cache.nbytes
    np.testing.assert_allclose(found.bytes.mean(), cache.nbytes / full)
    if kv is None:
        assert np.all(found.tokens == 1) and np.all(found.bytes == 1)
    if kv == "pyramidkv(w=2)@keep=0.5":
        assert np.all(np.diff(found.bytes) < 0), "lower layers keep more"


def test_generated_tokens_are_not_of_the_prompt():
    """A cache of prompts with room, and a token behind them."""
    policy = parse("knorm@keep=0.5", layers=CONFIG.layers)
    run = jax.jit(forward, static_argnums=0, static_argnames=("policy", "room"))
    before = run(CONFIG, params(), TOKENS, lengths=LENGTHS, policy=policy, room=T + 3).cache
    after = run(CONFIG, params(), TOKENS[:, :1], policy=policy, cache=before).cache
    assert after.seen.tolist() == (LENGTHS + 1).tolist()
    assert layer_jaccard(after, LENGTHS) == layer_jaccard(before, LENGTHS) < layer_jaccard(after, LENGTHS + 1)
    shares = (kept_share(CONFIG, cache, LENGTHS, room=T + 3).tokens for cache in (before, after))
    np.testing.assert_array_equal(*shares)
    np.testing.assert_array_equal(kept_map(before, 14), kept_map(after, 14))
