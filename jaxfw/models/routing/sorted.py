"""Tokens sorted by expert into padded slots, two batched products over all experts: for CPUs and single devices."""

import dataclasses

from jaxfw.core.shapes import Array, Float, PyTree
from jaxfw.models.routing.feed_forward import experts_of
from jaxfw.models.routing.limit import Limit, row_shards
from jaxfw.models.routing.route import ExpertStats, Route, RouteContext, SlotRoute, SoftRoute, TokenRoute, check_route
from jaxfw.models.routing.slots import Layout, run_route


@dataclasses.dataclass(frozen=True)
class Sorted(Limit):
    """Work for the assignments and some padding only; dropless by default. Takes routes of every kind.

    On a mesh, rows are sorted where they lie, and XLA brings the experts' weights there: where they are cut over the
    expert axis, `ExpertParallel` moves tokens instead. Under `jax.vmap` (clients side by side) dropless experts run all
    that any load could need, more work than `Dense`: give a capacity, or `jax.lax.map` over the clients.
    """

    def __call__(
        self, params: PyTree, x: Float[Array, "B T D"], route: Route, context: RouteContext
    ) -> tuple[Float[Array, "B T D"], ExpertStats]:
        """The experts' answers and how many were dropped; see `Experts`."""
        check_route(self, route, (TokenRoute, SlotRoute, SoftRoute))
        layout = Layout(experts_of(params), self.groups(x.shape[0], row_shards()))
        return run_route(self, layout, params, x, route, context.valid)
