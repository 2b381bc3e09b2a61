"""Attention of one new query a row to a cache of keys and values, split over the keys (flash-decoding).

    out[b, h] = sum_s p[h, s] v[b, k, s],   p[h, s] = exp(scale q[b, h] . k[b, k, s] - lse[b, h]),   k = h // G

over the visible slots of a row: its first `length`, of these the last `window`. Each program takes one key head and one
part of its visible blocks, for all G query heads at once, and leaves an output normalised over its part with the log of
the sum of its exponentials. Parts are merged by these logs. The visible blocks are shared out by each row's own length,
so that short rows of a long cache still fill the GPU; a part without blocks ends at once, and a block that nobody sees
is never read.

With `return_mass` it also leaves its logits; mass[b, k, s] = sum of p[h, s] over the G heads is made from these after
the merge. It costs no second pass over the keys.

Per call, with n visible slots in all (summed over B and K): 4 n G d FLOPs; 4 n d bytes read (2-byte keys and values),
8 P B H d written and read again, and 8 n G for the mass. G FLOPs a byte: bound by memory in every real model.

Axes: B batch, S cache length, K key heads, H query heads, G = H / K, d head width, P parts (splits).
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pallas_kernels._compat import triton_call
from pallas_kernels._dispatch import (
    HEAD_AXES,
    ROW_AXES,
    Choice,
    choose,
    dispatch_plan,
    divisors,
    on_each_device,
    run_chosen,
)

PROGRAMS = 264  # two for each of the 132 multiprocessors of an H100 or H200
SMALLEST_DOT = 16  # rows and columns of a tensor core's product
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Config:
    """Keys in a block, parts that a row's blocks are shared out to, and Triton's warps and pipeline stages."""

    block: int
    splits: int
    warps: int = 4
    stages: int = 3

    def __post_init__(self) -> None:
        if self.block < SMALLEST_DOT or self.block & (self.block - 1):
            raise ValueError(f"block={self.block} must be a power of two of at least {SMALLEST_DOT}.")
        if self.splits < 1:
            raise ValueError(f"splits={self.splits} must be at least 1.")

    @classmethod
    def for_shape(cls, *, B: int, K: int, S: int, d: int, itemsize: int) -> "Config":
        """Enough parts for `PROGRAMS` programs, as far as there are blocks; 16 KiB of keys in a block.

        >>> Config.for_shape(B=8, K=8, S=32768, d=128, itemsize=2)
        Config(block=64, splits=5, warps=4, stages=3)
        """
        block = max(SMALLEST_DOT, min(128, 16384 // (padded(d) * itemsize)))
        splits = min(math.ceil(PROGRAMS / (B * K)), math.ceil(S / block))
        return cls(block, max(1, splits))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoded:
    """What `decode_attention` gives: `lse` is the log of the sum of exponentials, `mass` is None unless asked for."""

    out: Float[Array, "B H d"]
    lse: Float[Array, "B H"]
    mass: Float[Array, "B K S"] | None = None


@dataclasses.dataclass(frozen=True)
class _Options:
    scale: float
    window: int | None
    return_mass: bool
    choice: Choice
    config: Config | None


def decode_attention(
    q: Float[Array, "B H d"],
    k: Float[Array, "B K S d"],
    v: Float[Array, "B K S d"],
    *,
    lengths: Int[Array, "B"] | Int[Array, "B K"],
    scale: float,
    window: int | None = None,
    return_mass: bool = False,
    impl: str | None = None,
    config: Config | None = None,
) -> Decoded:
    """Attention of one query a row to the slots 0..lengths-1 of its cache, H a multiple of K.

    With a `window`, only the last `window` of these slots are read. `lengths` may differ from key head to key head; at
    length 0 `out` and `mass` are 0 and `lse` is -inf, lengths beyond S are as S. Values in slots that nobody sees do
    not matter as long as they are finite. `out` has q's dtype, the rest is float32, and so is the arithmetic of the
    softmax. `mass` is the attention probability that a slot receives, summed over the query heads of its key head.

    `impl` is one of `pallas_kernels.IMPLS`, None chooses by the platform lowered for. For pools of slots, and keys and
    values in few bits, see `ragged_decode`.

    On a mesh (`jax.set_mesh`) a kernel takes each device's own rows and key heads, as far as the mesh divides them.
    It can be mapped by `jax.vmap`, and differentiated in reverse by q, k and v: the gradient recomputes by XLA, so that
    it holds [B H S] logits in memory. Forward-mode derivatives need impl="xla".

    Raises:
        ValueError: shapes that do not fit, an impl that is unknown or cannot run, with the reason.
    """
    lengths = _checked_lengths(q, k, v, lengths, window)
    supports = functools.partial(supports_decode_attention, q=q, k=k, v=v)
    choice = choose("decode_attention", supports, impl)
    options = _Options(float(scale), window, return_mass, choice, config)
    if choice == (("default", "xla"),):
        return _decode_xla(q, k, v, lengths, options)
    return _decode(q, k, v, lengths, options)


def supports_decode_attention(impl: str, *, q, k, v) -> str | None:
    """Why `impl` cannot do this, or None; asks for shapes and dtypes only."""
    if impl == "xla":
        return None
    if impl == "mosaic":
        return "no Mosaic body is written yet, take 'triton'"
    if not q.dtype == k.dtype == v.dtype or q.dtype.name not in DTYPES:
        return f"its q, k and v have one dtype of {', '.join(DTYPES)}, got {q.dtype}, {k.dtype}, {v.dtype}"
    G, d = q.shape[1] // k.shape[1], q.shape[2]
    if d > 256 or G > 128:
        return f"its blocks of d={d}, G={G} would not fit a multiprocessor (d up to 256, G up to 128)"
    return None


def decode_attention_plan(q, k, v, *, impl: str | None = None) -> dict[str, str]:
    """{platform: the impl that `decode_attention` takes there, or why it takes no kernel}, from shapes and dtypes."""
    supports = functools.partial(supports_decode_attention, q=q, k=k, v=v)
    return dispatch_plan("decode_attention", supports, impl)


def _checked_lengths(q, k, v, lengths, window) -> Int[Array, "B K"]:
    if q.ndim != 3 or k.ndim != 4 or k.shape != v.shape or (q.shape[0], q.shape[2]) != (k.shape[0], k.shape[3]):
        raise ValueError(f"expected q[B,H,d], k and v[B,K,S,d]: got {q.shape}, {k.shape}, {v.shape}.")
    (B, K), H = k.shape[:2], q.shape[1]
    if H % K:
        raise ValueError(f"expected q[B,H,d] with H a multiple of K: got H={H}, K={K}.")
    if lengths.shape not in ((B,), (B, K)) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(f"expected integer lengths[B] or [B,K] of B={B}, K={K}: got {lengths.shape} {lengths.dtype}.")
    if window is not None and window < 1:
        raise ValueError(f"window={window} must be at least 1 slot, or None for all.")
    per_head = jnp.broadcast_to(lengths if lengths.ndim == 2 else lengths[:, None], (B, K))
    return jnp.clip(per_head, 0, k.shape[2]).astype(jnp.int32)


def reference(q, k, v, *, lengths, scale, window=None) -> Decoded:
    """The definition, in float32 whatever comes in; always with the mass."""
    (B, H, d), (K, S) = q.shape, k.shape[1:3]
    q, k, v = (x.astype(jnp.float32) for x in (q.reshape(B, K, H // K, d), k, v))
    lengths = jnp.clip(jnp.broadcast_to(lengths.reshape(B, -1), (B, K)), 0, S)
    slots = jnp.arange(S)
    visible = slots < lengths[..., None]
    if window is not None:
        visible &= slots >= lengths[..., None] - window
    logits = jnp.einsum("BKGd,BKSd->BKGS", q, k, precision="highest") * scale
    logits = jnp.where(visible[:, :, None], logits, -jnp.inf)
    lse = jax.nn.logsumexp(logits, axis=-1)
    p = jnp.where(visible[:, :, None], jnp.exp(logits - lse[..., None]), 0.0)
    out = jnp.einsum("BKGS,BKSd->BKGd", p, v, precision="highest")
    return Decoded(out.reshape(B, H, d), lse.reshape(B, H), p.sum(axis=2))


# --- the algorithm, whatever carries it out


def padded(size: int) -> int:
    """The power of two that a block's axis of `size` takes."""
    return max(SMALLEST_DOT, pl.next_power_of_2(size))


def _visible(slots, length, window):
    """Which slots a row of `length` looks at."""
    return slots < length if window is None else (slots < length) & (slots >= length - window)


def own_blocks(length, part, config: Config, window):
    """The blocks [first, end) of one part of a row: its visible blocks shared out evenly, the last parts get fewer."""
    first = 0 if window is None else jnp.maximum(length - window, 0) // config.block
    end = pl.cdiv(length, config.block)
    share = pl.cdiv(end - first, config.splits)
    return first + part * share, jnp.minimum(first + (part + 1) * share, end)


def online_softmax(logits, largest, total):
    """One block of the running softmax: (weights, new largest, new total, what the sums so far are scaled by).

    A block has at least one visible slot, so that `largest` is finite after the first.
    """
    new = jnp.maximum(largest, jnp.max(logits, axis=1))
    weights, rescale = jnp.exp(logits - new[:, None]), jnp.exp(largest - new)
    return weights, new, total * rescale + jnp.sum(weights, axis=1), rescale


def merge(outs: Float[Array, "N P G d"], lses: Float[Array, "N P G"]):
    """Outputs of the parts, each normalised over its own slots, into one; a part that saw nothing has lse -inf."""
    lse = jax.nn.logsumexp(lses, axis=1)
    share = jnp.where(lses == -jnp.inf, 0.0, jnp.exp(lses - lse[:, None]))
    return jnp.sum(outs * share[..., None], axis=1), lse


def _mass(logits: Float[Array, "N G S"], lse: Float[Array, "N G"], lengths: Int[Array, "N"], window):
    """Probabilities from logits, summed over G; logits of slots that nobody sees were never written."""
    visible = _visible(jnp.arange(logits.shape[-1]), lengths[:, None], window)
    return jnp.sum(jnp.where(visible[:, None], jnp.exp(logits - lse[..., None]), 0.0), axis=1)


# --- bodies


def _decode_xla(q, k, v, lengths, options: _Options) -> Decoded:
    """One product over the whole cache; queries of a key head lie side by side, so that keys are never repeated."""
    (B, H, d), (K, S) = q.shape, k.shape[1:3]
    G = H // K
    # A matrix-vector product of 2-byte numbers takes XLA's CPU 6 times as long as one of two rows.
    spare = int(G == 1 and q.dtype.itemsize == 2)
    q = jnp.pad(q.reshape(B, K, G, d), ((0, 0), (0, 0), (0, spare), (0, 0)))
    logits = jnp.einsum("BKGd,BKSd->BKGS", q, k, preferred_element_type=jnp.float32) * options.scale
    visible = _visible(jnp.arange(S), lengths[..., None], options.window)[:, :, None]
    logits = jnp.where(visible, logits, jnp.finfo(jnp.float32).min)
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.exp(logits - largest)
    total = jnp.sum(weights, axis=-1)
    out = jnp.einsum("BKGS,BKSd->BKGd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    seen = (lengths > 0)[..., None]
    out = jnp.where(seen[..., None], out / total[..., None], 0.0)[:, :, :G].astype(q.dtype).reshape(B, H, d)
    lse = jnp.where(seen, jnp.log(total) + largest[..., 0], -jnp.inf)[:, :, :G].reshape(B, H)
    if not options.return_mass:
        return Decoded(out, lse)
    mass = jnp.sum((weights / total[..., None])[:, :, :G], axis=2)
    return Decoded(out, lse, jnp.where(seen, mass, 0.0))


def _decode_triton(q, k, v, lengths, options: _Options, *, interpret: bool = False) -> Decoded:
    """Partial results by the kernel, merged by XLA; on a mesh, each device with its own rows and heads."""
    heads = divisors(k.shape[1], HEAD_AXES)
    shards = {"B": divisors(q.shape[0], ROW_AXES), "H": heads, "K": heads}
    outputs = Decoded("B H d", "B H", "B K S" if options.return_mass else None)  # pyright: ignore[reportArgumentType]
    body = functools.partial(_decode_parts, options=options, interpret=interpret)
    return on_each_device(body, shards, ("B H d", "B K S d", "B K S d", "B K"), outputs)(q, k, v, lengths)


def _decode_parts(q, k, v, lengths, *, options: _Options, interpret: bool) -> Decoded:
    (B, H, d), (K, S) = q.shape, k.shape[1:3]
    N, G = B * K, H // K
    config = options.config or Config.for_shape(B=B, K=K, S=S, d=d, itemsize=k.dtype.itemsize)
    lengths = lengths.reshape(N)
    in_specs, out_specs, out_shape = _blocks(N, config.splits, G, d, S, options.return_mass)
    parts = triton_call(
        functools.partial(_triton_body, config=config, scale=options.scale, window=options.window),
        grid=(N * config.splits,),
        in_specs=in_specs, out_specs=out_specs, out_shape=out_shape,
        warps=config.warps, stages=config.stages, interpret=interpret, name="decode_attention",
    )(lengths, q.reshape(N, G, d), k.reshape(N, S, d), v.reshape(N, S, d))  # fmt: skip
    out, lse = merge(parts["out"], parts["lse"])
    mass = _mass(parts["logits"], lse, lengths, options.window).reshape(B, K, S) if options.return_mass else None
    return Decoded(out.astype(q.dtype).reshape(B, H, d), lse.reshape(B, H), mass)


def _blocks(N: int, P: int, G: int, d: int, S: int, return_mass: bool) -> tuple[Any, Any, Any]:
    """What of each array a program sees (inputs, outputs), and the outputs' shapes. Keys are cut in the body."""
    queries, keys = (pl.BlockSpec((None, rows, d), lambda i: (i // P, 0, 0)) for rows in (G, S))
    in_specs = [pl.BlockSpec((None,), lambda i: (i // P,)), queries, keys, keys]
    out_specs = {
        "out": pl.BlockSpec((None, None, G, d), lambda i: (i // P, i % P, 0, 0)),
        "lse": pl.BlockSpec((None, None, G), lambda i: (i // P, i % P, 0)),
    }
    shapes = {"out": (N, P, G, d), "lse": (N, P, G)}
    if return_mass:
        out_specs["logits"], shapes["logits"] = pl.BlockSpec((None, G, S), lambda i: (i // P, 0, 0)), (N, G, S)
    return in_specs, out_specs, {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


def _triton_body(length_ref, q_ref, k_ref, v_ref, refs, *, config: Config, scale: float, window: int | None):
    G, d = q_ref.shape
    rows, width = padded(G), padded(d)
    # float32 by float32: tensor cores would round it to 10 bits.
    precision = jax.lax.Precision.HIGHEST if k_ref.dtype == jnp.float32 else None
    heads, columns = indices(rows, width)
    inside = (heads < G) & (columns < d)
    length = length_ref[()]
    q = plt.load(q_ref.at[heads, columns], mask=inside, other=0.0)

    def step(block, carry):
        out, largest, total = carry
        start = block * config.block
        slots, channels = indices(config.block, width)
        seen = _visible(start + slots, length, window) & (channels < d)
        k = plt.load(k_ref.at[start + slots, channels], mask=seen, other=0.0)
        v = plt.load(v_ref.at[start + slots, channels], mask=seen, other=0.0)
        logits = plt.dot(q, k, trans_b=True, precision=precision) * scale
        queries, slots = indices(rows, config.block)
        seen = _visible(start + slots, length, window)
        if "logits" in refs:
            plt.store(refs["logits"].at[queries, start + slots], logits, mask=seen & (queries < G))
        weights, largest, total, rescale = online_softmax(jnp.where(seen, logits, -jnp.inf), largest, total)
        return out * rescale[:, None] + plt.dot(weights.astype(v.dtype), v, precision=precision), largest, total

    nothing = jnp.zeros((rows, width), jnp.float32), jnp.full((rows,), -jnp.inf), jnp.zeros((rows,), jnp.float32)
    first, end = own_blocks(length, pl.program_id(0) % config.splits, config, window)
    out, largest, total = jax.lax.fori_loop(first, end, step, nothing)
    plt.store(refs["out"].at[heads, columns], out / jnp.where(total == 0, 1.0, total)[:, None], mask=inside)
    heads = jnp.arange(rows)
    plt.store(refs["lse"].at[heads], largest + jnp.log(total), mask=heads < G)


def indices(rows: int, columns: int):
    """Row and column of each element of a block. Blocks have powers of two, arrays need not: hence no slices."""
    return tuple(jax.lax.broadcasted_iota(jnp.int32, (rows, columns), axis) for axis in (0, 1))


# --- the choice between bodies, with one gradient for all


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _decode(q, k, v, lengths, options: _Options) -> Decoded:
    bodies = {
        "xla": functools.partial(_decode_xla, options=options),
        "triton": functools.partial(_decode_triton, options=options),
        "interpret": functools.partial(_decode_triton, options=options, interpret=True),
    }
    return run_chosen(options.choice, bodies, q, k, v, lengths)


def _forward(q, k, v, lengths, options):
    return _decode(q, k, v, lengths, options), (q, k, v, lengths)


def _backward(options, residuals, gradient):
    *qkv, lengths = residuals
    return *jax.vjp(lambda q, k, v: _decode_xla(q, k, v, lengths, options), *qkv)[1](gradient), None


_decode.defvjp(_forward, _backward)
