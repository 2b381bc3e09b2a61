"""Expert parallelism: every device holds some experts, and tokens travel to them by all-to-all.

Rows lie over the mesh axes data, fsdp and expert, experts over the axis expert (GShard; Lepikhin et al. 2020,
arXiv:2006.16668). Each shard sorts its own rows into slots, one all-to-all along the axis expert takes them to their
experts, a second brings the answers back. The axis tensor, which cuts F, is left to XLA.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxfw.core.errors import InputError
from jaxfw.core.mesh import BATCH_AXES, auto_sizes
from jaxfw.core.shapes import Array, Float, PyTree
from jaxfw.models.routing.feed_forward import experts_of
from jaxfw.models.routing.limit import Limit
from jaxfw.models.routing.route import ExpertStats, Route, RouteContext, SlotRoute, SoftRoute, TokenRoute, check_route
from jaxfw.models.routing.slots import Layout, run_route


@dataclasses.dataclass(frozen=True)
class ExpertParallel(Limit):
    """`Sorted` on a mesh whose axis expert cuts the experts; takes routes of every kind.

    The rows must divide into the shards. Where the axis does not divide E, experts without tokens are added, and the
    weights are laid out anew in every call: better choose an axis that does. A capacity counts within a shard or a part
    of one: group="global" is refused. Dropless gradients send the tokens again. A `SlotRoute` must have as many groups
    as there are shards, or a multiple.

    Raises:
        InputError: no axis expert in the mesh of the moment; rows or groups that do not divide; group="global".
    """

    def __post_init__(self):
        super().__post_init__()
        if self.group == "global" and self.capacity is not None:
            raise InputError(
                "experts.group='global' needs every shard's counts before a token is sent: "
                "give ExpertParallel group='shard', or use Sorted."
            )

    def __call__(
        self, params: PyTree, x: Float[Array, "B T D"], route: Route, context: RouteContext
    ) -> tuple[Float[Array, "B T D"], ExpertStats]:
        """The experts' answers and how many were dropped; see `Experts`."""
        check_route(self, route, (TokenRoute, SlotRoute, SoftRoute))
        sizes = self._sizes()
        rows, shards, E = tuple(sizes), math.prod(sizes.values()), experts_of(params)
        groups = route.tokens.shape[0] if isinstance(route, SlotRoute) else self.groups(x.shape[0], shards)
        for name, size in (("rows of the batch", x.shape[0]), ("groups", groups)):
            if size % shards:
                raise InputError(
                    f"{size} {name} do not divide among {shards} shards ({', '.join(map(str, sizes.items()))}): "
                    "give a multiple, or use Sorted."
                )
        added = -E % sizes["expert"]
        params = jax.tree.map(lambda leaf: _padded(leaf, 0, added), params)
        layout = Layout(E, groups // shards, "expert", rows)
        run = jax.shard_map(
            functools.partial(run_route, self, layout),
            in_specs=(P("expert"), P(rows), P(rows), P(rows)),
            out_specs=(P(rows), P()),
            axis_names=set(rows),
            check_vma=False,
        )
        return run(params, x, _with_experts(route, added), context.valid)

    def _sizes(self) -> dict[str, int]:
        mesh = jax.sharding.get_abstract_mesh()
        sizes = {} if mesh.empty else auto_sizes(mesh)
        if "expert" not in sizes:
            raise InputError(
                f"{self!r} needs a mesh with an axis 'expert', this one has {', '.join(sizes) or 'none'}: run under "
                "jax.set_mesh(jaxfw.core.mesh.make_mesh(expert=...)), or use Sorted."
            )
        return {axis: sizes[axis] for axis in BATCH_AXES if axis in sizes}


def _padded(leaf: Array, axis: int, added: int, fill: float = 0) -> Array:
    widths = [(0, added if number == axis else 0) for number in range(leaf.ndim)]
    return jnp.pad(leaf, widths, constant_values=fill) if added else leaf


def _with_experts(route: Route, added: int) -> Route:
    """The route with experts added at the end, to which nothing goes."""
    if isinstance(route, SlotRoute):
        return SlotRoute(_padded(route.tokens, 1, added, -1), _padded(route.weights, 1, added))
    if isinstance(route, SoftRoute):
        return SoftRoute(_padded(route.dispatch, 2, added), _padded(route.combine, 2, added))
    return route
