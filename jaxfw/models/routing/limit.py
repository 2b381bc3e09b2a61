"""How many tokens an expert takes, and among which tokens that is counted."""

import dataclasses
import math

import jax

from jaxfw.core.errors import InputError
from jaxfw.core.mesh import BATCH_AXES, auto_sizes
from jaxfw.ops import routing
from jaxfw.ops.routing import Count


def row_shards() -> int:
    """How many ways the mesh of the moment cuts the rows of a batch; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {} if mesh.empty else auto_sizes(mesh)
    return math.prod(sizes.get(axis, 1) for axis in BATCH_AXES)


@dataclasses.dataclass(frozen=True)
class Limit:
    """What experts that take a `TokenRoute` may drop.

    Attributes:
        capacity: an expert takes ceil(valid tokens of the group * k / experts * capacity) assignments of a group, in
            turn (`jaxfw.ops.routing`), and drops the rest; None drops nothing. The second choice of a token then hangs
            on the first choices of later ones, and a row on its neighbours.
        group: among which tokens capacity and turns count: "shard", the rows of one shard of the mesh (all without a
            mesh); "global", the whole batch; or the batch cut into that many groups of rows.

    Raises:
        InputError: a value outside its range.
    """

    capacity: float | None = None
    group: str | int = "shard"

    def __post_init__(self):
        if self.capacity is not None and not self.capacity >= routing.LEAST_FACTOR:
            least = f"at least {routing.LEAST_FACTOR}"
            raise InputError(f"experts.capacity={self.capacity} must be {least}, or None to drop nothing.")
        is_number = isinstance(self.group, int) and not isinstance(self.group, bool) and self.group >= 1
        if not is_number and self.group not in ("shard", "global"):
            raise InputError(f"experts.group={self.group!r} must be 'shard', 'global' or a number of groups from 1 on.")

    def groups(self, rows: int, shards: int) -> int:
        """Groups among which capacity counts, on a mesh that cuts the rows into `shards`."""
        if self.capacity is None:
            # Nothing is dropped, so that groups decide only where sorting happens: in each shard, where that fits.
            return shards if rows % shards == 0 else 1
        return self.group if isinstance(self.group, int) else {"shard": shards, "global": 1}[self.group]

    def room(self, tokens: Count, k: int, experts: int) -> Count:
        """What each expert takes of a group with that many valid tokens, a host number or traced counts."""
        assert self.capacity is not None
        return routing.capacity(tokens, k=k, experts=experts, factor=self.capacity)
