"""A program for eight devices: for each cache policy, how far the named mesh is from one device, and what it holds.

Run by tests/test_cache_mesh.py in a process of its own, as jax fixes the number of its devices when it starts.
"""

import functools
import json
import os
import re
import sys

if __name__ == "__main__":  # whatever imports this (doctests, other tests) keeps its own devices
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np

from jaxfw.core.mesh import make_mesh
from jaxfw.core.sharding import shardings
from jaxfw.models import DecoderConfig, forward, init
from jaxfw.models.cache import FullCache, Int8Cache, RandomCache, RingCache
from jaxfw.models.sharding import batch_shardings, cache_shardings, decoder_rules
from tests.cache_page import page_module

CONFIG = DecoderConfig(
    vocab=64, width=32, ffn=48, layers=2, heads=8, kv_heads=4, head_dim=8, positions=128, init_std=0.3
)
POLICIES = (FullCache(), RingCache(6), RandomCache(6), Int8Cache(), page_module().SinkCache(2, 4))
MESHES = {"tensor=4": dict(tensor=4), "data=2,tensor=4": dict(data=2, tensor=4)}
B, ROOM = 4, 32
TEXT = np.random.default_rng(0).integers(0, CONFIG.vocab, (B, 24), np.int32)
# A prompt, a token, several tokens: widths and lengths.
CALLS = ((16, (9, 4, 1, 16)), (1, (1, 1, 1, 1)), (5, (5, 2, 0, 3)))


@functools.partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
def run(policy, params, tokens, lengths, key, cache=None):
    out = forward(CONFIG, params, tokens, lengths=lengths, policy=policy, cache=cache, room=ROOM, key=key)
    valid = jnp.arange(tokens.shape[1]) < lengths[:, None]
    return jnp.where(valid[..., None], out.logits, 0), out.cache


def calls(policy, params, mesh=None):
    """The logits of each call, the caches, and the text of the compiled programs."""
    logits, caches, programs, cache = [], [], [], None
    for width, lengths in CALLS:
        inputs = {"tokens": TEXT[:, :width], "lengths": np.array(lengths, np.int32)}
        if mesh is not None:
            inputs = jax.device_put(inputs, batch_shardings(mesh, inputs))
        arguments = (params, inputs["tokens"], inputs["lengths"], jax.random.key(1), cache)
        program = run.lower(policy, *arguments).compile()
        out, cache = program(*arguments)
        programs.append(program.as_text())
        logits.append(np.asarray(out))
        caches.append(cache)
    return logits, caches, programs


def is_laid_out(mesh, cache):
    """Whether each array of three axes or more lies as `cache_shardings` says."""
    places = cache_shardings(mesh, cache)
    same = jax.tree.map(lambda x, place: x.ndim < 3 or x.sharding.is_equivalent_to(place, x.ndim), cache, places)
    return all(jax.tree.leaves(same))


def held(cache):
    """Bytes of the arrays of three axes or more on the device that has most of them."""
    leaves = [x for x in jax.tree.leaves(cache) if x.ndim >= 3]
    return sum(max(shard.data.nbytes for shard in x.addressable_shards) for x in leaves)


def compare(policy, params, sizes):
    mesh = make_mesh(**sizes, devices=jax.devices()[: int(np.prod(list(sizes.values())))])
    expected, whole, _ = calls(policy, params)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings(decoder_rules(CONFIG), mesh, params))
        ours, caches, programs = calls(policy, placed, mesh)
    moved = re.findall(r"(all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", "".join(programs))
    return {
        "errors": [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(ours, expected)],
        "whole": [held(cache) for cache in whole],
        "held": [held(cache) for cache in caches],
        "laid out": [is_laid_out(mesh, cache) for cache in caches],
        "moved": sorted(set(moved)),
    }


if __name__ == "__main__":
    weights = jax.jit(init, static_argnums=0)(CONFIG, jax.random.key(0))
    found = {str(policy): compare(policy, weights, MESHES[sys.argv[1]]) for policy in POLICIES}
    print(json.dumps(found))
