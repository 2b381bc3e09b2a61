"""In how many bits the kept part of a prompt is held; what is generated stays in full width."""

import dataclasses
from typing import Literal, Protocol

from jaxfw.core.errors import InputError, unknown
from jaxfw.core.shapes import Array, Float, Int
from pallas_kernels import compact
from pallas_kernels.packing import BITS, SYMMETRIC, Packed
from pallas_kernels.ragged_decode import BLOCK

Pool = Array | Packed


class Store(Protocol):
    """How a pool of keys and values is held.

    Attributes:
        residual: so many of the newest kept tokens of a prompt stay in full width, beside the pool.
    """

    residual: int

    def check(self, d: int) -> None:
        """Raise an `InputError` if heads of width d cannot be held so."""
        ...

    def keys(self, x: Float[Array, "B R N d"], index: Int[Array, "B R P"]) -> Pool:
        """A pool [B R P d] of the keys at `index`."""
        ...

    def values(self, x: Float[Array, "B R N d"], index: Int[Array, "B R P"]) -> Pool:
        """A pool of values."""
        ...


@dataclasses.dataclass(frozen=True)
class Full:
    """As they come."""

    residual = 0

    def check(self, d: int) -> None:
        """Any width does."""

    def keys(self, x: Float[Array, "B R N d"], index: Int[Array, "B R P"]) -> Pool:
        """As they come."""
        return compact(x, index)

    def values(self, x: Float[Array, "B R N d"], index: Int[Array, "B R P"]) -> Pool:
        """As they come."""
        return compact(x, index)


@dataclasses.dataclass(frozen=True)
class Kivi:
    """KIVI (arXiv:2402.02750): keys by channel over 32 tokens, values by token over `group` channels, asymmetric.

    The `residual` newest tokens of the prompt stay in full width, and so does all that is generated: KIVI packs that
    too, 128 tokens at a time.
    """

    bits: int = 4
    group: int = 32
    residual: int = 128

    def __post_init__(self):
        if self.bits not in BITS:
            raise InputError(f"bits={self.bits} must be one of {', '.join(map(str, BITS))}.")
        if self.group < 1 or self.residual < 0:
            raise InputError(f"group={self.group} must be at least 1, residual={self.residual} 0 or more tokens.")

    def check(self, d: int) -> None:
        """The group must divide the width, and codes whole bytes."""
        if d % self.group or d * self.bits % 8:
            raise InputError(
                f"group={self.group} does not divide heads of width {d} in whole bytes of {self.bits}-bit codes: take "
                f"kv=kivi(bits={self.bits},group={d // 4})."
            )

    def keys(self, x: Float[Array, "B R N d"], index: Int[Array, "B R P"]) -> Pool:
        """A scale a channel and block."""
        return compact(x, index, bits=self.bits, axis="slots", group=BLOCK)

    def values(self, x: Float[Array, "B R N d"], index: Int[Array, "B R P"]) -> Pool:
        """A scale a token and group of channels."""
        return compact(x, index, bits=self.bits, axis="channels", group=self.group)


@dataclasses.dataclass(frozen=True)
class PerToken:
    """Whole numbers up to 127, or 8-bit floats, and one scale a token and head."""

    kind: Literal["int8", "fp8"] = "int8"
    residual: int = 0

    def __post_init__(self):
        if self.kind not in SYMMETRIC:
            raise unknown("kind", self.kind, SYMMETRIC)
        if self.residual < 0:
            raise InputError(f"residual={self.residual} must be 0 or more tokens.")

    def check(self, d: int) -> None:
        """Any width does."""

    def keys(self, x: Float[Array, "B R N d"], index: Int[Array, "B R P"]) -> Pool:
        """A scale a token."""
        return compact(x, index, kind=self.kind)

    def values(self, x: Float[Array, "B R N d"], index: Int[Array, "B R P"]) -> Pool:
        """A scale a token."""
        return compact(x, index, kind=self.kind)
