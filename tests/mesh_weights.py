"""A program for eight devices: what is loaded onto a mesh lies by the rules and is what one device holds.

Run by tests/test_weights_mesh.py in a process of its own; prints a report for each case.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":  # the test that imports the cases keeps its own devices
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np

from jaxfw.core.mesh import make_mesh
from jaxfw.core.sharding import shardings
from jaxfw.models import DecoderConfig, MoEConfig, forward
from jaxfw.models.sharding import decoder_rules
from jaxfw.weights import abstract_params, device_bytes, load, save

LLAMA = DecoderConfig(vocab=64, width=32, ffn=48, layers=1, heads=4, kv_heads=2, head_dim=8, positions=16, init_std=0.3)
GPT2 = dataclasses.replace(
    LLAMA, kv_heads=4, tie_embeddings=True, rope=None, learned_positions=True, norm="layer", norm_eps=1e-5,
    activation="gelu_tanh", gated=False, qkv_bias=True, out_bias=True, mlp_bias=True,
)  # fmt: skip
MIXTRAL = dataclasses.replace(LLAMA, moe=MoEConfig(experts=4, per_token=2, ffn=48, renormalize=True))
CASES = {
    "llama, tensor=2": (LLAMA, dict(tensor=2), None),
    "llama, fsdp=4, tensor=2": (LLAMA, dict(fsdp=4, tensor=2), None),
    "gpt2, fsdp=2, tensor=2": (GPT2, dict(fsdp=2, tensor=2), None),
    "mixtral, expert=2, tensor=2": (MIXTRAL, dict(expert=2, tensor=2), None),
    "llama, int8, tensor=2": (LLAMA, dict(tensor=2), "int8"),
    "llama, int4, tensor=2": (LLAMA, dict(tensor=2), "int4"),
    "llama, int4, fsdp=2, tensor=2": (LLAMA, dict(fsdp=2, tensor=2), "int4"),
    "mixtral, int4, expert=2, tensor=2": (MIXTRAL, dict(expert=2, tensor=2), "int4"),
    "gpt2, int8, data=2, tensor=4": (GPT2, dict(data=2, tensor=4), "int8"),
}


def numbers(config):
    """Parameters that differ everywhere."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: np.float32((x.ndim == 1) + 0.3 * rng.standard_normal(x.shape)), abstract_params(config)
    )


def logits(model, tokens):
    return jax.jit(lambda params, tokens: forward(model.config, params, tokens).logits)(model.params, tokens)


def is_equal(a, b):
    return a.dtype == b.dtype and np.array_equal(a, b)


def lies_at(x, place):
    return x.sharding.is_equivalent_to(place, x.ndim)


def compare(folder, config, sizes, quantise):
    """What is loaded onto a mesh beside what one device loads."""
    mesh = make_mesh(**sizes, devices=jax.devices()[: int(np.prod(list(sizes.values())))])
    tokens = np.arange(16, dtype=np.int32).reshape(2, 8)
    whole, cut = load(folder, quantise=quantise), load(folder, quantise=quantise, mesh=mesh)
    places = shardings(decoder_rules(config), mesh, cut.params)
    with jax.set_mesh(mesh):
        found = logits(cut, tokens)
    expected = np.asarray(logits(whole, tokens))
    held = {}
    for leaf in jax.tree.leaves(cut.params):
        for shard in leaf.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return {
        "equal": jax.tree.all(jax.tree.map(is_equal, whole.params, cut.params)),
        "as ruled": jax.tree.all(jax.tree.map(lies_at, cut.params, places)),
        "logits": float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()),
        "held": sorted(set(held.values())),
        "predicted": device_bytes(config, mesh=mesh, quantise=quantise),
        "whole": sum(leaf.nbytes for leaf in jax.tree.leaves(whole.params)),
        "predicted whole": device_bytes(config, quantise=quantise),
    }  # fmt: skip


def main(folder):
    """All cases, and a model that goes from a mesh to a directory again."""
    report, folders = {}, {}
    for name, (config, sizes, quantise) in CASES.items():
        if config not in folders:
            folders[config] = save(Path(folder) / str(len(folders)), config, numbers(config))
        report[name] = compare(folders[config], config, sizes, quantise)
    for config, directory in folders.items():
        cut = load(directory, mesh=make_mesh(fsdp=2, expert=2, tensor=2))
        again = save(directory.with_name(f"{directory.name}-again"), config, cut.params)
        report[f"saved {directory.name}"] = all(
            (again / path.name).read_bytes() == path.read_bytes() for path in directory.iterdir()
        )
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1])
