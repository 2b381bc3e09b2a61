"""Attention of one new token to a cache: against brute force, at the edges, on meshes, and compiled for H200s."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import decode_attention
from pallas_kernels._shapes import DECODE_SHAPES
from pallas_kernels.decode_attention import (
    PROGRAMS,
    Config,
    decode_attention_plan,
    reference,
    supports_decode_attention,
)
from tests.kernel_contract import TRITON, Case, KernelContract, assert_close, fast_jit

ROOT = Path(__file__).parents[1]


def draw_case(number: int) -> Case:
    """A seeded case: every width and group of the list below in turn, the rest drawn."""
    rng = np.random.default_rng(number)
    d, G = (64, 80, 128, 96, 16)[number % 5], (1, 3, 4, 7, 8)[number // 5 % 5]
    block, splits = int(rng.choice((16, 32))), int(rng.integers(1, 6))
    S = int(rng.integers(1, 5)) * block + int(rng.integers(0, block))
    sizes = {"B": int(rng.integers(1, 4)), "K": int(rng.integers(1, 3)), "G": G, "S": S, "d": d}
    options = {
        "config": Config(block, splits),
        "window": None if number % 3 else int(rng.integers(1, S + 9)),
        "per_head": number % 2 == 0,
    }
    dtype = "bfloat16" if number % 4 == 3 else "float32"
    size = "".join(f"{letter}{value}" for letter, value in sizes.items())
    return Case(f"{number} {size} {dtype}", sizes, options, dtype)


def real_shape(name: str, **options):
    shape = DECODE_SHAPES[name]
    q = jax.ShapeDtypeStruct((shape.B, shape.H, shape.d), "bfloat16")
    k = jax.ShapeDtypeStruct((shape.B, shape.K, shape.S, shape.d), "bfloat16")
    arrays = {"q": q, "k": k, "v": k, "lengths": jax.ShapeDtypeStruct((shape.B,), "int32")}
    return arrays, {"scale": shape.d**-0.5, **options}


class TestDecodeAttention(KernelContract):
    op = staticmethod(decode_attention)
    supports = staticmethod(lambda impl, q, k, v, **_: supports_decode_attention(impl, q=q, k=k, v=v))
    config = staticmethod(lambda: Config(32, 2))
    cases = tuple(draw_case(number) for number in range(44))
    named: ClassVar = {
        "llama-3.1-8b/8x32768": lambda: real_shape("llama-3.1-8b/8x32768", return_mass=True),
        "llama-2-7b/32x32768": lambda: real_shape("llama-2-7b/32x32768"),  # more than 2**32 bytes: 64-bit offsets
        "qwen2.5-7b/1x131072": lambda: real_shape("qwen2.5-7b/1x131072", window=4096),
        "phi-2/1x4096": lambda: real_shape("phi-2/1x4096", return_mass=True),
    }
    differentiable = ("q", "k", "v")

    def arguments(self, case, rng):
        sizes, options = case.sizes, dict(case.options)
        B, K, S, d = (sizes[letter] for letter in "BKSd")
        lengths = rng.integers(0, S + 1, (B, K) if options.pop("per_head") else B)
        lengths.flat[0] = (0, 1, S)[len(case.name) % 3]
        arrays = {"q": rng.standard_normal((B, K * sizes["G"], d)), "k": rng.standard_normal((B, K, S, d)),
                  "v": rng.standard_normal((B, K, S, d)), "lengths": lengths.astype(np.int32)}  # fmt: skip
        return arrays, {"scale": 2 * d**-0.5, "return_mass": True, **options}

    def reference(self, arrays, options):
        return reference(**arrays, scale=options["scale"], window=options["window"])


def brute_force(q, k, v, lengths, scale, window):
    """One row and head at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    (B, H, d), (K, S) = q.shape, k.shape[1:3]
    out, lse, mass = np.zeros((B, H, d)), np.full((B, H), -np.inf), np.zeros((B, K, S))
    for b in range(B):
        for h in range(H):
            head, end = h // (H // K), int(lengths[b, h // (H // K)])
            first = 0 if window is None else max(0, end - window)
            if end > first:
                logits = k[b, head, first:end] @ q[b, h] * scale
                weights = np.exp(logits - logits.max())
                lse[b, h] = logits.max() + np.log(weights.sum())
                out[b, h] = weights / weights.sum() @ v[b, head, first:end]
                mass[b, head, first:end] += weights / weights.sum()
    return out, lse, mass


@functools.cache
def example(dtype="float32", B=3, K=2, G=4, S=70, d=32):
    rng = np.random.default_rng(7)
    shapes = (B, K * G, d), (B, K, S, d), (B, K, S, d)
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


def decode(*arrays, **options):
    return fast_jit(functools.partial(decode_attention, **options))(*arrays[:3], lengths=arrays[3])


@pytest.mark.parametrize("window", [None, 5])
def test_the_reference_is_brute_force(window):
    q, k, v = example()
    lengths = jnp.array([[0, 1], [70, 33], [4, 6]])
    got = reference(q, k, v, lengths=lengths, scale=0.3, window=window)
    wanted = brute_force(q, k, v, lengths, 0.3, window)
    for mine, right in zip((got.out, got.lse, got.mass), wanted, strict=True):
        assert_close(mine, right, "float32", what="reference")


@pytest.mark.parametrize("impl", ["xla", "interpret"])
def test_a_row_without_keys_gives_nothing_and_no_nan(impl):
    q, k, v = example()
    got = decode(q, k, v, jnp.array([0, 1, -3]), scale=0.3, return_mass=True, impl=impl)
    assert not got.out[0].any() and not got.mass[0].any() and (got.lse[0] == -jnp.inf).all()
    assert not got.out[2].any() and not got.mass[2].any() and (got.lse[2] == -jnp.inf).all()
    # One key: all of the probability, of each of the G heads.
    np.testing.assert_allclose(got.out[1].reshape(2, 4, 32), jnp.repeat(v[1, :, :1], 4, axis=1), rtol=1e-6)
    assert (got.mass[1, :, 0] == 4).all() and not got.mass[1, :, 1:].any()


@pytest.mark.parametrize("impl", ["xla", "interpret"])
def test_what_lies_outside_the_window_or_behind_the_length_does_not_matter(impl):
    q, k, v = example()
    lengths, options = jnp.array([9, 40, 70]), {"scale": 0.3, "window": 7, "return_mass": True, "impl": impl}
    slots, ends = jnp.arange(70), lengths[:, None, None]
    unseen = ((slots >= ends) | (slots < ends - 7))[..., None]
    clean = decode(q, k, v, lengths, **options)
    soiled = decode(q, jnp.where(unseen, 1e4, k), jnp.where(unseen, -1e4, v), lengths, **options)
    jax.tree.map(np.testing.assert_array_equal, clean, soiled)


@pytest.mark.parametrize("impl", ["xla", "interpret"])
def test_lengths_beyond_the_cache_are_its_length(impl):
    q, k, v = example()
    options = {"scale": 0.3, "window": 9, "return_mass": True, "impl": impl}
    beyond, full = (decode(q, k, v, jnp.array(lengths), **options) for lengths in ([71, 5, 1000], [70, 5, 70]))
    jax.tree.map(np.testing.assert_array_equal, beyond, full)


@pytest.mark.parametrize("config", [Config(16, 1), Config(16, 5), Config(64, 9), Config(128, 1)], ids=str)
def test_parts_and_blocks_do_not_matter(config):
    q, k, v = example()
    lengths = jnp.array([3, 70, 35])
    got = decode(q, k, v, lengths, scale=0.3, return_mass=True, impl="interpret", config=config)
    wanted = reference(q, k, v, lengths=lengths, scale=0.3)
    jax.tree.map(lambda a, b: assert_close(a, b, "float32", what=str(config)), got, wanted)


def test_large_logits_do_not_overflow():
    q, k, v = example()
    got = decode(q, k, v, jnp.array([70, 50, 20]), scale=300.0, return_mass=True, impl="interpret")
    wanted = brute_force(q, k, v, np.array([[70, 70], [50, 50], [20, 20]]), 300.0, None)
    # float32 carries logits of some 7000 to a thousandth: probabilities near a tie move by that much.
    np.testing.assert_allclose(got.lse, wanted[1], rtol=1e-6)
    np.testing.assert_allclose(got.out, wanted[0], atol=5e-3)
    np.testing.assert_allclose(got.mass.sum(-1), 4.0, atol=5e-3)


def test_masses_are_probabilities_of_the_group():
    q, k, v = example("bfloat16")
    got = decode(q, k, v, jnp.array([70, 1, 35]), scale=0.3, return_mass=True)
    np.testing.assert_allclose(got.mass.sum(-1), 4.0, rtol=1e-5)
    assert got.out.dtype == jnp.bfloat16 and got.lse.dtype == got.mass.dtype == jnp.float32
    assert decode(q, k, v, jnp.array([70, 1, 35]), scale=0.3).mass is None


def test_gradients_in_half_precision_are_finite_for_an_empty_row_too():
    q, k, v = example("bfloat16", G=1)

    def loss(q, k, v):
        options = {"scale": 0.3, "return_mass": True, "impl": "interpret"}
        got = decode_attention(q, k, v, lengths=jnp.array([70, 0, 35]), **options)
        return jnp.sum(got.out.astype(jnp.float32) ** 2) + jnp.sum(got.mass**2)

    for gradient, array in zip(fast_jit(jax.grad(loss, (0, 1, 2)))(q, k, v), (q, k, v), strict=True):
        assert gradient.dtype == array.dtype and jnp.isfinite(gradient).all() and not gradient[1].any()


def test_configs_fill_the_gpu_where_the_cache_is_long_enough():
    for shape in DECODE_SHAPES.values():
        config = Config.for_shape(B=shape.B, K=shape.K, S=shape.S, d=shape.d, itemsize=2)
        programs = shape.B * shape.K * config.splits
        assert programs >= PROGRAMS or config.splits == -(-shape.S // config.block)
    assert Config.for_shape(B=1, K=1, S=5, d=64, itemsize=2).splits == 1


def test_the_plan_says_what_runs_where():
    q, k, v = example()
    assert decode_attention_plan(q, k, v) == {"cuda": "triton", "default": "xla"}
    assert decode_attention_plan(q, k, v, impl="interpret") == {"default": "interpret"}
    wide = example(d=512, S=3)
    assert decode_attention_plan(*wide)["cuda"].startswith("triton: its blocks of d=512, G=4 would not fit")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": jnp.ones((3, 3, 70, 32)), "v": jnp.ones((3, 3, 70, 32))}, "H a multiple of K: got H=8, K=3"),
        ({"v": jnp.ones((3, 2, 71, 32))}, r"expected q\[B,H,d\], k and v\[B,K,S,d\]"),
        ({"lengths": jnp.ones((2, 3), jnp.int32)}, r"lengths\[B\] or \[B,K\] of B=3, K=2: got \(2, 3\) int32"),
        ({"lengths": jnp.ones(3)}, r"expected integer lengths"),
        ({"window": 0}, "window=0 must be at least 1 slot, or None"),
        ({"impl": "mosaic"}, "impl='mosaic' cannot run: no Mosaic body is written yet, take 'triton'"),
        ({"impl": "triton", "q": jnp.ones((3, 8, 32), jnp.bfloat16)}, "one dtype of float32, bfloat16, float16, got"),
    ],
)  # fmt: skip
def test_wrong_input_is_named(change, message):
    q, k, v = example()
    with pytest.raises(ValueError, match=message):
        decode_attention(**{"q": q, "k": k, "v": v, "lengths": jnp.ones(3, jnp.int32), "scale": 1.0, **change})


def test_configs_that_triton_cannot_take_are_named():
    with pytest.raises(ValueError, match="block=48 must be a power of two of at least 16"):
        Config(48, 1)
    with pytest.raises(ValueError, match="splits=0 must be at least 1"):
        Config(64, 0)


def test_triton_on_a_cpu_is_refused():
    if jax.default_backend() != "cpu":
        pytest.skip("there is an accelerator")
    q, k, v = example()
    with pytest.raises(ValueError, match="Only interpret mode is supported on CPU"):
        decode(q, k, v, jnp.ones(3, jnp.int32), scale=1.0, impl="triton")


MESHES = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxfw.core import hlo
from jaxfw.core.mesh import make_mesh
from pallas_kernels import decode_attention
from pallas_kernels.decode_attention import Config, reference
from tests.kernel_contract import fast_jit

def decode(q, k, v, lengths, impl="interpret"):
    return decode_attention(q, k, v, lengths=lengths, scale=.3, return_mass=True, impl=impl, config=Config(16, 2))

def in_expert_region(*arrays):
    spec = P("expert")
    inside = jax.shard_map(decode, in_specs=(spec,) * 4, out_specs=spec, axis_names={"expert"}, check_vma=False)
    return inside(*arrays)

def problem(B, K):
    rng = np.random.default_rng(0)
    shapes = (B, 2 * K, 16), (B, K, 40, 16), (B, K, 40, 16)
    return *(rng.standard_normal(s).astype(np.float32) for s in shapes), rng.integers(0, 41, (B, K)).astype(np.int32)

out = {}
for name, B, K, axes, fn in (
    ("tensor", 2, 8, {"tensor": 8}, decode),
    ("mixed", 4, 4, {"data": 2, "fsdp": 2, "tensor": 2}, decode),
    ("indivisible", 3, 2, {"data": 2, "tensor": 4}, decode),
    ("chosen", 4, 4, {"data": 2, "tensor": 4}, lambda *arrays: decode(*arrays, impl=None)),
    ("region", 4, 4, {"expert": 2, "tensor": 4}, in_expert_region),
):
    mesh = make_mesh(**axes)
    arrays = problem(B, K)
    rows = tuple(a for a in ("data", "fsdp", "expert") if a in axes) if name != "indivisible" else None
    heads = "tensor" if name != "indivisible" else None
    placed = [jax.device_put(x, NamedSharding(mesh, P(rows, heads))) for x in arrays]
    with jax.set_mesh(mesh):
        compiled = fast_jit(fn).lower(*placed).compile()
        got = compiled(*placed)
    wanted = reference(*arrays[:3], lengths=arrays[3], scale=.3)
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(wanted))  # exponentials, since lse may be -inf
    largest = [float(np.max(np.abs(np.exp(a) - np.exp(b)) / np.exp(b).max())) for a, b in pairs]
    moved = sum(c.bytes for c in hlo.collectives(compiled.as_text()))
    shard = got.mass.addressable_shards[0].data.shape
    out[name] = {"error": max(largest), "moved": moved, "shard": shard}
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def on_meshes():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", MESHES], cwd=ROOT, env=os.environ | flags, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("mesh", ["tensor", "mixed", "indivisible", "chosen", "region"])
def test_on_a_mesh_it_is_the_reference_and_moves_nothing(on_meshes, mesh):
    found = on_meshes[mesh]
    assert found["error"] <= 1e-5
    assert found["moved"] == 0


def test_each_device_holds_its_own_rows_and_heads(on_meshes):
    assert on_meshes["tensor"]["shard"] == [2, 1, 40]
    assert on_meshes["mixed"]["shard"] == [1, 2, 40]
    assert on_meshes["indivisible"]["shard"] == [3, 2, 40]  # neither 3 rows on data=2 nor 2 heads on tensor=4


@pytest.mark.parametrize("axes", [{"tensor": 8}, {"data": 2, "tensor": 4}], ids=str)
def test_compiled_for_eight_h200s_nothing_crosses_between_them(axes):
    from jax.sharding import NamedSharding, PartitionSpec

    from jaxfw.core import aot, hlo

    reason = aot.missing()
    if reason:
        pytest.skip(reason)
    mesh = aot.cluster("h200:1x1x8", **axes)
    arrays, options = real_shape("llama-3.1-8b/8x32768")
    specs = {"lengths": PartitionSpec("data")}
    placed = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(
        mesh, specs.get(name, PartitionSpec("data", "tensor")))) for name, x in arrays.items()}  # fmt: skip
    compiled = aot.compile(lambda arrays: decode_attention(**arrays, **options), placed, mesh=mesh)
    assert hlo.custom_calls(compiled.text) == {TRITON: 1}
    assert not hlo.collectives(compiled.text)
    keys = 2 * arrays["k"].size * 2 // 8
    assert keys < compiled.bytes.arguments < 1.01 * keys


def test_the_committed_table_has_every_named_shape_on_two_versions_and_no_spills():
    table = json.loads((ROOT / "experiments" / "results" / "kernels.json").read_text(encoding="utf-8"))
    assert len(table) >= 2 and "0.10.2" in table
    for section in table.values():
        rows = section["rows"]
        held = {(row["shape"], row["variant"]) for row in rows}
        assert held >= {(shape, variant) for shape in DECODE_SHAPES for variant in ("plain", "mass")}
        assert all(row["spilled_bytes"] == row["stack_bytes"] == 0 and row["resident"] >= 2 for row in rows)
