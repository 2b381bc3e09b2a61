"""Attention of one new query a row to a pool in which every key head has as many slots as it needs, in any width.

    out[b, h] = sum_s p[h, s] v[b, r, s],   s in start[b, k] .. start[b, k] + lengths[b, k] - 1,   k = h // G

A pool [B R P d] has R shards, one for K / R neighbouring heads each: as many as a mesh cuts heads into, so that nobody
reads another's. Heads lie in order from multiples of `BLOCK` slots on (`starts`), what lies between them is not read.
Each program takes one head and one part of its blocks, as in `decode_attention`: heads of 5 % and of 100 % of the
tokens cost what they hold.

Keys and values may be `Packed`. Nothing is turned back: with keys in groups of `BLOCK` slots a block's logits are
(q * scale) . codes + q . zero, with values in groups of channels its outputs (p * scale) . codes + p . zero, piece by
piece, a piece being the channels of one group that one shift takes out of its bytes. These products are of float32, for
queries of 2 bytes by tensor cores, which round the queries and weights to 10 bits and the codes not at all.

Per call, with n slots in all: 4 n G d FLOPs; n d (bytes of a key and a value) read: bound by memory.

Axes: B batch, R shards, P slots of a shard, K key heads, H query heads, G = H / K, d head width.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pallas_kernels._compat import triton_call
from pallas_kernels._dispatch import HEAD_AXES, ROW_AXES, Choice, choose, divisors, on_each_device, run_chosen
from pallas_kernels.decode_attention import (
    DTYPES,
    PROGRAMS,
    Config,
    Decoded,
    indices,
    merge,
    online_softmax,
    own_blocks,
    padded,
)
from pallas_kernels.packing import Packed, unpack

# Triton's offsets are counted in elements, with a sign and 32 bits for arrays of up to 2^32 bytes.
PAIRED_BYTES = 2**31, 2**32
BLOCK = 32  # slots: heads begin at multiples of it, and keys in few bits share a scale over it
Pool = Array | Packed


@dataclasses.dataclass(frozen=True)
class _Options:
    scale: float
    return_mass: bool
    choice: Choice
    config: Config | None


def ragged_decode(
    q: Float[Array, "B H d"],
    k: Pool,
    v: Pool,
    *,
    start: Int[Array, "B K"],
    lengths: Int[Array, "B K"],
    scale: float,
    return_mass: bool = False,
    impl: str | None = None,
    config: Config | None = None,
) -> Decoded:
    """Attention of one query a row to each key head's slots of the pools k and v [B R P d], which may be `Packed`.

    At length 0 `out` and `mass` are 0 and `lse` is -inf. Values in slots that nobody sees do not matter as long as they
    are finite. `out` has q's dtype, the rest is float32. `mass` [B R P] is the probability that a slot receives, summed
    over the query heads of its key head. Not differentiated.

    `impl` is one of `pallas_kernels.IMPLS`, None chooses by the platform lowered for.

    Raises:
        ValueError: shapes that do not fit, an impl that is unknown or cannot run, with the reason.
    """
    _check(q, k, v, start, lengths)
    supports = functools.partial(supports_ragged_decode, q=q, k=k, v=v)
    options = _Options(float(scale), return_mass, choose("ragged_decode", supports, impl), config)
    bodies = {
        "xla": functools.partial(_ragged_xla, options=options),
        "triton": functools.partial(_ragged_triton, options=options),
        "interpret": functools.partial(_ragged_triton, options=options, interpret=True),
    }
    start, lengths = start.astype(jnp.int32), jnp.maximum(lengths, 0).astype(jnp.int32)
    return run_chosen(options.choice, bodies, q, k, v, start, lengths)


def supports_ragged_decode(impl: str, *, q, k, v) -> str | None:
    """Why `impl` cannot do this, or None; asks for shapes and dtypes only."""
    if impl == "xla":
        return None
    if impl == "mosaic":
        return "no Mosaic body is written yet, take 'triton'"
    if q.dtype.name not in DTYPES:
        return f"its q has one dtype of {', '.join(DTYPES)}, got {q.dtype}"
    for name, x in (("k", k), ("v", v)):
        if isinstance(x, Packed):
            if _is_paired(x) and (x.codes.shape[-1] % 2 or not jnp.issubdtype(x.codes.dtype, jnp.integer)):
                return f"{name} has {x.codes.size} bytes, in no pairs, and Triton's offsets reach up to 2^31"
            is_symmetric = x.zero is None and x.group == x.shape[-1]
            by = {"k": ("slots", BLOCK), "v": ("channels", x.group)}[name]
            if not is_symmetric and (x.axis, x.group) != by:
                groups = f"{x.group} {x.axis}"
                return f"it reads keys in groups of {BLOCK} slots, values in groups of channels: {name} has {groups}"
        elif x.dtype != q.dtype:
            return f"{name} in full width must have q's dtype {q.dtype}, got {x.dtype}"
    d = q.shape[2]
    return f"its blocks of d={d} would not fit a multiprocessor (d up to 256)" if d > 256 else None


def starts(lengths: Int[Array, "B K"], R: int) -> Int[Array, "B K"]:
    """Where heads of these lengths begin in their shard, one behind the other."""
    B, K = lengths.shape
    aligned = (-(-lengths // BLOCK) * BLOCK).reshape(B, R, K // R)
    return (jnp.cumsum(aligned, axis=2) - aligned).reshape(B, K)


def pool_size(tokens: int, heads: int) -> int:
    """Slots P that `heads` heads with so many tokens in all can need.

    >>> pool_size(100, 2)
    160
    """
    return max(1, (tokens + heads * (BLOCK - 1)) // BLOCK) * BLOCK


def block_heads(start: Int[Array, "B K"], R: int, P: int) -> Int[Array, "B R P/BLOCK"]:
    """Which of its shard's heads each block of slots belongs to, if to any."""
    begins = start.reshape(len(start), R, -1)
    blocks = jnp.arange(P // BLOCK) * BLOCK
    return jnp.sum(begins[..., None, :] <= blocks[:, None], axis=-1) - 1


def is_held(start: Int[Array, "B K"], lengths: Int[Array, "B K"], R: int, P: int) -> Array:
    """Which slots [B R P] hold a token."""
    shape = (len(start), R, -1)
    end = jnp.take_along_axis((start + lengths).reshape(shape), block_heads(start, R, P), axis=2)
    return jnp.arange(P) < jnp.repeat(end, BLOCK, axis=2)


def reference(q, k, v, *, start, lengths, scale) -> Decoded:
    """The definition, in float32 whatever comes in; always with the mass."""
    k, v = (unpack(x, jnp.float32) if isinstance(x, Packed) else x.astype(jnp.float32) for x in (k, v))
    (B, H, d), (R, P), K = q.shape, k.shape[1:3], lengths.shape[1]
    k, v = (jnp.repeat(x, K // R, axis=1) for x in (k, v))
    slots, begin = jnp.arange(P), start[..., None]
    visible = ((slots >= begin) & (slots < begin + lengths[..., None]))[:, :, None]
    logits = jnp.einsum("BKGd,BKPd->BKGP", q.astype(jnp.float32).reshape(B, K, -1, d), k, precision="highest") * scale
    logits = jnp.where(visible, logits, -jnp.inf)
    lse = jax.nn.logsumexp(logits, axis=-1)
    p = jnp.where(visible, jnp.exp(logits - lse[..., None]), 0.0)
    out = jnp.einsum("BKGP,BKPd->BKGd", p, v, precision="highest")
    return Decoded(out.reshape(B, H, d), lse.reshape(B, H), p.sum(axis=2).reshape(B, R, K // R, P).sum(axis=2))


def _check(q, k, v, start, lengths) -> None:
    if q.ndim != 3 or len(k.shape) != 4 or k.shape != v.shape or (q.shape[0], q.shape[2]) != (k.shape[0], k.shape[3]):
        raise ValueError(f"expected q[B,H,d], pools k and v[B,R,P,d]: got {q.shape}, {k.shape}, {v.shape}.")
    (B, H, _), (R, P) = q.shape, k.shape[1:3]
    if start.shape != lengths.shape or start.ndim != 2 or len(start) != B:
        raise ValueError(f"expected start and lengths[B,K] of B={B}: got {start.shape} and {lengths.shape}.")
    if lengths.shape[1] % R or H % lengths.shape[1] or P % BLOCK:
        raise ValueError(
            f"expected H a multiple of K, K of R, P of {BLOCK}: got H={H}, K={lengths.shape[1]}, R={R}, P={P}."
        )


# --- the twin


def _ragged_xla(q, k, v, start, lengths, options: _Options) -> Decoded:
    """Products of each block with the queries of its head; then the blocks of a head are merged."""
    k, v = (unpack(x, jnp.float32) if isinstance(x, Packed) else x for x in (k, v))
    (B, H, d), (R, P), K = q.shape, k.shape[1:3], lengths.shape[1]
    n, each = P // BLOCK, K // R
    head = block_heads(start, R, P)
    queries = jnp.take_along_axis(q.reshape(B, R, each, H // K, d), head[..., None, None], axis=2)
    keys, values = (x.reshape(B, R, n, BLOCK, d) for x in (k, v))
    logits = jnp.einsum("BRnGd,BRnsd->BRnGs", queries, keys, preferred_element_type=jnp.float32) * options.scale
    held = is_held(start, lengths, R, P).reshape(B, R, n, 1, BLOCK)
    lowest = jnp.finfo(jnp.float32).min
    logits = jnp.where(held, logits, lowest)
    is_own = (head[..., None] == jnp.arange(each)) & jnp.any(held, axis=-1)  # [B R n each]
    largest = jnp.max(jnp.where(is_own[..., None], jnp.max(logits, axis=-1)[..., None, :], lowest), axis=2)
    of_block = jnp.take_along_axis(largest, head[..., None], axis=2)  # [B R n G]
    weights = jnp.where(held, jnp.exp(logits - of_block[..., None]), 0.0)
    parts = jnp.einsum("BRnGs,BRnsd->BRnGd", weights.astype(v.dtype), values, preferred_element_type=jnp.float32)
    own = is_own.astype(jnp.float32)
    out = jnp.einsum("BRnGd,BRnK->BRKGd", parts, own, precision="highest")
    total = jnp.einsum("BRnGs,BRnK->BRKG", weights, own, precision="highest")
    seen = total > 0
    share = jnp.where(seen, 1 / jnp.where(seen, total, 1), 0)
    out = (out * share[..., None]).astype(q.dtype).reshape(B, H, d)
    lse = jnp.where(seen, jnp.log(jnp.where(seen, total, 1)) + largest, -jnp.inf).reshape(B, H)
    if not options.return_mass:
        return Decoded(out, lse)
    mass = jnp.sum(weights * jnp.take_along_axis(share, head[..., None], axis=2)[..., None], axis=3)
    return Decoded(out, lse, mass.reshape(B, R, P))


# --- the kernel


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Channels [first, first + size) that lie in one part of a pool's bytes and, by channels, in one group."""

    first: int
    size: int
    byte: int
    shift: int
    group: int


def _pieces(d: int, packed: Packed | None) -> tuple[_Piece, ...]:
    """The pieces of a width; of full width and of keys in groups of slots, as few as there are parts."""
    if packed is None:
        return (_Piece(0, d, 0, 0, 0),)
    part = d * packed.bits // 8
    size = part if packed.axis == "slots" else math.gcd(part, packed.group)
    group = d if packed.axis == "slots" else packed.group
    return tuple(
        _Piece(first, size, first % part, first // part * packed.bits, first // group) for first in range(0, d, size)
    )


def _ragged_triton(q, k, v, start, lengths, options: _Options, *, interpret: bool = False) -> Decoded:
    heads = divisors(k.shape[1], HEAD_AXES)
    shards = {"B": divisors(q.shape[0], ROW_AXES), "H": heads, "K": heads, "R": heads}
    pools = [jax.tree.map(lambda _: "B R P d", x) for x in (k, v)]
    outputs = Decoded("B H d", "B H", "B R P" if options.return_mass else None)  # pyright: ignore[reportArgumentType]
    body = functools.partial(_ragged_parts, options=options, interpret=interpret)
    return on_each_device(body, shards, ("B H d", *pools, "B K", "B K"), outputs)(q, k, v, start, lengths)


def _ragged_parts(q, k, v, start, lengths, *, options: _Options, interpret: bool) -> Decoded:
    (B, H, d), (R, P), K = q.shape, k.shape[1:3], lengths.shape[1]
    N, G, each = B * K, H // K, K // R
    config = options.config or _config(B, K, P // each, d, k)
    S = config.splits
    queries = pl.BlockSpec((None, G, d), lambda i: (i // S, 0, 0))
    number = pl.BlockSpec((None,), lambda i: (i // S,))
    inputs = [_flat(x, B * R) for x in (k, v)]
    pools = [jax.tree.map(lambda x: pl.BlockSpec((None, *x.shape[1:]), lambda i: (i // S // each, 0, 0)), x)
             for x in inputs]  # fmt: skip
    outputs = {
        "out": pl.BlockSpec((None, None, G, d), lambda i: (i // S, i % S, 0, 0)),
        "lse": pl.BlockSpec((None, None, G), lambda i: (i // S, i % S, 0)),
    }
    shapes = {"out": (N, S, G, d), "lse": (N, S, G)}
    if options.return_mass:
        outputs["logits"] = pl.BlockSpec((None, G, P), lambda i: (i // S // each, 0, 0))
        shapes["logits"] = (B * R, G, P)
    packed = [x if isinstance(x, Packed) else None for x in (k, v)]
    parts = triton_call(
        functools.partial(_triton_body, config=config, scale=options.scale, packed=packed),
        grid=(N * S,), in_specs=[number, number, queries, *pools], out_specs=outputs,
        out_shape={name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()},
        warps=config.warps, stages=config.stages, interpret=interpret, name="ragged_decode",
    )(start.reshape(N), lengths.reshape(N), q.reshape(N, G, d), *inputs)  # fmt: skip
    out, lse = merge(parts["out"], parts["lse"])
    mass = None
    if options.return_mass:
        of_block = jnp.take_along_axis(lse.reshape(B, R, each, G), block_heads(start, R, P)[..., None], axis=2)
        logits = parts["logits"].reshape(B, R, G, P)
        weights = jnp.exp(logits - jnp.repeat(jnp.swapaxes(of_block, 2, 3), BLOCK, axis=3))
        mass = jnp.sum(jnp.where(is_held(start, lengths, R, P)[:, :, None], weights, 0.0), axis=2)
    return Decoded(out.astype(q.dtype).reshape(B, H, d), lse.reshape(B, H), mass)


def _config(B: int, K: int, S: int, d: int, k: Pool) -> Config:
    """As if every head had S slots; twice as many parts, since the longest head decides when all are done."""
    is_packed = isinstance(k, Packed)
    block = BLOCK if is_packed else Config.for_shape(B=B, K=K, S=S, d=d, itemsize=k.dtype.itemsize).block
    return Config(block, max(1, min(math.ceil(2 * PROGRAMS / (B * K)), math.ceil(S / block))))


def _is_paired(x: Packed) -> bool:
    """Whether two bytes are read as one number, since there are too many to count."""
    least, most = PAIRED_BYTES
    return x.codes.dtype.itemsize == 1 and least <= x.codes.size <= most


def _flat(x: Pool, N: int) -> dict[str, Array]:
    """A pool's arrays with rows and shards as one axis."""
    if isinstance(x, Packed) and _is_paired(x):
        pairs = x.codes.reshape(*x.codes.shape[:-1], -1, 2)
        x = dataclasses.replace(x, codes=jax.lax.bitcast_convert_type(pairs, jnp.uint16))
    arrays = {"codes": x.codes, "scale": x.scale, "zero": x.zero} if isinstance(x, Packed) else {"codes": x}
    return {name: y.reshape(N, *y.shape[2:]) for name, y in arrays.items() if y is not None}


def _triton_body(
    start_ref, length_ref, q_ref, k_refs, v_refs, refs, *, config: Config, scale: float, packed: list[Packed | None]
):
    G, d = q_ref.shape
    rows = padded(G)
    precision = jax.lax.Precision.HIGHEST if q_ref.dtype == jnp.float32 else None
    keys, values = (_pieces(d, x) for x in packed)
    by_slots = packed[0] is not None and packed[0].axis == "slots"
    begin, length = start_ref[()], length_ref[()]

    def of_queries(piece: _Piece):
        heads, columns = indices(rows, padded(piece.size))
        inside = (heads < G) & (columns < piece.size)
        q = plt.load(q_ref.at[heads, piece.first + columns], mask=inside, other=0.0)
        return q if packed[0] is None else q.astype(jnp.float32)

    queries = [of_queries(piece) for piece in keys]

    def tile(refs, packed: Packed | None, piece: _Piece, first):
        """Codes [block size] of the slots from `first` on, relative to the head's own."""
        slots, columns = indices(config.block, padded(piece.size))
        inside = (first + slots < length) & (columns < piece.size)
        if packed is None:
            return plt.load(refs["codes"].at[begin + first + slots, columns], mask=inside, other=0.0)
        if refs["codes"].dtype == jnp.uint16:
            at = refs["codes"].at[begin + first + slots, (piece.byte + columns) // 2]
            pairs = plt.load(at, mask=inside, other=0).astype(jnp.int32)
            codes = pairs >> (piece.byte + columns) % 2 * 8 & 255
            signed = (codes ^ 128) - 128 if packed.codes.dtype == jnp.int8 else codes
            return (signed >> piece.shift & (2**packed.bits - 1) if packed.bits < 8 else signed).astype(jnp.float32)
        at = refs["codes"].at[begin + first + slots, piece.byte + columns]
        if not jnp.issubdtype(packed.codes.dtype, jnp.integer):  # Triton has no 8-bit zero to fill in
            return jnp.where(inside, plt.load(at, mask=inside).astype(jnp.float32), 0.0)
        codes = plt.load(at, mask=inside, other=0)
        if packed.bits < 8:
            codes = (codes.astype(jnp.int32) >> piece.shift) & (2**packed.bits - 1)
        return codes.astype(jnp.float32)

    def of_slots(refs, name: str, piece: _Piece, first):
        """The scale or zero of each slot of a block, for a piece of channels."""
        slots = first + jnp.arange(config.block)
        at = refs[name].at[begin + slots, jnp.full_like(slots, piece.group)]
        return plt.load(at, mask=slots < length, other=0.0).astype(jnp.float32)

    def of_channels(refs, name: str, piece: _Piece, first):
        """The scale or zero of each channel of a piece, for a block of slots."""
        columns = jnp.arange(padded(piece.size))
        at = jnp.full_like(columns, (begin + first) // BLOCK)
        found = plt.load(refs[name].at[at, piece.first + columns], mask=columns < piece.size, other=0.0)
        return found.astype(jnp.float32)

    def logits_of(first):
        total = jnp.zeros((rows, config.block), jnp.float32)
        for piece, q in zip(keys, queries, strict=True):
            codes = tile(k_refs, packed[0], piece, first)
            if by_slots:
                total += jnp.sum(q * of_channels(k_refs, "zero", piece, first)[None], axis=1)[:, None]
                q = q * of_channels(k_refs, "scale", piece, first)[None]
            product = plt.dot(q, codes, trans_b=True, precision=precision)
            if packed[0] is not None and not by_slots:
                product = product * of_slots(k_refs, "scale", piece, first)[None]
            total += product
        return total * scale

    def weighted(weights, piece: _Piece, first):
        codes = tile(v_refs, packed[1], piece, first)
        if packed[1] is None:
            return plt.dot(weights.astype(codes.dtype), codes, precision=precision)
        product = plt.dot(weights * of_slots(v_refs, "scale", piece, first)[None], codes, precision=precision)
        if "zero" in v_refs:
            product += jnp.sum(weights * of_slots(v_refs, "zero", piece, first)[None], axis=1)[:, None]
        return product

    def step(block, carry):
        outs, largest, total = carry
        first = block * config.block
        logits = logits_of(first)
        heads, slots = indices(rows, config.block)
        seen = first + slots < length
        if "logits" in refs:
            plt.store(refs["logits"].at[heads, begin + first + slots], logits, mask=seen & (heads < G))
        weights, largest, total, rescale = online_softmax(jnp.where(seen, logits, -jnp.inf), largest, total)
        outs = tuple(
            out * rescale[:, None] + weighted(weights, piece, first) for out, piece in zip(outs, values, strict=True)
        )
        return outs, largest, total

    nothing = tuple(jnp.zeros((rows, padded(piece.size)), jnp.float32) for piece in values)
    start_of = nothing, jnp.full((rows,), -jnp.inf), jnp.zeros((rows,), jnp.float32)
    first, end = own_blocks(length, pl.program_id(0) % config.splits, config, None)
    outs, largest, total = jax.lax.fori_loop(first, end, step, start_of)
    for out, piece in zip(outs, values, strict=True):
        heads, columns = indices(rows, padded(piece.size))
        at = refs["out"].at[heads, piece.first + columns]
        plt.store(at, out / jnp.where(total == 0, 1.0, total)[:, None], mask=(heads < G) & (columns < piece.size))
    heads = jnp.arange(rows)
    plt.store(refs["lse"].at[heads], largest + jnp.log(total), mask=heads < G)
