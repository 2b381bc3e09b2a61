"""The attention that each key receives, summed over chosen rows of queries: the scores of H2O and SnapKV.

    mass[b, h, t] = sum_w p[w, t],   p[w, t] = exp(scale q[b, w, h] . k[b, h // G, t] - lse[w])

over rows w that stand at `positions[b, w]` and see the keys up to there. The weights are never written: one kernel
leaves the log of each row's sum of exponentials, a second one makes the weights again and sums them.

The first takes a block of rows, of all G heads of a key head, past one part of the keys that these rows can see; parts
are merged by their logs. The second takes a block of keys past the rows that can see it, head by head: a sum over rows
never leaves its program. What no row of a block can see is skipped in both: causal rows in order cost half.

Per call, with n visible pairs of a row and a key in all (summed over B and H): 4 n d FLOPs and 2 n exponentials; bytes
read at least 4 B K T d (2-byte keys, twice) and 4 B W H d, written 4 B H T. Bound by memory where W G is below some
200, else by tensor cores.

Axes: B batch, W rows of queries, T keys, K key heads, H query heads, G = H / K, d head width, P parts (splits).
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
from pallas_kernels._dispatch import (
    HEAD_AXES,
    ROW_AXES,
    choose,
    dispatch_plan,
    divisors,
    on_each_device,
    run_chosen,
)
from pallas_kernels.decode_attention import DTYPES, PROGRAMS, SMALLEST_DOT, indices, padded

LARGEST_LOGITS = 2**20  # of a block of rows in XLA, all rows of the batch and heads: 4 MiB, which a CPU's cache holds
FEWEST_ROWS = 8  # of a block all the same: fewer would read the keys too often


@dataclasses.dataclass(frozen=True)
class Config:
    """Blocks of both kernels, what their work is shared out to, and Triton's warps and pipeline stages.

    A program holds `held` rows (the second kernel: keys), and `step` keys (rows) at a time go past; of rows, no block
    is larger than there are. The first kernel cuts the keys into `splits`, the second the heads of a key head into
    `shares`.
    """

    held: int
    step: int
    splits: int
    shares: int = 1
    warps: int = 4
    stages: int = 3

    def __post_init__(self) -> None:
        for name in ("held", "step"):
            size = getattr(self, name)
            if size < SMALLEST_DOT or size & (size - 1):
                raise ValueError(f"{name}={size} must be a power of two of at least {SMALLEST_DOT}.")
        for name in ("splits", "shares"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")

    @classmethod
    def for_shape(cls, *, B: int, K: int, G: int, W: int, T: int, d: int, itemsize: int) -> "Config":
        """About four times `PROGRAMS` programs where there is work for them: those of the last wave then weigh little.

        float32 takes small blocks: its products go through registers.

        >>> Config.for_shape(B=8, K=8, G=4, W=64, T=32768, d=128, itemsize=2)
        Config(held=128, step=64, splits=8, shares=1, warps=4, stages=3)
        """
        held, step, warps = (16384, 8192, 4) if itemsize == 2 else (4096, 2048, 8)
        held, step = (max(SMALLEST_DOT, min(most, size // padded(d))) for size, most in ((held, 128), (step, 64)))
        rows, tiles = math.ceil(W * G / min(held, padded(W * G))), math.ceil(T / held)
        splits = min(4 * PROGRAMS // (B * K * rows), math.ceil(T / (2 * step)))
        return cls(held, step, max(1, splits), max(1, min(G, 4 * PROGRAMS // (B * K * tiles))), warps)


@dataclasses.dataclass(frozen=True)
class _Options:
    scale: float
    window: int | None
    config: Config | None


def column_mass(
    q: Float[Array, "B W H d"],
    k: Float[Array, "B K T d"],
    *,
    positions: Int[Array, "B W"],
    scale: float,
    window: int | None = None,
    impl: str | None = None,
    config: Config | None = None,
) -> Float[Array, "B H T"]:
    """Softmax weights of the rows of q on each key, summed over rows, in float32 or wider; H a multiple of K.

    A row at position p sees the keys 0..p, with a `window` the last `window` of these; rows at negative positions see
    none and add nothing. Rows may stand in any order, those of neighbouring positions side by side are fastest. The
    kernels hold no weights, XLA those of a block of rows at a time. Values of keys that nobody sees do not matter as
    long as they are finite. Not differentiated.

    `impl` is one of `pallas_kernels.IMPLS`, None chooses by the platform lowered for.

    Raises:
        ValueError: shapes that do not fit, an impl that is unknown or cannot run, with the reason.
    """
    _check(q, k, positions, window)
    choice = choose("column_mass", functools.partial(supports_column_mass, q=q, k=k), impl)
    options = _Options(float(scale), window, config)
    bodies = {
        "xla": functools.partial(_mass_xla, options=options),
        "triton": functools.partial(_mass_triton, options=options),
        "interpret": functools.partial(_mass_triton, options=options, interpret=True),
    }
    return run_chosen(choice, bodies, q, k, jnp.maximum(positions, -1).astype(jnp.int32))


def supports_column_mass(impl: str, *, q, k) -> str | None:
    """Why `impl` cannot do this, or None; asks for shapes and dtypes only."""
    if impl == "xla":
        return None
    if impl == "mosaic":
        return "no Mosaic body is written yet, take 'triton'"
    if q.dtype != k.dtype or q.dtype.name not in DTYPES:
        return f"its q and k have one dtype of {', '.join(DTYPES)}, got {q.dtype}, {k.dtype}"
    d = q.shape[3]
    return f"its blocks of d={d} would not fit a multiprocessor (d up to 256)" if d > 256 else None


def column_mass_plan(q, k, *, impl: str | None = None) -> dict[str, str]:
    """{platform: the impl that `column_mass` takes there, or why it takes no kernel}, from shapes and dtypes."""
    return dispatch_plan("column_mass", functools.partial(supports_column_mass, q=q, k=k), impl)


def _check(q, k, positions, window) -> None:
    if q.ndim != 4 or k.ndim != 4 or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ValueError(f"expected q[B,W,H,d], k[B,K,T,d]: got {q.shape}, {k.shape}.")
    if q.shape[2] % k.shape[1]:
        raise ValueError(f"expected q[B,W,H,d] with H a multiple of K: got H={q.shape[2]}, K={k.shape[1]}.")
    if positions.shape != q.shape[:2] or not jnp.issubdtype(positions.dtype, jnp.integer):
        wanted = f"positions[B,W] of B={q.shape[0]}, W={q.shape[1]}"
        raise ValueError(f"expected integer {wanted}: got {positions.shape} {positions.dtype}.")
    if window is not None and window < 1:
        raise ValueError(f"window={window} must be at least 1 key, or None for all.")


def reference(q, k, *, positions, scale, window=None):
    """The definition, in float32 whatever comes in: with all weights at once."""
    (B, W, H, d), (K, T) = q.shape, k.shape[1:3]
    q, k = q.astype(jnp.float32).reshape(B, W, K, H // K, d), k.astype(jnp.float32)
    keys, rows = jnp.arange(T), positions[:, None, None, :, None]
    visible = keys <= rows
    if window is not None:
        visible &= keys > rows - window
    logits = jnp.einsum("BWKGd,BKTd->BKGWT", q, k, precision="highest") * scale
    logits = jnp.where(visible, logits, -jnp.inf)
    lse = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    p = jnp.where(visible, jnp.exp(logits - lse), 0.0)
    return p.sum(axis=3).reshape(B, H, T)


# --- the algorithm, whatever carries it out


def _visible(keys, positions, window):
    """Which keys rows at `positions` look at."""
    return keys <= positions if window is None else (keys <= positions) & (keys > positions - window)


def _extent(positions, window):
    """The keys [first, end) that some row of the last axis may look at; none where no row counts."""
    end = jnp.max(positions, axis=-1) + 1
    if window is None:
        return jnp.zeros_like(end), end
    lowest = jnp.min(jnp.where(positions < 0, jnp.iinfo(jnp.int32).max, positions), axis=-1)
    return jnp.minimum(jnp.maximum(lowest - window + 1, 0), end), end


def own_blocks(positions, part, T: int, config: Config, window):
    """The key blocks [first, end) of one part of a block of rows: those in sight shared out evenly."""
    first, end = _extent(positions, window)
    end = (jnp.minimum(end, T) + config.step - 1) // config.step
    first = jnp.minimum(first // config.step, end)
    share = (end - first + config.splits - 1) // config.splits
    return first + part * share, jnp.minimum(first + (part + 1) * share, end)


def row_blocks(positions: Int[Array, "B W"], step: int, held: int, T: int, window):
    """Of each block of `held` keys: the first block of `step` rows that may see it; how many up to the last such one.

    Two arrays [B, key blocks]. There is at least one, which may see nothing.
    """
    B, W = positions.shape
    n = pl.cdiv(W, step)
    positions = jnp.pad(positions, ((0, 0), (0, n * step - W)), constant_values=-1)
    low, high = _extent(positions.reshape(B, 1, n, step), window)
    start = jnp.arange(0, T, held, dtype=jnp.int32)[:, None]
    sees, blocks = (low < start + held) & (high > start), jnp.arange(n, dtype=jnp.int32)
    end = jnp.maximum(jnp.max(jnp.where(sees, blocks + 1, 0), axis=-1), 1)
    first = jnp.minimum(jnp.min(jnp.where(sees, blocks, n), axis=-1), end - 1)
    return first, end - first


def add_block(logits, largest, total):
    """One block of the running sum of exponentials; `largest` is finite though a row may have seen nothing yet."""
    new = jnp.maximum(largest, jnp.max(logits, axis=1))
    return new, total * jnp.exp(largest - new) + jnp.sum(jnp.exp(logits - new[:, None]), axis=1)


# --- bodies


@functools.partial(jax.jit, static_argnames="options")  # or a scan that runs by itself compiles at every call
def _mass_xla(q, k, positions, *, options: _Options):
    """A block of rows at a time. The sum over rows is a product: as a sum, it takes XLA's CPU 5 times as long."""
    (B, W, H, d), (K, T) = q.shape, k.shape[1:3]
    G, window = H // K, options.window
    rows = min(W, max(FEWEST_ROWS, LARGEST_LOGITS // (B * H * T)))
    n = pl.cdiv(W, rows)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    lowest = jnp.finfo(wide).min

    def cut(x, fill):
        x = jnp.pad(x, ((0, 0), (0, n * rows - W), *[(0, 0)] * (x.ndim - 2)), constant_values=fill)
        return jnp.moveaxis(x.reshape(B, n, rows, *x.shape[2:]), 1, 0)

    def block(mass, of_rows):
        q, positions = of_rows
        q = q.reshape(B, rows, K, G, d).transpose(0, 2, 3, 1, 4).reshape(B, K, G * rows, d)
        logits = jnp.einsum("BKRd,BKTd->BKRT", q, k, preferred_element_type=wide, precision="highest")
        visible = _visible(jnp.arange(T), positions[:, None, None, :, None], window)
        logits = jnp.where(visible, logits.reshape(B, K, G, rows, T) * options.scale, lowest)
        largest = jnp.max(logits, axis=-1)
        weights = jnp.exp(logits - largest[..., None])
        share = jnp.where(largest > lowest, 1 / jnp.sum(weights, axis=-1), 0.0)
        return mass + jnp.einsum("BKGW,BKGWT->BKGT", share, weights, precision="highest"), None

    mass = jnp.zeros((B, K, G, T), wide)
    return jax.lax.scan(block, mass, (cut(q, 0), cut(positions, -1)))[0].reshape(B, H, T)


def _mass_triton(q, k, positions, *, options: _Options, interpret: bool = False):
    """Two kernels with a merge between them; on a mesh, each device with its own rows of the batch and heads."""
    heads = divisors(k.shape[1], HEAD_AXES)
    shards = {"B": divisors(q.shape[0], ROW_AXES), "H": heads, "K": heads}
    body = functools.partial(_both_passes, options=options, interpret=interpret)
    return on_each_device(body, shards, ("B W H d", "B K T d", "B W"), "B H T")(q, k, positions)


def _both_passes(q, k, positions, *, options: _Options, interpret: bool):
    (B, W, H, d), (K, T) = q.shape, k.shape[1:3]
    G = H // K
    shape = {"B": B, "K": K, "G": G, "W": W, "T": T, "d": d}
    config = options.config or Config.for_shape(**shape, itemsize=k.dtype.itemsize)
    q = q.reshape(B, W, K, G, d)
    call = functools.partial(triton_call, warps=config.warps, stages=config.stages, interpret=interpret)
    common = {"scale": options.scale, "window": options.window}

    lse = jax.nn.logsumexp(_row_sums(positions, q, k, config, call, common), axis=2)
    return _column_sums(lse, positions, q, k, config, call, common).reshape(B, H, T)


def _row_sums(positions, q, k, config: Config, call, common) -> Float[Array, "B K P W*G"]:
    """The first kernel: of each row and head, the log of the sum of exponentials over each part of the keys."""
    B, W, K, G, _ = q.shape
    held = min(config.held, padded(W * G))
    blocks = pl.cdiv(W * G, held)
    each = config.splits * blocks  # programs of a key head
    return call(
        functools.partial(_lse_body, held=held, config=config, **common),
        grid=(B * K * each,),
        in_specs=_inputs(q, k, each),
        out_specs=pl.BlockSpec((None, None, None, W * G), lambda i: (*_head(i // each, K), i % each // blocks, 0)),
        out_shape=jax.ShapeDtypeStruct((B, K, config.splits, W * G), jnp.float32), name="column_mass_lse",
    )(positions, q, k)  # fmt: skip


def _column_sums(lse, positions, q, k, config: Config, call, common) -> Float[Array, "B K G T"]:
    """The second kernel: of each head and key, the sum of weights over rows."""
    (B, W, K, G, _), T = q.shape, k.shape[2]
    step, tiles = min(config.step, padded(W)), pl.cdiv(T, config.held)
    first, count = row_blocks(positions, step, config.held, T, common["window"])
    each = tiles * config.shares  # programs of a key head
    number = pl.BlockSpec((None, None), lambda i: (i // each // K, i % each // config.shares))
    of_rows = pl.BlockSpec((None, None, W * G), lambda i: (*_head(i // each, K), 0))
    return call(
        functools.partial(_mass_body, step=step, config=config, **common),
        grid=(B * K * each,),
        in_specs=[number, number, of_rows, *_inputs(q, k, each)],
        out_specs=pl.BlockSpec((None, None, G, T), lambda i: (*_head(i // each, K), 0, 0)),
        out_shape=jax.ShapeDtypeStruct((B, K, G, T), jnp.float32), name="column_mass",
    )(first, count, lse, positions, q, k)  # fmt: skip


def _head(i, K: int):
    return i // K, i % K


def _inputs(q, k, each: int) -> list[pl.BlockSpec]:
    """What of positions, q and k a program sees, of `each` programs a key head. Rows and keys are cut in the body."""
    _, W, K, G, d = q.shape
    return [
        pl.BlockSpec((None, W), lambda i: (i // each // K, 0)),
        pl.BlockSpec((None, W, None, G, d), lambda i: (i // each // K, 0, i // each % K, 0, 0)),
        pl.BlockSpec((None, None, k.shape[2], d), lambda i: (*_head(i // each, K), 0, 0)),
    ]


def _precision(dtype):
    """float32 by float32: tensor cores would round it to 10 bits."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _load_keys(k_ref, start, size: int):
    T, d = k_ref.shape
    keys, columns = indices(size, padded(d))
    return plt.load(k_ref.at[start + keys, columns], mask=(start + keys < T) & (columns < d), other=0.0)


def _lse_body(
    positions_ref, q_ref, k_ref, lse_ref, *, held: int, config: Config, scale: float, window: int | None
):  # fmt: skip
    """Row r of a key head is head r % G of row r // G: those of one position lie side by side."""
    (W, G, d), T = q_ref.shape, k_ref.shape[0]
    blocks = pl.cdiv(W * G, held)
    part, block = pl.program_id(0) % (config.splits * blocks) // blocks, pl.program_id(0) % blocks
    first_row = (blocks - 1 - block) * held  # causal rows: those with the most to do begin
    rows = first_row + jnp.arange(held)
    positions = plt.load(positions_ref.at[rows // G], mask=rows < W * G, other=-1)
    row, columns = indices(held, padded(d))
    row = first_row + row
    inside = (row < W * G) & (columns < d)
    q = plt.load(q_ref.at[row // G, row % G, columns], mask=inside, other=0.0)

    def step(block, carry):
        start = block * config.step
        k = _load_keys(k_ref, start, config.step)
        logits = plt.dot(q, k, trans_b=True, precision=_precision(k.dtype)) * scale
        keys = start + indices(held, config.step)[1]
        seen = _visible(keys, positions[:, None], window) & (keys < T)
        return add_block(jnp.where(seen, logits, -jnp.inf), *carry)

    nothing = jnp.full((held,), jnp.finfo(jnp.float32).min), jnp.zeros((held,), jnp.float32)
    first, end = own_blocks(positions, part, T, config, window)
    largest, total = jax.lax.fori_loop(first, end, step, nothing)
    plt.store(lse_ref.at[rows], largest + jnp.log(total), mask=rows < W * G)


def _mass_body(
    first_ref, count_ref, lse_ref, positions_ref, q_ref, k_ref, mass_ref,
    *, step: int, config: Config, scale: float, window: int | None,
):  # fmt: skip
    """One loop over a share of the heads and their blocks of rows, so that loads of the next head overlap too."""
    (W, G, d), T, held = q_ref.shape, k_ref.shape[0], config.held
    tile, share = pl.program_id(0) // config.shares, pl.program_id(0) % config.shares
    start, heads = tile % pl.cdiv(T, held) * held, pl.cdiv(G, config.shares)
    keys = start + jnp.arange(held)
    k = _load_keys(k_ref, start, held)
    first, count = first_ref[()], count_ref[()]

    def add(i, total):
        head, block = share * heads + i // count, i % count
        first_row = (first + block) * step
        rows = first_row + jnp.arange(step)
        positions = plt.load(positions_ref.at[rows], mask=rows < W, other=-1)
        lse = plt.load(lse_ref.at[rows * G + head], mask=rows < W, other=0.0)
        row, columns = indices(step, padded(d))
        row = first_row + row
        q = plt.load(q_ref.at[row, head, columns], mask=(row < W) & (columns < d), other=0.0)
        logits = plt.dot(k, q, trans_b=True, precision=_precision(k.dtype)) * scale
        seen = _visible(start + indices(held, step)[0], positions[None], window)
        weights = jnp.where(seen, jnp.exp(logits - lse[None]), 0.0)
        total = jnp.where(block == 0, 0.0, total) + jnp.sum(weights, axis=1)
        plt.store(mass_ref.at[head, keys], total, mask=(keys < T) & (block == count - 1))
        return total

    jax.lax.fori_loop(0, jnp.minimum(heads, G - share * heads) * count, add, jnp.zeros((held,), jnp.float32))
