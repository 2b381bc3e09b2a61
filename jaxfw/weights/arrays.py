"""Parameters as arrays on devices, made one at a time from the files: whole or sharded, as stored or quantised."""

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from jaxfw.core.errors import InputError
from jaxfw.core.mesh import make_mesh
from jaxfw.core.shapes import PyTree
from jaxfw.core.sharding import shardings
from jaxfw.models import DecoderConfig
from jaxfw.models.hub_names import Stored
from jaxfw.models.sharding import decoder_rules
from jaxfw.ops import quant
from jaxfw.ops.quant import Quantised
from jaxfw.weights import layout
from jaxfw.weights.layout import Index
from jaxfw.weights.tensors import Reader

# What is quantised: matrices that enter products, by their paths. Not embeddings, norms, biases, routers and gates.
MATRICES = re.compile(
    r"layers(_\d+)?/(attn/[qkvo]|(mlp|moe/shared)/(gate|up|down))/kernel|layers(_\d+)?/moe/experts/\w+|head/lm_head"
)
OUTPUTS = 1024  # of a matrix that are quantised at a time


def quantise_params(params: PyTree, quantise: str) -> PyTree:
    """The tree with its matrices quantised, "int8" or "int4"; under `jax.eval_shape`, what they will take."""
    flat = flatten_dict(params, sep="/")
    bits = quant.bits_of(quantise)
    return unflatten_dict({path: _quantised(path, leaf, bits) for path, leaf in flat.items()}, sep="/")


def _quantised(path: str, leaf: Any, bits: int) -> Any:
    return quant.quantise(leaf, bits=bits, axis=inputs_axis(path)) if MATRICES.fullmatch(path) else leaf


def inputs_axis(path: str) -> int:
    """Kernels are [in, out], the head is [V, D]."""
    return -1 if path == "head/lm_head" else -2


def abstract_params(
    config: DecoderConfig, *, dtypes: Mapping[str, Any] | None = None, quantise: str | None = None
) -> PyTree:
    """The tree as shapes, each in its dtype, by default `param_dtype`."""
    bits, shapes = None if quantise is None else quant.bits_of(quantise), {}
    leaves: dict[str, Any] = flatten_dict(layout.parameter_shapes(config), sep="/")
    for path, leaf in leaves.items():
        dtype = jax.numpy.dtype(leaf.dtype if dtypes is None else dtypes[path])
        is_cut = bits is not None and MATRICES.fullmatch(path)
        shapes[path] = (
            _abstract_matrix(leaf.shape, dtype, bits, inputs_axis(path)) if is_cut
            else jax.ShapeDtypeStruct(leaf.shape, dtype)
        )  # fmt: skip
    return unflatten_dict(shapes, sep="/")


@functools.lru_cache(maxsize=256)
def _abstract_matrix(shape: tuple[int, ...], dtype: Any, bits: int, axis: int) -> Quantised:
    """What a matrix will take; models have few sizes of matrices, and many of each."""
    return jax.eval_shape(functools.partial(quant.quantise, bits=bits, axis=axis), jax.ShapeDtypeStruct(shape, dtype))


def make_params(
    config: DecoderConfig,
    reader: Reader,
    stored: Mapping[str, Stored],
    dtypes: Mapping[str, Any],
    *,
    mesh: Mesh | None,
    quantise: str | None,
) -> PyTree:
    """Every parameter, one after the other: for each region that a device of this process holds, one of the files."""
    shapes = abstract_params(config, dtypes=dtypes, quantise=quantise)
    if mesh is None:
        default = SingleDeviceSharding(default_device())
        places = jax.tree.map(lambda _: default, shapes)
    else:
        places = shardings(decoder_rules(config), mesh, shapes)
    flat, flat_places = flatten_dict(shapes, sep="/"), flatten_dict(places, sep="/")
    make = {path: _make(reader, stored[path], path, leaf, flat_places[path]) for path, leaf in flat.items()}
    return unflatten_dict(make, sep="/")


def default_device() -> Any:
    """Where arrays go that nobody places."""
    given: Any = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    return jax.local_devices(backend=given)[0] if given is None or isinstance(given, str) else given


def _make(reader: Reader, stored: Stored, path: str, leaf: Any, place: Any) -> Any:
    if isinstance(leaf, Quantised):
        parts = _QuantisedParts(reader, stored, path, leaf)
        return jax.tree.unflatten(
            jax.tree.structure(leaf),
            [_array(leaf.values, place.values, parts.values), _array(leaf.scale, place.scale, parts.scale)],
        )
    return _array(leaf, place, lambda index: layout.read(reader, stored, index, leaf.dtype))


def _array(leaf: Any, place: Sharding, read: Callable[[Index], np.ndarray]) -> jax.Array:
    """Equal regions are read once; the next parameter waits until this one is on its devices."""
    held: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def region(index: Any) -> np.ndarray:
        index = layout.full_index(index, leaf.shape)
        if _key(index) not in held:
            held[_key(index)] = read(index)
        return held[_key(index)]

    return jax.block_until_ready(jax.make_array_from_callback(leaf.shape, place, region))


class _QuantisedParts:
    """Regions of a quantised matrix's values and scales, quantised block by block as they are read.

    A group's scale needs all of its inputs: they are read even where a device holds some of them only.
    """

    def __init__(self, reader: Reader, stored: Stored, path: str, leaf: Quantised):
        self.reader, self.stored, self.path, self.leaf = reader, stored, path, leaf
        self.axes = len(leaf.shape)
        self.inputs = self.axes + leaf.axis
        self.outputs = self.axes - 1 if leaf.axis == -2 else self.axes - 2
        self.scales: dict[Any, np.ndarray] = {}  # of the blocks whose values were made

    def values(self, index: Index) -> np.ndarray:
        """A region of `values`."""
        return self._read(index, (*(1,) * (self.axes - 1), 8 // self.leaf.bits), "values", self.leaf.values)

    def scale(self, index: Index) -> np.ndarray:
        """A region of `scale`."""
        spans = tuple(self.leaf.group if axis == self.inputs else 1 for axis in range(self.axes))
        return self._read(index, spans, "scale", self.leaf.scale)

    def _read(self, index: Index, spans: tuple[int, ...], part: str, leaf: Any) -> np.ndarray:
        """`spans` says how many entries of the matrix an entry of the part covers, on each axis."""
        out = np.empty([piece.stop - piece.start for piece in index], leaf.dtype)
        span, group = spans[self.inputs], self.leaf.group
        start, stop = index[self.inputs].start * span, index[self.inputs].stop * span
        groups = slice(start // group * group, -(-stop // group) * group)
        inside = slice((start - groups.start) // span, (stop - groups.start) // span)
        for where, place in self._blocks(index, spans[self.outputs]):
            where = _with(where, self.inputs, groups)
            known = self.scales.get(_key(where)) if part == "scale" else None
            block = getattr(self._quantise(where), part) if known is None else known
            out[place] = block[_with(layout.whole(block.shape), self.inputs, inside)]
        return out

    def _blocks(self, index: Index, span: int) -> Iterator[tuple[Index, Index]]:
        """Some outputs of one matrix at a time: their region of the matrix, and their place in the region `index`."""
        experts = range(index[0].start, index[0].stop) if self.axes == 3 else [None]
        outputs, all_of_it = index[self.outputs], layout.whole([part.stop - part.start for part in index])
        for number, expert in enumerate(experts):
            for first in range(outputs.start, outputs.stop, OUTPUTS):
                last = min(first + OUTPUTS, outputs.stop)
                where = _with(index, self.outputs, slice(first * span, last * span))
                place = _with(all_of_it, self.outputs, slice(first - outputs.start, last - outputs.start))
                if expert is not None:
                    where = _with(where, 0, slice(expert, expert + 1))
                    place = _with(place, 0, slice(number, number + 1))
                yield where, place

    def _quantise(self, where: Index) -> Quantised:
        name = self.stored.names[where[0].start if len(where) == 3 else 0]
        w = layout.read(self.reader, self.stored, where, np.dtype(np.float32))
        options = {"bits": self.leaf.bits, "axis": self.leaf.axis, "group": self.leaf.group}
        here = jax.local_devices()[0]
        with jax.set_mesh(make_mesh(devices=[here])):  # whatever mesh the caller is in
            found = jax.tree.map(np.asarray, _quantise(jax.device_put(w, here), **options))
        if not np.isfinite(found.scale).all():
            raise InputError(f"{name} holds values that are not finite: it cannot be quantised, or loaded to any use.")
        self.scales[_key(where)] = found.scale
        return found


_quantise = jax.jit(quant.quantise, static_argnames=("bits", "axis", "group"))


def _key(index: Index) -> tuple[tuple[int, int], ...]:
    return tuple((part.start, part.stop) for part in index)


def _with(index: Index, axis: int, part: slice) -> Index:
    return (*index[:axis], part, *index[axis + 1 :])
