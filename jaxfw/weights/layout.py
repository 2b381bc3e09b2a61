"""Parameters as regions of stored tensors: `Stored` says which, here are their shapes, and reading and writing them.

An axis in front of the last two counts experts, with a tensor each on the Hub.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from jaxfw.core.shapes import PyTree
from jaxfw.models import DecoderConfig, init
from jaxfw.models.hub_names import Stored
from jaxfw.weights.tensors import Reader

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Region:
    """A part of one tensor, and where it belongs in an array of ours.

    Attributes:
        name: the tensor.
        index: the part, a start and a stop an axis.
        place: the part of ours that it fills.
        transposed: whether the two are each other's transposes.
    """

    name: str
    index: Index
    place: Index
    transposed: bool


@functools.lru_cache(maxsize=8)
def parameter_shapes(config: DecoderConfig) -> PyTree:
    """The tree of a model's parameters as shapes and dtypes; not to be changed, as later calls give it again."""
    return jax.eval_shape(lambda: init(config, jax.random.key(0)))


def flat_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every parameter."""
    leaves: dict[str, Any] = flatten_dict(parameter_shapes(config), sep="/")
    return {path: tuple(leaf.shape) for path, leaf in leaves.items()}


def stored_shapes(stored: Mapping[str, Stored], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape, of all tensors that the parameters lie in."""
    found: dict[str, tuple[int, ...]] = {}
    for path, entry in stored.items():
        matrix = shapes[path][-2:]
        for name in entry.names:
            if entry.part is not None:
                end = max(sum(entry.part), found.get(name, (0,))[-1])
                found[name] = (*matrix[:-1], end)
            else:
                found[name] = tuple(reversed(matrix)) if entry.transposed else matrix
    return found


def whole(shape: Sequence[int]) -> Index:
    """The index of all of an array."""
    return tuple(slice(0, size) for size in shape)


def full_index(index: Sequence[slice], shape: Sequence[int]) -> Index:
    """`index` with numbers where it says None."""
    return tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, shape, strict=True))


def regions(stored: Stored, index: Index) -> Iterator[Region]:
    """The tensors' parts that make up the part `index` of a parameter."""
    if len(index) < 3:
        yield _region(stored, stored.names[0], index, ())
        return
    first, *matrix = index
    for place, expert in enumerate(range(first.start, first.stop)):
        yield _region(stored, stored.names[expert], tuple(matrix), (slice(place, place + 1),))


def _region(stored: Stored, name: str, index: Index, before: Index) -> Region:
    place = tuple(slice(0, part.stop - part.start) for part in index)
    if stored.part is not None:
        start, last = stored.part[0], index[-1]
        index = (*index[:-1], slice(last.start + start, last.stop + start))
    if stored.transposed:
        index = (index[1], index[0])
    return Region(name, index, (*before, *place), stored.transposed)


def read(reader: Reader, stored: Stored, index: Index, dtype: np.dtype) -> np.ndarray:
    """The part `index` of a parameter; beside the result, a few rows of a tensor are held at a time."""
    out = np.empty([part.stop - part.start for part in index], dtype)
    for region in regions(stored, index):
        target = out[region.place]
        target = target[0] if target.ndim == 3 else target
        target = target.T if region.transposed else target
        for rows, block in reader.blocks(region.name, region.index):
            target[rows] = block
    return out
