"""The policies hold to the contract of a cache policy; what a full cache holds, and where."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.register_assert_rewrite("tests.cache_contract")

from jaxfw.core.errors import InputError  # noqa: E402
from jaxfw.generate import engine  # noqa: E402
from jaxfw.models.cache import Cache, FullCache, Int8Cache, RandomCache, RingCache  # noqa: E402
from tests import cache_contract  # noqa: E402
from tests.cache_contract import CONFIG, LENGTHS, ROOM, SPEC, B, CacheContract, T  # noqa: E402


class TestFullCache(CacheContract):
    policy = FullCache()


class TestRingCache(CacheContract):
    policy = RingCache(window=8)
    reference = dataclasses.replace(CONFIG, window=8)


class TestRandomCache(CacheContract):
    policy = RandomCache(budget=6)
    is_exact = False


class TestInt8Cache(CacheContract):
    policy = Int8Cache()
    is_exact = False
    atol = 0.02


@pytest.mark.parametrize("dtype, width", [("float32", 4), ("bfloat16", 2)])
def test_a_full_cache_holds_two_numbers_a_token_head_and_channel(dtype, width):
    config = dataclasses.replace(CONFIG, dtype=dtype)
    cache = TestFullCache().prefilled(config).cache
    numbers = 2 * CONFIG.layers * B * CONFIG.kv_heads * ROOM * CONFIG.head_dim
    assert cache.nbytes == width * numbers + 4 * CONFIG.layers * B


def test_bytes_of_a_model_that_no_machine_here_holds():
    """Llama-3.1-70B, 128k tokens, bfloat16: 80 layers of 8 heads, 40 GiB a row."""
    spec = dataclasses.replace(SPEC, kv_heads=8, head_dim=128)
    states = jax.eval_shape(
        lambda: tuple(
            FullCache().empty(1, spec=spec, prompt=131072 - 64, new=64, dtype=jnp.bfloat16) for _ in range(80)
        )
    )
    assert Cache(states).nbytes == 40 * 2**30 + 80 * 4


def test_slots_are_positions():
    cache = TestFullCache().prefilled().cache
    for state in cache.layers:
        for b, length in enumerate(LENGTHS):
            for head in np.asarray(state.kept_positions[b]):
                assert head.tolist() == [*range(length), *[-1] * (ROOM - length)]
    after = TestFullCache().extended(cache, LENGTHS, (1,) * B).cache
    for old, new in zip(cache.layers, after.layers):
        for b, length in enumerate(LENGTHS):
            for before, behind in ((old.k, new.k), (old.v, new.v)):
                np.testing.assert_array_equal(before[b, :, :length], behind[b, :, :length])
                assert np.all(np.any(np.asarray(behind[b, :, length]) != 0, axis=-1))


def filled(room):
    """A full cache of `room` slots behind prompts of T tokens."""
    ids, lengths = cache_contract.text()[:, :T], jnp.full(B, T, jnp.int32)
    weights, keys = cache_contract.params(), cache_contract.keys()
    return cache_contract.run(CONFIG, FullCache(), weights, ids, lengths, keys, room=room).cache


def test_room_to_the_last_slot():
    """Prompt and new tokens fill the buffer exactly, and the last of them is read as in one forward."""
    contract, room = TestFullCache(), T + 2
    cache = filled(room)
    for i in range(T, room):
        out = contract.extended(cache, (i,) * B, (1,) * B)
        contract.assert_close(out.logits[:, 0], cache_contract.logits_of_text()[:, i])
        cache = out.cache
    assert cache.layers[0].kept_positions[0, 0].tolist() == list(range(room))


def test_padding_beyond_the_room_is_dropped():
    """One slot is left, and the row's one token comes in a padded piece."""
    contract, cache = TestFullCache(), filled(T + 1)
    padded = cache_contract.cut((T,) * B, (1,) * B, cache_contract.PIECE)
    ones, weights, keys = jnp.ones(B, jnp.int32), cache_contract.params(), cache_contract.keys()
    out = cache_contract.run(CONFIG, FullCache(), weights, padded, ones, keys, cache)
    contract.assert_close(out.logits[:, 0], contract.extended(cache, (T,) * B, (1,) * B).logits[:, 0])


def test_finish_settles_nothing():
    states = TestFullCache().prefilled().cache.layers
    for policy in (FullCache(), RingCache(8), RandomCache(8), Int8Cache()):
        assert policy.finish(states, None) == Cache(states)


class Grows(FullCache):
    def extend(self, state, qkv, step, **options):
        out, after = super().extend(state, qkv, step, **options)
        return out, dataclasses.replace(after, v=jnp.pad(after.v, ((0, 0), (0, 0), (0, 1), (0, 0))))


class Rounds(FullCache):
    def extend(self, state, qkv, step, **options):
        out, after = super().extend(state, qkv, step, **options)
        return out, dataclasses.replace(after, k=after.k.astype(jnp.bfloat16))


@pytest.mark.parametrize("policy, said", [(Grows(), r"\.v .*48.* became .*49"), (Rounds(), r"\.k .*became .*bfloat16")])
def test_a_policy_whose_extension_changes_the_state_is_refused_by_name(policy, said):
    with pytest.raises(InputError, match=rf"{type(policy).__name__}\(\)\.extend must return.*{said}"):
        engine.generate(CONFIG, cache_contract.params(), [[1, 2]], max_new_tokens=3, policy=policy, room=ROOM)
