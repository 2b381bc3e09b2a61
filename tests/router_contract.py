"""What every router must hold to, as tests that it inherits; beside `tests/experts_contract.py`, which is for experts.

    class TestMine(RouterContract):
        router = Mine()

It is driven over four rows of unequal lengths, one of them empty, and for E = 4 experts.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxfw.models.routing import Route, RouteContext, Router, RouterAux, SlotRoute, SoftRoute, TokenRoute

B, T, D, E, V = 4, 6, 5, 4, 50
LENGTHS = (6, 2, 5, 0)
FAST_TO_COMPILE = {"xla_backend_optimization_level": 0}


def mask(width=T) -> np.ndarray:
    return np.arange(width) < np.asarray(LENGTHS)[:, None]


def inputs(width=T, seed=0) -> tuple[np.ndarray, np.ndarray]:
    """(x, tokens)."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((B, width, D)).astype(np.float32), rng.integers(0, V, (B, width), np.int32)


def call(router: Router, params: Any, x, tokens, valid, state: Any) -> tuple[Route, RouterAux]:
    context = RouteContext(jnp.asarray(valid), jnp.int32(2), tokens=jnp.asarray(tokens), state=state)
    return router(params, x, context)


@functools.partial(jax.jit, static_argnums=0, compiler_options=FAST_TO_COMPILE)
def step(router, params, x, tokens, valid, state):
    """((a number that every valid weight and all losses go into, what the router says), gradients by params and x)."""

    def total(params, x):
        route, aux = call(router, params, x, tokens, valid, state)
        number = sum(aux.losses.values(), jnp.float32(0))
        for name, weights in weights_of(route).items():
            if not isinstance(route, SlotRoute):
                weights = jnp.where(valid.reshape(*valid.shape, *[1] * (weights.ndim - 2)), weights, 0)
            number += jnp.sum(weights * jnp.cos(jnp.arange(weights.shape[-1]) + len(name)))
        if aux.importance is not None:
            number += jnp.sum(aux.importance * jnp.sin(jnp.arange(E)))
        return number, (aux.losses, aux.load, aux.state, aux.importance)

    return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(params, x)


def weights_of(route: Route) -> dict[str, Any]:
    names = ("dispatch", "combine") if isinstance(route, SoftRoute) else ("weights",)
    return {name: getattr(route, name) for name in names}


def assert_near(found, wanted, what):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6, err_msg=what)


class RouterContract:
    """Holds `router` to the protocol `jaxfw.models.routing.Router`."""

    router: Router

    def params(self, dtype=jnp.float32):
        return self.router.init(jax.random.key(0), D, E, std=0.5, dtype=dtype)

    def test_padding_changes_nothing(self):
        """Junk or even NaN behind the valid tokens, or more of it: the same route, losses, loads and gradients."""
        (x, tokens), valid, params = inputs(), mask(), self.params()
        state = self.router.init_state(E)
        plain, (by_params, by_x) = step(self.router, params, x, tokens, valid, state)
        for width in (T, T + 2):
            inside, where = np.pad(valid, ((0, 0), (0, width - T))), mask(width)
            junk, others = np.full((B, width, D), np.nan, np.float32), np.full((B, width), V - 1, np.int32)
            junk[inside], others[inside] = x[valid], tokens[valid]
            found, (other_by_params, other_by_x) = step(self.router, params, junk, others, where, state)
            assert_near(found, plain, "losses, loads, weights and state")
            assert_near(other_by_params, by_params, "gradient by the parameters")
            assert_near(other_by_x[:, :T], by_x, "gradient by x")
            assert not np.any(np.asarray(other_by_x)[~where]), "padding has a gradient"
        assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(by_params)), "a parameter gets no gradient"

    def test_a_causal_route_is_blind_to_later_tokens(self):
        if not self.router.is_causal:
            return
        (x, tokens), (later, others), cut = inputs(), inputs(seed=1), 3
        later[:, :cut], others[:, :cut] = x[:, :cut], tokens[:, :cut]
        state, params = self.router.init_state(E), self.params()
        run = jax.jit(functools.partial(call, self.router), compiler_options=FAST_TO_COMPILE)
        found, wanted = (run(params, *each, np.ones((B, T), bool), state)[0] for each in ((later, others), (x, tokens)))
        assert isinstance(found, TokenRoute)
        np.testing.assert_array_equal(found.ids[:, :cut], wanted.ids[:, :cut])
        np.testing.assert_allclose(found.weights[:, :cut], wanted.weights[:, :cut], rtol=1e-5)

    def test_it_is_a_static_value_and_known_abstractly(self):
        """An equal new one does not retrace; parameters, state and float32 results are known without computing."""
        twin, seen = dataclasses.replace(self.router), []
        assert twin == self.router and hash(twin) == hash(self.router)
        assert jax.tree.leaves(self.router) == [self.router], "no pytree: parameters are arguments"

        @functools.partial(jax.jit, static_argnums=0)
        def traced(router, *arguments):
            seen.append(router)
            return call(router, *arguments)

        params = jax.eval_shape(lambda: self.params(jnp.bfloat16))
        assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(params))
        state = jax.eval_shape(lambda: self.router.init_state(E))
        x, tokens = jax.ShapeDtypeStruct((B, T, D), jnp.bfloat16), jax.ShapeDtypeStruct((B, T), jnp.int32)
        valid = jax.ShapeDtypeStruct((B, T), jnp.bool_)
        for router in (self.router, twin):
            route, aux = traced.eval_shape(router, params, x, tokens, valid, state)
        assert len(seen) == 1, "an equal value is traced again"
        assert aux.state == state, "the state after a batch has another tree, shape or dtype than init_state"
        assert aux.load.shape == (E,) and aux.probs.shape == (B, T, E)
        assert all(loss.shape == () for loss in aux.losses.values())
        assert aux.importance is None or aux.importance.shape == (E,)
        floats = (*weights_of(route).values(), aux.losses, aux.load, aux.probs, aux.importance)
        assert {leaf.dtype for leaf in jax.tree.leaves(floats)} == {jnp.dtype("float32")}, "routing is float32"
