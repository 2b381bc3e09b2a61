"""Attention to ragged pools, in full width and in few bits: brute force, interpreted, compiled for H200s."""

import functools
import sys
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels._shapes import RAGGED_SHAPES
from pallas_kernels.decode_attention import Config
from pallas_kernels.packing import Packed, pack, pack_symmetric, unpack
from pallas_kernels.ragged_decode import (
    BLOCK,
    block_heads,
    pool_size,
    ragged_decode,
    reference,
    starts,
    supports_ragged_decode,
)
from tests.kernel_contract import Case, KernelContract, assert_close, fast_jit

KINDS = ("full", "int2", "int4", "kivi8", "int8", "fp8")


def quantised(x, kind, *, of):
    if kind == "full":
        return x
    if kind in ("int8", "fp8"):
        return pack_symmetric(x, kind)
    bits = int(kind[-1])
    axis, group = ("slots", BLOCK) if of == "k" else ("channels", 20 if x.shape[-1] == 80 else 32)
    return pack(x, bits=bits, axis=axis, group=group)


def draw_case(number: int) -> Case:
    """A seeded case: kinds, widths and groups of heads in turn, the rest drawn."""
    rng = np.random.default_rng(number)
    d, G = (64, 80, 128)[number % 3], (1, 3, 4, 7, 8)[number // 3 % 5]
    kind = KINDS[number % len(KINDS)]
    sizes = {
        "B": int(rng.integers(1, 3)),
        "R": int(rng.integers(1, 3)),
        "each": int(rng.integers(1, 4)),
        "G": G,
        "d": d,
    }
    block = BLOCK if kind in ("int2", "int4", "kivi8") else int(rng.choice((16, 32, 64)))
    options = {"config": Config(block, int(rng.integers(1, 5))), "kind": kind}
    dtype = "bfloat16" if number % 4 == 3 else "float32"
    size = "".join(f"{letter}{value}" for letter, value in sizes.items())
    return Case(f"{number} {kind} {size} {dtype}", sizes, options, dtype)


def abstract(name: str, kind: str, **options):
    shape = RAGGED_SHAPES[name]
    pool = jax.ShapeDtypeStruct((shape.B, 1, shape.P, shape.d), "bfloat16")
    k, v = (jax.eval_shape(functools.partial(quantised, kind=kind, of=of), pool) for of in "kv")
    numbers = jax.ShapeDtypeStruct((shape.B, shape.K), "int32")
    q = jax.ShapeDtypeStruct((shape.B, shape.H, shape.d), "bfloat16")
    return {"q": q, "k": k, "v": v, "start": numbers, "lengths": numbers}, {"scale": shape.d**-0.5, **options}


class TestRaggedDecode(KernelContract):
    op = staticmethod(ragged_decode)
    supports = staticmethod(lambda impl, q, k, v, **_: supports_ragged_decode(impl, q=q, k=k, v=v))
    config = staticmethod(lambda: Config(32, 2))
    cases = tuple(draw_case(number) for number in range(48))
    named: ClassVar = {
        "llama-3.1-8b/8x32768": lambda: abstract("llama-3.1-8b/8x32768 at 0.2", "full", return_mass=True),
        "llama-3.1-8b/8x32768 int4": lambda: abstract("llama-3.1-8b/8x32768 at 0.2", "int4", return_mass=True),
        "llama-3.1-8b/64x131072 int4": lambda: abstract("llama-3.1-8b/64x131072 at 0.2", "int4"),
        "llama-3.1-8b/8x32768 int2": lambda: abstract("llama-3.1-8b/8x32768 at 0.2", "int2"),
        "llama-3.1-8b/8x32768 int8": lambda: abstract("llama-3.1-8b/8x32768 at 0.2", "int8"),
        "llama-3.1-8b/8x32768 fp8": lambda: abstract("llama-3.1-8b/8x32768 at 0.2", "fp8"),
        "llama-3.1-8b/64x131072 whole, int4": lambda: abstract("llama-3.1-8b/64x131072 at 1.0", "int4"),
        "qwen2.5-7b/8x32768 int4": lambda: abstract("qwen2.5-7b/8x32768 at 0.2", "int4"),
    }

    def arguments(self, case, rng):
        (B, R, each, G, d), K = case.sizes.values(), case.sizes["R"] * case.sizes["each"]
        lengths = rng.integers(0, 100, (B, K)).astype(np.int32)
        lengths.flat[0] = (0, 1, 77)[len(case.name) % 3]
        lengths = jnp.asarray(lengths)
        P = pool_size(int(lengths.reshape(B, R, each).sum(axis=2).max()), each)
        options = dict(case.options)
        kind = options.pop("kind")
        pools = {
            name: quantised(jnp.asarray(rng.standard_normal((B, R, P, d)), case.dtype), kind, of=name) for name in "kv"
        }
        arrays = {"q": rng.standard_normal((B, K * G, d)), "start": starts(lengths, R), "lengths": lengths}
        return {**arrays, **pools}, {"scale": 2 * d**-0.5, "return_mass": True, **options}

    @classmethod
    @functools.cache
    def problem(cls, case):
        arrays, options = cls().arguments(case, np.random.default_rng([len(case.name), *case.name.encode()]))
        return arrays | {"q": jnp.asarray(arrays["q"], case.dtype)}, options

    def reference(self, arrays, options):
        return reference(**arrays, scale=options["scale"])

    def test_mapped_it_is_a_loop(self):
        arrays, options = self.problem(self.cases[0])
        twice = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), arrays)
        op = functools.partial(self.call, options=options, impl="interpret")
        got, loop = fast_jit(jax.vmap(op))(twice), fast_jit(op)
        for i in range(2):
            wanted = loop(jax.tree.map(lambda x, i=i: x[i], twice))
            jax.tree.map(lambda a, b, i=i: assert_close(a[i], b, "float32", what=f"row {i}"), got, wanted)


def brute_force(q, k, v, start, lengths, scale):
    """One row and head at a time, in float64."""
    (B, H, d), (R, P), K = q.shape, k.shape[1:3], lengths.shape[1]
    out, lse, mass = np.zeros((B, H, d)), np.full((B, H), -np.inf), np.zeros((B, R, P))
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    for b in range(B):
        for h in range(H):
            head = h // (H // K)
            shard, own = head // (K // R), slice(start[b, head], start[b, head] + lengths[b, head])
            if lengths[b, head]:
                logits = k[b, shard, own] @ q[b, h] * scale
                weights = np.exp(logits - logits.max())
                lse[b, h] = logits.max() + np.log(weights.sum())
                out[b, h] = weights / weights.sum() @ v[b, shard, own]
                mass[b, shard, own] += weights / weights.sum()
    return out, lse, mass


@pytest.mark.parametrize("kind", ["full", "int4", "int8"])
def test_the_reference_is_brute_force(kind):
    rng = np.random.default_rng(0)
    lengths = jnp.array([[0, 70, 3, 1], [64, 1, 0, 0]])
    begin, P = starts(lengths, 2), 160
    pools = (jnp.asarray(rng.standard_normal((2, 2, P, 64)), jnp.float32) for _ in range(2))
    k, v = (quantised(x, kind, of=of) for x, of in zip(pools, "kv", strict=True))
    q = jnp.asarray(rng.standard_normal((2, 12, 64)), jnp.float32)
    got = reference(q, k, v, start=begin, lengths=lengths, scale=0.3)
    wide = [unpack(x) if isinstance(x, Packed) else x for x in (k, v)]
    wanted = brute_force(q, wide[0], wide[1], np.asarray(begin), np.asarray(lengths), 0.3)
    for mine, right in zip((got.out, got.lse, got.mass), wanted, strict=True):
        assert_close(mine, right, "float32", what=kind)


@pytest.mark.parametrize("kind", ["int2", "int4", "kivi8", "int8"])
def test_bytes_may_be_read_in_pairs(kind, monkeypatch):
    """As they are where there are between 2^31 and 2^32 of them."""
    monkeypatch.setattr(sys.modules["pallas_kernels.ragged_decode"], "PAIRED_BYTES", (0, 2**32))
    case = next(case for case in TestRaggedDecode.cases if case.options["kind"] == kind and case.dtype == "float32")
    TestRaggedDecode().check(case, "interpret")


def test_heads_lie_in_order_from_whole_blocks_on():
    lengths = jnp.array([[5, 0, 33, 64], [0, 0, 1, 0]])
    begin = starts(lengths, 2)
    np.testing.assert_array_equal(begin, [[0, 32, 0, 64], [0, 0, 0, 32]])
    np.testing.assert_array_equal(block_heads(begin, 2, 128)[0], [[0, 1, 1, 1], [0, 0, 1, 1]])


def test_a_pool_is_as_large_as_its_heads_can_need():
    rng = np.random.default_rng(1)
    for _ in range(200):
        lengths = rng.integers(0, 200, int(rng.integers(1, 9)))
        needed = int((-(-lengths // BLOCK) * BLOCK).sum())
        assert needed <= pool_size(int(lengths.sum()), len(lengths)) <= lengths.sum() + len(lengths) * BLOCK + BLOCK


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": jnp.ones((1, 1, 64, 32))}, r"expected q\[B,H,d\], pools k and v\[B,R,P,d\]"),
        ({"lengths": jnp.ones((1, 3), jnp.int32)}, r"expected start and lengths\[B,K\] of B=1"),
        ({"k": jnp.ones((1, 1, 40, 16)), "v": jnp.ones((1, 1, 40, 16))}, r"P of 32: got H=4, K=2, R=1, P=40"),
        ({"impl": "mosaic"}, "no Mosaic body is written yet, take 'triton'"),
        ({"impl": "triton", "q": jnp.ones((1, 4, 16), jnp.bfloat16)}, "k in full width must have q's dtype bfloat16"),
        ({"impl": "triton", "v": pack(jnp.ones((1, 1, 64, 16)), bits=4, axis="slots", group=32)},
         "values in groups of channels: v has 32 slots"),
    ],
)  # fmt: skip
def test_wrong_input_is_named(change, message):
    pool, numbers = jnp.ones((1, 1, 64, 16)), jnp.array([[5, 9]])
    options = {"q": jnp.ones((1, 4, 16)), "k": pool, "v": pool, "start": starts(numbers, 1), "lengths": numbers}
    with pytest.raises(ValueError, match=message):
        ragged_decode(**{**options, "scale": 1.0, **change})
