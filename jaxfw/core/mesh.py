"""Device meshes with axes by name, and the layout of activations on the mesh of the moment.

A mesh always has the five axes `AXES`, of size 1 where nothing is asked for, all of `AxisType.Auto`: XLA lays out what
nobody constrains (Explicit axes, jax's default, refuse the lookups and reshapes of a model). A program runs under
`with jax.set_mesh(mesh):`, on one device too.

| axis | what it shards |
|---|---|
| data | rows of the batch |
| fsdp | rows of the batch, and one axis of every large parameter |
| tensor | heads, feed-forward width, vocabulary |
| expert | rows of the batch, and experts |
| pipe | stages of layers |
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from jaxfw.core.errors import InputError, unknown
from jaxfw.core.shapes import Array

AXES = ("data", "fsdp", "tensor", "expert", "pipe")
BATCH_AXES = ("data", "fsdp", "expert")

Entry = str | tuple[str, ...] | None


# Tensor shards talk most: they are nearest neighbours, in one host.
_ORDER = ("data", "fsdp", "expert", "pipe", "tensor")


def make_mesh(
    *, data: int = 1, fsdp: int = 1, tensor: int = 1, expert: int = 1, pipe: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:  # fmt: skip
    """A mesh of all `devices`, by default every device of every process.

    Raises:
        InputError: a size below 1, or sizes whose product is not the number of devices.
    """
    abstract = abstract_mesh(data=data, fsdp=fsdp, tensor=tensor, expert=expert, pipe=pipe)
    devices = jax.devices() if devices is None else devices
    if abstract.size != len(devices):
        raise InputError(
            f"mesh {_say(abstract.shape)} needs {abstract.size} devices, there are {len(devices)}: "
            f"choose sizes whose product is {len(devices)} (data= takes the rest), or name those to use by devices=."
        )
    array = np.asarray(devices, dtype=object).reshape(abstract.axis_sizes)
    return Mesh(array, abstract.axis_names, axis_types=abstract.axis_types)


def abstract_mesh(*, data: int = 1, fsdp: int = 1, tensor: int = 1, expert: int = 1, pipe: int = 1) -> AbstractMesh:
    """The mesh without devices: enough for rules, tables and abstract values.

    Raises:
        InputError: a size below 1.
    """
    given = {"data": data, "fsdp": fsdp, "tensor": tensor, "expert": expert, "pipe": pipe}
    if any(size < 1 for size in given.values()):
        raise InputError(f"mesh {_say(given)}: every size must be at least 1.")
    return AbstractMesh(tuple(given[name] for name in _ORDER), _ORDER, axis_types=(AxisType.Auto,) * len(_ORDER))


def _say(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in sizes.items() if size != 1) or "of one device"


def parse_mesh(text: str) -> dict[str, int]:
    """The sizes in a flag's text, for `make_mesh(**sizes)`.

    >>> parse_mesh("tensor=4,data=2")
    {'tensor': 4, 'data': 2}

    Raises:
        InputError: an unknown axis, an axis twice, or a size that is no whole number of at least 1.
    """
    sizes: dict[str, int] = {}
    for piece in filter(None, text.split(",")):
        name, _, size = (word.strip() for word in piece.partition("="))
        if name not in AXES:
            raise unknown("mesh axis", name, AXES)
        if name in sizes:
            raise InputError(f"mesh axis {name!r} is given twice in {text!r}.")
        if not size.isdecimal() or int(size) < 1:
            raise InputError(f"mesh axis {name}={size!r} must be a whole number of at least 1, as in tensor=4,data=2.")
        sizes[name] = int(size)
    return sizes


def fit(sizes: Mapping[str, int], shape: Sequence[int], spec: Sequence[Entry]) -> PartitionSpec:
    """`spec` without the axes that `sizes` lacks, and without those that would cut an array axis unevenly.

    An entry of several axes keeps each that still divides together with those before it.

    >>> tuple(fit({"data": 4, "expert": 2, "tensor": 8}, (6, 2, 64), (("data", "expert"), "tensor", "fsdp")))
    ('expert', None, None)
    """
    entries = []
    for size, entry in zip(shape, spec, strict=True):
        kept, parts = [], 1
        for axis in (entry,) if isinstance(entry, str) else entry or ():
            if axis in sizes and size % (parts * sizes[axis]) == 0:
                kept.append(axis)
                parts *= sizes[axis]
        entries.append(tuple(kept) if len(kept) > 1 else kept[0] if kept else None)
    return PartitionSpec(*entries)


def auto_sizes(mesh: AbstractMesh) -> dict[str, int]:
    """Sizes of the axes that XLA shards over: not those of a `shard_map` around, which are manual.

    Raises:
        InputError: the mesh has Explicit axes.
    """
    explicit = [name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind == AxisType.Explicit]
    if explicit:
        raise InputError(
            f"mesh axes {', '.join(explicit)} are Explicit, jax's default, and the model needs Auto ones: "
            "make the mesh by jaxfw.core.mesh.make_mesh, or pass axis_types=(AxisType.Auto,) * number of axes."
        )
    return {name: mesh.shape[name] for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind == AxisType.Auto}


def constrain(x: Array, *spec: Entry, shape: Sequence[int] | None = None) -> Array:
    """`x` laid out as `spec` on the mesh of the moment (`jax.set_mesh`), one entry an axis; `x` itself without a mesh.

    What does not fit is left out (see `fit`): one line of a model serves every mesh and every size. What fits is asked
    of `shape` where it is given: of keys for queries, that must lie as they do.

    >>> constrain(jax.numpy.ones((4, 8)), BATCH_AXES, None).shape
    (4, 8)
    """
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {} if mesh.empty else auto_sizes(mesh)
    if not any(size > 1 for size in sizes.values()):
        return x
    return jax.lax.with_sharding_constraint(x, fit(sizes, x.shape if shape is None else shape, spec))
