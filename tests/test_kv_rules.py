"""Rules of selection: units stay whole, budgets hold but for the exceptions that are named, ties go where they should;
and closed forms of methods that can be said without running them.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxfw.kv import METHODS, parse
from jaxfw.kv.budgets import Pyramid, wanted
from jaxfw.kv.cache import KVCache
from jaxfw.kv.granularity import Chunks, Units
from jaxfw.kv.scorers import Context, HeavyHitters, Knorm, Scores
from jaxfw.kv.selection import ascending, highest, of_mask
from jaxfw.models.cache import QKV, AttentionSpec, Step
from tests.cache_contract import fast_to_compile

T, K, G, D = 24, 2, 2, 32
SPEC = AttentionSpec(K, D, D**-0.5, None, "float32")
NAN = float("nan")


@pytest.fixture(scope="module", autouse=True)
def _fast():
    with fast_to_compile():
        yield


def rows_of(positions):
    """The positions of each row and head, which must be ascending with -1 behind them."""
    found = []
    for row in np.asarray(positions).reshape(-1, positions.shape[-1]):
        kept = row[row >= 0]
        assert (np.diff(kept) > 0).all(), row
        assert (row[len(kept) :] == -1).all(), row
        found.append(kept.tolist())
    return found


# --- the highest scores


def best_by_sorting(score, protected, length, budget):
    """Protected tokens, the newest first, then scores from high to low, the earlier first; NaN is the lowest."""

    def order(i):
        if protected is not None and protected[i]:
            return (0, 0.0, -i)
        return (1, math.inf if math.isnan(score[i]) else -score[i], i)

    return sorted(sorted(range(length), key=order)[:budget])


LEVELS = st.sampled_from([0.0, 1.0, 1.0, 2.0, -1.0, NAN, math.inf, -math.inf])  # few: ties


@given(
    score=st.lists(st.lists(LEVELS, min_size=8, max_size=8), min_size=2, max_size=2),
    protected=st.none() | st.lists(st.booleans(), min_size=8, max_size=8),
    length=st.integers(0, 8),
    budget=st.integers(1, 6),
)
def test_the_highest_are_those_that_sorting_gives(score, protected, length, budget):
    mask = None if protected is None else np.asarray(protected)[None]
    found = _highest(np.asarray(score, np.float32)[None], mask, np.asarray([length]), np.asarray([budget]))
    assert rows_of(found) == [best_by_sorting(row, protected, length, budget) for row in score]


@jax.jit
def _highest(score, protected, lengths, budget):
    return highest(score, protected, lengths, budget, 6)


def test_ties_nan_and_a_budget_below_the_protected_tokens():
    def of(score, protected, budget):
        mask = None if protected is None else np.asarray(protected, bool)[None]
        found = _highest(np.asarray([[score]], np.float32), mask, np.asarray([len(score)]), np.asarray([budget]))
        return rows_of(found)[0]

    assert of([1.0, 1.0, 1.0, 1.0], None, 2) == [0, 1]  # a tie goes to the earlier
    assert of([NAN, 0.0, -9.0, NAN], None, 3) == [0, 1, 2]  # NaN is the lowest
    assert of([9.0, 0.0, 0.0, 0.0], [0, 1, 1, 1], 2) == [2, 3]  # the newest of the protected ones
    assert of([9.0, 0.0, NAN, 0.0], [0, 1, 1, 0], 3) == [0, 1, 2]
    assert of([math.inf, 0.0, 0.0, 0.0], [0, 0, 0, 1], 1) == [3]  # no score beats protection


@given(keep=st.lists(st.booleans(), min_size=8, max_size=8), room=st.none() | st.integers(0, 5))
@settings(max_examples=40)
def test_a_mask_gives_its_last_positions(keep, room):
    at, most = [i for i, kept in enumerate(keep) if kept], 5 if room is None else room
    found = _of_mask(np.asarray(keep)[None], None if room is None else np.asarray([room]))
    assert found.shape == (1, 1, 5)
    assert rows_of(found) == [at[max(0, len(at) - most) :]]


@jax.jit
def _of_mask(keep, room):
    return of_mask(keep, 5, room)


def test_ascending_cuts_and_fills():
    assert ascending(jnp.asarray([[[5, -1, 2, 9]]]), 2).tolist() == [[[2, 5]]]
    assert ascending(jnp.asarray([[[5, -1, 2, 9]]]), 5).tolist() == [[[2, 5, 9, -1, -1]]]


# --- units


def step_of(units, lengths=None, *, key=0, layer=0):
    """A step of rows with these units, up to the length of each."""
    lengths = [len(row) for row in units] if lengths is None else lengths
    packed = np.full((len(units), max(map(len, units))), -1, np.int32)
    for row, given_units in zip(packed, units, strict=True):
        row[: len(given_units)] = given_units
    positions = np.broadcast_to(np.arange(packed.shape[1], dtype=np.int32), packed.shape)
    keys = jax.random.split(jax.random.key(key), len(units))
    return Step(positions, np.asarray(lengths, np.int32), np.int32(layer), unit_id=packed, key=keys)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _choose(granularity, scores, step, budget, C):
    return granularity.choose(scores, step, budget, C)


def units_kept(units, score, budget, *, fill="skip", extra=64):
    """Positions that stay of a row."""
    made, length, value = Units(fill=fill, extra=extra), len(units), np.zeros((1, 1, T), np.float32)
    value[0, 0, :length] = score
    step = step_of([[*units, *[-1] * (T - length)]], [length])
    (found,) = rows_of(_choose(made, Scores(value), step, np.asarray([budget]), T))
    assert len(found) <= made.slots(np.minimum(np.arange(length + 1), budget))
    return found


def by_the_rule(units, score, budget, fill, extra):
    """The docstring of `Units`, with lists: what stays, and the tokens of each unit."""
    at = {name: [i for i in range(len(units)) if units[i] == name] for name in set(units) - {-1}}
    order = sorted(at, key=lambda name: (-np.mean([score[i] for i in at[name]]), name))
    fixed = [i for i in range(len(units)) if units[i] < 0]
    left, taken, room = budget - len(fixed), [], min(budget + extra, len(units))
    for name in order:
        if len(at[name]) <= left:
            taken.append(name)
            left -= len(at[name])
        elif fill == "stop":
            break
    if not taken:
        taken = [name for name in order if len(at[name]) <= room - len(fixed)][:1]
    kept = sorted([*fixed, *(i for name in taken for i in at[name])])
    return kept[max(0, len(kept) - room) :], at


@given(
    units=st.lists(st.sampled_from([-1, 0, 1, 1, 2, 2, 2, 3, 4]), min_size=T, max_size=T),
    is_sorted=st.booleans(),
    score=st.lists(st.integers(0, 3), min_size=T, max_size=T),
    budget=st.integers(1, T),
    fill=st.sampled_from(["skip", "stop"]),
    extra=st.sampled_from([0, 5]),
)
def test_units_stay_whole_within_the_budget_but_for_what_is_documented(units, is_sorted, score, budget, fill, extra):
    units = sorted(units) if is_sorted else units
    kept, (expected, at) = (
        units_kept(units, score, budget, fill=fill, extra=extra), by_the_rule(units, score, budget, fill, extra),
    )  # fmt: skip
    assert kept == expected
    taken = {units[i] for i in kept} - {-1}
    assert all(set(at[name]) <= set(kept) for name in taken), "a unit was split"
    fixed = {i for i in range(T) if units[i] < 0}
    assert fixed <= set(kept) or len(kept) == min(budget + extra, T), "protected tokens go while there are slots"
    assert len(kept) <= (budget if len(taken) > 1 or extra == 0 else budget + extra)


def test_skip_passes_over_what_does_not_fit_and_stop_ends_there():
    units = [0] * 3 + [1] * 6 + [2] * 2 + [-1]
    score = [9.0] * 3 + [5.0] * 6 + [1.0] * 2 + [0.0]
    assert units_kept(units, score, 7) == [0, 1, 2, 9, 10, 11]
    assert units_kept(units, score, 7, fill="stop", extra=5) == [0, 1, 2, 11]


def test_a_units_score_is_a_mean_and_a_tie_goes_to_the_lower_number():
    assert units_kept([0] * 4 + [1] * 2, [1.0] * 4 + [1.5] * 2, 4, extra=0) == [4, 5]  # its sum is the lower one
    assert units_kept([1, 1, 0, 0], [1.0] * 4, 2, extra=0) == [2, 3]
    assert units_kept([0, 0, 1, 1], [NAN, 9.0, 0.0, 0.0], 2, extra=0) == [2, 3]


def test_if_nothing_fits_the_best_unit_that_extra_has_room_for_stays():
    units, score = [0] * 8 + [1] * 5 + [-1], [9.0] * 8 + [1.0] * 5 + [0.0]
    assert units_kept(units, score, 3) == [*range(8), 13]
    assert units_kept(units, score, 3, extra=5) == [*range(8, 13), 13]
    assert units_kept(units, score, 3, extra=0) == [13]


def test_protected_tokens_beyond_the_budget_stay_the_newest_of_them():
    units = [-1] * 9 + [0] * 2
    assert units_kept(units, [1.0] * 11, 3, extra=0) == [6, 7, 8]
    assert units_kept(units, [1.0] * 11, 3, extra=5) == [*range(1, 9)]


def test_a_row_is_chosen_by_its_own_length():
    long, short = [0] * 8 + [1] * 8 + [-1] * 4, [0] * 3 + [1] * 3 + [-1]
    value, budget = np.zeros((2, 1, 20), np.float32), [12, 4]
    value[0, 0, 8:16], value[1, 0, :3] = 1, 1
    both = _choose(Units(extra=0), Scores(value), step_of([long, short]), np.asarray(budget), 12)
    assert rows_of(both) == [[*range(8, 20)], [0, 1, 2, 6]]


def test_what_a_row_holds_beyond_its_budget_does_not_depend_on_its_neighbours():
    """The long row has slots that the short ones, which have too few for a unit or for their question, do not."""
    units = [[0] * 8 + [1] * 8 + [-1] * 4, [0] * 6 + [1] * 4 + [-1], [-1] * 8]
    value, budgets = np.zeros((3, 1, 20), np.float32), np.asarray([12, 3, 3])
    value[1, 0, :6] = 1
    for extra, expected in ((0, [[10], [5, 6, 7]]), (2, [[*range(6, 11)], [3, 4, 5, 6, 7]])):
        found = _choose(Units(extra=extra), Scores(value), step_of(units), budgets, 12 + extra)
        assert rows_of(found)[1:] == expected


# --- chunks


def chunks_by_the_rule(size, rule, score, protected, budget, share):
    length = len(score)
    pieces = [range(i, min(i + size, length)) for i in range(0, length, size)]
    raised = [max(score) + 1 if rule == "count" and kept else one for one, kept in zip(score, protected, strict=True)]
    mean = [np.mean(np.asarray([raised[i] for i in piece]), dtype=np.float32) for piece in pieces]
    if rule == "count":
        count = max(1, int(len(pieces) * share + 1e-9))
        best = sorted(range(len(pieces)), key=lambda i: (-mean[i], i))[:count]
        return sorted(i for piece in best for i in pieces[piece])
    return best_by_sorting([mean[i // size] for i in range(length)], protected, length, budget)


@given(
    score=st.lists(st.integers(0, 4), min_size=1, max_size=T),
    size=st.sampled_from([1, 5]),
    rule=st.sampled_from(["fill", "count"]),
    window=st.integers(0, 4),
    share=st.floats(0.05, 1),
)
def test_chunks_of_highest_mean_stay(score, size, rule, window, share):
    length, made = len(score), Chunks(size, rule)
    protected = [i >= length - window for i in range(length)]
    table = KVCache(Knorm(), made, keep=share).kept(T)
    value, mask = np.zeros((1, 1, T), np.float32), np.zeros((1, T), bool)
    value[0, 0, :length], mask[0, :length] = score, protected
    found = _choose(made, Scores(value, mask), step_of([[-1] * T], [length]), table[[length]], T)
    assert rows_of(found) == [chunks_by_the_rule(size, rule, score, protected, table[length], share)]
    assert len(rows_of(found)[0]) <= made.slots(table)


@pytest.mark.parametrize(("rule", "held"), [("count", 93), ("fill", 101)])
def test_whole_chunks_may_be_fewer_than_the_budget(rule, held):
    """Of 203 tokens in chunks of 10, the short last one among them, half removed, kvpress keeps 93."""
    value = np.random.default_rng(0).normal(size=(1, 1, 203)).astype(np.float32)
    window, step = np.arange(203)[None] >= 187, step_of([[-1] * 203])
    made = Chunks(10, rule)
    table = KVCache(Knorm(), made, keep=0.5).kept(203)
    (found,) = rows_of(_choose(made, Scores(value, window), step, table[[203]], made.slots(table)))
    assert len(found) == held
    assert set(found) >= set(range(187, 203))


@given(score=st.permutations(range(T)), chunks=st.integers(1, 6))
@settings(max_examples=30)
def test_units_of_fixed_size_are_chunks(score, chunks):
    """Where nothing is protected and sizes divide, choosing units is choosing chunks by their mean."""
    step, budget = step_of([np.arange(T) // 4]), np.asarray([chunks * 4])
    scores = Scores(np.asarray(score, np.float32)[None, None])
    by_units = rows_of(_choose(Units(), scores, step, budget, T))
    assert by_units == rows_of(_choose(Chunks(4), scores, step, budget, T))
    assert len(by_units[0]) == chunks * 4


# --- methods on a layer's queries, keys and values


def layer_of(q, k, *, lengths=None, units=None, **options):
    """A layer's tokens and step, without rotary embeddings: q [B T H d], k [B T K d]."""
    q, k = jnp.asarray(q, jnp.float32), jnp.asarray(k, jnp.float32)
    step = step_of([[-1] * q.shape[1]] * len(q) if units is None else units, lengths, **options)
    hidden, w_o = jnp.zeros((*q.shape[:2], 1)), jnp.ones((q.shape[2] * q.shape[3], 1))
    return QKV(q, k, k, q, k, hidden, w_o), step


def kept_by(text, qkv, step):
    """Positions that each head keeps of the one row."""
    state = _prefilled(parse(text), qkv, step)
    return [sorted(row[row >= 0].tolist()) for row in np.asarray(state.kept_positions[0])]


@functools.partial(jax.jit, static_argnums=(0, 3))
def _prefilled(policy, qkv, step, spec=SPEC):
    return policy.prefill(qkv, step, spec=spec, room=qkv.k.shape[1])[1]


def random_layer(B=1, **options):
    rng = np.random.default_rng(0)
    return layer_of(*(rng.normal(size=(B, T, heads, D)) for heads in (K * G, K)), **options)


UNITS_OF_FOUR = [*(np.arange(T - 4) // 4), -1, -1, -1, -1]


def test_oracle_units_stay_by_their_number():
    numbers = [3] * 6 + [0] * 6 + [2] * 4 + [1] * 4 + [-1] * 4
    layer = random_layer(units=[numbers])
    assert kept_by("oracleshot@budget=10", *layer) == [[*range(6, 12), *range(20, 24)]] * K
    assert kept_by("oracleshot@budget=14", *layer) == [[*range(6, 12), *range(16, 24)]] * K


def test_units_by_chance_are_the_same_in_all_layers_and_others_than_by_attention():
    def chosen(method, key, layer):
        first, second = kept_by(f"{method}@budget=12", *random_layer(units=[UNITS_OF_FOUR], key=key, layer=layer))
        assert first == second
        return tuple(first)

    by_chance = [{chosen("randomshot", key, layer) for layer in range(3)} for key in range(5)]
    assert all(len(kept) == 1 for kept in by_chance)
    assert len(set.union(*by_chance)) > 2
    assert set.union(*by_chance) != {chosen("shotkv", 0, 0)}
    assert chosen("shotkv", 0, 0) == chosen("shotkv", 1, 2)


def test_tokens_by_chance_differ_between_layers_and_heads():
    found = [kept_by("random@budget=8", *random_layer(key=3, layer=layer)) for layer in (0, 1)]
    assert len({tuple(head) for layer in found for head in layer}) == 2 * K


def test_each_layer_chooses_for_itself_or_all_together():
    """The first layer prefers the second unit a little, the other the first one by far."""
    units, spec = [0] * 4 + [1] * 4 + [2] * 4 + [-1] * 2, AttentionSpec(1, 1, 1.0, None, "float32")
    wishes = ((2.0, 2.2, 0.0), (5.0, -5.0, -5.0))

    def chosen(scope):
        policy, states = parse(f"shotkv(w=2,scope={scope})@budget=6", layers=2), []
        for layer, wish in enumerate(wishes):
            keys = np.repeat([*wish, -9.0], [4, 4, 4, 2]).reshape(1, 14, 1, 1)
            qkv, step = layer_of(np.ones((1, 14, 1, 1)), keys, units=[units], layer=layer)
            states.append(_prefilled(policy.at(layer), qkv, step, spec))
        kept = [np.asarray(state.kept_positions[0, 0]) for state in jax.jit(policy.finish)(tuple(states), step).layers]
        return [row[row >= 0].tolist() for row in kept]

    assert chosen("layer") == [[*range(4, 8), 12, 13], [*range(4), 12, 13]]
    assert chosen("global") == [[*range(4), 12, 13]] * 2


@pytest.mark.parametrize("method", METHODS)
def test_with_keep_1_everything_stays(method):
    lengths = [T, 9]
    qkv, step = random_layer(2, units=[[*(np.arange(n - 4) // 4), -1, -1, -1, -1] for n in lengths], lengths=lengths)
    policies = {parse(f"{method}@keep=1", layers=3).at(layer) for layer in range(3)}
    assert not any(policy.decode.evicts for policy in policies)
    for policy in policies:
        state = _prefilled(policy, qkv, step)
        held = [sorted(head[head >= 0].tolist()) for row in np.asarray(state.kept_positions) for head in row]
        assert held == [list(range(n)) for n in lengths for _ in range(K)]


# --- closed forms

NEEDLES = (7, 13)  # of each key head


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("snapkv(w=4,kernel=1)@budget=5", [[7, *range(20, 24)], [13, *range(20, 24)]]),
        ("snapkv(w=4)@budget=9", [[*range(5, 10), *range(20, 24)], [*range(11, 16), *range(20, 24)]]),
        ("h2o(recent=0)@budget=1", [[7], [13]]),
        ("expected(sinks=0)@budget=1", [[7], [13]]),
        ("tova@budget=3", [[7, 13, 23]] * 2),
        ("chunkkv(w=4,size=4)@budget=12", [[*range(4, 8), *range(12, 16), *range(20, 24)]] * 2),
        ("shotkv(w=4)@budget=12", [[*range(4, 8), *range(12, 16), *range(20, 24)]] * 2),
    ],
)
def test_a_planted_needle_stays(text, expected):
    """Keys are orthonormal; every query points to one of them, which is another for each key head."""
    keys = np.broadcast_to(np.eye(T, D)[:, None], (T, K, D))
    needles = np.stack([np.eye(T, D)[needle] for needle in NEEDLES for _ in range(G)])
    queries = np.broadcast_to(30 * D**0.5 * needles, (T, K * G, D))
    assert kept_by(text, *layer_of(queries[None], keys[None], units=[UNITS_OF_FOUR])) == expected


def uniform():
    """A layer whose queries look at all that they may see alike."""
    return layer_of(np.zeros((1, T, K * G, D)), np.ones((1, T, K, D)))


@pytest.mark.parametrize(
    ("text", "before_the_window"),
    [
        # Padding takes two fifths and one fifth from the first two, and from the last two before the window.
        ("snapkv(w=4)@budget=5", [2]),
        ("snapkv(w=4)@budget=10", range(2, 8)),
        ("snapkv(w=4)@budget=20", range(2, 18)),
        ("snapkv(w=4)@budget=21", range(1, 18)),
        ("snapkv(w=4,kernel=1)@budget=10", range(6)),
    ],
)
def test_uniform_attention_leaves_snapkv_the_first_with_all_their_neighbours(text, before_the_window):
    assert kept_by(text, *uniform()) == [[*before_the_window, *range(20, 24)]] * K


@functools.partial(jax.jit, static_argnums=0)
def _scores(scorer, qkv, step):
    return scorer(Context(qkv, step, SPEC, jnp.asarray([8])))


def test_uniform_attention_leaves_h2o_the_earliest():
    """A token's sum is H(T) - H(t) with harmonic numbers H; its mean divides that by the T - t that could see it."""
    qkv, step = uniform()
    harmonic = np.concatenate([[0], np.cumsum(1 / np.arange(1, T + 1))])
    for normalise, divisor in ((False, 1), (True, T - np.arange(T))):
        value = _scores(HeavyHitters(normalise=normalise), qkv, step).value
        np.testing.assert_allclose(value[0], np.tile((harmonic[T] - harmonic[:T]) / divisor, (K, 1)), rtol=1e-5)
    assert kept_by("h2o(recent=0)@budget=8", qkv, step) == [[*range(8)]] * K
    assert kept_by("h2o@budget=8", qkv, step) == [[*range(4), *range(20, 24)]] * K


def test_h2os_sum_and_mean_differ_where_a_late_token_is_looked_at():
    keys = np.zeros((1, T, K, D))
    keys[:, T - 2] = 1e3
    layer = layer_of(np.ones((1, T, K * G, D)), keys)
    assert kept_by("h2o(recent=0)@budget=2", *layer) == [[0, 1]] * K  # sums of 3.7 and 2.7; the late one has 2
    assert kept_by("h2o(recent=0,normalise=true)@budget=2", *layer) == [[0, T - 2]] * K


# --- budgets


def by_layer(text, layers, length):
    policy = parse(text, layers=layers)
    return [int(policy.at(layer).kept(length)[length]) for layer in range(layers)]


def test_a_pyramid_has_the_budgets_of_its_paper():
    assert by_layer("pyramidkv(w=16)@keep=0.5", 4, 200) == [184, 128, 72, 16]
    assert by_layer("pyramidkv(w=8)@keep=0.2", 4, 200) == [40] * 4  # the last would have 2, and the window is 8
    assert by_layer("pyramidkv(w=2,beta=10)@keep=0.2", 3, 200) == [76, 40, 4]
    assert by_layer("pyramidkv@keep=1", 3, 50) == [50] * 3


@given(
    keep=st.floats(0.02, 1), length=st.integers(1, 300), layers=st.integers(2, 6), w=st.integers(0, 32),
    beta=st.sampled_from([1.0, 2.5, 20.0]),
)  # fmt: skip
def test_a_pyramid_falls_evenly_and_keeps_the_mean(keep, length, layers, w, beta):
    share = wanted(keep, None, length)
    found = np.asarray([Pyramid(beta, w).table(share, layer=i, layers=layers)[length] for i in range(layers)])
    assert abs(found.mean() - keep * length) <= 0.5 + 1e-9
    steps = -np.diff(found)
    assert (steps >= 0).all()
    assert np.ptp(steps) <= 2
    assert found.max() <= max(length - w, math.ceil(keep * length))


def test_layers_that_do_not_differ_share_one_policy():
    texts = ("snapkv@keep=0.3", "pyramidkv@keep=0.3", "chunkkv(reuse=2)@keep=0.3")
    plain, pyramid, reuse = (parse(text, layers=4) for text in texts)
    assert len({plain.at(layer) for layer in range(4)}) == 1
    assert len({pyramid.at(layer) for layer in range(4)}) == 4
    assert reuse.at(0) == reuse.at(2) != reuse.at(1) == reuse.at(3)


def test_a_budget_is_a_share_of_each_rows_length_or_a_number():
    assert parse("knorm@keep=0.3").kept(10).tolist() == [1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 3]
    assert parse("knorm@budget=3").kept(6).tolist() == [1, 1, 2, 3, 3, 3, 3]
    exact = np.maximum(np.arange(1001) * 29 // 100, 1)  # in doubles, 0.29 * 100 is 28.999999999999996
    assert parse("knorm@keep=0.29").kept(1000).tolist() == exact.tolist()
