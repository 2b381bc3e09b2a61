"""Llama-3.1-8B in few bits, compiled for an H200: it fits 7 GB, and no matrix is ever written in full width."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest

from jaxfw.core import aot, hlo
from jaxfw.generate.programs import Decoding, decode
from jaxfw.models import attention_spec, forward
from jaxfw.models.cache import Cache, FullCache
from jaxfw.models.presets import preset
from jaxfw.ops.quant import BITS, GROUP, product, quantise
from jaxfw.ops.sampling import Sampling
from jaxfw.weights import abstract_params, device_bytes

pytestmark = [pytest.mark.slow, pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))]
CONFIG, S, POLICY = preset("llama-3.1-8b"), 8192, FullCache()
SMALLEST_MATRIX = 2 * CONFIG.width * CONFIG.kv_heads * CONFIG.head_dim  # bytes in full width
HEAD_PRODUCTS = 4 * CONFIG.width // GROUP * CONFIG.vocab  # bytes of a row's products with each group, in float32
WIDTHS = {"bf16": 2, "f32": 4, "s32": 4, "u32": 4}
KEYS_OF_A_LAYER = S * CONFIG.kv_heads * CONFIG.head_dim
CACHE = 2 * CONFIG.layers * KEYS_OF_A_LAYER * 2  # bytes


def empty(layers):
    make = functools.partial(POLICY.empty, spec=attention_spec(CONFIG), prompt=S - 1, new=1, dtype=CONFIG.dtype)
    return Cache(tuple(make(1) for _ in range(layers)))


@functools.cache
def decode_step(name):
    """One token, beside a full cache that is donated."""

    def step(params, tokens, cache):
        out = forward(CONFIG, params, tokens, policy=POLICY, cache=cache)
        return jnp.argmax(out.logits[:, 0], axis=-1), out.cache

    cache, tokens = jax.eval_shape(lambda: empty(CONFIG.layers)), jax.ShapeDtypeStruct((1, 1), jnp.int32)
    params = abstract_params(CONFIG, quantise=name)
    return aot.compile(jax.jit(step, donate_argnums=2), params, tokens, cache, mesh=aot.cluster("h200:1x1x1"))


@functools.cache
def decode_loop(name):
    """The loop that generation runs: what does not change in it could be computed before it, and kept."""

    def start():
        keys = jax.random.split(jax.random.key(0), 1)
        return Decoding(
            empty(CONFIG.layers), jnp.zeros(1, jnp.int32), jnp.zeros(1, bool), jnp.array(True), keys, keys, jnp.int32(1)
        )

    state, params = jax.eval_shape(start), abstract_params(CONFIG, quantise=name)
    sampling = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), Sampling())
    stop, limit = jax.ShapeDtypeStruct((8,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    return aot.compile(decode, CONFIG, POLICY, params, state, sampling, stop, limit, mesh=aot.cluster("h200:1x1x1"))


def kept(compiled):
    """Sizes of what lies in memory between two kernels, the largest first; the cache is not among it."""
    written = ("fusion", "dot", "custom-call", "convert", "copy", "multiply", "transpose")
    outside = [
        found for found in hlo.instructions(compiled.text)
        if found.opcode in written and not found.computation.startswith(("fused", "wrapped", "gemm"))
    ]  # fmt: skip
    arrays = [array for found in outside for array in found.arrays if math.prod(array[1]) != KEYS_OF_A_LAYER]
    return sorted((math.prod(shape) * WIDTHS.get(kind, 1) for kind, shape in arrays), reverse=True)


@pytest.mark.parametrize("program", [decode_step, decode_loop])
def test_four_bits_fit_seven_gigabytes(program):
    held = program("int4").bytes
    assert device_bytes(CONFIG, quantise="int4") + CACHE <= held.arguments
    assert held.arguments + held.temporaries <= 7e9
    assert held.temporaries < 2.1 * HEAD_PRODUCTS


@pytest.mark.parametrize("program, name", [(decode_step, "int4"), (decode_loop, "int4"), (decode_step, "int8")])
def test_no_matrix_is_written_in_full_width(program, name):
    """The head's products with all groups are written, and turned; else nothing is half as large as any matrix."""
    held, sizes = program(name).bytes, kept(program(name))
    assert sizes[0] == HEAD_PRODUCTS and sizes[2] < SMALLEST_MATRIX / 2
    assert held.arguments + held.temporaries < device_bytes(CONFIG, quantise=name) + 1.05 * CACHE


@pytest.mark.parametrize("name", ["int4", "int8"])
@pytest.mark.parametrize("rows", [8, 1024])
def test_more_rows_compile_too(name, rows):
    """Some rows go as one does; with many, int4 alone takes a matrix in full width."""
    kernel = jax.eval_shape(
        functools.partial(quantise, bits=BITS[name]), jax.ShapeDtypeStruct((CONFIG.width, CONFIG.ffn), jnp.bfloat16)
    )
    x = jax.ShapeDtypeStruct((rows, CONFIG.width), jnp.bfloat16)
    compiled = aot.compile(jax.jit(product), x, kernel, mesh=aot.cluster("h200:1x1x1"))
    matrix, products = 2 * CONFIG.width * CONFIG.ffn, 4 * CONFIG.width // GROUP * rows * CONFIG.ffn
    allowed = products if rows == 8 else matrix if name == "int4" else 4 * rows * CONFIG.ffn
    assert compiled.bytes.temporaries <= 1.1 * allowed
