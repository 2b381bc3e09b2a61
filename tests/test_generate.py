"""Generation: against a loop without a cache; stopping, streaming, keys, traces, and what is refused."""

import collections
import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfw.core import aot, hlo
from jaxfw.core.errors import InputError
from jaxfw.generate import engine
from jaxfw.generate.engine import CHUNK, Decoding, bucket, decode, generate, prefill
from jaxfw.models import DecoderConfig, forward, init
from jaxfw.models.cache import FullCache
from jaxfw.ops.sampling import Sampling

CONFIG = DecoderConfig(
    vocab=37, width=16, ffn=24, layers=2, heads=4, kv_heads=2, head_dim=8, positions=256, init_std=0.6
)
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5], [7], [2, 7, 1, 8], list(range(30))]
NEW = CHUNK + 8  # more than one chunk
ROOM = 128  # given, so that tests share one compiled decode loop
SAMPLING = Sampling(temperature=1.0)


@functools.cache
def params():
    return jax.jit(init, static_argnums=0)(CONFIG, jax.random.key(0))


def run(prompts=PROMPTS, **options):
    return generate(CONFIG, params(), prompts, **{"max_new_tokens": NEW, "room": ROOM} | options)


@functools.cache
def greedy():
    """What `run` gives when nothing stops it."""
    return run().tokens


def padded(width):
    rows = np.zeros((len(PROMPTS), width), np.int32)
    for row, prompt in zip(rows, PROMPTS):
        row[: len(prompt)] = prompt
    return rows, np.array([len(prompt) for prompt in PROMPTS], np.int32)


@functools.cache
def without_a_cache(count):
    """Greedy continuation by whole forwards over right-padded rows."""
    call = jax.jit(lambda params, tokens: forward(CONFIG, params, tokens).logits)
    rows, lengths = padded(30 + count)
    for i in range(count):
        ends = lengths + i
        logits = np.asarray(call(params(), rows))[np.arange(len(rows)), ends - 1]
        rows[np.arange(len(rows)), ends] = np.argmax(logits, axis=-1)
    return tuple(tuple(row[n : n + count].tolist()) for row, n in zip(rows, lengths))


# --- what is generated


def test_greedy_equals_a_loop_without_a_cache():
    out = run()
    assert out.tokens == without_a_cache(NEW)
    assert out.stopped == (False,) * len(PROMPTS)
    assert np.mean([len(set(row)) for row in out.tokens]) > 5, "a model that repeats itself would prove little"
    assert out.prefill_seconds > 0 and out.decode_seconds > 0


@pytest.mark.parametrize("count", [1, 2, CHUNK, CHUNK + 1, CHUNK + 2, NEW])
def test_as_many_new_tokens_as_asked_for(count):
    assert run(max_new_tokens=count).tokens == tuple(row[:count] for row in greedy())


def test_a_row_does_not_depend_on_its_neighbours():
    order = [2, 0, 3, 1]
    assert run([PROMPTS[b] for b in order]).tokens == tuple(greedy()[b] for b in order)
    for b in (0, 3):
        assert run([PROMPTS[b]], room=256).tokens == (greedy()[b],), "nor on the room"


def test_prompts_may_be_arrays():
    assert run([np.asarray(prompt) for prompt in PROMPTS]).tokens == greedy()


def test_prefill_by_parts_equals_the_forward():
    tokens, lengths = padded(32)
    logits, cache = prefill(CONFIG, params(), tokens, lengths, policy=FullCache(), room=ROOM)
    whole = jax.jit(functools.partial(forward, CONFIG, policy=FullCache(), room=ROOM))(
        params(), tokens, lengths=lengths
    )
    np.testing.assert_allclose(logits, np.asarray(whole.logits)[np.arange(len(lengths)), lengths - 1], atol=1e-4)
    assert jax.tree.structure(cache) == jax.tree.structure(whole.cache)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), cache, whole.cache)


def test_buckets_of_all_lengths_to_4096():
    buckets = [bucket(n) for n in range(1, 4097)]
    assert all(b >= n for n, b in enumerate(buckets, 1)) and buckets == sorted(buckets)
    assert len(set(buckets)) <= 8
    assert all(b < 2 * n for n, b in enumerate(buckets, 1) if n > 32), "padding at most doubles the work"


# --- stopping


def cut_at(rows, stop_ids):
    """Each row up to and with its first stop id."""
    ends = [next((i + 1 for i, token in enumerate(row) if token in stop_ids), len(row)) for row in rows]
    return tuple(row[:end] for row, end in zip(rows, ends))


def steps_taken(**options):
    """Calls of `decode` by `generate`, and the decode steps that ran on the device in each."""
    steps = []

    def counting(config, policy, params, state, *rest, **named):
        before = int(state.step)
        state, drawn = decode(config, policy, params, state, *rest, **named)
        steps.append(int(state.step) - before)
        return state, drawn

    with mock.patch.object(engine, "decode", counting):
        return run(**options), steps


def test_a_row_ends_with_its_first_stop_id_and_the_others_go_on():
    stopped_somewhere = 0
    for stop_id in sorted({token for row in greedy() for token in row}):
        out, expected = run(stop_ids=[stop_id]), cut_at(greedy(), [stop_id])
        assert out.tokens == expected
        assert out.stopped == tuple(row[-1] == stop_id for row in expected)
        stopped_somewhere += len(set(out.stopped)) == 2
    assert stopped_somewhere > 0, "no batch in which some rows stop and others do not"


def test_any_of_several_stop_ids_ends_a_row():
    ids = [greedy()[0][3], greedy()[1][20], greedy()[2][7]]
    out = run(stop_ids=ids)
    assert out.tokens == cut_at(greedy(), ids) == run(stop_ids=[*reversed(ids), ids[0]]).tokens


def test_steps_stop_when_every_row_has_stopped():
    last = [row[5] for row in greedy()]
    longest = max(len(row) for row in cut_at(greedy(), last))
    assert 1 < longest <= 6
    out, steps = steps_taken(stop_ids=last)
    assert all(out.stopped) and steps == [longest - 1], "the first token comes from the prefill"


def test_no_step_when_every_first_token_stops():
    out, steps = steps_taken(stop_ids=[row[0] for row in greedy()])
    assert steps == [] and out.tokens == tuple(row[:1] for row in greedy()) and all(out.stopped)


def test_without_stop_ids_every_step_runs():
    assert steps_taken()[1] == [CHUNK, NEW - 1 - CHUNK]
    assert steps_taken(max_new_tokens=1)[1] == []


def test_a_row_that_is_done_writes_nothing():
    tokens, lengths = padded(32)
    _, cache = prefill(CONFIG, params(), tokens, lengths, policy=FullCache(), room=ROOM)
    before = jax.tree.map(np.array, cache)
    is_done = np.array([True, False, True, False])
    keys, others = (jax.random.split(jax.random.key(seed), len(lengths)) for seed in (0, 1))
    token = jnp.array([1, 2, 3, 4], jnp.int32)
    state = Decoding(cache, token, jnp.asarray(is_done), jnp.bool(True), keys, others, jnp.int32(1))
    stop, limit = jnp.array([-1], jnp.int32), jnp.int32(4)
    after, drawn = decode(CONFIG, FullCache(), params(), state, Sampling(), stop, limit)
    assert int(after.step) == 5
    assert after.cache.seen.tolist() == (lengths + 4 * ~is_done).tolist()
    assert np.all(np.asarray(drawn)[is_done] == -1) and np.all(np.asarray(drawn)[~is_done, :4] >= 0)
    for old, new in zip(before.layers, after.cache.layers):
        for b, length in enumerate(lengths):
            np.testing.assert_array_equal(old.k[b, :, :length], new.k[b, :, :length])


# --- streaming


@pytest.mark.parametrize("stop_ids", [[], [5], [11]])
def test_streamed_chunks_joined_are_the_result(stop_ids):
    chunks = []
    out = run(stop_ids=stop_ids, on_tokens=chunks.append)
    joined = np.concatenate(chunks, axis=1)
    assert chunks[0].shape == (len(PROMPTS), 1), "the first token is shown as soon as the prompt is read"
    for ids, row in zip(out.tokens, joined.tolist()):
        assert tuple(row) == ids + (-1,) * (len(row) - len(ids))


# --- drawing


def test_draws_are_reproducible_and_differ_by_key_and_row():
    same = [PROMPTS[0]] * 4
    first = run(same, sampling=SAMPLING, key=jax.random.key(1)).tokens
    assert first == run(same, sampling=SAMPLING, key=jax.random.key(1)).tokens
    other = run(same, sampling=SAMPLING, key=jax.random.key(2)).tokens
    assert len({*first, *other}) == 8
    assert run(same, sampling=SAMPLING).tokens == run(same, sampling=SAMPLING, key=jax.random.key(0)).tokens


def test_a_row_draws_the_same_whatever_its_neighbours_are():
    key = jax.random.key(3)
    whole = run(sampling=SAMPLING, key=key).tokens
    others = run([PROMPTS[0], *[[1, 2]] * 2, PROMPTS[3]], sampling=SAMPLING, key=key).tokens
    assert (others[0], others[3]) == (whole[0], whole[3]) and others[1] != whole[1]


def test_the_length_of_a_chunk_does_not_change_draws():
    long = run(sampling=SAMPLING).tokens
    assert run(sampling=SAMPLING, max_new_tokens=7).tokens == tuple(row[:7] for row in long)


def test_every_step_draws_afresh():
    """With logits that ignore the context the rows would repeat if a step reused the key of another."""
    flat = jax.tree.map(jnp.zeros_like, params())
    tokens = generate(CONFIG, flat, PROMPTS, max_new_tokens=NEW, sampling=SAMPLING, room=ROOM).tokens
    drawn = np.bincount(np.concatenate(tokens), minlength=CONFIG.vocab)
    assert np.count_nonzero(drawn) > 30 and drawn.max() < 20


# --- traces

Traced = collections.Counter()


class CountedCache(FullCache):
    """Its methods run in Python only while a layer is traced."""

    def prefill(self, qkv, step, **options):
        Traced["prefill", qkv.k.shape[1]] += 1
        return super().prefill(qkv, step, **options)

    def extend(self, state, qkv, step, **options):
        Traced["decode"] += 1
        return super().extend(state, qkv, step, **options)


NARROW = dataclasses.replace(CONFIG, width=8, ffn=8, heads=1, kv_heads=1, positions=8192)
LENGTHS = (1, 2, 31, 32, 33, 63, 64, 65, 100, 128, 129, 256, 257, 300, 512)


def test_one_trace_a_prompt_bucket_and_one_for_decoding():
    """Over prompts of many lengths, each with its own values of sampling and number of stop ids."""
    weights = jax.jit(init, static_argnums=0)(NARROW, jax.random.key(0))
    Traced.clear()
    for i, length in enumerate(LENGTHS):
        sampling = Sampling(temperature=0.5 + i / 10, top_k=i + 1, top_p=1 - i / 100)
        generate(
            NARROW, weights, [[1] * length], max_new_tokens=8, sampling=sampling, stop_ids=range(i % 4), room=520,
            policy=CountedCache(), key=jax.random.key(i),
        )  # fmt: skip
    assert Traced == {"decode": NARROW.layers} | {("prefill", bucket(n)): 1 for n in LENGTHS}


def test_at_most_eight_traces_of_prefill_for_prompts_up_to_4096():
    weights = jax.eval_shape(functools.partial(init, NARROW), jax.random.key(0))
    Traced.clear()
    for n in (*LENGTHS, *LENGTHS, 513, 1000, 1024, 1025, 2047, 2048, 2049, 4000, 4096):
        jax.eval_shape(
            functools.partial(prefill, NARROW, policy=CountedCache(), room=4104),
            weights, jax.ShapeDtypeStruct((1, bucket(n)), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32),
        )  # fmt: skip
    assert set(Traced.values()) == {1} and len(Traced) == 8


def test_the_default_room_is_one_for_all_prompts_of_a_bucket():
    Traced.clear()
    for n in (33, 50, 60, 64):
        run([[1] * n], max_new_tokens=8, policy=CountedCache(), room=None)
    assert Traced == {("prefill", 64): 1, "decode": CONFIG.layers}


def test_lengths_within_a_batch_and_new_tokens_within_a_room_do_not_retrace():
    Traced.clear()
    for n, count in ((1, 3), (7, 40), (32, 50)):
        run([[1] * n, [2] * (33 - n)], max_new_tokens=count, policy=CountedCache())
    assert Traced == {("prefill", 32): 1, "decode": CONFIG.layers}


# --- what is refused


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prompts": []}, "prompts is empty: give at least one"),
        ({"prompts": [[1], []]}, "prompt 1 is empty: give at least one token"),
        ({"prompts": [[1], [2, 37]]}, "prompt 1 holds token id 37, outside the model's vocabulary of 37"),
        ({"prompts": [[-1, 2]]}, "prompt 0 holds token id -1, outside"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"max_new_tokens": 227}, r"30 \+ 227 exceed the model's 256 positions: shorten"),
        ({"room": 69, "max_new_tokens": 40}, r"room=69 is below prompt \+ new tokens = 30 \+ 40: raise room"),
        ({"sampling": Sampling(temperature=0.0)}, "temperature=0.0 must be above 0"),
        ({"sampling": Sampling(temperature=1.0, top_p=2.0)}, "top_p=2.0 must be in"),
        ({"sampling": Sampling(top_k=3)}, "give temperature as well"),
    ],
)
def test_what_cannot_be_run_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        run(**options)


def test_the_last_position_can_be_used():
    assert len(run([[1] * (256 - NEW)], room=256).tokens[0]) == NEW


@pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
def test_the_decode_loop_compiles_for_a_gpu():
    """Without one at hand: the whole loop, sampling and stop ids included, with the kernel in every layer."""
    tokens, lengths = padded(32)
    _, cache = prefill(CONFIG, params(), tokens, lengths, policy=FullCache(), room=ROOM)
    B = len(lengths)
    keys, token = jax.random.split(jax.random.key(0), B), jnp.zeros(B, jnp.int32)
    state = Decoding(cache, token, jnp.zeros(B, bool), jnp.bool(True), keys, keys, jnp.int32(1))
    arguments = (CONFIG, FullCache(), params(), state, Sampling(1.0, 5, 0.9, 0.1), jnp.array([-1]), jnp.int32(4))
    compiled = aot.compile(decode, *arguments, mesh=aot.cluster("h200:1x1x1"))
    calls = [found for found in hlo.instructions(compiled.text) if found.target == "__gpu$xla.gpu.triton"]
    assert len(calls) == CONFIG.layers
    assert any(found.opcode == "while" for found in hlo.instructions(compiled.text))
