"""Dropless experts with static shapes: a room for typical loads, and blocks of that size one by one for the others.

Every expert gets somewhat more room than the mean, in one batch. Where one is fuller, experts run one after the other,
in as many blocks as their load fills: no load makes more work than the assignments and a block for each expert.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from jaxfw.core.shapes import Array, Float, Int, PyTree
from jaxfw.models.routing.again import cond_again
from jaxfw.models.routing.feed_forward import experts_of, slots_ffn

FACTOR = 1.5  # of the mean load: the room of every expert
FEW = 16  # rows for which an expert reads its weights longer than it multiplies: less room than that saves nothing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Assignments:
    """The assignments of g groups of N tokens, sorted by expert: see `jaxfw.ops.routing.order_by_expert`."""

    order: Int[Array, "g k*N"]
    starts: Int[Array, "g E"]
    counts: Int[Array, "g E"]

    def slots(self, weights: Float[Array, "g N k"], C: int) -> tuple[Int[Array, "g E C"], Float[Array, "g E C"]]:
        """The tokens and weights of each expert's first C assignments, N and 0 in the slots that are empty."""
        (g, E), N = self.starts.shape, weights.shape[1]
        full = jnp.arange(C) < self.counts[..., None]
        place = jnp.where(full, self.starts[..., None] + jnp.arange(C), 0).reshape(g, -1)
        picks = jnp.take_along_axis(self.order, place, axis=1)
        by_choice = weights.astype(jnp.float32).swapaxes(1, 2).reshape(g, -1)
        picked = jnp.take_along_axis(by_choice, picks, axis=1).reshape(g, E, C)
        return jnp.where(full, (picks % N).reshape(g, E, C), N), jnp.where(full, picked, 0)


def run_slots(
    params: PyTree,
    x: Float[Array, "g N D"],
    tokens: Int[Array, "g E C"],
    weights: Float[Array, "g E C"],
    axis: str | None,
) -> Float[Array, "g N D"]:
    """Gather, `slots_ffn`, weigh and add up in float32; slots with `tokens` N are empty."""

    def gather(x: Float[Array, "N D"], tokens: Int[Array, "E C"]) -> Float[Array, "E C D"]:
        return jnp.take(x, tokens, axis=0, mode="fill", fill_value=0)

    def add_up(answers: Float[Array, "E C D"], tokens: Int[Array, "E C"]) -> Float[Array, "N D"]:
        return jnp.zeros(x.shape[1:], jnp.float32).at[tokens].add(answers, mode="drop")

    answers = slots_ffn(params, jax.vmap(gather)(x, tokens), axis)
    return jax.vmap(add_up)(answers.astype(jnp.float32) * weights[..., None], tokens)


def run_dropless(
    params: PyTree,
    x: Float[Array, "g N D"],
    weights: Float[Array, "g N k"],
    given: Assignments,
    fullest: Int[Array, "E"],
    axis: str | None,
) -> Float[Array, "g N D"]:
    """All assignments; `fullest` is each expert's largest count over all groups, of every shard."""
    (g, N, k), E = weights.shape, given.starts.shape[1]
    room = max(math.ceil(k * N / E * FACTOR), -(-FEW // g))
    operands = (params, x, weights), (given, fullest)
    if room >= N:
        return _run_room(N, axis, *operands)
    forms = tuple(functools.partial(form, room, axis) for form in (_run_room, _run_blocks))
    return cond_again(forms, jnp.max(fullest) <= room, *operands)


def _run_room(room: int, axis: str | None, floats: PyTree, fixed: tuple[Assignments, Array]) -> Array:
    params, x, weights = floats
    return run_slots(params, x, *fixed[0].slots(weights, room), axis)


def _run_blocks(room: int, axis: str | None, floats: PyTree, fixed: tuple[Assignments, Array]) -> Array:
    """The held experts one after the other, on a mesh one of each shard at a time; empty blocks are skipped."""
    (params, x, weights), (given, fullest) = floats, fixed
    zeros, held = jnp.zeros(x.shape, jnp.float32), experts_of(params)
    forms = functools.partial(_run_room, room, axis), lambda *_: zeros

    def apart(values: Int[Array, "... E"]) -> Int[Array, "E/n ... n"]:
        return jnp.moveaxis(values.reshape(*values.shape[:-1], -1, held), -1, 0)

    def run_expert(y, part):
        own, starts, counts, fullest = part

        def run_block(y, first):
            rest = dataclasses.replace(given, starts=starts + first, counts=counts - first)
            return y + cond_again(forms, jnp.max(fullest) > first, (own, x, weights), (rest, fullest)), None

        return jax.lax.scan(run_block, y, jnp.arange(0, x.shape[1], room))[0], None

    each = jax.tree.map(lambda leaf: leaf[:, None], params)
    parts = (each, apart(given.starts), apart(given.counts), apart(fullest))
    return jax.lax.scan(run_expert, zeros, parts)[0]
