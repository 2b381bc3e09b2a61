"""Kept slots of keys or values, moved together: gathered, turned to new positions, put into few bits, in one pass.

    out[b, k, c] = turned(x[b, k, index[b, k, c]]),   0 where the index is negative
    turned(x)[i] = x[i] cos[i] - x[i + r] sin[i],   turned(x)[i + r] = x[i + r] cos[i] + x[i] sin[i],   i < r

the latter if angles are given, for the first 2 r channels in halves; then `packing`'s codes if any are asked for. Each
program takes one head and a block of slots: it loads their indices, the rows, the other halves of these (from the
cache) and the angles, and writes codes, scale and zero. Keys in groups of slots have one group as a block. Nothing of
the full width is written unless it is the result.

Per call, N = B K, 2-byte x: 4 N C + 2 N C d bytes read, 8 N C r for angles of each head; N C d bits / 8 written, and
4 N C d / group for scale and zero. About 10 N C d FLOPs: bound by memory. Not differentiated.

Axes: B batch, K key heads, T slots, C kept slots, d head width, r pairs that are turned.
"""

import dataclasses
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pallas_kernels._compat import triton_call
from pallas_kernels._dispatch import HEAD_AXES, ROW_AXES, choose, divisors, on_each_device, run_chosen
from pallas_kernels.decode_attention import DTYPES, indices
from pallas_kernels.packing import SYMMETRIC, Packed, pack, pack_symmetric

NUMBERS, LARGEST = 4096, 16384  # in a block; at most, where a group of slots is one


@dataclasses.dataclass(frozen=True)
class Config:
    """Kept slots in a block, a power of two, and Triton's warps. A group of slots is one block, filled up."""

    block: int
    warps: int = 4

    def __post_init__(self) -> None:
        if self.block < 1 or self.block & (self.block - 1):
            raise ValueError(f"block={self.block} must be a power of two: Triton takes no other blocks.")

    @classmethod
    def for_shape(cls, *, d: int, group: int | None = None) -> "Config":
        """4096 numbers in a block, 32 a thread; or a `group` of slots, 16 a thread.

        >>> Config.for_shape(d=128)
        Config(block=32, warps=4)
        """
        width = pl.next_power_of_2(d)
        if group is None:
            return cls(max(1, NUMBERS // width))
        block = pl.next_power_of_2(group)
        return cls(block, max(1, min(32, block * width // 512)))


@dataclasses.dataclass(frozen=True)
class _Format:
    bits: int | None
    axis: str
    group: int
    kind: str | None

    @property
    def slots(self) -> int | None:
        """The slots that share a scale, if it is slots that do."""
        return self.group if self.bits is not None and self.axis == "slots" else None

    @property
    def largest(self) -> float:
        """The largest code."""
        return 2.0**self.bits - 1 if self.bits is not None else SYMMETRIC[self.kind or "int8"][1]

    def __call__(self, x: Float[Array, "B K C d"]) -> Array | Packed:
        if self.kind is not None:
            return pack_symmetric(x, self.kind)
        return x if self.bits is None else pack(x, bits=self.bits, axis=self.axis, group=self.group)


def compact(
    x: Float[Array, "B K T d"],
    index: Int[Array, "B K C"],
    *,
    cos: Float[Array, "B #K C r"] | None = None,
    sin: Float[Array, "B #K C r"] | None = None,
    bits: int | None = None,
    axis: Literal["slots", "channels"] = "slots",
    group: int = 32,
    kind: str | None = None,
    impl: str | None = None,
    config: Config | None = None,
) -> Array | Packed:
    """The slots `index` of x as [B K C d] in x's dtype, or `Packed`; negative indices give zeros, T and more slot T-1.

    With `cos` and `sin` the first 2 r channels of a slot are turned by its own angles, pairs being i and i + r. With
    `bits` of 2, 4 or 8 the result is `packing.pack`ed in groups along `axis`, with `kind` "int8" or "fp8" by one scale
    a slot; zeros of empty slots belong to their groups.

    `impl` is one of `pallas_kernels.IMPLS`, None chooses by the platform lowered for. A kernel gives what XLA gives:
    scale and zero are the same, and so are codes but for those whose quotient lies at a half, which a GPU divides with
    an error of 2 units in the last place (float32) and may take to the next. With angles, products may be fused with
    sums, so that turned numbers are apart by one unit in the last place of x's dtype, and few codes by one.

    On a mesh (`jax.set_mesh`) a kernel takes each device's own rows and heads. Not differentiated.

    Raises:
        ValueError: shapes or formats that do not fit, an impl that is unknown or cannot run, with the reason.
    """
    _check(x, index, cos, sin, bits, kind)
    form = _Format(bits, axis, group, kind)
    jax.eval_shape(form, jax.ShapeDtypeStruct((*index.shape, x.shape[3]), x.dtype))
    supports = functools.partial(supports_compact, x=x, index=index, bits=bits, axis=axis, group=group, kind=kind)
    bodies = {
        "xla": functools.partial(_compact_xla, form=form),
        "triton": functools.partial(_compact_triton, form=form, config=config),
        "interpret": functools.partial(_compact_triton, form=form, config=config, interpret=True),
    }
    inputs = {"x": x, "index": jnp.clip(index, -1, x.shape[2] - 1).astype(jnp.int32)}
    if cos is not None and sin is not None:
        inputs |= {"cos": cos.astype(jnp.float32), "sin": sin.astype(jnp.float32)}
    return run_chosen(choose("compact", supports, impl), bodies, inputs)


def supports_compact(
    impl: str, *, x, index, bits: int | None = None, axis: str = "slots", group: int = 32, kind: str | None = None
) -> str | None:
    """Why `impl` cannot do this, or None; asks for shapes and dtypes only."""
    if impl == "xla":
        return None
    if impl == "mosaic":
        return "no Mosaic body is written yet, take 'triton'"
    if x.dtype.name not in DTYPES:
        return f"its x has one dtype of {', '.join(DTYPES)}, got {x.dtype}"
    if not index.size:
        return f"there is nothing to keep in index[B,K,C] of {index.shape}"
    d, form = x.shape[3], _Format(bits, axis, group, kind)
    if d > 256 or pl.next_power_of_2(d) * (form.slots or 1) > LARGEST:
        return f"a block of {form.slots or 1} x d={d} would not fit its registers (d up to 256, {LARGEST} numbers)"
    size = index.size * d * (bits or 8) // 8
    if (bits or kind) and size >= 2**31:
        return f"its codes would have {size} bytes, and offsets into them 32 bits (below 2^31)"
    return None


def _check(x, index, cos, sin, bits, kind) -> None:
    if x.ndim != 4 or index.ndim != 3 or index.shape[:2] != x.shape[:2] or x.shape[2] < 1:
        raise ValueError(f"expected x[B,K,T,d] with T >= 1 and index[B,K,C]: got {x.shape}, {index.shape}.")
    if not jnp.issubdtype(index.dtype, jnp.integer):
        raise ValueError(f"expected whole numbers as index: got {index.dtype}.")
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin come together: give both or none.")
    if cos is not None:
        (B, K, C), d = index.shape, x.shape[3]
        fits = cos.ndim == 4 and cos.shape[:3] in ((B, K, C), (B, 1, C)) and 2 * cos.shape[3] <= d
        if not fits or sin.shape != cos.shape:
            raise ValueError(
                f"expected cos and sin[B,K,C,r] or [B,1,C,r] of B={B}, K={K}, C={C}, 2 r <= d={d}: "
                f"got {cos.shape}, {sin.shape}."
            )
    if bits is not None and kind is not None:
        raise ValueError(f"bits={bits} and kind={kind!r} are two formats: give one.")


def reference(x, index, *, cos=None, sin=None, bits=None, axis="slots", group=32, kind=None):
    """The definition: gathered by one index array a letter, turned as complex numbers, then packed."""
    B, K, T, _ = x.shape
    rows = x[jnp.arange(B)[:, None, None], jnp.arange(K)[:, None], jnp.clip(index, 0, T - 1)]
    if cos is not None and sin is not None:
        pairs, still = jnp.split(rows.astype(jnp.float32), [2 * cos.shape[3]], axis=-1)
        first, second = jnp.split(pairs, 2, axis=-1)
        by = jax.lax.complex(cos.astype(jnp.float32), sin.astype(jnp.float32))
        product = jax.lax.complex(first, second) * by
        rows = jnp.concatenate([product.real, product.imag, still], axis=-1).astype(x.dtype)
    return _Format(bits, axis, group, kind)(jnp.where(index[..., None] < 0, 0, rows))


# --- the algorithm, whatever carries it out


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Channels [first, first + size) that lie in one part of the bytes and, by channels, in one group."""

    first: int
    size: int
    byte: int = 0
    shift: int = 0
    group: int = 0


def _pieces(d: int, form: _Format) -> tuple[_Piece, ...]:
    """The pieces of a width; of full width, of symmetric codes and by slots, as few as there are parts."""
    if form.bits is None:
        return (_Piece(0, d),)
    part = d * form.bits // 8
    group = d if form.axis == "slots" else form.group
    size = math.gcd(part, group)
    return tuple(
        _Piece(first, size, first % part, first // part * form.bits, first // group) for first in range(0, d, size)
    )


def turned(own, other, cos, sin, is_first):
    """A channel of a pair, by the pair's angle; `other` is the pair's second channel for the first, and vice versa."""
    return own * cos + jnp.where(is_first, -other, other) * sin


def extremes(numbers, insides, axis: int):
    """Smallest and largest of the numbers of several pieces that are there, along an axis."""
    found = []
    for both, reduced, none in ((jnp.minimum, jnp.min, jnp.inf), (jnp.maximum, jnp.max, -jnp.inf)):
        each = [reduced(jnp.where(inside, x, none), axis=axis) for x, inside in zip(numbers, insides, strict=True)]
        found.append(functools.reduce(both, each))
    return found


def scale_of(span: Float[Array, "*L"], largest: float, dtype) -> Float[Array, "*L"]:
    """The quotient of both, as the next number of `dtype` that is not smaller; `span` is not negative.

    A product, since XLA makes one of a division by a constant, and Triton's quotients are not rounded as XLA's.
    """
    exact = span * jnp.float32(1 / largest)
    near = exact.astype(dtype)
    if near.dtype.itemsize == 4:
        return near
    is_below = near.astype(jnp.float32) < exact
    next_up = jax.lax.bitcast_convert_type(near, jnp.int16) + is_below.astype(jnp.int16)
    return jax.lax.bitcast_convert_type(next_up, dtype)


def coded(x, scale, zero, form: _Format):
    """Codes as float32, whole ones rounded half to even."""
    wide = scale.astype(jnp.float32)
    codes = (x if zero is None else x - zero) / jnp.where(wide > 0, wide, 1.0)
    if form.kind == "fp8":
        return codes
    return jnp.clip(half_to_even(codes), -form.largest if zero is None else 0.0, form.largest)


def half_to_even(x):
    """`jnp.round`, which Pallas does not lower to Triton."""
    whole = jnp.floor(x)
    part, is_odd = x - whole, whole.astype(jnp.int32) & 1 == 1
    return whole + ((part > 0.5) | (part == 0.5) & is_odd).astype(jnp.float32)


# --- bodies


def _compact_xla(inputs, *, form: _Format):
    x, index = inputs["x"], inputs["index"][..., None]
    rows = jnp.take_along_axis(x, jnp.maximum(index, 0), axis=2)
    if "cos" in inputs:
        cos, sin = inputs["cos"], inputs["sin"]
        r = cos.shape[3]
        first, second = (rows[..., part].astype(jnp.float32) for part in (slice(r), slice(r, 2 * r)))
        pairs = turned(first, second, cos, sin, True), turned(second, first, cos, sin, False)
        rows = jnp.concatenate([*(pair.astype(x.dtype) for pair in pairs), rows[..., 2 * r :]], axis=-1)
    return form(jnp.where(index < 0, jnp.zeros((), x.dtype), rows))


def _compact_triton(inputs, *, form: _Format, config: Config | None, interpret: bool = False):
    x, index = inputs["x"], inputs["index"]
    shards = {"B": divisors(x.shape[0], ROW_AXES), "K": divisors(x.shape[1], HEAD_AXES)}
    letters = {"x": "B K T d", "index": "B K C"}
    if "cos" in inputs:
        letters |= dict.fromkeys(("cos", "sin"), "B K C r" if inputs["cos"].shape[1] == x.shape[1] else "B 1 C r")
    made = jax.eval_shape(form, jax.ShapeDtypeStruct((*index.shape, x.shape[3]), x.dtype))
    outputs = jax.tree.map(lambda _: "B K m n", made)
    body = functools.partial(_compact_rows, form=form, config=config, interpret=interpret)
    return on_each_device(body, shards, (letters,), outputs)(inputs)


def _compact_rows(inputs, *, form: _Format, config: Config | None, interpret: bool):
    (B, K, _, d), C, dtype = inputs["x"].shape, inputs["index"].shape[2], inputs["x"].dtype
    config = config or Config.for_shape(d=d, group=form.slots)
    if form.slots and config.block != pl.next_power_of_2(form.slots):
        raise ValueError(f"block={config.block} must be {pl.next_power_of_2(form.slots)}, a group of {form.slots}.")
    P = pl.cdiv(C, form.slots or config.block)
    made = jax.eval_shape(form, jax.ShapeDtypeStruct((B, K, C, d), dtype))
    shapes = {"codes": made} if not isinstance(made, Packed) else {
        name: x for name in ("codes", "scale", "zero") if (x := getattr(made, name)) is not None}  # fmt: skip

    def of_head(x) -> pl.BlockSpec:
        each = P if x.shape[1] == K else K * P
        return pl.BlockSpec((None, *x.shape[2:]), lambda i: (i // each, *(0,) * (x.ndim - 2)))

    out = triton_call(
        functools.partial(_triton_body, form=form, block=config.block),
        grid=(B * K * P,),
        in_specs=[jax.tree.map(of_head, inputs)], out_specs=jax.tree.map(of_head, shapes),
        out_shape={name: jax.ShapeDtypeStruct((B * K, *x.shape[2:]), x.dtype) for name, x in shapes.items()},
        warps=config.warps, stages=1, interpret=interpret, name="compact",
    )({name: x.reshape(-1, *x.shape[2:]) for name, x in inputs.items()})  # fmt: skip
    out = {name: x.reshape(shapes[name].shape) for name, x in out.items()}
    return dataclasses.replace(made, **out) if isinstance(made, Packed) else out["codes"]


def _triton_body(refs, out_refs, *, form: _Format, block: int):
    x_ref, (C,) = refs["x"], refs["index"].shape
    d, dtype, each = x_ref.shape[1], x_ref.dtype, form.slots or block
    part, rows = pl.program_id(0) % pl.cdiv(C, each), jnp.arange(block)
    slots = part * each + rows
    held = (rows < each) & (slots < C)
    index = plt.load(refs["index"].at[slots], mask=held, other=-1)

    def places(piece: _Piece):
        """Slot and channel of each number of a block, the latter within the piece, and which of them there are."""
        rows, columns = indices(block, pl.next_power_of_2(piece.size))
        return part * each + rows, columns, held[:, None] & (columns < piece.size)

    def kept(piece: _Piece):
        slots, columns, inside = places(piece)
        channels, inside = piece.first + columns, inside & (index >= 0)[:, None]
        source = jnp.broadcast_to(jnp.maximum(index, 0)[:, None], inside.shape)
        x = plt.load(x_ref.at[source, channels], mask=inside, other=0.0)
        if "cos" not in refs:
            return x
        r = refs["cos"].shape[1]
        inside, is_first = inside & (channels < 2 * r), channels < r
        pair = jnp.where(is_first, channels, channels - r)
        other = plt.load(x_ref.at[source, jnp.where(is_first, channels + r, pair)], mask=inside, other=0.0)
        cos, sin = (plt.load(refs[name].at[slots, pair], mask=inside, other=0.0) for name in ("cos", "sin"))
        pairs = turned(x.astype(jnp.float32), other.astype(jnp.float32), cos, sin, is_first)
        return jnp.where(inside, pairs.astype(dtype), x)

    def scaled(group: list[_Piece]):
        """Codes of the pieces that share scales; stores the scales."""
        numbers, insides = [kept(piece).astype(jnp.float32) for piece in group], [places(piece)[2] for piece in group]
        over = 0 if form.slots else 1
        low, high = extremes(numbers, insides, over)
        zero = low if form.kind is None else None
        span = jnp.maximum(high, -low) if zero is None else high - zero
        scale = scale_of(span, form.largest, dtype)
        if form.slots:
            columns = jnp.arange(high.shape[0])
            at, there = (jnp.full_like(columns, part), group[0].first + columns), columns < group[0].size
        else:
            at, there = (slots, jnp.full_like(slots, group[0].group)), held
        plt.store(out_refs["scale"].at[at], scale, mask=there)
        if zero is not None:
            plt.store(out_refs["zero"].at[at], zero.astype(dtype), mask=there)
            zero = jnp.expand_dims(zero, over)
        return [coded(x, jnp.expand_dims(scale, over), zero, form) for x in numbers]

    pieces = _pieces(d, form)
    if "scale" not in out_refs:
        tiles = {piece: kept(piece) for piece in pieces}
    else:
        share = [[piece] for piece in pieces]
        if not form.slots:
            share = [[piece for piece in pieces if piece.group == g] for g in range(pieces[-1].group + 1)]
        codes = {piece: x for group in share for piece, x in zip(group, scaled(group), strict=True)}
        tiles = _joined(codes, form)
    for piece, tile in tiles.items():
        rows, columns, inside = places(piece)
        plt.store(out_refs["codes"].at[rows, piece.byte + columns], tile.astype(out_refs["codes"].dtype), mask=inside)


def _joined(codes, form: _Format):
    """{a piece: the bytes that begin with its codes, those of the other parts in their higher bits}."""
    if form.bits is None:
        return codes
    tiles, of_byte = {}, {piece.byte: piece for piece in reversed(codes)}
    for piece, x in codes.items():
        first = of_byte[piece.byte]
        shifted = x.astype(jnp.int32) << piece.shift
        tiles[first] = tiles[first] | shifted if first in tiles else shifted
    return tiles
