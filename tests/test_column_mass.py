"""The attention that keys receive from chosen rows: brute force, edges, meshes, and compiled for H200s."""

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

from pallas_kernels._shapes import HEADS
from pallas_kernels.column_mass import (
    Config,
    column_mass,
    column_mass_plan,
    own_blocks,
    reference,
    row_blocks,
    supports_column_mass,
)
from pallas_kernels.decode_attention import PROGRAMS
from tests.kernel_contract import TRITON, Case, KernelContract, assert_close, fast_jit

ROOT = Path(__file__).parents[1]


def draw_case(number: int) -> Case:
    """A seeded case: every width, group and kind of rows in turn, the rest drawn; every ninth has a single key."""
    rng = np.random.default_rng(number)
    d, G, rows = (64, 80, 128)[number % 3], (1, 3, 4, 7, 8)[number % 5], ("any", "last", "all")[number % 4 % 3]
    held, step = (int(rng.choice((16, 32))) for _ in range(2))
    T = 1 if number % 9 == 5 else int(rng.integers(2, 90))
    W = T if rows == "all" else int(rng.integers(1, 71))
    window = None if number % 2 else int(rng.integers(1, T + 9))
    config = Config(held, step, int(rng.integers(1, 5)), int(rng.integers(1, 4)))
    sizes = {"B": int(rng.integers(1, 4)), "K": int(rng.integers(1, 3)), "G": G, "W": W, "T": T, "d": d}
    dtype = "bfloat16" if number % 7 == 3 else "float32"
    size = "".join(f"{letter}{value}" for letter, value in sizes.items())
    options = {"config": config, "window": window, "rows": rows}
    return Case(f"{number} {size} {rows} window={window} {dtype}", sizes, options, dtype)


def draw_positions(rows: str, B: int, W: int, T: int, rng: np.random.Generator):
    """In any order with gaps; the last of each row's own length, from below 0 on; or all of them."""
    positions = {
        "any": rng.integers(-1, T, (B, W)),
        "last": rng.integers(0, T + 1, (B, 1)) - W + np.arange(W),
        "all": np.broadcast_to(np.arange(W), (B, W)).copy(),
    }[rows]
    if B > 1:
        positions[B // 2] = -1
    return positions.astype(np.int32)


def real_shape(model: str, B: int, W: int, T: int, dtype: str = "bfloat16", window: int | None = None):
    H, K, d = HEADS[model]
    arrays = {
        "q": jax.ShapeDtypeStruct((B, W, H, d), dtype),
        "k": jax.ShapeDtypeStruct((B, K, T, d), dtype),
        "positions": jax.ShapeDtypeStruct((B, W), "int32"),
    }
    return arrays, {"scale": d**-0.5, "window": window}


@functools.cache
def compiled_for_an_h200(make):
    """The program of a named shape, with its PTX."""
    from jaxfw.core import aot

    reason = aot.missing()
    if reason:
        pytest.skip(reason)
    arrays, options = make()
    mesh = aot.cluster("h200:1x1x1")
    return arrays, aot.compile(lambda arrays: column_mass(**arrays, **options), arrays, mesh=mesh, dump_ptx=True)


class TestColumnMass(KernelContract):
    op = staticmethod(column_mass)
    supports = staticmethod(lambda impl, q, k, **_: supports_column_mass(impl, q=q, k=k))
    config = staticmethod(lambda: Config(32, 16, 2))
    cases = tuple(draw_case(number) for number in range(15))  # every width with every group
    named: ClassVar = {
        "llama-3.1-8b/8x32768, last 64": lambda: real_shape("llama-3.1-8b", 8, 64, 32768),
        "llama-3.1-8b/8x32768, last 64, float32": lambda: real_shape("llama-3.1-8b", 8, 64, 32768, "float32"),
        "llama-3.1-8b/1x4096, all": lambda: real_shape("llama-3.1-8b", 1, 4096, 4096),
        "qwen2.5-7b/8x32768, last 64": lambda: real_shape("qwen2.5-7b", 8, 64, 32768),
        "qwen2.5-7b/1x4096, all, window": lambda: real_shape("qwen2.5-7b", 1, 4096, 4096, window=1024),
        "phi-2/8x32768, last 8": lambda: real_shape("phi-2", 8, 8, 32768),
        "gemma-2b/1x4096, all, float32": lambda: real_shape("gemma-2b", 1, 4096, 4096, "float32"),
    }

    def arguments(self, case, rng):
        options = dict(case.options)
        B, K, G, W, T, d = (case.sizes[letter] for letter in "BKGWTd")
        positions = draw_positions(options.pop("rows"), B, W, T, rng)
        arrays = {"q": rng.standard_normal((B, W, K * G, d)), "k": rng.standard_normal((B, K, T, d))}
        return {**arrays, "positions": positions}, {"scale": 2 * d**-0.5, **options}

    def reference(self, arrays, options):
        return reference(**arrays, scale=options["scale"], window=options["window"])

    def test_compiles_for_an_h200(self, name):
        """Both kernels, and no registers spilled."""
        from experiments.kernels import assemble, read_ptxas
        from jaxfw.core import hlo

        _, compiled = compiled_for_an_h200(self.named[name])
        assert hlo.custom_calls(compiled.text) == {TRITON: 2}
        for kernel in ("column_mass_lse", "column_mass"):
            (ptx,) = (text for text in compiled.ptx if f".entry {kernel}(" in text)
            _, stack, spilled = read_ptxas(assemble(ptx))
            assert (stack, spilled) == (0, 0), f"{kernel}: {spilled} bytes spilled"

    def test_compiled_it_holds_no_weights(self, name):
        arrays, compiled = compiled_for_an_h200(self.named[name])
        (B, W, H, _), T = arrays["q"].shape, arrays["k"].shape[2]
        assert compiled.bytes.temporaries <= 0.05 * 4 * B * H * W * T
        assert compiled.bytes.temporaries <= 4 * B * H * (W + T)


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["xla", "interpret"])
@pytest.mark.parametrize("number", range(15, 60))
def test_more_shapes(number, impl):
    TestColumnMass().check(draw_case(number), impl)


def brute_force(q, k, positions, scale, window):
    """One row and head at a time, in float64."""
    q, k = (np.asarray(x, np.float64) for x in (q, k))
    (B, W, H, _), (K, T) = q.shape, k.shape[1:3]
    mass = np.zeros((B, H, T))
    for b, w, h in np.ndindex(B, W, H):
        end = int(positions[b, w]) + 1
        first = 0 if window is None else max(0, end - window)
        if end > 0:
            logits = k[b, h // (H // K), first:end] @ q[b, w, h] * scale
            weights = np.exp(logits - logits.max())
            mass[b, h, first:end] += weights / weights.sum()
    return mass


@functools.cache
def example(dtype="float32", B=3, W=37, K=2, G=4, T=70, d=32):
    rng = np.random.default_rng(7)
    q, k = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((B, W, K * G, d), (B, K, T, d)))
    return q, k, jnp.asarray(draw_positions("any", B, W, T, rng))


def mass_of(*arrays, **options):
    return fast_jit(functools.partial(column_mass, **{"scale": 0.3, **options}))(*arrays[:2], positions=arrays[2])


@pytest.mark.parametrize("window", [None, 5])
def test_the_reference_is_brute_force(window):
    q, k, positions = example()
    got = reference(q, k, positions=positions, scale=0.3, window=window)
    assert_close(got, brute_force(q, k, positions, 0.3, window), "float32", what="reference")


@pytest.mark.parametrize("impl", ["xla", "interpret"])
def test_a_row_gives_all_of_its_weight_and_one_without_keys_nothing(impl):
    q, k, positions = example("bfloat16")
    got = mass_of(q, k, positions, impl=impl)
    counting = jnp.sum(positions >= 0, axis=1)
    assert got.dtype == jnp.float32 and got.shape == (3, 8, 70) and int(counting[1]) == 0 < int(counting[0])
    np.testing.assert_allclose(got.sum(-1), jnp.broadcast_to(counting[:, None], (3, 8)), rtol=1e-5)
    assert not got[1].any()
    first = mass_of(q, k, jnp.zeros_like(positions), impl=impl)
    assert (first[..., 0] == 37).all() and not first[..., 1:].any()


@pytest.mark.parametrize("impl", ["xla", "interpret"])
def test_values_that_nobody_sees_do_not_matter(impl):
    q, k, _ = example()
    positions = jnp.arange(37) + jnp.array([[5], [20], [30]])
    keys, options = jnp.arange(70), {"window": 7, "impl": impl}
    unseen = (keys > positions[:, -1:]) | (keys <= positions[:, :1] - 7)
    soiled = mass_of(q, jnp.where(unseen[:, None, :, None], 1e4, k), positions, **options)
    np.testing.assert_array_equal(mass_of(q, k, positions, **options), soiled)
    assert not jnp.where(unseen[:, None], soiled, 0).any()


@pytest.mark.parametrize("impl", ["xla", "interpret"])
def test_the_order_of_rows_does_not_matter(impl):
    q, k, positions = example()
    order = np.random.default_rng(1).permutation(37)
    config = Config(16, 16, 3, 2)
    got, mixed = (
        mass_of(q[:, by], k, positions[:, by], impl=impl, config=config, window=20) for by in (np.arange(37), order)
    )
    assert_close(mixed, got, "float32", what=impl)


@pytest.mark.parametrize("impl", ["xla", "interpret"])
def test_positions_behind_the_last_key_see_what_is_left_of_their_window(impl):
    q, k, _ = example()
    positions = jnp.broadcast_to(jnp.arange(60, 97), (3, 37))
    wanted = reference(q, k, positions=positions, scale=0.3, window=9)
    assert_close(mass_of(q, k, positions, window=9, impl=impl), wanted, "float32", what=impl)
    assert float(wanted.sum()) == pytest.approx(3 * 8 * 18), "positions 60..77 see a key, 78 and beyond see none"


@pytest.mark.parametrize(
    "config", [None, Config(16, 16, 1), Config(16, 32, 9, 3), Config(64, 16, 2, 4), Config(128, 128, 1, 2)], ids=str
)
def test_parts_shares_and_blocks_do_not_matter(config):
    q, k, positions = example()
    got = mass_of(q, k, positions, impl="interpret", config=config)
    assert_close(got, reference(q, k, positions=positions, scale=0.3), "float32", what=str(config))


@pytest.mark.parametrize("impl", ["xla", "interpret"])
def test_large_logits_do_not_overflow(impl):
    q, k, positions = example()
    got = mass_of(q, k, positions, scale=300.0, impl=impl)
    # float32 carries logits of some 7000 to a thousandth: probabilities near a tie move by that much.
    np.testing.assert_allclose(got, brute_force(q, k, positions, 300.0, None), atol=5e-3)


def test_the_twin_takes_rows_by_blocks():
    q, k, positions = example(B=2, W=1000, K=1, G=4, T=1024, d=16)
    compiled = jax.jit(functools.partial(column_mass, scale=0.3)).lower(q, k, positions=positions).compile()
    memory = compiled.memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < 0.5 * 4 * 2 * 4 * 1000 * 1024
    got = compiled(q, k, positions=positions)
    assert_close(got, reference(q, k, positions=positions, scale=0.3), "float32", what="blocks")


@pytest.mark.parametrize("window", [None, 40])
def test_blocks_that_no_row_sees_are_skipped(window):
    config, positions = Config(32, 16, 1), jnp.arange(128)
    rows, keys = np.mgrid[:128, :128]
    sees = (keys <= rows) & (keys > rows - (window or 128))
    held, passing = sees.reshape(4, 32, 8, 16), sees.reshape(8, 16, 4, 32)  # blocks of rows, then of keys
    for block, of_keys in enumerate(np.any(held, axis=(1, 3), keepdims=True)):
        first, end = own_blocks(positions[32 * block : 32 * (block + 1)], 0, 128, config, window)
        assert list(np.flatnonzero(of_keys)) == list(range(int(first), int(end)))
    firsts, counts = (x[0].tolist() for x in row_blocks(positions[None], 16, 32, 128, window))
    for block, (first, count) in enumerate(zip(firsts, counts, strict=True)):
        assert list(np.flatnonzero(np.any(passing[:, :, block], axis=(1, 2)))) == list(range(first, first + count))


def test_rows_that_do_not_count_cost_one_block():
    first, end = own_blocks(jnp.full(32, -1), 0, 128, Config(32, 16, 1), 40)
    assert int(first) >= int(end)
    _, count = row_blocks(jnp.full((1, 50), -1), 16, 32, 128, None)
    np.testing.assert_array_equal(count, 1)  # the one that writes zeros


def test_parts_are_all_blocks_once():
    for splits in range(1, 12):
        config = Config(16, 16, splits)
        ranges = [own_blocks(jnp.array([33, 149]), part, 200, config, 60) for part in range(splits)]
        assert [i for first, end in ranges for i in range(int(first), int(end))] == list(range(10))


@pytest.mark.parametrize("model", HEADS)
def test_configs_fill_the_gpu(model):
    H, K, d = HEADS[model]
    for B, W, T in ((1, 8, 4096), (1, 64, 4096), (1, 4096, 4096), (8, 64, 32768), (1, 32, 131072)):
        config = Config.for_shape(B=B, K=K, G=H // K, W=W, T=T, d=d, itemsize=2)
        rows = -(-W * H // K // config.held)
        assert B * K * rows * config.splits >= PROGRAMS or T // (2 * config.step) == config.splits
        assert B * K * -(-T // config.held) * config.shares >= PROGRAMS or config.shares == H // K


def test_the_plan_says_what_runs_where():
    q, k, _ = example()
    assert column_mass_plan(q, k) == {"cuda": "triton", "default": "xla"}
    assert column_mass_plan(q, k, impl="interpret") == {"default": "interpret"}
    assert column_mass_plan(*example(d=512, T=3)[:2])["cuda"].startswith("triton: its blocks of d=512 would not fit")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": jnp.ones((3, 3, 70, 32))}, "H a multiple of K: got H=8, K=3"),
        ({"k": jnp.ones((2, 2, 70, 32))}, r"expected q\[B,W,H,d\], k\[B,K,T,d\]"),
        ({"positions": jnp.ones((3, 36), jnp.int32)}, r"positions\[B,W\] of B=3, W=37: got \(3, 36\) int32"),
        ({"positions": jnp.ones((3, 37))}, r"expected integer positions"),
        ({"window": 0}, "window=0 must be at least 1 key, or None"),
        ({"impl": "mosaic"}, "impl='mosaic' cannot run: no Mosaic body is written yet, take 'triton'"),
        ({"impl": "triton", "k": jnp.ones((3, 2, 70, 32), jnp.bfloat16)}, "one dtype of float32, bfloat16, float16"),
    ],
)  # fmt: skip
def test_wrong_input_is_named(change, message):
    q, k, positions = example()
    with pytest.raises(ValueError, match=message):
        column_mass(**{"q": q, "k": k, "positions": positions, "scale": 1.0, **change})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((48, 16, 1), "held=48 must be a power of two of at least 16"),
        ((16, 8, 1), "step=8 must be a power of two of at least 16"),
        ((16, 16, 0), "splits=0 must be at least 1"),
        ((16, 16, 1, 0), "shares=0 must be at least 1"),
    ],
)
def test_configs_that_triton_cannot_take_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Config(*arguments)


MESHES = """
import json
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxfw.core import hlo
from jaxfw.core.mesh import make_mesh
from pallas_kernels.column_mass import Config, column_mass, reference
from tests.kernel_contract import fast_jit

def mass_of(q, k, positions, impl="interpret"):
    return column_mass(q, k, positions=positions, scale=.3, window=30, impl=impl, config=Config(16, 16, 2))

def problem(B, K):
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal(s).astype(np.float32) for s in ((B, 9, 2 * K, 16), (B, K, 40, 16)))
    return q, k, rng.integers(-1, 40, (B, 9)).astype(np.int32)

out = {}
for name, B, K, axes, impl in (
    ("tensor", 2, 8, {"tensor": 8}, "interpret"),
    ("mixed", 4, 4, {"data": 2, "fsdp": 2, "tensor": 2}, "interpret"),
    ("indivisible", 3, 2, {"data": 2, "tensor": 4}, "interpret"),
    ("chosen", 4, 4, {"data": 2, "tensor": 4}, None),
):
    mesh = make_mesh(**axes)
    arrays = problem(B, K)
    rows = tuple(a for a in ("data", "fsdp") if a in axes) if name != "indivisible" else None
    heads = "tensor" if name != "indivisible" else None
    specs = P(rows, None, heads), P(rows, heads), P(rows)
    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs)]
    with jax.set_mesh(mesh):
        compiled = fast_jit(lambda *arrays: mass_of(*arrays, impl=impl)).lower(*placed).compile()
        got = compiled(*placed)
    wanted = reference(*arrays[:2], positions=arrays[2], scale=.3, window=30)
    moved = sum(c.bytes for c in hlo.collectives(compiled.as_text()))
    shard = got.addressable_shards[0].data.shape
    out[name] = {"error": float(np.max(np.abs(got - wanted))), "moved": moved, "shard": shard}
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


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["tensor", "mixed", "indivisible", "chosen"])
def test_on_a_mesh_it_is_the_reference_and_moves_nothing(on_meshes, mesh):
    found = on_meshes[mesh]
    assert found["error"] <= 1e-5
    assert found["moved"] == 0


@pytest.mark.slow
def test_each_device_holds_its_own_rows_and_heads(on_meshes):
    assert on_meshes["tensor"]["shard"] == [2, 2, 40]
    assert on_meshes["mixed"]["shard"] == [1, 4, 40]
    assert on_meshes["indivisible"]["shard"] == [3, 4, 40]  # neither 3 rows on data=2 nor 2 heads on tensor=4


def test_compiled_for_eight_h200s_nothing_crosses_between_them():
    from jax.sharding import NamedSharding, PartitionSpec

    from jaxfw.core import aot, hlo

    reason = aot.missing()
    if reason:
        pytest.skip(reason)
    mesh = aot.cluster("h200:1x1x8", data=2, tensor=4)
    arrays, options = real_shape("llama-3.1-8b", 8, 64, 32768)
    specs = {"q": ("data", None, "tensor"), "k": ("data", "tensor"), "positions": ("data",)}
    placed = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(
        mesh, PartitionSpec(*specs[name]))) for name, x in arrays.items()}  # fmt: skip
    compiled = aot.compile(lambda arrays: column_mass(**arrays, **options), placed, mesh=mesh)
    assert hlo.custom_calls(compiled.text) == {TRITON: 2}
    assert not hlo.collectives(compiled.text)
