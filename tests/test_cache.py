"""`FullCache` holds to the contract of a cache policy, and the contract would notice if it did not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.register_assert_rewrite("tests.cache_contract")

from jaxfw.models.cache import Cache, FullCache, FullState, Int8Cache, RandomCache, RingCache  # noqa: E402
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


def test_room_to_the_last_slot():
    """Prompt and new tokens fill the buffer exactly, and the last of them is read as in one forward."""
    ids, lengths = cache_contract.text(), jnp.full(B, T, jnp.int32)
    room = T + 2
    cache = cache_contract.run(CONFIG, FullCache(), cache_contract.params(), ids[:, :T], lengths, room=room).cache
    for i in range(T, room):
        out = TestFullCache().extended(cache, (i,) * B, (1,) * B)
        cache_contract.assert_close(out.logits[:, 0], cache_contract.logits_of_text()[:, i])
        cache = out.cache
    assert cache.layers[0].kept_positions[0, 0].tolist() == list(range(room))


def test_padding_beyond_the_room_is_dropped():
    """One slot is left, and the row's one token comes in a padded piece."""
    contract, lengths, room = TestFullCache(), jnp.full(B, T, jnp.int32), T + 1
    ids, weights = cache_contract.text(), cache_contract.params()
    cache = cache_contract.run(CONFIG, FullCache(), weights, ids[:, :T], lengths, room=room).cache
    padded = cache_contract.cut((T,) * B, (1,) * B, cache_contract.PIECE)
    out = cache_contract.run(CONFIG, FullCache(), weights, padded, jnp.ones(B, jnp.int32), cache)
    cache_contract.assert_close(out.logits[:, 0], contract.extended(cache, (T,) * B, (1,) * B).logits[:, 0])


def test_finish_settles_nothing():
    states = TestFullCache().prefilled().cache.layers
    assert FullCache().finish(states, None) is states


# --- the contract notices


class Broken(FullCache):
    """A policy with one fault; subclasses of a frozen dataclass stay hashable."""


class NeverAdvances(Broken):
    def extend(self, state, qkv, step, **options):
        out, after = super().extend(state, qkv, step, **options)
        return out, dataclasses.replace(after, seen=state.seen)


class CountsPaddingOfPrompts(Broken):
    def prefill(self, qkv, step, **options):
        out, state = super().prefill(qkv, step, **options)
        return out, dataclasses.replace(state, seen=jnp.full_like(state.seen, qkv.k.shape[1]))


class CountsPaddingOfExtensions(Broken):
    def extend(self, state, qkv, step, **options):
        lengths = jnp.full_like(step.lengths, qkv.k.shape[1])
        return super().extend(state, qkv, dataclasses.replace(step, lengths=lengths), **options)


class AdvancesWithTheLongestRow(Broken):
    def extend(self, state, qkv, step, **options):
        lengths = jnp.full_like(step.lengths, step.lengths.max())
        return super().extend(state, qkv, dataclasses.replace(step, lengths=lengths), **options)


class AlwaysWrites(Broken):
    def extend(self, state, qkv, step, *, write=True, **options):
        return super().extend(state, qkv, step, **options)


class ReadsOnlyWhatWasThere(Broken):
    def extend(self, state, qkv, step, *, write=True, **options):
        positions = step.positions if write else step.positions - step.positions + state.seen[:, None] - 1
        return super().extend(state, qkv, dataclasses.replace(step, positions=positions), write=write, **options)


class WritesOneSlotLate(Broken):
    def extend(self, state, qkv, step, **options):
        out, after = super().extend(dataclasses.replace(state, seen=state.seen + 1), qkv, step, **options)
        return out, dataclasses.replace(after, seen=after.seen - 1)


class Grows(Broken):
    def extend(self, state, qkv, step, **options):
        out, after = super().extend(state, qkv, step, **options)
        spare = ((0, 0), (0, 0), (0, 1), (0, 0))
        return out, dataclasses.replace(after, k=jnp.pad(after.k, spare), v=jnp.pad(after.v, spare))


class ChangesDtype(Broken):
    def extend(self, state, qkv, step, **options):
        out, after = super().extend(state, qkv, step, **options)
        return out, dataclasses.replace(after, v=after.v.astype(jnp.float16))


class IgnoresRows(Broken):
    def rows(self, state, index):
        return jax.tree.map(lambda x: x[: index.shape[0]], state)


class LeavesValuesInPlace(Broken):
    def rows(self, state, index):
        return FullState(state.k[index], state.v[jnp.arange(index.shape[0]) % B], state.seen[index])


class LooksAtNeighbours(Broken):
    def prefill(self, qkv, step, **options):
        out, state = super().prefill(qkv, step, **options)
        return out, dataclasses.replace(state, v=state.v + 0.01 * (state.v.shape[0] - 1))


class ForgetsTheFirstToken(Broken):
    def prefill(self, qkv, step, **options):
        out, state = super().prefill(qkv, step, **options)
        return out, dataclasses.replace(state, k=state.k.at[:, :, 0].set(0), v=state.v.at[:, :, 0].set(0))


class RoundsKeys(Broken):
    def prefill(self, qkv, step, **options):
        out, state = super().prefill(qkv, step, **options)
        return out, dataclasses.replace(state, k=state.k.astype(jnp.bfloat16).astype(state.k.dtype))


class KeepsKeysBeforeRotation(Broken):
    def extend(self, state, qkv, step, **options):
        return super().extend(state, dataclasses.replace(qkv, k=qkv.k_pre), step, **options)


class EmptyIsNotEmpty(Broken):
    def empty(self, batch, **options):
        state = super().empty(batch, **options)
        return dataclasses.replace(state, seen=state.seen + 1)


class HasNoEqual(Broken):
    __hash__ = FullCache.__hash__

    def __eq__(self, other):
        return self is other


class Rounds(Broken):
    """Values to multiples of 1/8 as they come in: sound where a policy says that it is not exact."""

    def prefill(self, qkv, step, **options):
        return super().prefill(self._rounded(qkv), step, **options)

    def extend(self, state, qkv, step, **options):
        return super().extend(state, self._rounded(qkv), step, **options)

    def _rounded(self, qkv):
        return dataclasses.replace(qkv, v=jnp.round(qkv.v * 8) / 8)


NOTICED_BY = {
    NeverAdvances: "seen_and_kept_positions_of_unequal_rows",
    CountsPaddingOfPrompts: "token_by_token_equals_one_forward",
    CountsPaddingOfExtensions: "padding_of_an_extension_does_no_harm",
    AdvancesWithTheLongestRow: "a_row_that_is_given_nothing_stays_as_it_is",
    AlwaysWrites: "reading_without_writing_changes_nothing",
    ReadsOnlyWhatWasThere: "reading_without_writing_changes_nothing",
    WritesOneSlotLate: "token_by_token_equals_one_forward",
    Grows: "extend_keeps_tree_shapes_and_dtypes",
    ChangesDtype: "extend_keeps_tree_shapes_and_dtypes",
    IgnoresRows: "rows_are_gathered_reordered_and_repeated",
    LeavesValuesInPlace: "rows_are_gathered_reordered_and_repeated",
    LooksAtNeighbours: "a_row_alone_equals_the_row_in_a_padded_batch",
    ForgetsTheFirstToken: "token_by_token_equals_one_forward",
    RoundsKeys: "token_by_token_equals_one_forward",
    KeepsKeysBeforeRotation: "from_nothing_equals_one_forward",
    EmptyIsNotEmpty: "from_nothing_equals_one_forward",
    HasNoEqual: "the_policy_is_a_static_value",
    Rounds: "the_prompt_is_read_as_without_a_cache",
}


@pytest.mark.parametrize("broken", NOTICED_BY, ids=lambda broken: broken.__name__)
def test_the_contract_notices(broken):
    contract = CacheContract()
    contract.policy = broken()
    with pytest.raises(AssertionError):
        getattr(contract, f"test_{NOTICED_BY[broken]}")()


def test_a_policy_that_says_that_it_rounds_is_held_to_the_rest():
    contract = CacheContract()
    contract.policy, contract.is_exact = Rounds(), False
    contract.test_the_prompt_is_read_as_without_a_cache()
    contract.test_token_by_token_equals_one_forward()
    contract.test_seen_and_kept_positions_of_unequal_rows()
    contract.test_a_row_that_is_given_nothing_stays_as_it_is()
