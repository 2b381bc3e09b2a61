"""Compiling for H200s that are not there, and reading what came of it."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxfw.core import aot, hlo
from jaxfw.core.errors import InputError

needs_compiler = pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))


def array(mesh, shape, *spec, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))


@pytest.fixture(scope="module")
def mesh():
    jax.devices()  # the CPU is initialised first, as in most sessions
    return aot.cluster("h200:1x2x4", data=2, tensor=4)


# --- compiling


@needs_compiler
def test_the_cluster_is_described_and_the_cpu_stays(mesh):
    device = mesh.devices.flat[0]
    assert (device.platform, device.device_kind, mesh.size) == ("gpu", "NVIDIA H200", 8)
    assert {device.process_index for device in mesh.devices.flat} == {0, 1}, "two hosts"
    assert all(len({device.process_index for device in row.flat}) == 1 for row in mesh.devices), "tensor in one host"
    assert jax.default_backend() == "cpu" or jax.devices()[0].platform == "gpu"


@needs_compiler
def test_a_sharded_loop_its_collectives_bytes_and_ptx(mesh):
    def f(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w) @ w.T, None), x, None, length=5)[0]

    B, D, F = 256, 1024, 4096
    x, w = array(mesh, (B, D), "data"), array(mesh, (D, F), None, "tensor")
    compiled = aot.compile(jax.jit(f, donate_argnums=0), x, w, mesh=mesh, dump_ptx=True)
    held = 2 * (B * D // 2 + D * F // 4)
    assert compiled.bytes.arguments == held
    assert compiled.bytes.outputs == 0, "it lies where the donated argument lay"
    assert compiled.bytes.total == held + compiled.bytes.temporaries > held
    (reduced,) = hlo.collectives(compiled.text)
    assert (reduced.kind, reduced.bytes, reduced.times) == ("all-reduce", 2 * B * D // 2, 5)
    assert any(i.opcode == "dot" and i.times == 5 for i in hlo.instructions(compiled.text))
    assert compiled.ptx and all(".target sm_90a" in ptx for ptx in compiled.ptx)


@needs_compiler
def test_each_kind_of_collective(mesh):
    def f(x, w):
        split = jax.lax.all_to_all(x, "tensor", 0, 1, tiled=True)
        gathered = jax.lax.all_gather(x, "data", tiled=True)
        passed = jax.lax.ppermute(x, "data", [(0, 1), (1, 0)])
        return split, gathered, passed, jax.lax.psum_scatter(w, "tensor", tiled=True)

    cut, columns = PartitionSpec("data", "tensor"), PartitionSpec(None, "tensor")
    mapped = jax.shard_map(
        f, in_specs=(cut, PartitionSpec()), out_specs=(cut, columns, cut, PartitionSpec("tensor")), check_vma=False
    )
    compiled = aot.compile(mapped, array(mesh, (256, 1024), "data", "tensor"), array(mesh, (64, 64)), mesh=mesh)
    block = 2 * 128 * 256
    assert {(c.kind, c.bytes, c.times) for c in hlo.collectives(compiled.text)} == {
        ("all-to-all", block, 1),
        ("all-gather", 2 * block, 1),
        ("collective-permute", block, 1),
        ("reduce-scatter", 2 * 16 * 64, 1),
    }


@needs_compiler
def test_cudnn_attention_is_in_the_program(mesh):
    attend = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    q, k = (array(mesh, (2, 512, heads, 128), "data", None, "tensor") for heads in (32, 8))
    compiled = aot.compile(attend, q, k, k, mesh=mesh)
    assert hlo.custom_calls(compiled.text) == {"__cudnn$fmhaSoftmax": 1}
    assert hlo.collectives(compiled.text) == ()


@needs_compiler
def test_arrays_of_this_machine_and_static_arguments_serve_as_arguments(mesh):
    jitted = jax.jit(lambda scale, x: scale * x, static_argnums=0)
    compiled = aot.compile(jitted, 3, jnp.ones((4, 4)), mesh=mesh)
    assert compiled.bytes.arguments == 64, "replicated"


@needs_compiler
def test_streams_are_those_of_the_compiler(mesh):
    """By default all that runs beside kernels shares one; with more, collectives of two links do not."""

    def f(x, w):
        y = jax.lax.all_gather(x, "tensor", axis=0, tiled=True) @ w
        z = jax.lax.all_gather(x * 2, "data", axis=0, tiled=True) @ w
        return jnp.tanh(y).sum(0) + jnp.tanh(z).sum(0)

    spec = PartitionSpec(("data", "tensor"))
    mapped = jax.shard_map(f, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=PartitionSpec(), check_vma=False)
    arrays = array(mesh, (4096, 4096), ("data", "tensor")), array(mesh, (4096, 4096))
    options = {
        "xla_gpu_experimental_parallel_collective_overlap_limit": 2,
        "xla_gpu_experimental_enable_collective_multi_streaming": True,
    }
    plain, several = (
        aot.compile(mapped, *arrays, mesh=mesh, compiler_options=given, dump_streams=True) for given in ({}, options)
    )
    assert len(set(plain.streams.values())) <= 1 and plain.ptx == ()
    begun = [name for name in several.streams if name.endswith("start") or "-start." in name]
    assert len(set(several.streams.values())) == min(2, len(begun)) >= 1
    started = {collective.instruction.name for collective in hlo.collectives(several.text)}
    assert set(several.streams) <= started


@needs_compiler
def test_the_compilers_options_are_passed_on(mesh):
    with pytest.raises(Exception, match="No such compile option: 'xla_gpu_nonsense'"):
        aot.compile(jnp.tanh, array(mesh, (4, 4)), mesh=mesh, compiler_options={"xla_gpu_nonsense": True})


# --- what is refused


@pytest.mark.parametrize(
    ("target", "axes", "message"),
    [
        ("h20:1x1x8", {}, r"target chip='h20' is unknown\. Known: h200, h100, a100\. Did you mean 'h200'\?"),
        ("h200", {}, r"'h200' must be chip:HOSTSxGPUS, as in h200:1x8"),
        ("h200:8", {}, r"'h200:8' must be chip:HOSTSxGPUS"),
        ("h200:1x0x8", {}, r"'h200:1x0x8' must be chip:HOSTSxGPUS"),
    ],
)
def test_targets_that_are_wrong_are_named(target, axes, message):
    with pytest.raises(InputError, match=message):
        aot.cluster(target, **axes)


@needs_compiler
def test_a_mesh_that_does_not_fit_the_cluster_is_named():
    with pytest.raises(InputError, match=r"mesh tensor=4 needs 4 devices, there are 8"):
        aot.cluster("h200:1x1x8", tensor=4)


def lacking(monkeypatch, *names, version=jax.__version__):
    """As if only what is not named were installed."""
    found = importlib.util.find_spec
    present = ("jax_plugins.xla_cuda13", "nvidia.cudnn", "nvidia.cu13")
    monkeypatch.setattr(
        aot, "_found", lambda name: name not in names if name in present else found("jax") is None
    )  # fmt: skip
    monkeypatch.setattr(aot.metadata, "version", lambda name: version)
    monkeypatch.setattr(aot.shutil, "which", lambda name: None)
    monkeypatch.setattr(aot.ctypes.util, "find_library", lambda name: None)
    aot._devices.cache_clear()


@pytest.mark.parametrize(
    ("names", "version", "message"),
    [
        (["jax_plugins.xla_cuda13"], jax.__version__, r"CUDA plugin is missing: pip install 'jaxfw\[aot\]'"),
        ([], "0.4.1", rf"jax-cuda13-plugin 0\.4\.1 does not fit jax {jax.__version__}: pip install"),
        (["nvidia.cudnn"], jax.__version__, r"cannot compile for h200: cuDNN is missing.*pip install"),
        (["nvidia.cu13"], jax.__version__, r"ptxas is missing: pip install"),
    ],
)
def test_what_is_missing_is_named_with_the_remedy(monkeypatch, names, version, message):
    lacking(monkeypatch, *names, version=version)
    with pytest.raises(InputError, match=message):
        aot.cluster("h200:1x1x8")


def test_nothing_is_missing_when_all_is_there(monkeypatch):
    lacking(monkeypatch)
    assert aot.missing() is None


# --- reading

TEXT = """\
HloModule jit_f, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%wrapped (p: bf16[8,4]) -> bf16[2,4] {
  %p = bf16[8,4]{1,0} parameter(0)
  ROOT %scattered = bf16[2,4]{1,0} reduce-scatter(%p), replica_groups={{0,1,2,3}}, to_apply=%add
}

%body (c: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %c = (s32[], bf16[8,4]{1,0}) parameter(0)
  %x = bf16[8,4]{1,0} get-tuple-element(%c), index=1
  %attention = (bf16[8,4]{1,0}, u8[16]{0}) custom-call(%x), custom_call_target="__cudnn$fmhaSoftmax"
  %gather-start = (bf16[8,4]{1,0}, bf16[32,4]{1,0}) all-gather-start(%x), replica_groups={{0,1,2,3}}, dimensions={0}
  %gather-done = bf16[32,4]{1,0} all-gather-done(%gather-start)
  %start = ((bf16[8,4]{1,0}), bf16[2,4]{1,0}, s32[]) async-start(%x), calls=%wrapped
  %update = ((bf16[8,4]{1,0}), bf16[2,4]{1,0}, s32[]) async-update(%start), calls=%wrapped
  %done = bf16[2,4]{1,0} async-done(%update), calls=%wrapped
  ROOT %t = (s32[], bf16[8,4]{1,0}) tuple(%i, %x)
}

%condition (c.1: (s32[], bf16[8,4])) -> pred[] {
  %c.1 = (s32[], bf16[8,4]{1,0}) parameter(0)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%never (q: f32[4]) -> f32[4] {
  ROOT %q = f32[4]{0} custom-call(), custom_call_target="unreached"
}

%branch (r: f32[4]) -> f32[4] {
  %r = f32[4]{0} parameter(0)
  ROOT %reduced = f32[4]{0} all-reduce(%r), to_apply=%add
}

ENTRY %main (x.1: bf16[8,4]) -> bf16[8,4] {
  %x.1 = bf16[8,4]{1,0} parameter(0)
  %w = (s32[], bf16[8,4]) while(%x.1), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"7"}}
  %w.2 = (s32[], bf16[8,4]{1,0}) while(%w), condition=%condition, body=%body
  %cond = f32[4]{0} conditional(%k, %v, %v), branch_computations={%branch, %branch}
  ROOT %kernel = bf16[8,4]{1,0} custom-call(%w.2), custom_call_target="__gpu$xla.gpu.triton"
}
"""


def test_reading_a_program_counts_loops_wrappers_and_branches():
    assert hlo.custom_calls(TEXT) == {"__cudnn$fmhaSoftmax": 8, "__gpu$xla.gpu.triton": 1}
    assert [(c.kind, c.bytes, c.times, c.instruction.name) for c in hlo.collectives(TEXT)] == [
        ("reduce-scatter", 16, 8, "scattered"),
        ("all-gather", 256, 8, "gather-start"),
        ("all-reduce", 16, 2, "reduced"),
    ]
    (call,) = [i for i in hlo.instructions(TEXT) if i.name == "attention"]
    assert call.arrays == (("bf16", (8, 4)), ("u8", (16,)))
    assert call.bytes == 2 * 32 + 16


def test_reading_a_program_of_this_machine():
    x = jax.ShapeDtypeStruct((4, 8), jnp.float32)
    f = jax.jit(lambda x: jax.lax.fori_loop(0, 9, lambda i, x: jnp.sin(x) + i, x))
    found = hlo.instructions(f.lower(x).compile().as_text())
    assert {i.times for i in found if i.opcode == "sine"} == {9}
