"""Which scores of a row are its highest: a radix search for the smallest of them, without sorting.

    mask[n, m] = key[n, m] > t[n],  or  key[n, m] = t[n] and it is one of the first of these that complete the count

where `key` is the score as a whole number of the same order and t the count-th largest key of the row. t is found bit
by bit from the highest on: the largest t that `count` keys reach. NaN is the lowest key of all, -0 is 0.

A row of 262,144 scores is too long for one block, so that one program takes a row, block by block, once for each 2
bits of the key, counting in registers how many keys reach each of 3 candidates, and once more to mark. It stays in the
second-level cache (1 MiB of 50), up to 32,768 scores in the multiprocessor's own. Several programs a row would need a
launch and a merge for each pass; 2 bits a pass is where comparisons and bytes read are least together.

Per call: 4 N M bytes read from memory, 68 N M from caches (17 passes), N M written, and 2 N M to turn these into
bools; about 200 N M integer operations. A row keeps one multiprocessor: few rows are bound by what one can read and
compare. Not differentiated.

Axes: N rows (or B batch and K heads), M scores of a row.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels._compat import triton_call
from pallas_kernels._dispatch import HEAD_AXES, ROW_AXES, choose, divisors, on_each_device, run_chosen

LOWEST = -(2**31)  # the key of NaN, and of what lies beyond a row
BITS = 2  # of the key that one pass of the kernel settles
LETTERS = {2: "N M", 3: "B K M"}


@dataclasses.dataclass(frozen=True)
class Config:
    """Scores in a block, a power of two, and Triton's warps."""

    block: int
    warps: int = 4

    def __post_init__(self) -> None:
        if self.block < 1 or self.block & (self.block - 1):
            raise ValueError(f"block={self.block} must be a power of two: Triton takes no other blocks.")

    @classmethod
    def for_shape(cls, *, M: int) -> "Config":
        """8 scores a thread, which leaves room for the counts, and as many threads as a row can use.

        >>> Config.for_shape(M=32768)
        Config(block=8192, warps=32)
        """
        block = max(128, min(8192, pl.next_power_of_2(M)))
        return cls(block, max(1, block // 256))


def highest_mask(
    score: Float[Array, "*L M"], count: Int[Array, "*L"], *, impl: str | None = None, config: Config | None = None
) -> Bool[Array, "*L M"]:
    """Marks the `count` highest scores of each row of score[N,M] or [B,K,M]: none below 1, all from M on.

    Of equal scores the earlier ones are taken; NaN is below -inf. Scores are compared as float32.

    `impl` is one of `pallas_kernels.IMPLS`, None chooses by the platform lowered for. On a mesh (`jax.set_mesh`) a
    kernel takes each device's own rows, of [B,K,M] also its own heads. Not differentiated.

    Raises:
        ValueError: shapes that do not fit, an impl that is unknown or cannot run, with the reason.
    """
    if score.ndim not in LETTERS or count.shape != score.shape[:-1] or not jnp.issubdtype(count.dtype, jnp.integer):
        raise ValueError(
            "expected score[N,M] and integer count[N], or [B,K,M] and [B,K]: "
            f"got {score.shape}, {count.shape} {count.dtype}."
        )
    choice = choose("highest_mask", functools.partial(supports_highest_mask, score=score), impl)
    bodies = {
        "xla": _mask_xla,
        "triton": functools.partial(_mask_triton, config=config),
        "interpret": functools.partial(_mask_triton, config=config, interpret=True),
    }
    wanted = jnp.clip(count, 0, score.shape[-1]).astype(jnp.int32)
    return run_chosen(choice, bodies, score.astype(jnp.float32), wanted)


def supports_highest_mask(impl: str, *, score) -> str | None:
    """Why `impl` cannot do this, or None; asks for shapes and dtypes only."""
    if impl == "xla":
        return None
    if impl == "mosaic":
        return "no Mosaic body is written yet, take 'triton'"
    if score.size >= 2**31:
        return f"its mask would have {score.size} bytes, and offsets into it 32 bits (below 2^31)"
    return None if score.size else f"there is nothing to mark in {score.shape}"


def reference(score, count):
    """The definition, by a stable sort from the highest score on."""
    order = jnp.argsort(-score.astype(jnp.float32), axis=-1, stable=True)
    return jnp.argsort(order, axis=-1) < count[..., None]


# --- the algorithm, whatever carries it out


def sort_keys(score: Float[Array, "*L"]) -> Int[Array, "*L"]:
    """Whole numbers in the order of float32 scores; by bits alone, so that no denormal is taken for 0."""
    bits = jax.lax.bitcast_convert_type(score, jnp.int32)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = jnp.where(bits == LOWEST, 0, key)  # -0
    return jnp.where((bits & 0x7FFFFFFF) > 0x7F800000, LOWEST, key)  # NaN


def candidates(threshold, shift, bits: int):
    """The thresholds that fill in the `bits` bits from `shift` on, ascending; from LOWEST on, bits flip upwards."""
    return [threshold ^ (jnp.int32(j) << shift) for j in range(1, 2**bits)]


def raised(threshold, above, tried, counts, wanted):
    """(The last threshold tried that `wanted` keys reach, how many keys reach the first that fewer do)."""
    for candidate, count in zip(tried, counts, strict=True):
        threshold = jnp.where(count >= wanted, candidate, threshold)
        above = jnp.maximum(above, jnp.where(count >= wanted, 0, count))
    return threshold, above


# --- bodies


def _mask_xla(score, wanted):
    """A bit a pass: on a CPU half the time of sorting, and of two bits a pass."""
    keys = sort_keys(score)

    def step(i, carry):
        threshold, above = carry
        tried = candidates(threshold, 31 - i, 1)
        counts = [jnp.sum(keys >= candidate[..., None], axis=-1, dtype=jnp.int32) for candidate in tried]
        return raised(threshold, above, tried, counts, wanted)

    start = jnp.full_like(wanted, LOWEST), jnp.zeros_like(wanted)
    threshold, above = (x[..., None] for x in jax.lax.fori_loop(0, 32, step, start))
    tie = keys == threshold
    return (keys > threshold) | tie & (jnp.cumsum(tie, axis=-1, dtype=jnp.int32) <= wanted[..., None] - above)


def _mask_triton(score, wanted, *, config: Config | None, interpret: bool = False):
    letters, rows = LETTERS[score.ndim], divisors(score.shape[0], ROW_AXES)
    shards = {"N": rows, "B": rows, "K": divisors(score.shape[1], HEAD_AXES)}
    body = functools.partial(_mask_rows, config=config, interpret=interpret)
    return on_each_device(body, shards, (letters, letters.removesuffix(" M")), letters)(score, wanted)


def _mask_rows(score, wanted, *, config: Config | None, interpret: bool):
    *_, M = score.shape
    config = config or Config.for_shape(M=M)
    row = pl.BlockSpec((None, M), lambda i: (i, 0))
    mask = triton_call(
        functools.partial(_triton_body, config=config),
        grid=(wanted.size,), in_specs=[row, pl.BlockSpec((None,), lambda i: (i,))],
        out_specs=row, out_shape=jax.ShapeDtypeStruct((wanted.size, M), jnp.int8),
        warps=config.warps, stages=1, interpret=interpret, name="highest_mask",
    )(score.reshape(-1, M), wanted.reshape(-1))  # fmt: skip
    return (mask != 0).reshape(score.shape)


def _triton_body(score_ref, wanted_ref, mask_ref, *, config: Config):
    (M,) = score_ref.shape
    wanted, blocks = wanted_ref[()], pl.cdiv(M, config.block)

    def block_keys(block):
        slots = block * config.block + jnp.arange(config.block)
        return sort_keys(plt.load(score_ref.at[slots], mask=slots < M, other=jnp.nan)), slots

    def settle(i, carry):
        threshold, above = carry
        tried = candidates(threshold, 32 - BITS * (i + 1), BITS)

        def count(block, counts):
            keys, _ = block_keys(block)
            return tuple(n + (keys >= candidate) for n, candidate in zip(counts, tried, strict=True))

        nothing = tuple(jnp.zeros(config.block, jnp.int32) for _ in tried)
        counts = [jnp.sum(n) for n in jax.lax.fori_loop(0, blocks, count, nothing)]
        return raised(threshold, above, tried, counts, wanted)

    threshold, above = jax.lax.fori_loop(0, 32 // BITS, settle, (jnp.int32(LOWEST), jnp.int32(0)))

    def mark(block, seen):
        keys, slots = block_keys(block)
        tie = (keys == threshold).astype(jnp.int32)
        marked = (keys > threshold) | (tie != 0) & (seen + jnp.cumsum(tie) <= wanted - above)
        plt.store(mask_ref.at[slots], marked.astype(jnp.int8), mask=slots < M)
        return seen + jnp.sum(tie)

    jax.lax.fori_loop(0, blocks, mark, jnp.int32(0))
