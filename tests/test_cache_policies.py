"""What the ring, random eviction and 8 bits promise beyond the contract, against loops in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfw.core.errors import InputError
from jaxfw.models import DecoderConfig, attention_spec, first_step, forward, init
from jaxfw.models.cache import QKV, FullCache, Int8Cache, RandomCache, RingCache
from jaxfw.models.cache.quantised import dequantise, quantise
from tests.numpy_attention import attention

CONFIG = DecoderConfig(
    vocab=61, width=24, ffn=40, layers=2, heads=6, kv_heads=2, head_dim=8, positions=128, init_std=0.3
)
SPEC = attention_spec(CONFIG)
H, K, d = CONFIG.heads, CONFIG.kv_heads, CONFIG.head_dim
LENGTHS = (9, 4, 1)
B, T, ROOM = len(LENGTHS), 12, 64
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def draw(rows, width, seed):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((rows, width, heads, d)).astype(np.float32) for heads in (H, K, K))
    return QKV(q, k, v, q, k, q, q)


def step_of(lengths, width, seen=None, keys=None, layer=0):
    step = first_step(jnp.asarray(lengths, jnp.int32), width)
    positions = step.positions if seen is None else step.positions + jnp.asarray(seen)[:, None]
    return dataclasses.replace(step, positions=positions, key=keys, layer=jnp.int32(layer))


@functools.cache
def prefill(policy, spec=SPEC):
    return jit(functools.partial(policy.prefill, spec=spec, room=ROOM))


@functools.cache
def extend(policy, spec=SPEC):
    return jit(functools.partial(policy.extend, spec=spec))


@functools.cache
def params():
    return jax.jit(init, static_argnums=0)(CONFIG, jax.random.key(0))


@functools.partial(jit, static_argnames=("config", "policy"))
def _run(config, policy, params, tokens, cache, key):
    return forward(config, params, tokens, policy=policy, cache=cache, room=ROOM, key=key)


def run(config, policy, tokens, cache=None, key=None):
    return _run(config, policy, params(), tokens, cache, key)


def keys(count=B):
    return jax.random.split(jax.random.key(5), count)


TEXT = np.random.default_rng(0).integers(0, CONFIG.vocab, (1, 32), np.int32)

# --- ring


@pytest.mark.parametrize("window", [3, 8])
def test_a_ring_attends_to_the_last_tokens_however_they_come(window):
    """Pieces longer than the window, of unequal rows, and single tokens, behind a prompt; all attention by loops."""
    policy, pieces = RingCache(window), [(T, LENGTHS), (5, (5, 2, 0)), (1, (1, 0, 1)), (5, (4, 5, 5)), (1, (1, 1, 1))]
    given = [([], []) for _ in range(B)]
    state = seen = None
    for number, (width, lengths) in enumerate(pieces):
        qkv, step = draw(B, width, number), step_of(lengths, width, seen)
        out, state = prefill(policy)(qkv, step) if state is None else extend(policy)(state, qkv, step)
        for b, length in enumerate(lengths):
            k, v = given[b]
            k.extend(qkv.k[b, :length])
            v.extend(qkv.v[b, :length])
            age = np.arange(len(k) - length, len(k))[:, None] - np.arange(len(k))
            visible = np.broadcast_to((age >= 0) & (age < window), (K, *age.shape))
            if length:
                kv = (np.swapaxes(np.stack(x), 0, 1) for x in (k, v))
                expected = attention(qkv.q[b, :length], *kv, visible, SPEC.scale)
                np.testing.assert_allclose(out[b, :length], expected, atol=5e-6)
            n = len(k)
            assert sorted(state.kept_positions[b, 1].tolist()) == sorted(
                [*range(max(0, n - window), n), *[-1] * max(0, window - n)]
            )
            for slot, p in enumerate(state.kept_positions[b, 0].tolist()):
                if p >= 0:
                    np.testing.assert_array_equal(state.k[b, :, slot], k[p])
                    np.testing.assert_array_equal(state.v[b, :, slot], v[p])
        seen = state.seen


def test_the_smaller_of_two_windows_holds():
    windowed = dataclasses.replace(CONFIG, window=5)
    expected = run(windowed, None, TEXT).logits
    for config, policy in ((windowed, RingCache(20)), (CONFIG, RingCache(5))):
        prompt = run(config, policy, TEXT[:, :20])
        assert prompt.cache.layers[0].k.shape == (1, K, 5, d)
        after = run(config, policy, TEXT[:, 20:], prompt.cache)
        logits = jnp.concatenate([prompt.logits, after.logits], axis=1)
        np.testing.assert_allclose(logits, expected, atol=2e-5)


def test_a_ring_takes_no_more_than_its_window_and_no_more_than_the_room():
    sizes = {
        (window, new): RingCache(window).empty(2, spec=SPEC, prompt=8, new=new, dtype=jnp.bfloat16).k.shape
        for window, new in ((16, 4), (16, 1000))
    }
    assert sizes == {(16, 4): (2, K, 12, d), (16, 1000): (2, K, 16, d)}
    short = run(CONFIG, RingCache(1000), TEXT)
    np.testing.assert_allclose(short.logits, run(CONFIG, FullCache(), TEXT).logits, atol=2e-5)
    assert short.cache.layers[0].k.shape[2] == ROOM


# --- random eviction


def kept(state):
    """[B][K] sets of positions."""
    return [[set(head[head >= 0].tolist()) for head in row] for row in np.asarray(state.kept_positions)]


def test_the_same_tokens_stay_however_they_come():
    policy, total, drawn = RandomCache(5), np.array([12, 7, 3], np.int32), keys()
    _, at_once = prefill(policy)(draw(B, T, 0), step_of(total, T, keys=drawn))
    states = {}
    for width in (1, 4):
        state = policy.empty(B, spec=SPEC, prompt=T, new=0, dtype=jnp.float32)
        while np.any(np.asarray(state.seen) < total):
            lengths = np.minimum(width, total - np.asarray(state.seen))
            _, state = extend(policy)(state, draw(B, width, 0), step_of(lengths, width, state.seen, drawn))
        states[width] = kept(state)
    assert states[1] == states[4] == kept(at_once)
    for row, n in zip(kept(at_once), total):
        assert all(len(head) == min(n, 5) and n - 1 in head for head in row)


def test_rows_heads_layers_and_keys_draw_each_their_own():
    policy, lengths, same = RandomCache(6), np.full(B, T), jnp.broadcast_to(jax.random.key(0), B)

    def of(keys, layer):
        return kept(prefill(policy)(draw(B, T, 0), step_of(lengths, T, keys=keys, layer=layer))[1])

    one = of(same, 0)
    assert one[0] == one[1] == one[2] and one[0][0] != one[0][1]
    assert of(same, 1)[0] != one[0] and of(keys(), 0)[0] != of(keys(), 0)[1]


def test_every_token_but_the_newest_is_as_likely_to_stay():
    rows, budget = 1000, 5
    step = step_of(np.full(rows, T), T, keys=keys(rows))
    _, state = prefill(RandomCache(budget))(draw(rows, T, 0), step)
    counts = np.bincount(np.asarray(state.kept_positions).ravel(), minlength=T)
    n, p = rows * K, (budget - 1) / (T - 1)
    assert counts[-1] == n
    assert np.all(np.abs(counts[:-1] - n * p) < 4 * np.sqrt(n * p * (1 - p)))


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("width", [1, 4])
def test_attention_is_to_what_is_kept_and_what_is_new(width, window):
    policy, drawn, spec = RandomCache(5), keys(), dataclasses.replace(SPEC, window=window)
    prompt, new = draw(B, T, 0), draw(B, width, 1)
    _, state = prefill(policy)(prompt, step_of(LENGTHS, T, keys=drawn))
    lengths = np.full(B, width)
    step = step_of(lengths, width, state.seen, drawn)
    out, _ = extend(policy, spec)(state, new, step)
    # The first new token takes a slot: of the prompt, what is kept when one token more has come.
    _, later = extend(policy)(state, new, dataclasses.replace(step, lengths=jnp.minimum(step.lengths, 1)))
    for b, length in enumerate(LENGTHS):
        k, v = (np.concatenate([x[b, :length], y[b]]) for x, y in ((prompt.k, new.k), (prompt.v, new.v)))
        visible = np.zeros((K, width, length + width), bool)
        for head, t in np.ndindex(K, width):
            seen = [p for p in kept(later)[b][head] if p < length] + list(range(length, length + t + 1))
            visible[head, t, [p for p in seen if length + t - p < (window or 99)]] = True
        expected = attention(new.q[b], np.swapaxes(k, 0, 1), np.swapaxes(v, 0, 1), visible, SPEC.scale)
        np.testing.assert_allclose(out[b], expected, atol=5e-6)


def test_a_budget_above_what_comes_is_a_full_cache():
    random, full = run(CONFIG, RandomCache(1000), TEXT[:, :20], key=jax.random.key(0)), run(CONFIG, FullCache(), TEXT)
    after = run(CONFIG, RandomCache(1000), TEXT[:, 20:], random.cache, jax.random.key(0))
    np.testing.assert_allclose(jnp.concatenate([random.logits, after.logits], axis=1), full.logits, atol=2e-5)


# --- 8 bits


def test_rounding_is_to_a_254th_of_the_largest():
    x = draw(4, 7, 0).k * np.float32(10.0) ** np.arange(-3, 4, dtype=np.float32)[:, None, None]
    x[0, 0, 0] = 0
    whole, scale = quantise(jnp.asarray(x))
    assert whole.dtype == jnp.int8 and scale.dtype == jnp.float32 and int(jnp.abs(whole.astype(int)).max()) == 127
    largest = np.abs(x.astype(np.float64)).max(axis=-1, keepdims=True)
    error = np.abs(np.asarray(dequantise(whole, scale, jnp.float32), np.float64) - x)
    assert np.all(error <= largest / 254 * (1 + 1e-5)) and np.all(error[0, 0, 0] == 0)
    assert np.all(error[1:].max(axis=-1) > 0)  # it does round


def test_attention_to_rounded_keys_and_values_stays_within_the_bound():
    """|q . dk| <= |q|_1 max|k| / 254 shifts a logit; weights then move by at most exp(2 shift) - 1."""
    prompt, new = draw(B, T, 0), draw(B, 1, 1)
    _, state = prefill(Int8Cache())(prompt, step_of(LENGTHS, T))
    _, exact = prefill(FullCache())(prompt, step_of(LENGTHS, T))
    step = step_of((1,) * B, 1, state.seen)
    ours, expected = extend(Int8Cache())(state, new, step)[0], extend(FullCache())(exact, new, step)[0]
    largest = max(np.abs(x).max() for x in (prompt.k, prompt.v, new.k, new.v))
    shift = SPEC.scale * np.abs(new.q).sum(axis=-1, keepdims=True) * largest / 254
    bound = largest / 254 + (np.exp(2 * shift) - 1) * largest
    error = np.abs(np.asarray(ours) - expected)
    assert np.all(error <= bound) and 1e-4 < error.max() < 0.03


def test_a_model_hardly_notices_8_bits():
    def logits(policy):
        cache = run(CONFIG, policy, TEXT[:, :20]).cache
        return np.asarray(run(CONFIG, policy, TEXT[:, 20:], cache).logits)

    exact = logits(FullCache())
    error = logits(Int8Cache()) - exact
    assert 1e-3 < np.sqrt(np.mean(error**2)) / exact.std() < 0.05


def test_bytes_of_8_bits():
    held = Int8Cache().empty(3, spec=SPEC, prompt=10, new=6, dtype=jnp.bfloat16)
    assert sum(x.nbytes for x in jax.tree.leaves(held)) == 3 * (2 * K * 16 * (d + 4) + 4)


# --- what is refused


@pytest.mark.parametrize("policy, size", [(RingCache, "window"), (RandomCache, "budget")])
@pytest.mark.parametrize("value", [0, -3, 2.5, None])
def test_sizes_are_whole_numbers_from_1_on(policy, size, value):
    with pytest.raises(InputError, match=rf"{policy.__name__}\.{size}={value} must be a whole number"):
        policy(value)


def test_random_eviction_asks_for_a_key():
    with pytest.raises(InputError, match=r"RandomCache.*give a key, e\.g\. key=jax\.random\.key\(0\)"):
        run(CONFIG, RandomCache(4), TEXT)
