"""A shared prefix: what goes on from it equals what is read at once, for each policy; scoring behind it; misuse."""

import functools
from typing import Any

import jax
import numpy as np
import pytest

from jaxfw.core.errors import InputError
from jaxfw.generate import scoring
from jaxfw.generate.engine import generate
from jaxfw.generate.prefix import read_prefix
from jaxfw.models import DecoderConfig, Edit, MoEConfig, forward, init
from jaxfw.models.cache import FullCache, Int8Cache, RandomCache, RingCache
from jaxfw.ops.sampling import Sampling

CONFIG = DecoderConfig(
    vocab=37, width=16, ffn=24, layers=2, heads=4, kv_heads=2, head_dim=8, positions=256, init_std=0.6,
    moe=MoEConfig(experts=3, per_token=2, ffn=8, first=1),
)  # fmt: skip
BEGINNING = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6, 4, 3, 3, 8, 3, 2, 7, 9, 5, 0, 2]
ENDS = [[8, 8, 4], [], [1, 9, 7, 1, 6, 9, 3]]
NEW, ROOM = 10, 96
SAMPLING = Sampling(temperature=1.0, repetition_penalty=1.2)


@pytest.fixture(scope="module", autouse=True)
def fast_to_compile():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def params(seed=0):
    return jax.jit(init, static_argnums=0)(CONFIG, jax.random.key(seed))


def run(prompts, **options: Any):
    room = {} if options.get("prefix") else {"room": ROOM}
    return generate(CONFIG, params(), prompts, **{"max_new_tokens": NEW} | room | options)


@functools.cache
def beginning(policy=None):
    return read_prefix(CONFIG, params(), BEGINNING, room=ROOM, policy=policy)


WHOLE = [BEGINNING + end for end in ENDS]


def test_tokens_are_those_of_prompts_read_at_once():
    together = run(ENDS, prefix=beginning(), logprobs=True)
    whole = run(WHOLE, logprobs=True)
    assert together.tokens == whole.tokens and len(set(whole.tokens)) == 3
    for ours, theirs in zip(together.logprobs or (), whole.logprobs or (), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    drawn = run(ENDS, prefix=beginning(), sampling=SAMPLING, n=2)
    assert drawn.tokens == run(WHOLE, sampling=SAMPLING, n=2).tokens, "a penalty sees the prefix; samples share it"


def test_a_prefix_is_not_used_up():
    before = jax.tree.map(np.array, (beginning().cache, beginning().logits))
    assert run(ENDS[:1], prefix=beginning()).tokens == run(ENDS[:1], prefix=beginning()).tokens
    jax.tree.map(np.testing.assert_array_equal, (beginning().cache, beginning().logits), before)


@pytest.mark.parametrize("policy", [RingCache(12), Int8Cache(), RandomCache(256)])
def test_any_policy_goes_on_from_its_prefix(policy):
    """RingCache forgets in order and a random cache of this size nothing: both as if read at once. Int8 is near it."""
    ours, theirs = run(ENDS, prefix=beginning(policy), logprobs=True), run(WHOLE, policy=policy, logprobs=True)
    atol = 0.1 if isinstance(policy, Int8Cache) else 1e-4
    for b, (mine, other) in enumerate(zip(ours.logprobs or (), theirs.logprobs or (), strict=True)):
        assert abs(mine[0] - other[0]) < atol, "the first is of one token in both"
        assert isinstance(policy, Int8Cache) or ours.tokens[b] == theirs.tokens[b]


def test_taps_hold_behind_a_prefix_at_true_positions():
    shift = np.linspace(-9, 9, CONFIG.width, dtype=np.float32)
    edit = Edit("resid/out", shift, op="add", pos=np.full((1, 2), [[33, 36]], np.int32))
    begun = read_prefix(CONFIG, params(), BEGINNING, room=ROOM, taps=[edit])
    ours = run(ENDS[2:], prefix=begun, taps=[edit]).tokens
    assert ours == run(WHOLE[2:], taps=[edit]).tokens != run(WHOLE[2:]).tokens


Traced: list[str] = []


class CountedCache(FullCache):
    def prefill(self, qkv, step, **options):
        Traced.append("prefill")
        return super().prefill(qkv, step, **options)

    def extend(self, state, qkv, step, **options):
        Traced.append(f"extend {qkv.k.shape[1]}")
        return super().extend(state, qkv, step, **options)


def test_other_lengths_of_a_bucket_do_not_retrace():
    begun = read_prefix(CONFIG, params(), BEGINNING, room=ROOM, policy=CountedCache())
    run(ENDS, prefix=begun)
    first, begun = list(Traced), read_prefix(CONFIG, params(), BEGINNING[:-1], room=ROOM, policy=CountedCache())
    run([[1] * 31, [2], [3] * 9], prefix=begun, max_new_tokens=NEW + 1)
    assert Traced == first
    # Two kinds of layers (dense, experts); every length of a bucket and of a prefix shares them.
    assert sorted(first) == ["extend 1"] * 2 + ["extend 32"] * 2 + ["prefill"] * 2


# --- scoring


def expected_scores(row):
    padded = np.zeros((1, 64), np.int32)
    padded[0, : len(row)] = row
    logits = np.asarray(jax.jit(lambda tokens: forward(CONFIG, params(), tokens).logits[0])(padded), np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return (logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True)))[np.arange(len(row) - 1), row[1:]]


def test_scores_behind_a_prefix_are_those_of_the_joined_rows():
    ends = [[8], *ENDS[2:], [2] * 20]
    got = scoring.score_rows(CONFIG, params(), ends, prefix=beginning())
    for end, scores in zip(ends, got, strict=True):
        assert scores.dtype == np.float32 and scores.shape == (len(end),), "every token has its entry"
        np.testing.assert_allclose(scores, expected_scores(BEGINNING + end)[-len(end) :], atol=1e-4)
    before = scoring.continuation_logprobs._cache_size()
    scoring.score_rows(CONFIG, params(), [[1, 2], [3], [4] * 32], prefix=beginning())
    assert scoring.continuation_logprobs._cache_size() == before


# --- what is refused


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: run(ENDS, prefix=beginning(), policy=Int8Cache()), r"policy=FullCache\(\), not Int8Cache\(\): leave"),
        (lambda: generate(CONFIG, params(1), ENDS, max_new_tokens=2, prefix=beginning()), "by another model, or with"),
        (lambda: run(ENDS, prefix=beginning(), room=200), "room=200 is given beside a prefix, whose cache has room=96"),
        (lambda: run(ENDS, prefix=beginning(), max_new_tokens=60), r"room=96, below .* = 34 \+ 7 \+ 60: read it with"),
        (lambda: run([], prefix=beginning()), "prompts is empty"),
        (lambda: run([[40]], prefix=beginning()), "token id 40, outside"),
        (lambda: read_prefix(CONFIG, params(), []), "prompt 0 is empty"),
        (lambda: read_prefix(CONFIG, params(), [1, 99]), "token id 99, outside"),
        (
            lambda: read_prefix(CONFIG, params(), BEGINNING, room=34),
            "room=34 must be a whole number above .* 34 tokens",
        ),
        (lambda: read_prefix(CONFIG, params(), BEGINNING, room="big"), "room='big' must be"),
        (lambda: read_prefix(CONFIG, params(), [1] * 256), "exceed the model's 256 positions"),
        (lambda: read_prefix(CONFIG, params(), [1, 2], unit_ids=[0]), "give one for each token"),
    ],
)
def test_misuse_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_by_default_a_prefix_leaves_room_for_512_tokens():
    config = DecoderConfig(vocab=9, width=8, ffn=8, layers=1, heads=1, kv_heads=1, head_dim=8, positions=2048)
    begun = read_prefix(config, jax.jit(init, static_argnums=0)(config, jax.random.key(0)), [1] * 33)
    assert begun.room - 33 >= 512 and begun.cache.layers[0].k.shape[2] == begun.room
    assert len(repr(begun)) < 300
