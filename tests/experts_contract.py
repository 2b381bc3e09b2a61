"""What every function that runs experts must hold to, as tests that it inherits.

    class TestMine(ExpertsContract):
        experts = Mine()

What cannot take every kind of route says which it takes: `kinds = ("token",)`. One that drops has a `capacity`, and
says in `groups` among how many groups of rows it counts. One that needs a mesh overrides `mesh`.

The oracle is plain numpy in float64: a loop over tokens, with the derivatives written out by hand.
"""

import contextlib
import dataclasses
import functools
import math
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfw.core.errors import InputError
from jaxfw.models.routing import Experts, RouteContext, SlotRoute, SoftRoute, TokenRoute

B, T, D, F, E, K, C, P = 8, 5, 6, 7, 4, 2, 3, 2
LENGTHS = (5, 3, 5, 1, 4, 5, 0, 2)
RTOL = 1e-5  # of the largest entry: float32 sums of some 40 terms, in any order
FAST_TO_COMPILE = {"xla_backend_optimization_level": 0}


# --- the oracle


def silu(a):
    return a / (1 + np.exp(-a))


class Oracle:
    """Collects, in float64, what visits to experts answer and the derivatives of sum(answers * cotangents)."""

    def __init__(self, params, x):
        self.params = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
        self.x = np.asarray(x, np.float64)
        self.y, self.dx = np.zeros_like(self.x), np.zeros_like(self.x)
        self.dparams = {name: np.zeros_like(leaf) for name, leaf in self.params.items()}

    def answer(self, e, h):
        gate, up, down = (self.params[name][e] for name in ("gate", "up", "down"))
        return (silu(h @ gate) * (h @ up)) @ down

    def visit_back(self, e, h, d):
        """The derivative by h, those by the expert's parameters added up; d is the answer's cotangent."""
        gate, up, down = (self.params[name][e] for name in ("gate", "up", "down"))
        a, u = h @ gate, h @ up
        sigmoid = 1 / (1 + np.exp(-a))
        dm = down @ d
        da, du = dm * u * (sigmoid + a * sigmoid * (1 - sigmoid)), dm * silu(a)
        self.dparams["down"][e] += np.outer(silu(a) * u, d)
        self.dparams["gate"][e] += np.outer(h, da)
        self.dparams["up"][e] += np.outer(h, du)
        return gate @ da + up @ du

    def send(self, b, t, e, weight, cotangent):
        """Token (b, t) visits e; returns the derivative by its weight."""
        h, ct = self.x[b, t], np.asarray(cotangent[b, t], np.float64)
        out = self.answer(e, h)
        self.y[b, t] += weight * out
        self.dx[b, t] += self.visit_back(e, h, weight * ct)
        return out @ ct


def room_of(tokens: int, capacity: float, k: int = K, experts: int = E) -> int:
    """ceil(tokens * k / experts * capacity) in rational numbers."""
    return math.ceil(Fraction(str(capacity)) * tokens * k / experts)


def kept_by_loop(ids, valid, capacity, *, groups=1, experts=E):
    """[B T k]: all first choices in the order of tokens, then all second ones, until an expert is full."""
    kept = np.zeros(ids.shape, bool)
    rows = len(ids) // groups
    for g in range(groups):
        inside = range(g * rows, (g + 1) * rows)
        count = int(valid[g * rows : (g + 1) * rows].sum())
        room = math.inf if capacity is None else room_of(count, capacity, ids.shape[2], experts)
        taken = dict.fromkeys(range(experts), 0)
        for j in range(ids.shape[2]):
            for b in inside:
                for t in range(ids.shape[1]):
                    if valid[b, t] and taken[ids[b, t, j]] < room:
                        taken[ids[b, t, j]] += 1
                        kept[b, t, j] = True
    return kept


def expected(params, x, route, valid, cotangent, kept=None):
    """(y, derivatives by params, by x, and by the route's floating-point fields) in float64."""
    oracle = Oracle(params, x)
    if isinstance(route, TokenRoute):
        assert kept is not None
        dweights = np.zeros(route.weights.shape)
        for b, t, j in np.argwhere(kept):
            e, weight = int(route.ids[b, t, j]), float(route.weights[b, t, j])
            dweights[b, t, j] = oracle.send(b, t, e, weight, cotangent)
        return oracle.y, (oracle.dparams, oracle.dx, {"weights": dweights})
    if isinstance(route, SlotRoute):
        dweights, rows = np.zeros(route.weights.shape), len(x) // len(route.tokens)
        for g, e, c in np.argwhere(np.asarray(route.tokens) >= 0):
            b, t = divmod(int(route.tokens[g, e, c]), x.shape[1])
            dweights[g, e, c] = oracle.send(g * rows + b, t, e, float(route.weights[g, e, c]), cotangent)
        return oracle.y, (oracle.dparams, oracle.dx, {"weights": dweights})
    mask = np.asarray(valid)[..., None, None]
    dispatch, combine = (np.where(mask, np.asarray(w, np.float64), 0) for w in (route.dispatch, route.combine))
    ddispatch, dcombine = np.zeros(dispatch.shape), np.zeros(combine.shape)
    clean, ct = np.where(valid[..., None], oracle.x, 0), np.asarray(cotangent, np.float64)
    for b, e, p in np.ndindex(len(x), *dispatch.shape[2:]):
        slot = dispatch[b, :, e, p] @ clean[b]
        out = oracle.answer(e, slot)
        oracle.y[b] += np.outer(combine[b, :, e, p], out)
        dcombine[b, :, e, p] = ct[b] @ out
        dslot = oracle.visit_back(e, slot, combine[b, :, e, p] @ ct[b])
        ddispatch[b, :, e, p] = clean[b] @ dslot
        oracle.dx[b] += np.outer(dispatch[b, :, e, p], dslot)
    dfields = {"dispatch": np.where(mask, ddispatch, 0), "combine": np.where(mask, dcombine, 0)}
    return oracle.y, (oracle.dparams, oracle.dx, dfields)


# --- inputs


@functools.cache
def params() -> Any:
    rng = np.random.default_rng(1)
    shapes = {"gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def mask(lengths=LENGTHS, width=T):
    return np.arange(width) < np.asarray(lengths)[:, None]


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def token_route(ids=None, *, batch=B, width=T, seed=3):
    """Random different choices, the first expert wanted more than the others; or the given ones."""
    rng = np.random.default_rng(seed)
    if ids is None:
        liking = rng.random((batch, width, E)) + np.array([0.5, 0, 0, 0.2])
        ids = np.argsort(-liking, axis=-1)[..., :K]
    ids = np.broadcast_to(np.asarray(ids, np.int32), (batch, width, np.shape(ids)[-1]))
    return TokenRoute(ids, rng.random(ids.shape).astype(np.float32) + 0.1)


def slot_route(groups, valid, seed=4):
    """Random valid tokens for every slot, some slots empty, no token twice at one expert."""
    rng, flat = np.random.default_rng(seed), valid.reshape(groups, -1)
    tokens = np.full((groups, E, C), -1, np.int32)
    for g, e in np.ndindex(groups, E):
        count = min(rng.integers(0, C + 1), flat[g].sum())
        tokens[g, e, :count] = rng.permutation(np.flatnonzero(flat[g]))[:count]
    return SlotRoute(tokens, rng.random(tokens.shape).astype(np.float32) + 0.1)


def soft_route(seed=5):
    rng = np.random.default_rng(seed)
    return SoftRoute(*(rng.random((B, T, E, P)).astype(np.float32) for _ in range(2)))


def floats(route) -> dict[str, Any]:
    names = (field.name for field in dataclasses.fields(route))
    return {name: getattr(route, name) for name in names if name not in ("ids", "tokens")}


def context(valid):
    return RouteContext(jnp.asarray(valid), jnp.int32(0))


def with_junk(x, valid, size):
    """The same valid tokens, something else and large in the padding."""
    return np.where(
        valid.reshape(*valid.shape, *[1] * (x.ndim - 2)), x, (size * draw(*x.shape, seed=9)).astype(x.dtype)
    )


def assert_near(found, wanted, what, rtol=RTOL):
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=rtol * max(np.abs(wanted).max(), 1e-3), err_msg=what)


@functools.partial(jax.jit, static_argnames="experts", compiler_options=FAST_TO_COMPILE)
def run_back(experts, params, x, route, valid, cotangent):
    """(y, stats, derivatives of sum(y * cotangent) by params, x and the route's weights)."""

    def loss(params, x, weights):
        y, stats = experts(params, x, dataclasses.replace(route, **weights), context(valid))
        return jnp.sum(jnp.where(valid[..., None], y, 0) * cotangent), (y, stats)

    gradients, (y, stats) = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(params, x, floats(route))
    return y, stats, gradients


class ExpertsContract:
    """Drives `experts` with random routes over eight rows of unequal lengths, one of them empty."""

    experts: Experts
    kinds = ("token", "slot", "soft")
    groups = 1

    def mesh(self):
        """The mesh to run under."""
        return contextlib.nullcontext()

    def routes(self, valid):
        makers = {"token": token_route, "slot": lambda: slot_route(self.groups, valid), "soft": soft_route}
        return [makers[kind]() for kind in self.kinds]

    def back(self, x, route, valid, cotangent):
        with self.mesh():
            return jax.device_get(run_back(self.experts, params(), x, route, valid, cotangent))

    def kept(self, route, valid):
        if isinstance(route, TokenRoute):
            return kept_by_loop(route.ids, valid, self.experts.capacity, groups=self.groups)
        return None

    def check(self, x, route, valid):
        """Output, derivatives and statistics against the oracle; returns the statistics."""
        cotangent, kept, kind = draw(*x.shape, seed=8), self.kept(route, valid), type(route).__name__
        cotangent = np.where(valid[..., None], cotangent, 0)
        y, stats, gradients = self.back(x, route, valid, cotangent)
        wanted, derivatives = expected(params(), x, route, valid, cotangent, kept)
        assert_near(np.where(valid[..., None], y, 0), np.where(valid[..., None], wanted, 0), f"{kind}: output")
        for name, leaf in derivatives[0].items():
            assert_near(gradients[0][name], leaf, f"{kind}: gradient by {name}")
        assert_near(gradients[1], derivatives[1], f"{kind}: gradient by x")
        for name, leaf in derivatives[2].items():
            assert_near(gradients[2][name], leaf, f"{kind}: gradient by the route's {name}")
        return stats

    def test_experts_are_a_static_value(self):
        twin = dataclasses.replace(self.experts)
        assert twin == self.experts and hash(twin) == hash(self.experts)
        assert jax.tree.leaves(self.experts) == [self.experts], "no pytree: parameters are arguments"
        assert self.experts.capacity is None or self.experts.capacity > 0
        seen = []

        @functools.partial(jax.jit, static_argnums=0)
        def shapes(experts, x, route, valid):
            seen.append(experts)
            return experts(params(), x, route, context(valid))

        with self.mesh():
            for experts in (self.experts, twin):
                shapes.trace(experts, draw(B, T, D), self.routes(mask())[0], mask())
        assert len(seen) == 1, "an equal value is traced again"

    def test_outputs_and_all_gradients_equal_the_reference(self):
        for route in self.routes(mask()):
            self.check(draw(B, T, D), route, mask())

    def test_statistics_count_valid_assignments(self):
        valid = mask()
        for route in self.routes(valid):
            _, stats, _ = self.back(draw(B, T, D), route, valid, draw(B, T, D, seed=8))
            assert {np.shape(leaf) for leaf in jax.tree.leaves(stats)} == {()}
            if isinstance(route, TokenRoute):
                load = np.bincount(route.ids[valid].ravel(), minlength=E)
                kept = self.kept(route, valid).sum()
            elif isinstance(route, SlotRoute):
                load = (route.tokens >= 0).sum(axis=(0, 2))
                kept = load.sum()
            else:
                load = np.full(E, P * valid.any(axis=1).sum())
                kept = load.sum()
            assert (int(stats.kept), int(stats.dropped)) == (kept, load.sum() - kept)
            assert float(stats.max_load) == pytest.approx(load.max() / load.sum(), rel=1e-6)

    def test_padding_changes_nothing(self):
        """Junk in the padding, of x and of the route, reaches no output, gradient or count."""
        valid, x, cotangent = mask(), draw(B, T, D), draw(B, T, D, seed=8)
        for route in self.routes(valid):
            other = route
            if isinstance(route, TokenRoute):
                ids = np.where(valid[..., None], route.ids, (route.ids + 1) % E)
                other = TokenRoute(ids, with_junk(route.weights, valid, 1e4))
            elif isinstance(route, SoftRoute):
                other = SoftRoute(*(with_junk(part, valid, 1e4) for part in (route.dispatch, route.combine)))
            plain = self.back(x, route, valid, cotangent)
            junk = self.back(with_junk(x, valid, 1e4), other, valid, cotangent)
            for a, b in zip(jax.tree.leaves(plain[1:]), jax.tree.leaves(junk[1:]), strict=True):
                np.testing.assert_array_equal(a, b)
            np.testing.assert_array_equal(plain[0][valid], junk[0][valid])
            assert not np.any(junk[2][1][~valid]), "padding has a gradient"

    def test_all_tokens_to_one_expert(self):
        if "token" in self.kinds:
            self.check(draw(B, T, D), token_route([2, 0]), mask())

    def test_one_token_a_row(self):
        """As in decoding."""
        if "token" in self.kinds:
            valid = mask([1, 1, 1, 0, 1, 1, 1, 1], width=1)
            self.check(draw(B, 1, D), token_route(width=1), valid)

    def test_every_token_to_every_expert(self):
        if "token" in self.kinds:
            self.check(draw(B, T, D), token_route([3, 1, 0, 2]), mask())

    def test_nothing_valid_is_nothing_done(self):
        valid = np.zeros((B, T), bool)
        for route in self.routes(valid):
            y, stats, gradients = self.back(draw(B, T, D), route, valid, draw(B, T, D, seed=8))
            assert all(np.all(leaf == 0) for leaf in jax.tree.leaves((stats, gradients)))

    def test_the_answer_has_the_dtype_of_x(self):
        x, route, valid = jnp.asarray(draw(B, T, D), jnp.bfloat16), self.routes(mask())[0], mask()

        @functools.partial(jax.jit, compiler_options=FAST_TO_COMPILE)
        def run(params, x, route, valid):
            return self.experts(params, x, route, context(valid))[0]

        with self.mesh():
            y = run(params(), x, route, valid)
        wanted, _ = expected(params(), x, route, valid, np.zeros(x.shape), self.kept(route, valid))
        assert y.dtype == jnp.bfloat16
        # bfloat16 has 8 bits: three products and a sum, each rounded.
        inside = valid[..., None]
        assert_near(np.where(inside, y, 0), np.where(inside, wanted, 0), "bfloat16", rtol=2e-2)

    def test_a_route_of_another_kind_is_refused_by_name(self):
        with self.mesh(), pytest.raises(InputError) as caught:
            self.experts(params(), jnp.asarray(draw(B, T, D)), {"ids": 0}, context(mask()))  # pyright: ignore
        assert type(self.experts).__name__ in str(caught.value) and "dict" in str(caught.value)
