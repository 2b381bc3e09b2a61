"""Every expert on every token: the plain reference, E / k times the work."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxfw.core.shapes import Array, Bool, Float, Int, PyTree
from jaxfw.models.routing.feed_forward import expert_ffn, experts_of
from jaxfw.models.routing.limit import Limit, row_shards
from jaxfw.models.routing.route import (
    ExpertStats,
    Route,
    RouteContext,
    SlotRoute,
    SoftRoute,
    TokenRoute,
    check_route,
    in_groups,
)
from jaxfw.models.routing.slots import Layout, expert_stats, run_soft
from jaxfw.ops import routing


@dataclasses.dataclass(frozen=True)
class Dense(Limit):
    """Each token's answers of all E experts, weighted by a [B T E] matrix that is zero where the token did not go."""

    def __call__(
        self, params: PyTree, x: Float[Array, "B T D"], route: Route, context: RouteContext
    ) -> tuple[Float[Array, "B T D"], ExpertStats]:
        """The experts' answers and how many were dropped; see `Experts`."""
        check_route(self, route, (TokenRoute, SlotRoute, SoftRoute))
        E = experts_of(params)
        if isinstance(route, SoftRoute):
            return run_soft(Layout(E, groups=1), params, x, route, context.valid)
        x = jnp.where(context.valid[..., None], x, 0)
        if isinstance(route, TokenRoute):
            weights, stats = self._of_tokens(route, context.valid, E)
        else:
            weights, stats = _of_slots(route, context.valid)
        everywhere = jnp.broadcast_to(x[None], (E, *x.shape))
        answers = expert_ffn(params, everywhere).astype(jnp.float32)
        return jnp.einsum("bte,ebtd->btd", weights, answers).astype(x.dtype), stats

    def _of_tokens(self, route: TokenRoute, valid: Bool[Array, "B T"], E: int) -> tuple[Array, ExpertStats]:
        B, T, k = route.ids.shape
        kept = jnp.broadcast_to(valid[..., None], route.ids.shape)
        if self.capacity is not None:
            g = self.groups(B, row_shards())
            grouped = in_groups(g, valid)
            turns = routing.turns(in_groups(g, route.ids), grouped, E)
            room = self.room(jnp.sum(grouped, axis=1, dtype=jnp.int32), k, E)
            kept &= (turns < jnp.reshape(room, (g, 1, 1))).reshape(B, T, k)
        chosen = (route.ids[..., None] == jnp.arange(E)) & kept[..., None]
        weights = jnp.sum(jnp.where(chosen, route.weights[..., None], 0), axis=2)
        return weights, expert_stats(jnp.sum(kept), routing.load(route.ids, valid, E))


def _of_slots(route: SlotRoute, valid: Bool[Array, "B T"]) -> tuple[Array, ExpertStats]:
    g, E, C = route.tokens.shape
    N = valid.size // g
    filled = route.tokens >= 0

    def scatter(tokens: Int[Array, "E C"], weights: Float[Array, "E C"]) -> Float[Array, "N E"]:
        return jnp.zeros((N, E)).at[tokens, jnp.arange(E)[:, None]].add(weights, mode="drop")

    weights = jax.vmap(scatter)(jnp.where(filled, route.tokens, N), jnp.where(filled, route.weights, 0))
    load = jnp.sum(filled, axis=(0, 2), dtype=jnp.float32)
    return weights.reshape(*valid.shape, E), expert_stats(jnp.sum(load), load)
