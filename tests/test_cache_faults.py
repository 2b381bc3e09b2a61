"""The contract of cache policies notices what may be wrong with one: each fault is planted, and one clause fails."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

pytest.register_assert_rewrite("tests.cache_contract")

from jaxfw.core.errors import InputError  # noqa: E402
from jaxfw.core.shapes import Array  # noqa: E402
from jaxfw.models.cache import FullCache, FullState  # noqa: E402
from tests.cache_contract import CacheContract  # noqa: E402


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CountedState(FullState):
    calls: Array


class HoldsSomethingOfNoRow(Broken):
    def empty(self, batch, **options):
        return CountedState(**vars(super().empty(batch, **options)), calls=jnp.int32(0))

    def prefill(self, qkv, step, **options):
        out, state = super().prefill(qkv, step, **options)
        return out, CountedState(**vars(state), calls=jnp.int32(0))


class KeepsHeadsThird(Broken):
    def empty(self, batch, **options):
        return self._swapped(super().empty(batch, **options))

    def prefill(self, qkv, step, **options):
        out, state = super().prefill(qkv, step, **options)
        return out, self._swapped(state)

    def extend(self, state, qkv, step, **options):
        out, after = super().extend(self._swapped(state), qkv, step, **options)
        return out, self._swapped(after)

    def _swapped(self, state):
        return dataclasses.replace(state, k=jnp.swapaxes(state.k, 1, 2), v=jnp.swapaxes(state.v, 1, 2))


class TurnsRowsRound(Broken):
    """The states' rows are in another order than the batch's: what is told of a row comes from another."""

    def extend(self, state, qkv, step, **options):
        out, after = super().extend(jax.tree.map(lambda x: x[::-1], state), qkv, step, **options)
        return out, jax.tree.map(lambda x: x[::-1], after)

    def prefill(self, qkv, step, **options):
        out, state = super().prefill(qkv, step, **options)
        return out, jax.tree.map(lambda x: x[::-1], state)


class DrawsForTheBatch(Broken):
    """Noise on values from the first row's key."""

    def prefill(self, qkv, step, **options):
        out, state = super().prefill(qkv, step, **options)
        return out, dataclasses.replace(state, v=state.v + 0.1 * jax.random.normal(step.key[0], state.v.shape[1:]))


class DependsOnTheWidthOfAPiece(Broken):
    def extend(self, state, qkv, step, **options):
        out, after = super().extend(state, qkv, step, **options)
        return out * (1 + 0.01 * (qkv.k.shape[1] > 1)), after


class LooksAhead(Broken):
    def extend(self, state, qkv, step, **options):
        last = jnp.max(step.positions, axis=1, keepdims=True)
        ahead = dataclasses.replace(step, positions=jnp.broadcast_to(last, step.positions.shape))
        return super().extend(state, qkv, ahead, **options)


class CountsItsTraces(Broken):
    """Part by part all layers share a trace; in one jit each has its own."""

    traces = 0

    def prefill(self, qkv, step, **options):
        CountsItsTraces.traces += 1
        qkv = dataclasses.replace(qkv, v=qkv.v * (1 + 0.1 * CountsItsTraces.traces))
        return super().prefill(qkv, step, **options)


class FinishesOtherwise(Broken):
    """Settles budgets that `empty` and the loop know nothing of."""

    def finish(self, states, step):
        short = [dataclasses.replace(state, k=state.k[:, :, :-1], v=state.v[:, :, :-1]) for state in states]
        return super().finish(tuple(short), step)


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


GENERATION = "generated_tokens_are_the_likeliest_and_those_of_each_row_alone"
# Each fault and the clauses that must notice it.
NOTICED_BY = {
    NeverAdvances: ["seen_and_kept_positions_of_unequal_rows"],
    CountsPaddingOfPrompts: ["token_by_token_equals_one_forward"],
    CountsPaddingOfExtensions: ["padding_of_an_extension_does_no_harm"],
    AdvancesWithTheLongestRow: ["a_row_that_is_given_nothing_stays_as_it_is"],
    AlwaysWrites: ["reading_without_writing_changes_nothing"],
    ReadsOnlyWhatWasThere: ["reading_without_writing_changes_nothing"],
    WritesOneSlotLate: ["token_by_token_equals_one_forward"],
    Grows: ["extend_keeps_tree_shapes_and_dtypes"],
    ChangesDtype: ["extend_keeps_tree_shapes_and_dtypes"],
    HoldsSomethingOfNoRow: ["arrays_lead_with_the_batch_and_then_the_key_heads"],
    KeepsHeadsThird: ["arrays_lead_with_the_batch_and_then_the_key_heads"],
    TurnsRowsRound: ["rows_are_gathered_reordered_and_repeated"],
    LooksAtNeighbours: ["a_row_alone_equals_the_row_in_a_padded_batch", GENERATION],
    DrawsForTheBatch: ["a_row_alone_equals_the_row_in_a_padded_batch"],
    ForgetsTheFirstToken: ["token_by_token_equals_one_forward"],
    RoundsKeys: ["token_by_token_equals_one_forward"],
    KeepsKeysBeforeRotation: ["from_nothing_equals_one_forward"],
    EmptyIsNotEmpty: ["from_nothing_equals_one_forward"],
    HasNoEqual: ["the_policy_is_a_static_value", "an_equal_policy_is_not_traced_again"],
    Rounds: ["the_prompt_is_read_as_without_a_cache"],
    DependsOnTheWidthOfAPiece: ["padding_of_an_extension_does_no_harm"],
    LooksAhead: ["padding_of_an_extension_does_no_harm"],
    CountsItsTraces: ["prefill_by_parts_equals_the_whole"],
    FinishesOtherwise: ["extend_keeps_tree_shapes_and_dtypes"],
}


@pytest.mark.parametrize("broken, clause", [(broken, clause) for broken, all_ in NOTICED_BY.items() for clause in all_])
def test_the_contract_notices(broken, clause):
    contract = CacheContract()
    contract.policy = broken()
    with pytest.raises((AssertionError, InputError)):
        getattr(contract, f"test_{clause}")()


def test_a_policy_that_says_that_it_rounds_is_held_to_the_rest():
    contract = CacheContract()
    contract.policy, contract.is_exact = Rounds(), False
    contract.test_the_prompt_is_read_as_without_a_cache()
    contract.test_token_by_token_equals_one_forward()
    contract.test_seen_and_kept_positions_of_unequal_rows()
    contract.test_a_row_that_is_given_nothing_stays_as_it_is()
