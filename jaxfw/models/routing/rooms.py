"""Dropless experts with static shapes: slots of a few sizes, chosen at run time by the fullest expert.

Under typical loads every expert gets a little more room than the mean, in one batch; where one is fuller, experts run
one after the other, each with room for its own load. No load makes more work than a few times the assignments.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxfw.core.shapes import Array, Bool, Float, Int, PyTree
from jaxfw.models.routing.feed_forward import experts_of, slots_ffn
from jaxfw.ops import routing

FACTORS = (1.25, 2.0)  # of the mean load: the sizes of the batched form
PARTS = (16, 4)  # of the group: the sizes of the form in which experts run one after the other
SPARE = 2  # up to that many times the assignments, the batched form with room for everything serves as the last
FEW = 16  # rows for which an expert reads its weights longer than it multiplies: less room than that saves nothing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Assignments:
    """The assignments of g groups of N tokens, sorted by expert: see `jaxfw.ops.routing.order_by_expert`.

    `weights` are by k-major number, as `order` counts.
    """

    order: Int[Array, "g k*N"]
    starts: Int[Array, "g E"]
    counts: Int[Array, "g E"]
    weights: Float[Array, "g k*N"]

    @classmethod
    def of(cls, ids: Int[Array, "g N k"], weights: Float[Array, "g N k"], valid: Bool[Array, "g N"], experts: int):
        """Sorted; `weights` of tokens that are not valid are never read."""
        flat = weights.astype(jnp.float32).swapaxes(1, 2).reshape(len(weights), -1)
        return cls(*routing.order_by_expert(ids, valid, experts), flat)

    def slots(self, N: int, C: int) -> tuple[Int[Array, "g E C"], Float[Array, "g E C"]]:
        """The tokens and weights of each expert's first C assignments, N and 0 in the slots that are empty."""
        g, E = self.starts.shape
        full = jnp.arange(C) < self.counts[..., None]
        place = jnp.where(full, self.starts[..., None] + jnp.arange(C), 0).reshape(g, -1)
        picks = jnp.take_along_axis(self.order, place, axis=1)
        weights = jnp.take_along_axis(self.weights, picks, axis=1).reshape(g, E, C)
        return jnp.where(full, (picks % N).reshape(g, E, C), N), jnp.where(full, weights, 0)


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
    params: PyTree, x: Float[Array, "g N D"], given: Assignments, fullest: Int[Array, "E"], axis: str | None
) -> Float[Array, "g N D"]:
    """All assignments; `fullest` is each expert's largest count over all groups, of every shard.

    Gradients run the experts again: kept, a switch would hold the activations of all its sizes.
    """
    (g, N), E, total = x.shape[:2], given.starts.shape[1], given.order.shape[1]
    if g * N <= FEW:
        return _run_room(N, axis, (params, x, given), fullest)
    rooms = _rooms(g, N, [total / E * factor for factor in FACTORS])
    runs = [functools.partial(_run_room, room, axis) for room in rooms]
    is_small = SPARE * total >= E * N
    runs.append(functools.partial(_run_room, N, axis) if is_small else functools.partial(_run_each, axis))
    return switch_again(runs, _smallest(rooms, jnp.max(fullest)), (params, x, given), fullest)


def _rooms(g: int, N: int, sizes: Sequence[float]) -> list[int]:
    """Those of the sizes that make a difference, below N and in ascending order."""
    return sorted({room for room in (max(math.ceil(size), -(-FEW // g)) for size in sizes) if room < N})


def _smallest(rooms: Sequence[int], load: Int[Array, ""]) -> Int[Array, ""]:
    """The number of the first room that holds `load`, the rooms in ascending order; one more where none does."""
    return jnp.sum(load > jnp.asarray(rooms, jnp.int32))


def _run_room(room: int, axis: str | None, operands: tuple[PyTree, Array, Assignments], fullest: Array) -> Array:
    params, x, given = operands
    return run_slots(params, x, *given.slots(x.shape[1], room), axis)


def _run_each(axis: str | None, operands: tuple[PyTree, Array, Assignments], fullest: Int[Array, "E"]) -> Array:
    """The held experts one after the other, on a mesh one of each shard at a time."""
    params, x, given = operands
    held, N = experts_of(params), x.shape[1]
    rooms = [0, *_rooms(x.shape[0], N, [N / part for part in PARTS]), N]
    runs = [functools.partial(_run_room, room, axis) for room in rooms]

    def apart(values: Int[Array, "... E"]) -> Int[Array, "E/n ... n"]:
        return jnp.moveaxis(values.reshape(*values.shape[:-1], -1, held), -1, 0)

    def body(y, part):
        params, starts, counts, fullest = part
        operands = (params, x, dataclasses.replace(given, starts=starts, counts=counts))
        return y + switch_again(runs, _smallest(rooms[:-1], jnp.max(fullest)), operands, fullest), None

    each = jax.tree.map(lambda leaf: leaf[:, None], params)
    parts = (each, apart(given.starts), apart(given.counts), apart(fullest))
    return jax.lax.scan(body, jnp.zeros(x.shape, jnp.float32), parts)[0]


def switch_again(
    branches: Sequence[Callable[..., Array]], index: Int[Array, ""], operands: PyTree, fixed: PyTree
) -> Array:
    """`lax.switch` over `branch(operands, fixed)` whose gradient holds the operands alone and runs the branch again.

    The gradient of `lax.switch` holds what every branch would, zeros for those that did not run. Differentiable in the
    floating-point leaves of `operands`, in reverse mode.
    """
    leaves, tree = jax.tree.flatten(operands)
    is_float = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]

    def rebuild(floats, others):
        floats, others = iter(floats), iter(others)
        return jax.tree.unflatten(tree, [next(floats) if wanted else next(others) for wanted in is_float])

    def call(branch, floats, others, fixed):
        return branch(rebuild(floats, others), fixed)

    def call_back(branch, floats, others, fixed, cotangent):
        return jax.vjp(lambda floats: call(branch, floats, others, fixed), floats)[1](cotangent)[0]

    @jax.custom_vjp
    def run(floats, *rest):
        index, *arguments = rest
        return jax.lax.switch(index, [functools.partial(call, branch) for branch in branches], floats, *arguments)

    def forward(*arguments):
        return run(*arguments), arguments

    def backward(arguments, cotangent):
        floats, index, *rest = arguments
        runs = [functools.partial(call_back, branch) for branch in branches]
        return jax.lax.switch(index, runs, floats, *rest, cotangent), None, None, None

    run.defvjp(forward, backward)
    floats = [leaf for leaf, wanted in zip(leaves, is_float, strict=True) if wanted]
    others = [leaf for leaf, wanted in zip(leaves, is_float, strict=True) if not wanted]
    return run(floats, index, others, fixed)
