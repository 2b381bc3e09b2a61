"""Keys and values in few bits: codes with a scale for each group, as KIVI packs them (arXiv:2402.02750), or per slot.

    x = code * scale + zero

A group is `group` neighbouring slots of one channel (axis "slots", KIVI's keys: channels differ in size, slots do not)
or neighbouring channels of one slot (axis "channels", KIVI's values). Codes of `bits` bits are whole numbers from 0 to
2^bits - 1, zero is the group's smallest number, and scale a (2^bits - 1)-th of its range, rounded up in the dtype that
it is kept in: |x - unpacked| <= scale / 2. A constant group has scale 0 and comes back exactly. Symmetric codes have no
zero: whole numbers from -127 to 127, or 8-bit floats (e4m3) up to 448, times the largest magnitude over that.

Codes below 8 bits share bytes by parts of the width: with n = 8 / bits, byte j holds channels j, j + d/n, j + 2d/n ...,
the first in the lowest bits, so that one shift of a tile gives neighbouring channels. Bytes a number: bits / 8, and 4 /
group for scale and zero in 2 bytes.

Axes: S slots, d channels.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

AXES = ("slots", "channels")
BITS = (2, 4, 8)
FLOAT8 = jnp.float8_e4m3fn
SYMMETRIC = {"int8": (jnp.int8, 127.0), "fp8": (FLOAT8, 448.0)}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """Numbers [... S d] in few bits.

    Attributes:
        codes: [... S d bits/8], uint8; int8 or an 8-bit float where there is no zero.
        scale: [... S/group d] for axis "slots", [... S d/group] for "channels".
        zero: as scale, or None.
        bits: of a code.
        axis: along which numbers share a scale.
    """

    codes: Shaped[Array, "*L S c"]
    scale: Float[Array, "*L m n"]
    zero: Float[Array, "*L m n"] | None
    bits: int = dataclasses.field(metadata={"static": True})
    axis: Literal["slots", "channels"] = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the numbers."""
        *leading, c = self.codes.shape
        return (*leading, c * 8 // self.bits)

    @property
    def group(self) -> int:
        """Numbers that share a scale."""
        at = -2 if self.axis == "slots" else -1
        return self.shape[at] // self.scale.shape[at]


def pack(x: Float[Array, "*L S d"], *, bits: int, axis: str, group: int) -> Packed:
    """Asymmetric codes; scale and zero are kept in x's dtype.

    Raises:
        ValueError: other bits than 2, 4 or 8, a width that no byte holds whole, an axis that groups do not divide.
    """
    if bits not in BITS or axis not in AXES:
        raise ValueError(f"bits={bits} must be one of {BITS}, axis={axis!r} one of {AXES}.")
    S, d = x.shape[-2:]
    if d * bits % 8 or (S if axis == "slots" else d) % group:
        raise ValueError(f"x[...,S,d] with S={S}, d={d} does not split into groups of {group} {axis} in whole bytes.")
    grouped = _grouped(x.astype(jnp.float32), axis, group)
    at = -2 if axis == "slots" else -1
    smallest, largest = (f(grouped, axis=at, keepdims=True) for f in (jnp.min, jnp.max))
    scale = _rounded_up((largest - smallest) / (2**bits - 1), x.dtype)
    wide = scale.astype(jnp.float32)
    codes = jnp.round((grouped - smallest) / jnp.where(wide > 0, wide, 1))
    codes = jnp.clip(codes, 0, 2**bits - 1).astype(jnp.uint8).reshape(x.shape)
    scale, zero = (y.squeeze(at).astype(x.dtype) for y in (scale, smallest))
    return Packed(_bytes(codes, bits), scale, zero, bits, axis)  # pyright: ignore[reportArgumentType]


def pack_symmetric(x: Float[Array, "*L S d"], kind: str) -> Packed:
    """One scale a slot, `kind` "int8" or "fp8".

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in SYMMETRIC:
        raise ValueError(f"kind={kind!r} must be one of {', '.join(SYMMETRIC)}.")
    dtype, most = SYMMETRIC[kind]
    wide = x.astype(jnp.float32)
    scale = _rounded_up(jnp.max(jnp.abs(wide), axis=-1, keepdims=True) / most, x.dtype)
    codes = wide / jnp.where(scale > 0, scale, 1).astype(jnp.float32)
    codes = jnp.round(codes) if kind == "int8" else codes
    return Packed(codes.astype(dtype), scale, None, 8, "channels")


def unpack(packed: Packed, dtype=None) -> Float[Array, "*L S d"]:
    """The numbers, in the dtype of their scales or another."""
    codes = unpacked_codes(packed).astype(jnp.float32)
    grouped = _grouped(codes, packed.axis, packed.group)
    at = -2 if packed.axis == "slots" else -1
    out = grouped * jnp.expand_dims(packed.scale.astype(jnp.float32), at)
    if packed.zero is not None:
        out = out + jnp.expand_dims(packed.zero.astype(jnp.float32), at)
    return out.reshape(packed.shape).astype(dtype or packed.scale.dtype)


def unpacked_codes(packed: Packed) -> Shaped[Array, "*L S d"]:
    """A code a number."""
    if packed.bits == 8:
        return packed.codes
    parts = [packed.codes >> shift & (2**packed.bits - 1) for shift in range(0, 8, packed.bits)]
    return jnp.concatenate(parts, axis=-1)


def _bytes(codes: Shaped[Array, "*L S d"], bits: int) -> Shaped[Array, "*L S c"]:
    if bits == 8:
        return codes
    out, *parts = jnp.split(codes, 8 // bits, axis=-1)
    for i, part in enumerate(parts, 1):
        out = out | part << (i * bits)
    return out


def _grouped(x: Array, axis: str, group: int) -> Array:
    """[... S/group group d], or [... S d/group group]."""
    *leading, S, d = x.shape
    return x.reshape(*leading, S // group, group, d) if axis == "slots" else x.reshape(*leading, S, d // group, group)


def _rounded_up(x: Float[Array, "*L"], dtype) -> Float[Array, "*L"]:
    """To the next number of `dtype` that is not smaller: codes then reach the largest number."""
    near = x.astype(dtype)
    return jnp.where(near.astype(jnp.float32) < x, jnp.nextafter(near, jnp.array(jnp.inf, dtype)), near)
