"""Moving kept slots together: against loops in NumPy, in every format, turned, on meshes, and compiled for H200s."""

import functools
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfw.ops.rope import Rope, rotate, rotation
from pallas_kernels.compact import Config, compact, reference, supports_compact
from pallas_kernels.packing import Packed, unpack, unpacked_codes
from tests.kernel_contract import TRITON, Case, KernelContract, assert_close, fast_jit, poisoned_bounds

ROOT = Path(__file__).parents[1]
GROUPED = tuple(itertools.product((2, 4, 8), ("slots", "channels")))
FORMATS: dict[str, dict[str, Any]] = {
    "full": {},
    **{f"int{bits} {axis}": {"bits": bits, "axis": axis} for bits, axis in GROUPED},
    "int8": {"kind": "int8"},
    "fp8": {"kind": "fp8"},
}
DTYPES = ("float32", "bfloat16", "float32", "float16", "bfloat16")
TURNS = ("", "each head", "shared")


def draw_case(number: int) -> Case:
    """A seeded case: formats, widths, dtypes and kinds of angles in turn, the rest drawn."""
    rng = np.random.default_rng(number)
    name = list(FORMATS)[number % len(FORMATS)]
    d, turn = (64, 80, 128)[number % 7 % 3], TURNS[number // len(FORMATS) % 3]
    options = dict(FORMATS[name])
    C = 1 if number % 11 == 3 else int(rng.integers(1, 80))
    config = Config(int(rng.choice((4, 16, 32))))
    if "bits" in options:
        by_channels = 20 if d == 80 else (16, 32)[number % 2]
        options["group"] = group = by_channels if options["axis"] == "channels" else (32, 8, 24)[number % 3]
        if options["axis"] == "slots":
            C, config = int(rng.integers(1, 4)) * group, Config(32 if group != 8 else 8)
    sizes = {"B": int(rng.integers(1, 3)), "K": int(rng.integers(1, 4)), "T": 1 if number % 13 == 5 else
             int(rng.integers(2, 90)), "C": C, "d": d, "r": (d // 2, 16)[number % 2]}  # fmt: skip
    empty = (0.2, 0.0, 1.0, 0.2)[number % 4] if number % 3 == 0 else 0.2
    dtype = DTYPES[number % len(DTYPES)]
    size = "".join(f"{letter}{value}" for letter, value in sizes.items())
    return Case(
        f"{number} {name} {turn} {size} {dtype}",
        sizes,
        {"config": config, **options, "turn": turn, "empty": empty},
        dtype,
    )


def angles(rng, shape):
    angle = rng.uniform(-50, 50, shape)
    return {"cos": np.cos(angle), "sin": np.sin(angle)}


def abstract(name: str, *, turn: bool = False, d: int = 128, B: int = 8, K: int = 8, T: int = 32768, C: int = 6560):
    arrays = {"x": jax.ShapeDtypeStruct((B, K, T, d), "bfloat16"), "index": jax.ShapeDtypeStruct((B, K, C), "int32")}
    if turn:
        arrays |= dict.fromkeys(("cos", "sin"), jax.ShapeDtypeStruct((B, K, C, d // 2), "float32"))
    return arrays, dict(FORMATS[name])


def ordered(x: np.ndarray) -> np.ndarray:
    """8-bit floats as whole numbers of the same order, neighbours one apart."""
    bits = x.view(np.int8).astype(int)
    return np.where(bits < 0, -(bits & 127), bits)


def assert_same(got, wanted, *, is_turned: bool) -> None:
    """The same to the last bit; if turned, up to one unit in the last place, which moves few codes by one step."""
    if not is_turned:
        return jax.tree.map(np.testing.assert_array_equal, got, wanted)
    if not isinstance(wanted, Packed):
        return assert_close(got, wanted, str(wanted.dtype).replace("float16", "bfloat16"), what="out")
    for name in ("scale", "zero"):
        if getattr(wanted, name) is not None:
            half = wanted.scale.dtype.itemsize == 2
            assert_close(getattr(got, name), getattr(wanted, name), "bfloat16" if half else "float32", what=name)
    steps = [np.asarray(unpacked_codes(x)) for x in (got, wanted)]
    if steps[0].dtype.kind not in "iu":
        steps = [ordered(x) for x in steps]
    apart = np.abs(steps[0].astype(int) - steps[1].astype(int))
    assert apart.max(initial=0) <= 1 and apart.mean() <= 0.001, (apart.max(), apart.mean())


class TestCompact(KernelContract):
    op = staticmethod(compact)
    supports = staticmethod(lambda impl, x, index, **_: supports_compact(impl, x=x, index=index))
    config = staticmethod(lambda: Config(16))
    cases = tuple(draw_case(number) for number in range(41))
    named: ClassVar = {
        **{f"8b {name}": functools.partial(abstract, name) for name in FORMATS},
        "llama-2-7b full": functools.partial(abstract, "full", B=32, K=32),  # more than 2**32 bytes: 64-bit offsets
    }
    differentiable = ()

    def arguments(self, case, rng):
        (B, K, T, C, d, r), options = case.sizes.values(), dict(case.options)
        index = rng.integers(0, T, (B, K, C))
        index = np.where(rng.random(index.shape) < options.pop("empty"), -1, index).astype(np.int32)
        arrays = {"x": 3 * rng.standard_normal((B, K, T, d)) + 1, "index": index}
        turn = options.pop("turn")
        return arrays | (angles(rng, (B, K if turn == "each head" else 1, C, r)) if turn else {}), options

    def reference(self, arrays, options):
        return reference(**arrays, **{name: value for name, value in options.items() if name != "config"})

    def check(self, case, impl):
        arrays, options = self.problem(case)
        with poisoned_bounds():
            got = fast_jit(lambda arrays: self.call(arrays, options, impl))(arrays)
        wanted = self.wanted(case)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), got) == jax.tree.map(lambda x: (x.shape, x.dtype), wanted)
        assert_same(got, wanted, is_turned="cos" in arrays)


def move(x, index, cos=None, sin=None, **options) -> Any:
    arrays = [x, index] if cos is None else [x, index, cos, sin]
    names = ("x", "index", "cos", "sin")[: len(arrays)]
    arrays = {name: jnp.asarray(x) for name, x in zip(names, arrays, strict=True)}
    return fast_jit(lambda arrays: compact(**arrays, **options))(arrays)


@functools.cache
def example(dtype="float32", B=2, K=2, T=50, C=64, d=64):
    rng = np.random.default_rng(5)
    index = np.where(rng.random((B, K, C)) < 0.3, -1, rng.integers(0, T, (B, K, C)))
    return jnp.asarray(rng.standard_normal((B, K, T, d)), dtype), jnp.asarray(index, jnp.int32)


def brute_force(x, index, cos=None, sin=None):
    """One slot at a time, in float64."""
    x = np.asarray(x, np.float64)
    out = np.zeros((*index.shape, x.shape[3]))
    for b, k, c in np.ndindex(index.shape):
        if index[b, k, c] >= 0:
            out[b, k, c] = row = x[b, k, index[b, k, c]].copy()
            if cos is not None and sin is not None:
                angle = b, k % cos.shape[1], c
                for i in range(cos.shape[3]):
                    pair, j = complex(cos[angle][i], sin[angle][i]), i + cos.shape[3]
                    turned = (row[i] + 1j * row[j]) * pair
                    out[b, k, c, i], out[b, k, c, j] = turned.real, turned.imag
    return out


def groups_in_numpy(x, bits, axis, group):
    """Codes, scale and zero of each group in turn, in float64."""
    at = -2 if axis == "slots" else -1
    codes, scale, zero = [], [], []
    for part in np.split(x, x.shape[at] // group, axis=at):
        low, span = part.min(axis=at, keepdims=True), np.ptp(part, axis=at, keepdims=True)
        codes.append(np.round((part - low) / np.where(span > 0, span, 1) * (2**bits - 1)))
        scale.append(span / (2**bits - 1))
        zero.append(low)
    return (np.concatenate(parts, axis=at) for parts in (codes, scale, zero))


@pytest.mark.parametrize("heads", [0, 1, 2])
def test_the_reference_is_brute_force(heads):
    x, index = example()
    turn = angles(np.random.default_rng(0), (2, heads, 64, 24)) if heads else {}
    cos, sin = (jnp.asarray(y, jnp.float32) for y in turn.values()) if turn else (None, None)
    got = reference(x, index, cos=cos, sin=sin)
    assert_close(got, brute_force(x, np.asarray(index), **turn), "float32", what="reference")


@pytest.mark.parametrize("impl", ["xla", "interpret"])
@pytest.mark.parametrize(("bits", "axis", "group"), [(2, "slots", 32), (4, "channels", 16), (8, "slots", 64)])
def test_codes_scales_and_zeros_are_those_of_numpy(impl, bits, axis, group):
    x, index = example()
    got = move(x, index, bits=bits, axis=axis, group=group, impl=impl)
    codes, scale, zero = groups_in_numpy(brute_force(x, np.asarray(index)), bits, axis, group)
    np.testing.assert_allclose(got.scale, scale, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(got.zero, zero.astype(np.float32))
    apart = np.abs(np.asarray(unpacked_codes(got), int) - codes)
    assert apart.max() <= 1 and apart.mean() <= 1e-3
    assert got.shape == (2, 2, 64, 64) and got.group == group and got.codes.shape[3] == 8 * bits


@pytest.mark.parametrize("impl", ["xla", "interpret"])
@pytest.mark.parametrize("name", ["int4 slots", "int4 channels", "int8", "fp8"])
def test_what_is_kept_comes_back_and_empty_slots_are_zeros(impl, name):
    x, index = example("bfloat16")
    got = move(x, index, **FORMATS[name], impl=impl)
    wanted = brute_force(x, np.asarray(index))
    wide = np.asarray(unpack(got, jnp.float32), np.float64)
    scale = np.asarray(got.scale, np.float64)
    scale = np.repeat(scale, got.group, axis=2 if got.axis == "slots" else 3)
    bound = np.abs(wanted) * 2.0**-4 + scale * 2.0**-9 if name == "fp8" else scale / 2
    assert (np.abs(wide - wanted) <= bound * (1 + 1e-6)).all()
    assert not wide[np.asarray(index) < 0].any() or name.startswith("int4")


def test_an_error_of_a_quotient_moves_few_codes_and_by_one_step():
    """Triton's division is 2 units in the last place off at most: the codes between both ends of that."""
    x = np.asarray(example("bfloat16", T=400, d=128)[0], np.float64)
    index = jnp.broadcast_to(jnp.arange(400), (2, 2, 400))
    for bits, axis in ((2, "channels"), (4, "slots"), (8, "slots"), (8, "channels")):
        group = 40 if axis == "slots" else 32
        packed = move(jnp.asarray(x, jnp.bfloat16), index, bits=bits, axis=axis, group=group)
        at = 2 if axis == "slots" else 3
        zero, scale = (np.repeat(np.asarray(y, np.float64), group, at) for y in (packed.zero, packed.scale))
        quotient = (x - zero).astype(np.float32) / scale
        low, high = (np.round(quotient * (1 + error)) for error in (-(2.0**-22), 2.0**-22))
        assert (high - low).max() <= 1 and (high != low).mean() <= 0.01


@pytest.mark.parametrize("impl", ["xla", "interpret"])
def test_nothing_kept_is_nothing_but_zeros(impl):
    x, index = jnp.full((1, 2, 3, 64), jnp.nan), jnp.full((1, 2, 32), -1, jnp.int32)
    turn = {name: jnp.full((1, 1, 32, 8), jnp.nan) for name in ("cos", "sin")}
    for name, more in (("full", turn), ("int2 slots", turn), ("int4 channels", {}), ("fp8", {})):
        got = move(x, index, **more, **FORMATS[name], impl=impl)
        assert all((np.asarray(leaf, np.float32) == 0).all() for leaf in jax.tree.leaves(got))


@pytest.mark.parametrize("impl", ["xla", "interpret"])
def test_slots_that_stay_behind_do_not_matter_and_others_come_as_they_are(impl):
    x = np.random.default_rng(0).standard_normal((1, 1, 9, 64)).astype(np.float32)
    x[0, 0, 3:6] = np.array([[np.nan], [np.inf], [-np.inf]])
    got = move(x, np.array([[[8, 0, -1, 8, -7, 99]]]), impl=impl)
    np.testing.assert_array_equal(got[0, 0], np.stack([x[0, 0, 8], x[0, 0, 0], 0 * x[0, 0, 0]] * 2)[[0, 1, 2, 0, 2, 0]])
    got = move(x, np.array([[[3, 4, 5]]]), impl=impl)
    np.testing.assert_array_equal(got[0, 0], x[0, 0, 3:6])


@pytest.mark.parametrize(("axis", "group"), [("slots", 24), ("channels", 20)])
def test_what_fills_up_a_block_belongs_to_no_group(axis, group):
    x = 5 + jnp.abs(example(d=80)[0])
    index = jnp.broadcast_to(jnp.arange(48), (2, 2, 48))
    got, wanted = (move(x, index, bits=4, axis=axis, group=group, impl=impl) for impl in ("interpret", "xla"))
    assert (got.zero >= 5).all()
    assert_same(got, wanted, is_turned=False)


@pytest.mark.parametrize("impl", ["xla", "interpret"])
def test_a_constant_group_comes_back_exactly(impl):
    x = jnp.full((1, 1, 40, 64), 0.3, jnp.bfloat16)
    for axis in ("slots", "channels"):
        got = move(x, np.arange(32)[None, None], bits=2, axis=axis, impl=impl)
        assert not got.scale.any() and (unpack(got) == x[:, :, :32]).all()


@pytest.mark.parametrize("impl", ["xla", "interpret"])
def test_turned_keys_are_keys_of_their_new_positions(impl):
    """jaxfw's own rotation to position p, then turned by the way from p to its place among the kept."""
    rng = np.random.default_rng(1)
    plain, index = jnp.asarray(rng.standard_normal((1, 1, 300, 64)), jnp.float32), jnp.arange(3, 300, 9)[None, None]
    rope, C = Rope(), index.shape[2]

    def at(x, positions):
        cos, sin = rotation(rope, positions, width=64, seq_len=jnp.array([300]))
        return rotate(x.swapaxes(1, 2), cos, sin).swapaxes(1, 2)

    cos, sin = rotation(rope, jnp.arange(C)[None] - index[0], width=64, seq_len=jnp.array([300]))
    got = move(at(plain, jnp.arange(300)[None]), index, cos[:, None], sin[:, None], impl=impl)
    wanted = at(plain[:, :, index[0, 0]], jnp.arange(C)[None])
    np.testing.assert_allclose(got, wanted, atol=5e-4)  # angles of some 300 radians, in float32


@pytest.mark.parametrize("name", ["full", "int4 channels"])
def test_blocks_do_not_matter(name):
    x, index = example("bfloat16", C=43)
    wanted = move(x, index, **FORMATS[name], impl="xla")
    for config in (Config(1), Config(128), None):
        got = move(x, index, **FORMATS[name], impl="interpret", config=config)
        assert_same(got, wanted, is_turned=False)


def test_a_group_of_slots_is_a_block():
    x, index = example()
    with pytest.raises(ValueError, match="block=16 must be 32, a group of 32"):
        move(x, index, bits=4, impl="interpret", config=Config(16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.ones((2, 50, 64))}, r"expected x\[B,K,T,d\] with T >= 1 and index\[B,K,C\]"),
        ({"index": jnp.ones((2, 3, 64), jnp.int32)}, r"index\[B,K,C\]: got \(2, 2, 50, 64\), \(2, 3, 64\)"),
        ({"index": jnp.ones((2, 2, 64))}, "expected whole numbers as index: got float32"),
        ({"cos": jnp.ones((2, 2, 64, 8))}, "cos and sin come together"),
        ({"cos": jnp.ones((2, 2, 64, 33)), "sin": jnp.ones((2, 2, 64, 33))}, r"2 r <= d=64"),
        ({"cos": jnp.ones((2, 2, 64, 8)), "sin": jnp.ones((2, 1, 64, 8))}, r"got \(2, 2, 64, 8\), \(2, 1, 64, 8\)"),
        ({"bits": 4, "kind": "int8"}, "bits=4 and kind='int8' are two formats"),
        ({"bits": 3}, r"bits=3 must be one of \(2, 4, 8\)"),
        ({"bits": 0}, r"bits=0 must be one of \(2, 4, 8\)"),
        ({"bits": 4, "axis": "tokens"}, "axis='tokens' one of"),
        ({"bits": 4, "group": 48}, "does not split into groups of 48 slots"),
        ({"kind": "int3"}, "kind='int3' must be one of int8, fp8"),
        ({"impl": "mosaic"}, "impl='mosaic' cannot run: no Mosaic body is written yet, take 'triton'"),
        ({"impl": "triton", "x": jnp.ones((2, 2, 50, 64), jnp.int8)}, "one dtype of float32, bfloat16, float16, got"),
        ({"impl": "triton", "index": jnp.ones((2, 2, 0), jnp.int32)}, "nothing to keep"),
        ({"impl": "triton", "x": jnp.ones((2, 2, 50, 512))}, "a block of 1 x d=512 would not fit"),
        ({"impl": "triton", "x": jnp.ones((2, 2, 5, 256)), "index": jnp.ones((2, 2, 128), jnp.int32), "bits": 4,
          "group": 128}, "a block of 128 x d=256 would not fit"),
    ],
)  # fmt: skip
def test_wrong_input_is_named(change, message):
    x, index = example()
    with pytest.raises(ValueError, match=message):
        compact(**{"x": x, "index": index, **change})


def test_codes_that_32_bits_cannot_address_have_no_kernel():
    x = jax.ShapeDtypeStruct((32, 32, 32768, 128), "bfloat16")
    index = jax.ShapeDtypeStruct((32, 32, 16384), "int32")
    assert supports_compact("triton", x=x, index=index) is None
    assert supports_compact("triton", x=x, index=index, bits=4) is None
    assert "32 bits" in (supports_compact("triton", x=x, index=index, kind="fp8") or "")


def test_configs_that_triton_cannot_take_are_named():
    with pytest.raises(ValueError, match="block=48 must be a power of two"):
        Config(48)


MESHES = """
import json
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxfw.core import hlo
from jaxfw.core.mesh import make_mesh
from pallas_kernels.compact import compact, reference
from tests.kernel_contract import fast_jit

def move(x, index, cos, sin, **how):
    return compact(x, index, cos=cos, sin=sin, **{"impl": "interpret"} | how)

packed = {"bits": 4, "axis": "slots", "group": 16}

out = {}
for name, B, K, axes, rows, heads, how in (
    ("tensor", 2, 8, {"tensor": 8}, None, "tensor", {}),
    ("mixed", 4, 4, {"data": 2, "fsdp": 2, "tensor": 2}, ("data", "fsdp"), "tensor", packed),
    ("indivisible", 3, 2, {"data": 2, "tensor": 4}, None, None, {}),
    ("chosen", 4, 4, {"data": 2, "tensor": 4}, "data", "tensor", {"impl": None}),
):
    mesh, rng = make_mesh(**axes), np.random.default_rng(0)
    x, index = rng.standard_normal((B, K, 40, 16)), rng.integers(-1, 40, (B, K, 32)).astype(np.int32)
    angle = rng.standard_normal((B, 1, 32, 8))
    arrays = [y.astype(np.float32) for y in (x, np.cos(angle), np.sin(angle))]
    arrays.insert(1, index)
    specs = [P(rows, heads)] * 2 + [P(rows)] * 2
    placed = [jax.device_put(y, NamedSharding(mesh, spec)) for y, spec in zip(arrays, specs)]
    with jax.set_mesh(mesh):
        compiled = fast_jit(lambda *xs: move(*xs, **how)).lower(*placed).compile()
        got = compiled(*placed)
    form = {} if how != packed else packed
    wanted = reference(*map(jnp.asarray, arrays[:2]), cos=arrays[2], sin=arrays[3], **form)
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(wanted))
    error = max(float(np.max(np.abs(np.asarray(a, float) - np.asarray(b, float)))) for a, b in pairs)
    moved = sum(c.bytes for c in hlo.collectives(compiled.as_text()))
    out[name] = {"error": error, "moved": moved, "shard": jax.tree.leaves(got)[0].addressable_shards[0].data.shape}
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
    [("tensor", [2, 1, 32, 16]), ("mixed", [1, 2, 32, 8]), ("indivisible", [3, 2, 32, 16]), ("chosen", [2, 1, 32, 16])],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_on_a_mesh_each_device_moves_its_own_slots_and_nothing_crosses(on_meshes, mesh, shard):
    found = on_meshes[mesh]
    assert found["error"] <= 1e-5
    assert found["moved"] == 0 and found["shard"] == shard


def compiled_for(devices, arrays, options, **axes):
    from jax.sharding import NamedSharding, PartitionSpec

    from jaxfw.core import aot, hlo

    reason = aot.missing()
    if reason:
        pytest.skip(reason)
    mesh = aot.cluster(devices, **axes)
    heads = NamedSharding(mesh, PartitionSpec(None, "tensor"))
    placed = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=heads) for name, x in arrays.items()}
    compiled = aot.compile(lambda arrays: compact(**arrays, **options), placed, mesh=mesh)
    assert hlo.custom_calls(compiled.text) == {TRITON: 1}
    assert not hlo.collectives(compiled.text)
    return compiled


def test_compiled_for_eight_h200s_nothing_crosses_between_them():
    arrays, options = abstract("int4 slots", turn=True)
    compiled_for("h200:1x1x8", arrays, options, tensor=8)


def test_nothing_of_the_full_width_is_written():
    arrays, options = abstract("int4 slots")
    found = compiled_for("h200:1x1x1", arrays, options).bytes
    kept = arrays["index"].size * 128
    assert found.outputs < kept * 0.65  # half a byte for a code, an eighth for scale and zero
    assert found.temporaries <= arrays["index"].size * 4 + 4096  # indices within their bounds


EVERY = [*itertools.product(FORMATS, (False, True), (96, 128))]
FAST = [("full", True, 128), ("int4 slots", True, 128), ("int4 channels", False, 128), ("fp8", False, 128)]


@pytest.mark.parametrize(
    ("name", "turn", "d"), [pytest.param(*how, marks=() if how in FAST else pytest.mark.slow) for how in EVERY]
)
def test_compiled_for_an_h200_it_spills_nothing(name, turn, d):
    from experiments.kernels import audit
    from jaxfw.core import aot

    reason = aot.missing()
    if reason:
        pytest.skip(reason)
    arrays, options = abstract(name, turn=turn, d=d)

    def fn(*arrays_of):
        return compact(**dict(zip(arrays, arrays_of, strict=True)), **options)

    found = audit(fn, *arrays.values(), kernel="compact")
    assert found.spilled_bytes == found.stack_bytes == 0
    assert found.resident >= 2 and found.programs >= 264
