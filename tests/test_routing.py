"""Routing against loops in plain Python and numpy in float64: choices, turns, capacity, losses, the three routers."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxfw.core.errors import InputError
from jaxfw.core.keys import row_keys
from jaxfw.models.routing import ExpertChoice, RouteContext, SoftChoice, TokenChoice
from jaxfw.ops import routing
from tests.experts_contract import FAST_TO_COMPILE, kept_by_loop, room_of
from tests.router_contract import RouterContract

B, T, D, E = 4, 6, 5, 4
LENGTHS = (6, 2, 5, 0)
QUICK = settings(max_examples=40, deadline=None, derandomize=True)


def mask(lengths=LENGTHS, width=T):
    return np.arange(width) < np.asarray(lengths)[:, None]


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def context(valid, **fields):
    return RouteContext(jnp.asarray(valid), jnp.int32(2), **fields)


def softmax(h):
    e = np.exp(h - h.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


# --- choices, turns, capacity


def test_ties_go_to_the_lower_expert():
    scores = jnp.array([[0.25, 0.25, 0.25, 0.25], [0.1, 0.4, 0.4, 0.1]])
    assert routing.choose(scores, 3).tolist() == [[0, 1, 2], [1, 2, 0]]


@QUICK
@given(
    st.integers(0, 5000), st.integers(1, 8), st.integers(1, 64),
    st.sampled_from([0.1, 0.5, 1.0, 1.1, 1.25, 2.0, 0.333]),
)  # fmt: skip
def test_capacity_is_exact_for_numbers_and_traced_counts(tokens, k, experts, factor):
    wanted = room_of(tokens, factor, k, experts)
    options = {"k": k, "experts": experts, "factor": factor}
    assert routing.capacity(tokens, **options) == wanted
    assert int(routing.capacity(jnp.int32(tokens), **options)) == wanted


def test_capacity_of_very_many_tokens():
    assert int(routing.capacity(jnp.int32(2**30), k=2, experts=3, factor=1.25)) == math.ceil(2**30 * 2.5 / 3)
    with pytest.raises(InputError, match="fewer digits"):
        routing.capacity(8, k=7, experts=4093, factor=999 / 997)


@QUICK
@given(st.integers(0, 2**32), st.floats(0, 3), st.floats(0, 1))
def test_turns_are_those_of_the_loop(seed, skew, padding):
    rng = np.random.default_rng(seed)
    ids = np.argsort(-(rng.random((B, T, E)) + np.array([skew, 0, 0, 0])), axis=-1)[..., :2].astype(np.int32)
    valid = rng.random((B, T)) >= padding
    found = np.asarray(turns(ids.reshape(2, -1, 2), valid.reshape(2, -1))).reshape(ids.shape)
    assert np.all((found == -1) == ~valid[..., None])
    for capacity in (0.25, 0.75, 1.0):
        room = [room_of(int(half.sum()), capacity, 2, E) for half in np.split(valid, 2)]
        kept = (found >= 0) & (found < np.repeat(room, B // 2)[:, None, None])
        np.testing.assert_array_equal(kept, kept_by_loop(ids, valid, capacity, groups=2, experts=E))


@jax.jit
def turns(ids, valid):
    return routing.turns(ids, valid, E)


def test_assignments_sorted_by_expert():
    ids, valid = jnp.array([[[2, 0], [0, 2], [2, 1]]]), jnp.array([[True, True, False]])
    order, starts, counts = routing.order_by_expert(ids, valid, 4)
    # k-major numbers: 0..2 are the first choices, 3..5 the second ones; 2 and 5 are of a token that is not valid
    assert order[0, :4].tolist() == [1, 3, 0, 4] and sorted(order[0, 4:].tolist()) == [2, 5]
    assert starts.tolist() == [[0, 2, 2, 4]] and counts.tolist() == [[2, 0, 2, 0]]


# --- losses


def losses_by_loop(logits, ids, valid):
    """Switch's and Megatron's balance loss, GShard's, and the z-loss, token by token in float64."""
    logits, tokens = np.asarray(logits, np.float64), np.argwhere(valid)
    count, k = len(tokens), ids.shape[-1]
    mean, share, first, z = np.zeros(E), np.zeros(E), np.zeros(E), 0.0
    for b, t in tokens:
        mean += softmax(logits[b, t]) / count
        z += np.log(np.exp(logits[b, t]).sum()) ** 2 / count
        first[ids[b, t, 0]] += 1 / count
        for e in ids[b, t]:
            share[e] += 1 / (count * k)
    return E * (mean @ share), E * (mean @ first), z


@functools.partial(jax.jit, compiler_options=FAST_TO_COMPILE)
def losses(logits, ids, valid):
    probs = jax.nn.softmax(logits, axis=-1)
    both = (routing.balance_loss(probs, chosen, valid) for chosen in (ids, ids[..., :1]))
    return (*both, routing.z_loss(logits, valid))


def test_losses_equal_the_loop_over_valid_tokens_padded_or_not():
    logits = 3 * draw(B, T, E)
    ids = np.asarray(routing.choose(jnp.asarray(logits), 2))
    np.testing.assert_allclose(losses(logits, ids, mask()), losses_by_loop(logits, ids, mask()), rtol=1e-6)
    even = np.ones((1, E, E)), np.eye(E, dtype=int)[None].argmax(-1)[..., None], np.ones((1, E), bool)
    assert float(losses(*even)[0]) == pytest.approx(1.0)
    assert all(float(loss) == 0 for loss in losses(logits, ids, np.zeros((B, T), bool)))
    wide = np.concatenate([logits, np.full((B, 3, E), 40.0, np.float32)], axis=1)
    wide_ids = np.concatenate([ids, np.zeros((B, 3, 2), ids.dtype)], axis=1)
    np.testing.assert_allclose(losses(wide, wide_ids, mask(width=T + 3)), losses(logits, ids, mask()), rtol=1e-6)


def test_joint_balance_is_the_mean_over_the_tokens_of_all_layers():
    """By a loop over layers and valid tokens, in float64; layers uneven in opposite ways balance each other."""
    logits = 3 * draw(3, B, T, E)
    ids = np.asarray(routing.choose(jnp.asarray(logits), 2))
    tokens, mean, given = [(i, b, t) for i in range(3) for b, t in np.argwhere(mask())], np.zeros(E), np.zeros(E)
    for place in tokens:
        mean += softmax(logits[place].astype(np.float64)) / len(tokens)
        given[ids[place]] += 1 / len(tokens)
    probs, valid = jax.nn.softmax(logits, axis=-1), jnp.asarray(mask())
    importance = jnp.stack([routing.importance(layer, valid) for layer in probs])
    loads = jnp.stack([routing.load(layer, valid, E) for layer in ids])
    np.testing.assert_allclose(routing.joint_balance_loss(importance, loads), E * mean @ given, rtol=1e-6)
    opposite = jnp.array([[8.0, 0.0], [0.0, 8.0]])
    assert float(routing.joint_balance_loss(opposite, opposite)) == 1.0
    assert float(routing.joint_balance_loss(opposite[:1], opposite[:1])) == 2.0
    assert float(routing.joint_balance_loss(0 * opposite, 0 * opposite)) == 0.0


# --- token choice

KINDS = [("softmax", True), ("softmax", False), ("sigmoid", True), ("sigmoid", False)]


def token_choice(kernel, x, scores, renormalize, k=2):
    """(logits, ids, weights) in float64."""
    h = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    p = softmax(h) if scores == "softmax" else 1 / (1 + np.exp(-h))
    ids = np.argsort(-p, axis=-1, kind="stable")[..., :k]
    weights = np.take_along_axis(p, ids, axis=-1)
    return h, ids, weights / weights.sum(axis=-1, keepdims=True) if renormalize else weights


@functools.partial(jax.jit, static_argnums=0, compiler_options=FAST_TO_COMPILE)
def route(router, params, x, context):
    return router(params, x, context)


@pytest.mark.parametrize("scores, renormalize", KINDS)
def test_token_choice_equals_numpy(scores, renormalize):
    x, kernel, valid = draw(B, T, D), draw(D, E, seed=1), mask()
    chosen, aux = route(TokenChoice(2, scores, renormalize), {"kernel": kernel}, x, context(valid))
    h, ids, weights = token_choice(kernel, x, scores, renormalize)
    np.testing.assert_array_equal(np.asarray(chosen.ids)[valid], ids[valid])
    np.testing.assert_allclose(np.asarray(chosen.weights)[valid], weights[valid], rtol=1e-5)
    np.testing.assert_array_equal(aux.load, np.bincount(ids[valid].ravel(), minlength=E))
    balance, _, z = losses_by_loop(h, ids, valid)
    np.testing.assert_allclose(aux.losses["z"], z, rtol=1e-5)
    if scores == "softmax":
        np.testing.assert_allclose(aux.losses["balance"], balance, rtol=1e-5)
        np.testing.assert_allclose(np.asarray(aux.probs)[valid], softmax(h)[valid], rtol=1e-5)
    if renormalize and scores == "softmax":
        over_chosen = softmax(np.take_along_axis(h, ids, axis=-1))
        np.testing.assert_allclose(np.asarray(chosen.weights)[valid], over_chosen[valid], rtol=1e-5)
    assert aux.state is None and {leaf.dtype for leaf in jax.tree.leaves(aux)} == {jnp.dtype("float32")}


def test_gshard_counts_first_choices():
    x, kernel = draw(B, T, D), draw(D, E, seed=1)
    _, aux = route(TokenChoice(2, balance="first"), {"kernel": kernel}, x, context(mask()))
    h, ids, _ = token_choice(kernel, x, "softmax", True)
    np.testing.assert_allclose(aux.losses["balance"], losses_by_loop(h, ids, mask())[1], rtol=1e-5)


ROUTERS = [
    TokenChoice(2),
    TokenChoice(2, "sigmoid", renormalize=False),
    TokenChoice(1, renormalize=False),
    TokenChoice(2, "sigmoid", bias_rate=0.1),
    ExpertChoice(1.5),
    ExpertChoice(1.0, groups=2),
    SoftChoice(2),
]


class TestRouters(RouterContract):
    @pytest.fixture(autouse=True, params=ROUTERS, ids=repr)
    def each(self, request):
        self.router = request.param


class CountsPadding(TokenChoice):
    def __call__(self, params, x, context):
        return super().__call__(params, x, dataclasses.replace(context, valid=jnp.ones_like(context.valid)))


class LooksAhead(TokenChoice):
    def __call__(self, params, x, context):
        return super().__call__(params, jnp.flip(jnp.cumsum(jnp.flip(x, 1), 1), 1), context)


class StartsOtherwise(TokenChoice):
    def init_state(self, experts):
        return {"bias": jnp.zeros(experts + 1)}


class HasNoEqual(TokenChoice):
    __hash__ = TokenChoice.__hash__

    def __eq__(self, other):
        return self is other


NOTICED_BY = {
    CountsPadding(2): "padding_changes_nothing",
    LooksAhead(2): "a_causal_route_is_blind_to_later_tokens",
    StartsOtherwise(2): "it_is_a_static_value_and_known_abstractly",
    HasNoEqual(2): "it_is_a_static_value_and_known_abstractly",
}


@pytest.mark.parametrize("broken", NOTICED_BY, ids=repr)
def test_the_contract_notices(broken):
    contract = RouterContract()
    contract.router = broken
    with pytest.raises(AssertionError):
        getattr(contract, f"test_{NOTICED_BY[broken]}")()


def test_noise_needs_a_key_and_is_a_rows_own():
    router = TokenChoice(2, noise=2.0)
    params, x, keys = {"kernel": draw(D, E, seed=1)}, draw(B, T, D), row_keys(jax.random.key(3), B)
    quiet = route(router, params, x, context(mask()))[0].ids
    np.testing.assert_array_equal(quiet, route(TokenChoice(2), params, x, context(mask()))[0].ids)
    noisy, again = (route(router, params, x, context(mask(), key=keys))[0].ids for _ in range(2))
    np.testing.assert_array_equal(noisy, again)
    assert np.any(np.asarray(noisy != quiet))
    alone = route(router, params, x[2:3], context(mask()[2:3], key=keys[2:3]))[0].ids
    np.testing.assert_array_equal(alone, noisy[2:3])
    wide = route(router, params, np.pad(x, ((0, 0), (0, 3), (0, 0))), context(mask(width=T + 3), key=keys))[0].ids
    np.testing.assert_array_equal(np.asarray(wide)[:, :T][mask()], np.asarray(noisy)[mask()])


def test_a_bias_steers_choices_and_not_weights():
    """DeepSeek-V3: chosen by sigmoid plus bias, weighed by sigmoid; the state moves against the surplus."""
    router = TokenChoice(2, "sigmoid", bias_rate=0.25)
    params, x, valid = {"kernel": draw(D, E, seed=1)}, draw(B, T, D), mask()
    bias = np.array([0.0, 3.0, -3.0, 0.0], np.float32)
    chosen, aux = route(router, params, x, context(valid, state={"bias": jnp.asarray(bias)}))
    p = 1 / (1 + np.exp(-(x.astype(np.float64) @ params["kernel"])))
    ids = np.argsort(-(p + bias), axis=-1, kind="stable")[..., :2]
    np.testing.assert_array_equal(np.asarray(chosen.ids)[valid], ids[valid])
    weights = np.take_along_axis(p, ids, axis=-1)
    weights /= weights.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(np.asarray(chosen.weights)[valid], weights[valid], rtol=1e-5)
    load = np.bincount(ids[valid].ravel(), minlength=E)
    assert load[1] == valid.sum() and load[2] == 0
    np.testing.assert_allclose(aux.state["bias"], bias + 0.25 * np.sign(load.mean() - load))
    fresh = route(router, params, x, context(valid))[1]
    assert np.abs(fresh.state["bias"]).max() == 0.25, "zeros at first"


def test_the_bias_evens_loads_out():
    router, x = TokenChoice(1, "sigmoid", renormalize=False, bias_rate=0.01), draw(8, 32, D)
    params, state, spread = {"kernel": 0.3 * draw(D, E, seed=1) + np.float32([0.3, 0, 0, 0])}, None, []
    for _ in range(100):
        aux = route(router, params, x + 1, context(np.ones((8, 32), bool), state=state))[1]
        state = aux.state
        spread.append(float(aux.load.max() / aux.load.mean()))
    assert spread[0] > 2 and max(spread[-5:]) < 1.3


# --- expert choice, soft choice


@pytest.mark.parametrize("factor, groups", [(1.5, 1), (2.0, 2), (4.0, 1)])
def test_expert_choice_equals_the_loop(factor, groups):
    x, kernel, valid = draw(B, T, D), draw(D, E, seed=1), mask((6, 2, 3, 1))
    chosen, aux = route(ExpertChoice(factor, groups), {"kernel": kernel}, x, context(valid))
    probs = softmax(x.astype(np.float64) @ kernel).reshape(groups, -1, E)
    load = np.zeros(E)
    for g, inside in enumerate(valid.reshape(groups, -1)):
        room = min(room_of(int(inside.sum()), factor, 1, E), int(inside.sum()))
        for e in range(E):
            ranked = sorted(np.flatnonzero(inside), key=lambda n, g=g, e=e: (-probs[g, n, e], n))[:room]
            tokens = np.asarray(chosen.tokens)[g, e]
            assert tokens[tokens >= 0].tolist() == ranked and np.all(tokens[len(ranked) :] == -1)
            np.testing.assert_allclose(chosen.weights[g, e, : len(ranked)], probs[g, ranked, e], rtol=1e-5)
            assert not np.any(chosen.weights[g, e, len(ranked) :])
            load[e] += len(ranked)
    np.testing.assert_array_equal(aux.load, load)


def test_soft_choice_equals_numpy():
    x, kernel, scale, valid = draw(B, T, D), draw(D, E * 3, seed=1), np.float32(1.7), mask()
    chosen, aux = route(SoftChoice(3), {"kernel": kernel, "scale": scale}, x, context(valid))
    x, kernel = x.astype(np.float64), kernel.astype(np.float64)
    x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    h = scale * (x @ (kernel / np.linalg.norm(kernel, axis=0)))
    dispatch, combine = np.zeros(h.shape), np.where(valid[..., None], softmax(h), 0)
    for b, length in enumerate(LENGTHS):
        if length:
            dispatch[b, :length] = softmax(h[b, :length].T).T
    np.testing.assert_allclose(chosen.dispatch, dispatch.reshape(B, T, E, 3), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(chosen.combine, combine.reshape(B, T, E, 3), rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(aux.load, np.full(E, valid.sum()))
    assert aux.losses == {}


# --- what is refused


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: TokenChoice(0), r"router\.k=0"),
        (lambda: TokenChoice(1), r"router\.k=1 .*no gradient.*renormalize=False"),
        (lambda: TokenChoice(2, "softmx"), r"router\.scores='softmx'.*Did you mean 'softmax'"),
        (lambda: TokenChoice(2, balance="al"), r"router\.balance='al'.*Known: all, first"),
        (lambda: TokenChoice(2, noise=-1.0), r"router\.noise=-1\.0"),
        (lambda: ExpertChoice(0.0004), r"router\.factor=0\.0004.*at least 0\.001"),
        (lambda: ExpertChoice(groups=0), r"router\.groups=0"),
        (lambda: SoftChoice(0), r"router\.slots=0"),
        (lambda: TokenChoice(5)({"kernel": draw(D, E)}, draw(B, T, D), context(mask())), r"router\.k=5.*4 experts"),
        (lambda: ExpertChoice(groups=3)({"kernel": draw(D, E)}, draw(B, T, D), context(mask())), r"groups=3.*4 rows"),
        (
            lambda: SoftChoice(3)({"kernel": draw(D, E), "scale": 1.0}, draw(B, T, D), context(mask())),
            r"router\.slots=3 does not divide the 4 slots",
        ),
    ],
)
def test_refusals(make, message):
    with pytest.raises(InputError, match=message):
        make()
