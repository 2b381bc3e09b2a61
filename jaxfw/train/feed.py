"""Rows of a global batch to the devices of a mesh: each process reads those of its own devices, and no others."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxfw.core.shapes import PyTree
from jaxfw.models.sharding import batch_shardings


def own_rows(mesh: Mesh, batch: int) -> range:
    """The rows, of `batch` in all, that lie on this process's devices, with what is between them if they are apart."""
    sharding = batch_shardings(mesh, jax.ShapeDtypeStruct((batch, 1), np.int32))
    places = sharding.addressable_devices_indices_map((batch, 1)).values()
    spans = [index[0].indices(batch) for index in places]
    return range(min(first for first, _, _ in spans), max(last for _, last, _ in spans))


def place(mesh: Mesh, batch: PyTree, *, rows: range, total: int) -> PyTree:
    """Arrays of the rows `rows` as parts of global ones with `total` rows, cut over the mesh by `batch_shardings`."""

    def put(x: np.ndarray) -> jax.Array:
        shape = (total, *x.shape[1:])

        def part(index: Any) -> np.ndarray:
            first, last, _ = index[0].indices(total)
            return x[first - rows.start : last - rows.start]

        return jax.make_array_from_callback(shape, batch_shardings(mesh, jax.ShapeDtypeStruct(shape, x.dtype)), part)

    return jax.tree.map(put, batch)
