"""Marking the highest scores of rows: against sorting in NumPy, at ties, NaN and infinities, on meshes, for H200s."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import triton as plt

from pallas_kernels.select_highest import Config, highest_mask, reference, sort_keys, supports_highest_mask
from tests.kernel_contract import TRITON, Case, KernelContract, fast_jit

ROOT = Path(__file__).parents[1]
KINDS = ("normal", "few values", "special", "one value")
REAL = {"64 x 32768": (64, 32768), "8 x 8 x 32768": (8, 8, 32768), "8 x 262144": (8, 262144), "1 x 1000000": (1, 10**6)}


def draw_scores(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    if kind == "normal":
        return rng.standard_normal(shape)
    if kind == "few values":
        return rng.integers(-2, 3, shape).astype(float)
    if kind == "one value":
        return np.full(shape, rng.choice((np.nan, -np.inf, 0.0, 3.5)))
    special = [np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1e30, -1e30, 1.0, 2.5]
    return rng.choice(special, shape)


def draw_case(number: int) -> Case:
    """A seeded case: kinds of scores and lengths of rows in turn, the rest drawn."""
    rng = np.random.default_rng(number)
    block = int(rng.choice((8, 16, 64)))
    M = (1, 2, block, block + 1, int(rng.integers(1, 6)) * block + int(rng.integers(0, block)))[number % 5]
    sizes = {"N": int(rng.integers(1, 5)), "M": M} | ({"K": int(rng.integers(1, 4))} if number % 3 == 0 else {})
    options = {"config": Config(block), "kind": KINDS[number % 4]}
    dtype = "bfloat16" if number % 7 == 3 else "float32"
    size = "".join(f"{letter}{value}" for letter, value in sizes.items())
    return Case(f"{number} {options['kind']} {size} {dtype}", sizes, options, dtype)


def abstract(shape):
    return {"score": jax.ShapeDtypeStruct(shape, "float32"), "count": jax.ShapeDtypeStruct(shape[:-1], "int32")}, {}


class TestHighestMask(KernelContract):
    op = staticmethod(highest_mask)
    supports = staticmethod(lambda impl, score, **_: supports_highest_mask(impl, score=score))
    config = staticmethod(lambda: Config(32))
    cases = tuple(draw_case(number) for number in range(44))
    named: ClassVar = {name: functools.partial(abstract, shape) for name, shape in REAL.items()}
    differentiable = ()

    def arguments(self, case, rng):
        options, M = dict(case.options), case.sizes["M"]
        rows = (case.sizes["N"], *([case.sizes["K"]] if "K" in case.sizes else []))
        scores = draw_scores(options.pop("kind"), (*rows, M), rng)
        count = rng.integers(-2, M + 4, rows).astype(np.int32)
        count.flat[0] = (0, 1, M)[len(case.name) % 3]
        return {"score": scores, "count": count}, options

    def reference(self, arrays, options):
        return reference(**arrays)


def brute_force(score, count):
    """One row at a time, by Python's sort."""
    mask = np.zeros(score.shape, bool)
    for row in np.ndindex(score.shape[:-1]):
        values = [-np.inf if np.isnan(x) else float(x) for x in score[row]]
        order = sorted(range(len(values)), key=lambda m: (np.isnan(score[row][m]), -values[m], m))
        mask[row][order[: max(0, int(count[row]))]] = True
    return mask


def mark(score, count, **options):
    return np.asarray(fast_jit(functools.partial(highest_mask, **options))(jnp.asarray(score), jnp.asarray(count)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_brute_force(kind):
    rng = np.random.default_rng(0)
    score = draw_scores(kind, (3, 2, 40), rng).astype(np.float32)
    for count in rng.integers(-1, 43, (4, 3, 2)):
        np.testing.assert_array_equal(reference(jnp.asarray(score), jnp.asarray(count)), brute_force(score, count))


@pytest.mark.parametrize("impl", ["xla", "interpret"])
def test_every_count_of_a_row_with_all_kinds_of_numbers(impl):
    tiny = np.finfo(np.float32).smallest_subnormal
    row = np.array([tiny, -0.0, 0.0, -tiny, np.nan, -np.inf, np.inf, -np.nan, 2 * tiny, 3.4e38, -3.4e38, 1, np.inf, 0])
    score = np.tile(row.astype(np.float32), (len(row) + 3, 1))
    count = np.arange(len(score)) - 1
    np.testing.assert_array_equal(mark(score, count, impl=impl, config=Config(4)), brute_force(score, count))


def test_keys_have_the_order_of_the_scores():
    rng = np.random.default_rng(1)
    score = rng.integers(0, 2**32, 20_000, dtype=np.uint32).view(np.float32)
    score = np.sort(score[~np.isnan(score)])
    keys = np.asarray(jax.jit(sort_keys)(jnp.asarray(score))).astype(np.int64)
    np.testing.assert_array_equal(np.diff(keys) > 0, np.diff(score.astype(np.float64)) > 0)
    assert (np.diff(keys) >= 0).all()


@pytest.mark.parametrize("impl", ["xla", "interpret"])
def test_a_row_marks_its_count_and_nothing_below_what_it_leaves(impl):
    rng = np.random.default_rng(2)
    score = rng.standard_normal((4, 3000)).astype(np.float32)
    count = np.array([1, 600, 2999, 3000])
    got = mark(score, count, impl=impl, config=Config(512))
    np.testing.assert_array_equal(got.sum(axis=1), count)
    for row, kept in zip(score, got, strict=True):
        assert row[kept].min() > row[~kept].max(initial=-np.inf)


@pytest.mark.parametrize("config", [Config(1), Config(16), Config(64), Config(128), None], ids=str)
def test_blocks_do_not_matter(config):
    rng = np.random.default_rng(3)
    score, count = draw_scores("few values", (5, 70), rng).astype(np.float32), np.array([3, 20, 35, 69, 70])
    np.testing.assert_array_equal(mark(score, count, impl="interpret", config=config), brute_force(score, count))


def test_what_lies_beyond_a_row_is_not_read():
    """Interpreted, a load beyond the array is moved inside: here it gives the highest score instead."""
    score, count = np.full((2, 21), -1.0, np.float32), np.array([3, 20])
    load = plt.load

    def infinite_outside(ref, *, mask, **options):
        slots = ref.transforms[-1].indices[-1]
        return jnp.where((slots >= 21) & mask, jnp.inf, load(ref, mask=mask, **options))

    with mock.patch.object(plt, "load", infinite_outside):
        got = mark(score, count, impl="interpret", config=Config(16))
    np.testing.assert_array_equal(got, brute_force(score, count))


def test_other_types_are_compared_as_float32():
    score = jnp.array([[3, 1, 2, 2]])
    for dtype in ("int32", "bfloat16", "float16"):
        for impl in ("xla", "interpret"):
            got = mark(score.astype(dtype), jnp.array([2], jnp.int8), impl=impl)
            np.testing.assert_array_equal(got, [[True, False, True, False]])


def test_a_row_without_scores_has_no_kernel():
    assert highest_mask(jnp.zeros((3, 0)), jnp.ones(3, jnp.int32)).shape == (3, 0)
    with pytest.raises(ValueError, match=r"cannot run: there is nothing to mark in \(3, 0\)"):
        highest_mask(jnp.zeros((3, 0)), jnp.ones(3, jnp.int32), impl="triton")


def test_a_mask_that_32_bits_cannot_address_has_no_kernel():
    below, beyond = (jax.ShapeDtypeStruct((N, 2**18), "float32") for N in (2**13 - 1, 2**13))
    assert supports_highest_mask("triton", score=below) is None
    assert "32 bits" in (supports_highest_mask("triton", score=beyond) or "")


@pytest.mark.parametrize(
    ("score", "count"), [((4,), ()), ((3, 4), (4,)), ((3, 4), (3, 1)), ((2, 3, 4), (2,)), ((2, 2, 3, 4), (2, 2, 3))]
)
def test_wrong_shapes_are_named(score, count):
    with pytest.raises(ValueError, match=r"expected score\[N,M\] and integer count\[N\]"):
        highest_mask(jnp.ones(score), jnp.ones(count, jnp.int32))


def test_wrong_types_and_configs_are_named():
    with pytest.raises(ValueError, match=r"got \(3, 4\), \(3,\) float32"):
        highest_mask(jnp.ones((3, 4)), jnp.ones(3))
    with pytest.raises(ValueError, match="block=48 must be a power of two"):
        Config(48)


MESHES = """
import json
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxfw.core import hlo
from jaxfw.core.mesh import make_mesh
from pallas_kernels.select_highest import Config, highest_mask, reference
from tests.kernel_contract import fast_jit

def mark(score, count, impl="interpret"):
    return highest_mask(score, count, impl=impl, config=Config(16))

out = {}
for name, shape, axes, spec, fn in (
    ("rows", (8, 40), {"data": 2, "fsdp": 2, "expert": 2}, P(("data", "fsdp", "expert")), mark),
    ("heads", (2, 8, 40), {"data": 2, "tensor": 4}, P("data", "tensor"), mark),
    ("indivisible", (3, 2, 40), {"data": 2, "tensor": 4}, P(), mark),
    ("chosen", (2, 8, 40), {"data": 2, "tensor": 4}, P("data", "tensor"), lambda *xs: mark(*xs, impl=None)),
):
    mesh, rng = make_mesh(**axes), np.random.default_rng(0)
    arrays = rng.integers(-3, 4, shape).astype(np.float32), rng.integers(0, 41, shape[:-1]).astype(np.int32)
    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x in arrays]
    with jax.set_mesh(mesh):
        compiled = fast_jit(fn).lower(*placed).compile()
        got = compiled(*placed)
    moved = sum(c.bytes for c in hlo.collectives(compiled.as_text()))
    wrong = int(np.sum(np.asarray(got) != reference(*map(jnp.asarray, arrays))))
    out[name] = {"wrong": wrong, "moved": moved, "shard": got.addressable_shards[0].data.shape}
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


@pytest.mark.parametrize(
    ("mesh", "shard"),
    [("rows", [1, 40]), ("heads", [1, 2, 40]), ("indivisible", [3, 2, 40]), ("chosen", [1, 2, 40])],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_on_a_mesh_each_device_marks_its_own_rows_and_nothing_moves(on_meshes, mesh, shard):
    assert on_meshes[mesh] == {"wrong": 0, "moved": 0, "shard": shard}


def test_compiled_for_eight_h200s_nothing_crosses_between_them():
    from jax.sharding import NamedSharding, PartitionSpec

    from jaxfw.core import aot, hlo

    reason = aot.missing()
    if reason:
        pytest.skip(reason)
    mesh = aot.cluster("h200:1x1x8", tensor=8)
    heads = NamedSharding(mesh, PartitionSpec(None, "tensor"))
    arrays, _ = abstract((8, 8, 32768))
    placed = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=heads) for name, x in arrays.items()}
    compiled = aot.compile(lambda arrays: highest_mask(**arrays), placed, mesh=mesh)
    assert hlo.custom_calls(compiled.text) == {TRITON: 1}
    assert not hlo.collectives(compiled.text)


@pytest.mark.parametrize("name", REAL)
def test_compiled_for_an_h200_it_spills_nothing(name):
    from experiments.kernels import audit
    from jaxfw.core import aot

    reason = aot.missing()
    if reason:
        pytest.skip(reason)
    arrays, _ = abstract(REAL[name])
    found = audit(highest_mask, *arrays.values(), kernel="highest_mask")
    assert found.spilled_bytes == found.stack_bytes == 0
    assert found.resident >= 1 and found.programs == np.prod(REAL[name][:-1])
