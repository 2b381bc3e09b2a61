"""Running a route of each kind through slots; what `Sorted` and `ExpertParallel` share.

g groups of N tokens, E experts with C slots each; empty slots hold zeros. Inside a `shard_map`, `axis` names the mesh
axis over which `params` are cut and `axes` those over which rows are.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxfw.core.shapes import Array, Bool, Float, PyTree
from jaxfw.models.routing.feed_forward import expert_ffn, experts_of, slots_ffn
from jaxfw.models.routing.limit import Limit
from jaxfw.models.routing.rooms import Assignments, run_dropless, run_slots
from jaxfw.models.routing.route import ExpertStats, Route, SlotRoute, SoftRoute, TokenRoute, in_groups
from jaxfw.ops import routing


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a route runs: `experts` of the model, over how many groups capacity counts, the axes of the mesh."""

    experts: int
    groups: int
    axis: str | None = None
    axes: tuple[str, ...] = ()


def run_route(
    limit: Limit, layout: Layout, params: PyTree, x: Float[Array, "B T D"], route: Route, valid: Bool[Array, "B T"]
) -> tuple[Float[Array, "B T D"], ExpertStats]:
    """The weighted sum of the experts' answers, and what was dropped."""
    if isinstance(route, SoftRoute):
        return run_soft(layout, params, x, route, valid)
    if isinstance(route, SlotRoute):
        return _run_slot_route(layout, params, x, route)
    if limit.capacity is None and layout.axis is None and _is_few(route, layout.experts):
        return _run_few(params, x, route, valid)
    return _run_tokens(limit, layout, params, x, route, valid)


def expert_stats(kept: Array, load: Float[Array, "E"], axes: tuple[str, ...] = ()) -> ExpertStats:
    """From the assignments that were computed and those that each expert was given; summed over the mesh's `axes`."""
    kept, load = jnp.asarray(kept, jnp.float32), jnp.asarray(load, jnp.float32)
    if axes:
        kept, load = jax.lax.psum((kept, load), axes)
    given = jnp.sum(load)
    return ExpertStats(kept, given - kept, jnp.max(load) / jnp.maximum(given, 1))


def _run_tokens(
    limit: Limit, layout: Layout, params: PyTree, x: Float[Array, "B T D"], route: TokenRoute, valid: Bool[Array, "B T"]
) -> tuple[Float[Array, "B T D"], ExpertStats]:
    k, axis = route.ids.shape[-1], layout.axis
    held = experts_of(params) * (1 if axis is None else jax.lax.axis_size(axis))
    tokens, ids, weights, mask = (in_groups(layout.groups, part) for part in (x, route.ids, route.weights, valid))
    given = Assignments(*routing.order_by_expert(ids, mask, held))
    load = jnp.sum(given.counts, axis=0)
    if limit.capacity is None:
        fullest = jnp.max(given.counts, axis=0)
        fullest = jax.lax.pmax(fullest, layout.axes) if layout.axes else fullest
        y = run_dropless(params, tokens, weights, given, fullest, axis)
        kept = jnp.sum(load)
    else:
        room = limit.room(jnp.sum(mask, axis=1, dtype=jnp.int32), k, layout.experts)
        given = dataclasses.replace(given, counts=jnp.minimum(given.counts, jnp.reshape(room, (-1, 1))))
        N = tokens.shape[1]
        # Padding must not raise what an expert takes: the count of valid tokens rules, N only bounds the shape.
        slots = given.slots(weights, min(limit.room(N, k, layout.experts), N))
        y = run_slots(params, tokens, *slots, axis)
        kept = jnp.sum(given.counts)
    return y.reshape(x.shape).astype(x.dtype), expert_stats(kept, load, layout.axes)


def _is_few(route: TokenRoute, experts: int) -> bool:
    # On a mesh, one expert's weights may lie on another device: there all experts run where they are.
    return route.ids.size <= experts // 2 and jax.sharding.get_abstract_mesh().size <= 1


def _run_few(
    params: PyTree, x: Float[Array, "B T D"], route: TokenRoute, valid: Bool[Array, "B T"]
) -> tuple[Float[Array, "B T D"], ExpertStats]:
    """One assignment after the other: a decode step reads the weights of the experts that it uses, not of all."""
    B, T, k = route.ids.shape
    x, ids = jnp.where(valid[..., None], x, 0), jnp.where(valid[..., None], route.ids, 0)
    weights = jnp.where(valid[..., None], route.weights, 0)

    def answer(part: tuple[Array, Array]) -> Float[Array, "D"]:
        number, expert = part
        own = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, expert, 1), params)
        return expert_ffn(own, jax.lax.dynamic_slice_in_dim(x.reshape(B * T, -1), number // k, 1)[None])[0, 0]

    answers = jax.lax.map(answer, (jnp.arange(ids.size), ids.reshape(-1))).reshape(B, T, k, -1)
    y = jnp.sum(weights[..., None] * answers.astype(jnp.float32), axis=2).astype(x.dtype)
    given = jnp.sum(valid, dtype=jnp.float32) * k
    load = routing.load(route.ids, valid, experts_of(params))
    return y, expert_stats(given, load)


def _run_slot_route(
    layout: Layout, params: PyTree, x: Float[Array, "B T D"], route: SlotRoute
) -> tuple[Float[Array, "B T D"], ExpertStats]:
    tokens = in_groups(route.tokens.shape[0], x)
    filled = route.tokens >= 0
    slots = jnp.where(filled, route.tokens, tokens.shape[1])
    y = run_slots(params, tokens, slots, jnp.where(filled, route.weights, 0), layout.axis)
    load = jnp.sum(filled, axis=(0, 2))
    return y.reshape(x.shape).astype(x.dtype), expert_stats(jnp.sum(load), load, layout.axes)


def run_soft(
    layout: Layout, params: PyTree, x: Float[Array, "B T D"], route: SoftRoute, valid: Bool[Array, "B T"]
) -> tuple[Float[Array, "B T D"], ExpertStats]:
    """Mixtures of a row's valid tokens, the experts' answers to them, and mixtures of those; sums in float32."""
    inside = valid[..., None, None]
    dispatch, combine = jnp.where(inside, route.dispatch, 0), jnp.where(inside, route.combine, 0)
    x = jnp.where(valid[..., None], x, 0)
    slots = jnp.einsum("btep,btd->bepd", dispatch, x.astype(jnp.float32)).astype(x.dtype)
    answers = slots_ffn(params, slots, layout.axis).astype(jnp.float32)
    y = jnp.einsum("btep,bepd->btd", combine, answers).astype(x.dtype)
    load = jnp.full(layout.experts, dispatch.shape[-1] * jnp.sum(jnp.any(valid, axis=1)), jnp.float32)
    return y, expert_stats(jnp.sum(load), load, layout.axes)
