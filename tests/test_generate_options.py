"""The engine's options: repetition penalty, samples, log-probabilities, ending rows on the host; what is refused."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfw.core.errors import InputError
from jaxfw.generate.engine import CHUNK, decode, generate, prefill
from jaxfw.models import DecoderConfig, forward, init
from jaxfw.models.cache import FullCache, RandomCache
from jaxfw.ops.sampling import Sampling, penalise, sample

CONFIG = DecoderConfig(
    vocab=37, width=16, ffn=24, layers=1, heads=4, kv_heads=2, head_dim=8, positions=256, init_std=0.6
)
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5], [7], [2, 7, 1, 8]]
NEW, ROOM = CHUNK + 8, 96
DRAWN = Sampling(temperature=1.0)


@pytest.fixture(scope="module", autouse=True)
def fast_to_compile():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def params():
    return jax.jit(init, static_argnums=0)(CONFIG, jax.random.key(0))


def run(prompts=PROMPTS, **options: Any):
    return generate(CONFIG, params(), prompts, **{"max_new_tokens": NEW, "room": ROOM} | options)


@functools.cache
def logits_of(row):
    """Of each position of a row, in float64, by a whole forward."""
    call = jax.jit(lambda tokens: forward(CONFIG, params(), tokens).logits[0])
    padded = np.zeros((1, 64), np.int32)
    padded[0, : len(row)] = row
    return np.asarray(call(padded)[: len(row)], np.float64)


def log_softmax(x):
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


# --- repetition penalty


def test_penalise_divides_what_is_positive_and_multiplies_the_rest():
    rng = np.random.default_rng(0)
    logits, seen = rng.standard_normal((3, 11)).astype(np.float32), rng.random((3, 11)) < 0.5
    expected = logits.copy()
    for b, v in np.argwhere(seen):
        expected[b, v] = logits[b, v] / 1.7 if logits[b, v] > 0 else logits[b, v] * 1.7
    np.testing.assert_allclose(penalise(logits, 1.7, seen), expected, rtol=1e-6)


@pytest.mark.parametrize("penalty", [1.5, 0.8])
def test_greedy_with_a_penalty_is_the_likeliest_of_the_penalised_by_hand(penalty):
    out = run(sampling=Sampling(repetition_penalty=penalty))
    assert out.tokens != run().tokens
    for prompt, drawn in zip(PROMPTS, out.tokens, strict=True):
        text, logits = list(prompt), logits_of((*prompt, *drawn))
        for i, token in enumerate(drawn):
            row = logits[len(prompt) + i - 1].copy()
            ids = sorted(set(text))
            row[ids] = np.where(row[ids] > 0, row[ids] / penalty, row[ids] * penalty)
            assert row.max() - row[token] < 1e-3, "up to near ties"
            text.append(token)


def test_a_penalty_of_one_changes_nothing_and_other_values_do_not_retrace():
    plain = run(sampling=DRAWN).tokens
    assert run(sampling=Sampling(temperature=1.0, repetition_penalty=1.0)).tokens == plain
    before = decode._cache_size()
    for penalty, prompts in ((1.2, PROMPTS), (3, [[5], [6, 7], [8] * 30])):
        assert run(prompts, sampling=Sampling(temperature=0.9, repetition_penalty=penalty)).tokens != plain
    assert decode._cache_size() == before


def test_a_huge_penalty_never_repeats_a_token_of_prompt_or_output():
    """Logits of both signs, moved out of reach: every token of the row is another, until all are used."""
    flat = jax.tree.map(jnp.zeros_like, params())
    out = generate(CONFIG, flat, PROMPTS, max_new_tokens=8, sampling=Sampling(repetition_penalty=1e9), room=ROOM)
    assert all(row == (0,) * 8 for row in out.tokens), "logits of 0 stay 0"
    out = run(sampling=Sampling(repetition_penalty=1e9), max_new_tokens=12)
    for prompt, row in zip(PROMPTS, out.tokens, strict=True):
        assert len(set(row)) == 12 and not set(row) & set(prompt)


def test_without_a_penalty_nothing_is_remembered():
    with pytest.raises(InputError, match="needs the ids that were seen: give seen="):
        sample(jnp.zeros((1, 4)), Sampling(repetition_penalty=1.1), jax.random.split(jax.random.key(0), 1))


# --- samples


@functools.cache
def samples(n, key=5):
    return run(sampling=DRAWN, n=n, key=jax.random.key(key)).tokens


def test_samples_are_n_a_prompt_and_differ():
    rows = samples(3)
    assert len(rows) == 3 * len(PROMPTS) and len(set(rows)) == 9
    assert rows[::3] == run(sampling=DRAWN, key=jax.random.key(5)).tokens, "the first is what is drawn without n"
    assert samples(2) == tuple(row for b in range(3) for row in rows[3 * b : 3 * b + 2])


def test_a_sample_does_not_depend_on_other_rows():
    others = [[1, 2], PROMPTS[1], [9] * 20]
    assert run(others, sampling=DRAWN, n=3, key=jax.random.key(5)).tokens[3:6] == samples(3)[3:6]
    keys = jax.random.split(jax.random.key(8), 3)
    batch = run(sampling=DRAWN, n=2, key=keys).tokens
    assert run(PROMPTS[2:], sampling=DRAWN, n=2, key=keys[2:]).tokens == batch[4:]


def test_samples_read_a_prompt_once():
    """The prompt's part of a random cache is drawn once: what all samples of a row keep of it is the same."""
    policy, prompt = RandomCache(4), [list(range(1, 21))]
    kept = []

    class Watched(RandomCache):
        def prefill(self, qkv, step, **options):
            kept.append(qkv.k.shape[0])
            return super().prefill(qkv, step, **options)

    rows = run(prompt, policy=Watched(4), sampling=DRAWN, n=3, max_new_tokens=6).tokens
    assert kept == [1] and len(set(rows)) == 3
    assert rows[0] == run(prompt, policy=policy, sampling=DRAWN, max_new_tokens=6).tokens[0]


# --- log-probabilities


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=2.0, top_k=5, repetition_penalty=1.3)])
def test_logprobs_are_of_the_models_own_distribution(sampling):
    out = run(sampling=sampling, logprobs=True, stop_ids=[run(sampling=sampling).tokens[0][5]])
    assert out.logprobs is not None
    for prompt, row, scores in zip(PROMPTS, out.tokens, out.logprobs, strict=True):
        expected = log_softmax(logits_of((*prompt, *row)))[len(prompt) - 1 : -1]
        assert scores.dtype == np.float32 and scores.shape == (len(row),)
        np.testing.assert_allclose(scores, expected[np.arange(len(row)), list(row)], atol=2e-4)


def test_logprobs_change_no_token_and_are_absent_unless_asked_for():
    with_them = run(sampling=DRAWN, logprobs=True, n=2)
    assert run(sampling=DRAWN, n=2).tokens == with_them.tokens
    assert run(max_new_tokens=1).logprobs is None
    assert [len(x) for x in run(max_new_tokens=1, logprobs=True).logprobs or ()] == [1, 1, 1]


# --- rows that the host ends


def test_a_row_that_the_host_ends_is_done_with_that_chunk():
    chunks, free = [], run().tokens

    def end_second(ids):
        chunks.append(ids)
        return np.array([False, len(chunks) == 1, False])

    out = run(on_tokens=end_second)
    assert out.tokens == (free[0], free[1][:1], free[2]) and out.stopped == (False, True, False)
    assert np.all(chunks[1][1] == -1)


def test_no_step_when_the_host_ends_all_rows():
    calls = []

    def end_all(ids):
        calls.append(ids.shape)
        return np.ones(3, bool)

    out = run(on_tokens=end_all)
    assert calls == [(3, 1)] and all(out.stopped) and [len(row) for row in out.tokens] == [1, 1, 1]


def test_ending_rows_does_not_retrace():
    run()
    before = decode._cache_size()
    run(on_tokens=lambda ids: np.array([True, False, False]))
    assert decode._cache_size() == before


# --- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling": Sampling(repetition_penalty=0)}, "repetition_penalty=0 must be above 0"),
        ({"sampling": Sampling(repetition_penalty=-1.5)}, "repetition_penalty=-1.5 must be above 0"),
        ({"sampling": Sampling(repetition_penalty=float("inf"))}, "repetition_penalty=inf must be"),
        ({"sampling": Sampling(repetition_penalty="1.1")}, "repetition_penalty='1.1' must be"),
        ({"n": 0, "sampling": DRAWN}, "n=0 must be at least 1"),
        ({"n": 2.0, "sampling": DRAWN}, "n=2.0 must be at least 1, a whole number"),
        ({"n": True, "sampling": DRAWN}, "n=True must be"),
        ({"n": 2}, "n=2 samples of greedy decoding would all be alike: give temperature"),
        ({"stop_ids": "ab"}, "stop_ids='ab' must be token ids; texts that stop are"),
        ({"stop_ids": ["\n"]}, "must be token ids"),
        ({"prompts": [[1.5, 2.0]]}, "prompt 0 is .*token ids are whole numbers"),
        ({"prompts": "text"}, "prompts='text' must be a list of token ids"),
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5 must be at least 1, a whole number"),
    ],
)
def test_what_means_nothing_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        run(**options)


def test_prefill_takes_arrays_of_the_host():
    tokens, lengths = np.array([[1, 2, 3, 0]], np.int32), np.array([3], np.int32)
    logits, cache = prefill(CONFIG, params(), tokens, lengths, policy=FullCache(), room=8)
    np.testing.assert_allclose(logits[0], logits_of((1, 2, 3))[-1], atol=1e-4)
    assert cache.seen.tolist() == [3]
