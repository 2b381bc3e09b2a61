"""Published models compiled for H200s on this machine: the kernels are there, and the cache stays in its place."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import pytest

from experiments import h200
from jaxfw.audit import programs
from jaxfw.core import aot, hlo
from jaxfw.models.presets import preset
from jaxfw.ops.attention import attend

pytestmark = pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
CONFIG, B, S = preset(h200.MODEL), 8, 32768
CACHE_OF_A_LAYER = B * S * CONFIG.head_dim * 2  # bytes of the keys of one of eight devices: one key head each


@functools.cache
def decode_step():
    return programs.decode_step(CONFIG, aot.cluster("h200:1x1x8", tensor=8), batch=B, length=S).compile()


@pytest.mark.slow
def test_a_decode_step_calls_the_kernel_once_a_layer():
    calls = hlo.custom_calls(decode_step().text)
    assert calls["__gpu$xla.gpu.triton"] == CONFIG.layers
    assert "__cudnn$fmhaSoftmax" not in calls


@pytest.mark.slow
def test_nothing_else_reads_the_cache():
    """No product, and no collective, of anything with the cache's slots."""
    products = [
        found for found in hlo.instructions(decode_step().text)
        if found.opcode in ("dot", "convolution") or "gemm" in (found.target or "")
    ]  # fmt: skip
    assert products and not [found.line for found in products if str(S) in found.line]
    moved = hlo.collectives(decode_step().text)
    assert moved and max(found.bytes for found in moved) < CACHE_OF_A_LAYER / 100


@pytest.mark.slow
def test_a_device_holds_its_share_of_a_decode_step():
    """An eighth of the cache (a float32 count a row and layer is whole), an eighth of the matrices, no second cache."""
    held = decode_step().bytes
    cache = 2 * CONFIG.layers * CACHE_OF_A_LAYER
    matrices = (
        sum(x.size * 2 for x in jax.tree.leaves(programs.placed_params(CONFIG, aot.cluster("h200:1x1x8", tensor=8))))
        / 8
    )
    assert cache + matrices <= held.arguments < 1.01 * (cache + matrices)
    assert held.temporaries + held.outputs < CACHE_OF_A_LAYER


def test_the_prefill_of_a_layer_calls_cudnn():
    compiled = programs.prefill_layer(CONFIG, aot.cluster("h200:1x1x8", tensor=8), batch=B, length=4096).compile()
    calls = hlo.custom_calls(compiled.text)
    assert calls["__cudnn$fmhaSoftmax"] == 1 and "__gpu$xla.gpu.triton" not in calls
    assert {found.kind for found in hlo.collectives(compiled.text)} == {"all-reduce"}


@pytest.mark.parametrize("dtype, d, calls", [("bfloat16", 64, 2), ("bfloat16", 256, 0), ("float32", 64, 0)])
def test_prompts_take_cudnn_forth_and_back_only_where_it_can(dtype, d, calls):
    q, k = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((1, 256, 4, d), (1, 2, 256, d)))

    def loss(q, k, v):
        return jnp.sum(attend(q, k, v, scale=0.1, window=100).astype(jnp.float32))

    compiled = aot.compile(jax.grad(loss, argnums=(0, 1, 2)), q, k, k, mesh=aot.cluster("h200:1x1x1"))
    found = {name: count for name, count in hlo.custom_calls(compiled.text).items() if name.startswith("__cudnn$fmha")}
    assert sum(found.values()) == calls and len(found) == calls, "one forward, one backward"


def test_key_heads_that_do_not_divide_leave_queries_with_them():
    """4 key heads on 8 devices: cuDNN wants queries, keys and values laid out alike."""
    config = dataclasses.replace(CONFIG, kv_heads=4)
    compiled = programs.prefill_layer(config, aot.cluster("h200:1x1x8", tensor=8), batch=B, length=1024).compile()
    assert hlo.custom_calls(compiled.text)["__cudnn$fmhaSoftmax"] == 1


def test_the_committed_table_is_of_these_programs():
    found = json.loads(h200.RESULTS.read_text(encoding="utf-8"))
    rows = found["programs"]
    assert found["model"] == h200.MODEL
    assert rows["decode step, tensor=8, batch 8, cache 32768"]["kernels"] == {"decode_attention": CONFIG.layers}
    assert rows["prefill of a layer, tensor=8, batch 8 x 4096"]["kernels"] == {"cuDNN attention": 1}
