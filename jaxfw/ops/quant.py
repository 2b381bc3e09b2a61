"""Weights in few bits: symmetric integers with a float32 scale, multiplied without a copy in full width.

A matrix [... D F] maps D inputs to F outputs (or [V D], with `axis` -1). Each group of g inputs of each output has a
scale, its largest magnitude divided by 127 (int8, g = D) or by 7 (int4, g = 128 or the largest power of two below that
divides D):

    values = round(w / scale),  |w - scale * values| <= scale / 2 = max|w of the group| / 254 or / 14

int4 keeps two values in a byte, neighbours along the last axis, the first in the low half. Bytes per weight: 1 + 4 / D,
and 1 / 2 + 4 / g (0.53 for g = 128).

What XLA makes of a product on a GPU (compiled for H200): with few rows of x, integers are widened in the registers of
the kernel that multiplies them, if there is one product for each 128 inputs, [G rows F] in float32, and the scales come
behind it. With scales in front, or halves of bytes taken apart by shifts, XLA writes the whole matrix in full width
first; with one product for all inputs it does so for int8 where a matrix has few outputs. With 64 rows or more those
products would be larger than the matrix: there int8 is one product, and int4 is made wide, one matrix at a time.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxfw.core.errors import InputError, unknown
from jaxfw.core.shapes import Array, Float, PyTree

BITS = {"int8": 8, "int4": 4}
GROUP = 128
_LARGEST = {8: 127, 4: 7}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantised:
    """A matrix, or a stack of them, in `bits`.

    Attributes:
        values: int8 in the matrix's shape, or uint8 with half the length of its last axis.
        scale: float32, one for each group of inputs and each output.
        bits: 8 or 4.
        axis: the axis of the inputs, -2 or -1.
    """

    values: Array
    scale: Array
    bits: int = dataclasses.field(metadata={"static": True})
    axis: int = dataclasses.field(default=-2, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the matrix."""
        *leading, last = self.values.shape
        return (*leading, last * 8 // self.bits)

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.shape[self.axis] // self.scale.shape[self.axis]


def group_of(inputs: int, bits: int) -> int:
    """How many of so many inputs share a scale.

    >>> group_of(4096, 8), group_of(4096, 4), group_of(96, 4)
    (4096, 128, 32)
    """
    return inputs if bits == 8 else min(GROUP, inputs & -inputs)


def bits_of(name: str) -> int:
    """The bits of "int8" or "int4"; `InputError` for anything else."""
    if name not in BITS:
        raise unknown("quantise", name, BITS)
    return BITS[name]


def quantise(w: Float[Array, "... D F"], *, bits: int, axis: int = -2, group: int | None = None) -> Quantised:
    """Round to the nearest multiple of each group's scale. Works under `jax.eval_shape`.

    `group` inputs share a scale, by default `group_of` them; give that of the matrix to quantise a part of it.

    >>> q = quantise(jnp.array([[254.0], [-1.0]]), bits=8)
    >>> q.values.tolist(), q.scale.tolist()
    ([[127], [0]], [[2.0]])
    """
    if bits == 4 and w.shape[-1] % 2:
        raise InputError(
            f"a matrix {list(w.shape)} has no int4 form, which keeps pairs along the last axis: give quantise='int8'."
        )
    largest = _LARGEST[bits]
    wide = _grouped(w.astype(jnp.float32), axis, group or group_of(w.shape[axis], bits))
    scale = jnp.max(jnp.abs(wide), axis=axis, keepdims=True) / largest
    values = jnp.clip(jnp.round(wide / jnp.where(scale > 0, scale, 1)), -largest, largest).astype(jnp.int8)
    values = values.reshape(w.shape)
    if bits == 4:
        halves = jax.lax.bitcast_convert_type(values, jnp.uint8).reshape(*w.shape[:-1], -1, 2)
        values = (halves[..., 0] & 15) | (halves[..., 1] << 4)
    return Quantised(values, jnp.squeeze(scale, axis), bits, axis)


def dequantise(kernel: Quantised, dtype: Any = jnp.float32) -> Float[Array, "... D F"]:
    """The matrix that the values and scales stand for."""
    wide = _grouped(_integers(kernel).astype(jnp.float32), kernel.axis, kernel.group)
    return (wide * jnp.expand_dims(kernel.scale, kernel.axis)).astype(dtype).reshape(kernel.shape)


def product(x: Float[Array, "... D"], kernel: Quantised) -> Float[Array, "... F"]:
    """Product of x and the matrix, in x's dtype; for a stack of matrices [E D F], x is [E ... D]."""
    stack, group = len(kernel.shape) - 2, group_of(kernel.shape[kernel.axis], bits=4)
    rows = math.prod(x.shape[stack:-1])
    if 2 * rows < group:
        out, scale = _group_products(x, kernel, stack, group), kernel.scale
        scale = scale if kernel.axis == -2 else jnp.swapaxes(scale, -1, -2)
        return jnp.sum(out * _beside(out, scale), axis=stack).astype(x.dtype)
    if kernel.bits == 8:
        out = _dot(x, kernel.values.astype(x.dtype), kernel.axis)
        return (out * _beside(out, jnp.squeeze(kernel.scale, kernel.axis))).astype(x.dtype)
    return _dot(x, dequantise(kernel, x.dtype), kernel.axis).astype(x.dtype)


def _group_products(x: Array, kernel: Quantised, stack: int, group: int) -> Float[Array, "... G T F"]:
    """Product of x and the integers of each `group` inputs apart, float32; the groups' axis is behind the stack's."""
    integers = _grouped(_integers(kernel), kernel.axis, group)
    integers = jnp.moveaxis(integers, kernel.axis - 1, stack)
    pieces = jnp.moveaxis(x.reshape(*x.shape[:-1], -1, group), -2, stack)
    return _dot(pieces, integers.astype(x.dtype), kernel.axis)


def is_quantised(params: PyTree) -> bool:
    """Whether any leaf of a tree is `Quantised`."""
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Quantised))
    return any(isinstance(leaf, Quantised) for leaf in leaves)


def _dot(x: Array, w: Array, axis: int) -> Float[Array, "... F"]:
    """The last axis of x times the `axis` of w, in float32; what w has in front of two axes, x has too."""
    stacked = tuple(range(w.ndim - 2))
    numbers = (((x.ndim - 1,), (w.ndim + axis,)), (stacked, stacked))
    return jax.lax.dot_general(x, w, numbers, preferred_element_type=jnp.float32)


def _beside(out: Array, scale: Float[Array, "... F"]) -> Array:
    """The scale with axes for the rows of `out`."""
    return scale.reshape(*scale.shape[:-1], *(1,) * (out.ndim - scale.ndim), scale.shape[-1])


def _integers(kernel: Quantised) -> Array:
    """The values one by one. int4 is how bytes are read, no copy; without the barrier, XLA's GPU compiler crashes."""
    if kernel.bits == 8:
        return kernel.values
    pairs = jax.lax.bitcast_convert_type(kernel.values, jnp.int4)
    return jax.lax.optimization_barrier(pairs).reshape(kernel.shape)


def _grouped(w: Array, axis: int, group: int) -> Array:
    """Groups apart: an axis in front of the inputs'."""
    at = w.ndim + axis
    return w.reshape(*w.shape[:at], -1, group, *w.shape[at + 1 :])
