"""The contract between a decoder and its experts: who goes where, what a router sees and says, what experts return.

A `Router` decides, an `Experts` runs. Both are frozen, hashable dataclasses without arrays (their parameters are
arguments), so that an equal new one does not retrace. x stays [B T D] throughout: merging B and T would move every
token between the devices of a data x tensor mesh. Tokens that are not `valid` take no capacity and no part in losses.
"""

import dataclasses
from typing import Any, ClassVar, Protocol

import jax

from jaxfw.core.errors import InputError
from jaxfw.core.shapes import Array, Bool, Float, Int, PRNGKeyArray, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenRoute:
    """Each token chooses k different experts; ids and weights of tokens that are not valid mean nothing."""

    ids: Int[Array, "B T k"]
    weights: Float[Array, "B T k"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotRoute:
    """Each expert chooses C tokens of a group of B/g rows: their index in the group's [B/g*T], -1 for an empty slot."""

    tokens: Int[Array, "g E C"]
    weights: Float[Array, "g E C"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SoftRoute:
    """Every slot is a mixture of its row's tokens (`dispatch`), every token one of slots (`combine`); P slots each."""

    dispatch: Float[Array, "B T E P"]
    combine: Float[Array, "B T E P"]


Route = TokenRoute | SlotRoute | SoftRoute


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouteContext:
    """What a router and experts may read beside the activations: `key` holds one random key a row."""

    valid: Bool[Array, "B T"]
    layer: Int[Array, ""]
    tokens: Int[Array, "B T"] | None = None
    key: PRNGKeyArray | None = None
    state: PyTree | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterAux:
    """What a router says beside its route.

    `losses` are scalars, means over the valid tokens of the whole batch, not yet weighted into the training loss.
    `probs` are every token's probabilities (or scores) of all experts, float32; `load` is the number of valid tokens
    that each expert was given before any was dropped; `importance` is its sum of probabilities over valid tokens, those
    of a token summing to 1, or None where there are no such; `state` is the router's state after this batch, or None.
    """

    losses: dict[str, Float[Array, ""]]
    probs: Float[Array, "B T E"]
    load: Float[Array, "E"]
    state: PyTree | None = None
    importance: Float[Array, "E"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertStats:
    """Assignments of valid tokens that were computed and that found no room, and the fullest expert's share of all.

    The share counts what experts were given before any was dropped. Nothing of a `SlotRoute` is dropped; of a
    `SoftRoute`, `kept` are the slots of rows with a valid token.
    """

    kept: Float[Array, ""]
    dropped: Float[Array, ""]
    max_load: Float[Array, ""]


def in_groups(groups: int, x: Array) -> Array:
    """[B T ...] as [g B/g*T ...]: every group is B/g rows.

    Raises:
        InputError: the rows do not divide into that many groups.
    """
    if x.shape[0] % groups:
        raise InputError(
            f"groups={groups} does not divide the {x.shape[0]} rows of the batch: every group needs as many."
        )
    return x.reshape(groups, -1, *x.shape[2:])


def check_route(experts: "Experts", route: Route, kinds: tuple[type, ...]) -> None:
    """Raise an `InputError` that names both unless `experts` take this kind of route."""
    if not isinstance(route, kinds):
        known = ", ".join(kind.__name__ for kind in kinds)
        raise InputError(
            f"experts={experts!r} cannot run a route of the kind {type(route).__name__}. Known: {known}: "
            "give a router that returns one, or other experts."
        )


class Router(Protocol):
    """Chooses; see `jaxfw.models.routing.routers`."""

    is_causal: ClassVar[bool]  # whether a token's route is blind to later tokens: a language model refuses others

    def init(self, key: PRNGKeyArray, width: int, experts: int, *, std: float, dtype: Any) -> PyTree:
        """Fresh parameters for x of `width`. Works under `jax.eval_shape`."""
        ...

    def init_state(self, experts: int) -> PyTree | None:
        """What it remembers before the first batch, the tree of `RouterAux.state`; None for a router without state."""
        ...

    def __call__(self, params: PyTree, x: Float[Array, "B T D"], context: RouteContext) -> tuple[Route, RouterAux]:
        """The route of every token; `params` is the layer's `moe/router`."""
        ...


class Experts(Protocol):
    """Runs; see `jaxfw.models.routing.dense`, `sorted` and `parallel`."""

    @property
    def capacity(self) -> float | None:
        """Factor over the mean load that an expert takes; None drops nothing, as generation needs."""
        ...

    def __call__(
        self, params: PyTree, x: Float[Array, "B T D"], route: Route, context: RouteContext
    ) -> tuple[Float[Array, "B T D"], ExpertStats]:
        """The experts' answers, weighted and summed; `params` is the layer's `moe/experts`, stacked over E."""
        ...
