"""A program for eight devices: each method of compression on meshes beside one device, and what moves between them.

Run by tests/test_kv_mesh.py in a process of its own, as jax fixes the number of its devices when it starts.
"""

import functools
import json
import os
import re
import sys

if __name__ == "__main__":  # whatever imports this (doctests, other tests) keeps its own devices
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    os.environ["JAX_PLATFORMS"] = "cpu"
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from jaxfw.core.mesh import make_mesh
from jaxfw.core.sharding import shardings
from jaxfw.kv import parse
from jaxfw.models import DecoderConfig, forward, init
from jaxfw.models.sharding import batch_shardings, cache_shardings, decoder_rules

CONFIG = DecoderConfig(
    vocab=64, width=32, ffn=48, layers=2, heads=8, kv_heads=4, head_dim=8, positions=128, init_std=0.2
)
METHODS = (
    "streaming@keep=0.4", "random@keep=0.4", "knorm@keep=0.4", "keydiff@keep=0.4", "snapkv(w=3)@keep=0.4",
    "h2o@keep=0.4", "tova@keep=0.4", "pyramidkv(w=2,beta=4)@keep=0.4", "expected@keep=0.4",
    "chunkkv(w=3,size=4,reuse=2)@keep=0.4", "lagkv(lag=4)@keep=0.4", "shotkv@keep=0.5,rd=0.5",
    "shotkv(scope=global)@keep=0.5", "randomshot@keep=0.5", "oracleshot@keep=0.5",
    "knorm@keep=0.4,decode=slide(window=3,recent=1)", "knorm@keep=0.4,decode=discontinuous(recent=1,delta=2)",
    "critical(w=3)@keep=0.4", "adakv(w=3)@keep=0.4",
)  # fmt: skip
PACKED = (
    "adakv(w=3)@keep=0.4,rd=0.5,kv=kivi(bits=4,group=8,residual=2)", "snapkv(w=3)@keep=0.4,kv=int8",
)  # fmt: skip
MESHES = {"tensor=4": dict(tensor=4), "data=2,tensor=2": dict(data=2, tensor=2)}
B, T, NEW = 4, 32, 6
LENGTHS = np.array([32, 17, 9, 25], np.int32)
# No token twice in a row: keys of one token have the same norm wherever they stand, and rounding would choose.
TEXT = np.random.default_rng(0).permuted(np.tile(np.arange(CONFIG.vocab, dtype=np.int32), (B, 1)), axis=1)[:, : T + NEW]
UNITS = np.where(np.arange(T) < LENGTHS[:, None] - 3, np.arange(T) // 4, -1).astype(np.int32)


@functools.partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
def read(policy, params, tokens, lengths, units, key):
    out = forward(CONFIG, params, tokens, lengths=lengths, policy=policy, room=T + NEW, unit_id=units, key=key)
    valid = jnp.arange(T) < lengths[:, None]
    return jnp.where(valid[..., None], out.logits, 0), out.cache


@functools.partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
def step(policy, params, token, cache, key):
    out = forward(CONFIG, params, token, policy=policy, cache=cache, key=key)
    return out.logits, out.cache


def calls(policy, params, mesh=None):
    """Logits of a prompt and of six steps, the caches behind both, and the text of both programs."""
    inputs = {"tokens": TEXT[:, :T], "lengths": LENGTHS, "units": UNITS}
    tokens = [TEXT[np.arange(B), LENGTHS + i][:, None] for i in range(NEW)]
    if mesh is not None:
        inputs = jax.device_put(inputs, batch_shardings(mesh, inputs))
        tokens = jax.device_put(tokens, batch_shardings(mesh, tokens))
    key = jax.random.key(1)
    arguments = (policy, params, inputs["tokens"], inputs["lengths"], inputs["units"], key)
    program = read.lower(*arguments).compile()
    logits, cache = program(*arguments[1:])
    found, caches, texts = [np.asarray(logits)], [cache], [program.as_text()]
    program = step.lower(policy, params, tokens[0], cache, key).compile()
    texts.append(program.as_text())
    for token in tokens:
        logits, cache = program(params, token, cache, key)
        found.append(np.asarray(logits))
    return found, [*caches, cache], texts


def largest_moved(text, names="all-gather|all-to-all|collective-permute|reduce-scatter"):
    """Elements of the largest array that a collective other than a sum moves."""
    shapes = re.findall(rf"= \(?\w+\[([\d,]*)\][^=]*? (?:{names})(?:-start)?\(", text)
    return max((int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes), default=0)


def control(mesh):
    """What is counted where keys of all heads are wanted on every device, and how many they are."""
    keys = jax.ShapeDtypeStruct((B, CONFIG.kv_heads, T, CONFIG.head_dim), jnp.float32)
    cut, whole = (jax.NamedSharding(mesh, jax.P(None, heads)) for heads in ("tensor", None))
    moved = jax.jit(lambda x: x + 1, in_shardings=cut, out_shardings=whole).lower(keys).compile().as_text()
    return largest_moved(moved), int(np.prod(keys.shape))


def kept(caches):
    return [np.asarray(state.kept_positions) for cache in caches for state in cache.layers]


def held(cache):
    """Bytes of keys and values on the device that has most of them."""
    arrays = jax.tree.leaves([(state.k, state.v) for state in cache.layers])
    return sum(max(shard.data.nbytes for shard in x.addressable_shards) for x in arrays)


def compare(kv, params, sizes):
    policy = parse(kv, layers=CONFIG.layers)
    mesh = make_mesh(**sizes, devices=jax.devices()[:4])
    # Heads of a device share its part of a budget: on one device, as many parts.
    with mock.patch("jaxfw.kv.pool.shards_of", lambda heads: sizes["tensor"]):
        expected, whole, _ = calls(policy, params)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings(decoder_rules(CONFIG), mesh, params))
        ours, caches, texts = calls(policy, placed, mesh)
    places = cache_shardings(mesh, caches[1])
    laid_out = jax.tree.map(
        lambda x, place: x.ndim < 3 or x.sharding.is_equivalent_to(place, x.ndim), caches[1], places
    )
    return {
        "error": max(float(np.abs(a - b).max()) for a, b in zip(ours, expected, strict=True)),
        "kept": all(np.array_equal(a, b) for a, b in zip(kept(caches), kept(whole), strict=True)),
        "share": held(caches[1]) / held(whole[1]),
        "laid out": all(jax.tree.leaves(laid_out)),
        "moved": [largest_moved(text) for text in texts],
        "summed": largest_moved(texts[1], "all-reduce"),  # of a decode step; a prompt's are wider than its keys
        "keys": sum(x.size for x in jax.tree.leaves(whole[1].layers[0].k)),
    }


if __name__ == "__main__":
    weights = jax.jit(init, static_argnums=0)(CONFIG, jax.random.key(0))
    # On the second mesh, one of each kind: what differs there are the rows.
    chosen = METHODS + PACKED[1:] if sys.argv[1] == "tensor=4" else METHODS[:-1:5] + METHODS[-1:] + PACKED
    cases = {kv: compare(kv, weights, MESHES[sys.argv[1]]) for kv in chosen}
    moved = control(make_mesh(**MESHES[sys.argv[1]], devices=jax.devices()[:4]))
    print(json.dumps({"control": moved, "cases": cases}))
