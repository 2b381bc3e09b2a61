"""Which tokens of a prompt stay: the rules that no peer fixes, by properties and closed forms."""


import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxfw.kv import METHODS, parse
from jaxfw.kv.granularity import Chunks, Units
from jaxfw.kv.scorers import Context, HeavyHitters, Scores, SnapKV
from jaxfw.kv.selection import highest
from jaxfw.kv.units import blocks, lines, sentences
from jaxfw.models.cache import QKV, AttentionSpec, Step

T, K, D = 32, 2, 4
SPEC = AttentionSpec(K, D, 1.0, None, "float32")


def step(lengths, units=None):
    at = jnp.broadcast_to(jnp.arange(T), (len(lengths), T))
    return Step(
        at, jnp.asarray(lengths, jnp.int32), jnp.int32(0), unit_id=None if units is None else jnp.asarray(units)
    )


def kept(positions, row=0, head=0):
    found = np.asarray(positions)[row, head]
    return found[found >= 0].tolist()


prompts = st.integers(1, T).flatmap(
    lambda n: st.tuples(
        st.just(n),
        st.lists(st.integers(-1, 7), min_size=n, max_size=n),
        st.lists(st.floats(-3, 3, width=32), min_size=8, max_size=8),
        st.integers(1, n),
        st.integers(0, 8),
    )
)


@given(prompts, st.sampled_from(("skip", "stop")))
def test_units_stay_whole_and_what_is_protected_stays(case, fill):
    n, units, scores, budget, extra = case
    ids = np.full((1, T), -1, np.int32)
    ids[0, :n] = units
    value = np.where(ids >= 0, np.array(scores, np.float32)[ids], 0)[:, None]
    rule = Units(fill=fill, extra=extra)
    C = min(budget + extra, T)
    found = kept(rule.choose(Scores(jnp.asarray(value)), step([n], ids), jnp.asarray([budget]), C))
    protected = [i for i in range(n) if units[i] < 0]
    assert found == sorted(found) and set(found) <= set(range(n)) and len(found) <= budget + extra
    if len(protected) <= C:
        assert set(protected) <= set(found)
        for unit in {units[i] for i in found if units[i] >= 0}:
            assert {i for i in range(n) if units[i] == unit} <= set(found), "a unit was split"
        taken = {units[i] for i in found} - {-1}
        assert len(found) <= budget or len(taken) <= 1, "beyond the budget, one unit at most"
    else:
        assert found == protected[-C:], "the newest of what is protected"


def test_a_unit_that_does_not_fit_is_passed_over_or_ends_the_choice():
    units = np.full((1, T), -1, np.int32)
    units[0, :12] = [0] * 6 + [1] * 4 + [2] * 2
    value = jnp.asarray(np.where(units >= 0, np.array([2.0, 3.0, 1.0])[units], 0)[:, None], jnp.float32)
    for fill, expected in (("skip", [*range(6, 12), 12]), ("stop", [*range(6, 10), 12])):
        choose = Units(fill=fill, extra=0).choose
        assert kept(choose(Scores(value), step([13], units), jnp.asarray([7]), 7)) == expected


def test_units_of_a_fixed_size_are_chunks():
    value = np.random.default_rng(0).normal(size=(1, 1, T)).astype(np.float32)
    units = np.broadcast_to(np.arange(T) // 4, (1, T)).astype(np.int32)
    for budget in (4, 12, 20):
        budgets = jnp.asarray([budget])
        as_units = Units(extra=0).choose(Scores(jnp.asarray(value)), step([T], units), budgets, budget)
        as_chunks = Chunks(size=4).choose(Scores(jnp.asarray(value)), step([T]), budgets, budget)
        assert kept(as_units) == kept(as_chunks) and len(kept(as_units)) == budget


@given(
    st.lists(st.sampled_from((0.0, 1.0, 2.0, float("nan"))), min_size=T, max_size=T), st.integers(1, T),
    st.sets(st.integers(0, T - 1)), st.integers(1, T),
)  # fmt: skip
def test_the_highest_scores_stay_as_a_sort_in_python_has_them(scores, n, protected, budget):
    mask = np.zeros((1, T), bool)
    mask[0, list(protected)] = True
    value = jnp.asarray(scores, jnp.float32)[None, None]
    found = kept(highest(value, jnp.asarray(mask), jnp.asarray([n]), jnp.asarray([budget]), T))
    first = sorted((i for i in range(n) if i in protected), reverse=True)
    rest = sorted(
        (i for i in range(n) if i not in protected),
        key=lambda i: (float("inf") if np.isnan(scores[i]) else -scores[i], i),
    )
    assert found == sorted([*first, *rest][: min(budget, n)])


def context(q, k, budget=8):
    nothing = jnp.zeros((1, q.shape[1], 1))
    qkv = QKV(q, k, k, q, k, nothing, nothing)
    at = jnp.arange(q.shape[1])[None]
    lengths = jnp.asarray([q.shape[1]], jnp.int32)
    return Context(qkv, Step(at, lengths, jnp.int32(0)), SPEC, jnp.asarray([budget]))


def test_a_planted_key_is_found():
    k = jnp.zeros((1, T, K, D)).at[:, 11, :, 0].set(9.0)
    q = jnp.zeros((1, T, K, D)).at[..., 0].set(1.0)
    c = context(q, k)
    scores = SnapKV(w=4, kernel=1)(c)
    assert kept(highest(scores.value, scores.protected, c.step.lengths, jnp.asarray([5]), 5)) == [11, 28, 29, 30, 31]


def test_flat_attention_shows_what_a_rule_does_by_itself():
    c = context(jnp.zeros((1, T, K, D)), jnp.ones((1, T, K, D)))
    scores = SnapKV(w=4, kernel=5)(c)  # padding counts as zero: two positions at each edge get less
    assert kept(highest(scores.value, scores.protected, c.step.lengths, jnp.asarray([8]), 8)) == [
        2,
        3,
        4,
        5,
        *range(28, 32),
    ]
    harmonic = np.cumsum(1 / np.arange(1, T + 1))
    value = HeavyHitters(recent=0.0)(c).value[0, 0]  # token t is seen by queries t.. with weight 1 / (i + 1)
    np.testing.assert_allclose(value, harmonic[-1] - np.concatenate([[0], harmonic[:-1]]), rtol=1e-5)
    normalised = HeavyHitters(recent=0.0, normalise=True)(c).value[0, 0]
    assert np.all(np.diff(value) < 0) and np.argmax(normalised) != T - 1 and not np.allclose(value, normalised)


@pytest.mark.parametrize(("keep", "w", "expected"), ((0.5, 16, (184, 128, 72, 16)), (0.2, 8, (40,) * 4)))
def test_a_pyramid_falls_evenly_or_is_flat(keep, w, expected):
    policy = parse(f"pyramidkv(w={w})@keep={keep}", layers=4)
    assert tuple(int(policy.at(i).kept(200)[200]) for i in range(4)) == expected


@pytest.mark.parametrize("method", METHODS)
def test_keep_1_keeps_all_and_a_row_never_loses_its_last_token(method):
    policy = parse(f"{method}@keep=1", layers=3)
    for layer in range(3):
        assert policy.at(layer).kept(64).tolist() == [1, *range(1, 65)]
    assert not policy.decode.evicts
    assert parse(f"{method}@keep=0.01", layers=1).kept(64).min() == 1


def test_layers_that_do_not_differ_share_one_policy():
    plain, pyramid, reuse = (
        parse(f"{text}@keep=0.3", layers=4) for text in ("snapkv", "pyramidkv", "chunkkv(reuse=2)")
    )
    assert len({plain.at(i) for i in range(4)}) == 1 and len({pyramid.at(i) for i in range(4)}) == 4
    assert reuse.at(0) == reuse.at(2) != reuse.at(1) == reuse.at(3)


def test_texts_are_cut_behind_their_separators():
    assert blocks("a\nb\n\nc\n\nd") == ((0, 5), (5, 8))
    assert lines("a\nb\nc") == ((0, 2), (2, 4))
    assert sentences('He said "no." Then left. Why') == ((0, 14), (14, 25))
    assert blocks("one block") == () == lines("") == sentences("no end")
