"""A program for eight devices: each case prints how far it is from one device, and what each device holds.

Run by tests/test_sharding.py in a process of its own, as jax fixes the number of its devices when it starts.
"""

import dataclasses
import functools
import json
import os

if __name__ == "__main__":  # whatever imports this (doctests, other tests) keeps its own devices
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jaxfw.core.mesh import make_mesh
from jaxfw.core.sharding import shardings, state_shardings, table
from jaxfw.models import DecoderConfig, MoEConfig, forward, init, stack_layers
from jaxfw.models.cache import FullCache
from jaxfw.models.routing import Dense, ExpertParallel, Sorted
from jaxfw.models.sharding import batch_shardings, cache_shardings, decoder_rules
from jaxfw.ops.losses import token_log_probs
from jaxfw.train.step import Aux, init_state, update

B, T = 8, 6
# Sizes that do not divide: a vocabulary of 41, 2 key heads on 8 devices, 6 experts on 4.
SMALL = DecoderConfig(
    vocab=41, width=32, ffn=24, layers=2, heads=8, kv_heads=2, head_dim=4, positions=64, init_std=0.3,
    qkv_bias=True, out_bias=True, mlp_bias=True,
)  # fmt: skip
DENSE = dataclasses.replace(SMALL, layers=1)
MIXED = dataclasses.replace(SMALL, moe=MoEConfig(experts=6, per_token=2, ffn=16, first=1))
PLAIN = dataclasses.replace(SMALL, layers=1, kv_heads=4, tie_embeddings=True)
MESHES = {
    "tensor=8": (DENSE, None, dict(tensor=8)),
    "fsdp=8": (DENSE, None, dict(fsdp=8)),
    "data=8": (DENSE, None, dict(data=8)),
    "data=2,fsdp=2,tensor=2": (MIXED, Sorted(), dict(data=2, fsdp=2, tensor=2)),
    "data=2,expert=4": (MIXED, ExpertParallel(), dict(data=2, expert=4)),
    "fsdp=2,tensor=2,expert=2": (MIXED, ExpertParallel(), dict(fsdp=2, tensor=2, expert=2)),
}
# Compiling is most of what this takes, and compiles fastest unoptimised.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def params_of(config):
    """Parameters with every bias and norm scale moved off its neutral value."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    return jax.tree.map(lambda x: np.float32((x.ndim == 1) + 0.3 * rng.standard_normal(x.shape)), shapes)


def rows(batch):
    """Padded rows, one of them full."""
    rng = np.random.default_rng(batch)
    lengths = rng.integers(1, T + 1, batch, np.int32)
    lengths[0] = T
    return {"tokens": rng.integers(0, SMALL.vocab, (batch, T), np.int32), "lengths": lengths}


def loss_of(config, experts, params, batch):
    """Mean over predicted valid tokens, and the logits of valid tokens."""
    out = forward(config, params, batch["tokens"], lengths=batch["lengths"], experts=experts)
    valid = jnp.arange(T) < batch["lengths"][:, None]
    nll = -token_log_probs(out.logits[:, :-1], batch["tokens"][:, 1:])
    return jnp.sum(nll * valid[:, 1:]) / jnp.sum(valid[:, 1:]), jnp.where(valid[..., None], out.logits, 0)


def values(config, experts, params, batch, **options):
    """(loss, logits), gradients."""
    f = functools.partial(loss_of, config, experts)
    return jit(jax.value_and_grad(f, has_aux=True), **options)(params, batch)


def error(ours, theirs):
    """Of every leaf, the largest difference in units of its largest value; the worst of them."""

    def of(ours, theirs):
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        assert np.abs(theirs).max() > 0
        return float(np.abs(ours - theirs).max() / np.abs(theirs).max())

    return max(jax.tree.leaves(jax.tree.map(of, ours, theirs)))


def held(tree):
    """Bytes of `tree` on each device, all equal."""
    totals = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            totals[shard.device] = totals.get(shard.device, 0) + shard.data.nbytes
    assert len(set(totals.values())) == 1, totals
    return next(iter(totals.values()))


def same_layout(ours, wanted):
    """Whether every array lies as wanted."""
    return all(
        jax.tree.leaves(jax.tree.map(lambda x, sharding: x.sharding.is_equivalent_to(sharding, x.ndim), ours, wanted))
    )


def compare(config, experts, mesh, batch, params, expected):
    """One forward and backward on a mesh beside what one device says."""
    rules = decoder_rules(config)
    places = shardings(rules, mesh, params)
    placed = jax.device_put(params, places)
    with jax.set_mesh(mesh):
        replicated = NamedSharding(mesh, PartitionSpec())
        inputs = jax.device_put(batch, batch_shardings(mesh, batch))
        got = values(config, experts, placed, inputs, out_shardings=((replicated, replicated), places))
    (loss, logits), grads = got
    return {
        "loss": error(loss, expected[0][0]),
        "logits": error(logits, expected[0][1]),
        "gradients": error(grads, expected[1]),
        "held": held(placed),
        "table": table(rules, mesh, params).bytes_per_device,
        "whole": sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
        "gradients held": held(grads),
    }


def train(mesh):
    """Two steps of Adam with its state laid out as the parameters are."""
    config, optimizer = PLAIN, optax.adamw(0.01)
    params, batch = params_of(config), rows(B)

    def loss(params, batch, key, *, state):
        return loss_of(config, None, params, batch)[0], Aux({}, state)

    def run(state, batch, **options):
        step = jit(functools.partial(update, loss, optimizer), **options)
        for _ in range(2):
            state, metrics = step(state, batch, jax.random.key(0))
        return metrics["train/loss"], state

    expected, _ = run(init_state(params, optimizer), batch)
    places = shardings(decoder_rules(config), mesh, params)
    state = jax.eval_shape(lambda: init_state(params, optimizer))
    layout = state_shardings(places, params, state)
    with jax.set_mesh(mesh):
        placed = jax.device_put(init_state(params, optimizer), layout)
        got, after = run(placed, jax.device_put(batch, batch_shardings(mesh, batch)), out_shardings=(layout, None))
    table_bytes = table(decoder_rules(config), mesh, params).bytes_per_device
    return {"loss": error(got, expected), "held": held(after), "table": table_bytes}


def decode(meshes):
    """A prompt and one more token through a full cache; nothing says how the caches are to lie."""
    config, policy, room = PLAIN, FullCache(), 8
    params, batch = params_of(config), rows(B)
    one = {"tokens": batch["tokens"][:, :1], "lengths": np.ones(B, np.int32)}

    def run(params, batch, one):
        @functools.partial(jit, static_argnames="room")
        def call(params, batch, cache=None, room=None):
            return forward(
                config, params, batch["tokens"], lengths=batch["lengths"], policy=policy, cache=cache, room=room
            )

        first = call(params, batch, room=room)
        second = call(params, one, first.cache)
        return second.logits, first.cache, second.cache

    expected, whole, _ = run(params, batch, one)
    report = {}
    for name, mesh in meshes.items():
        placed = jax.device_put(params, shardings(decoder_rules(config), mesh, params))
        with jax.set_mesh(mesh):
            got, first, second = run(placed, *jax.device_put((batch, one), batch_shardings(mesh, (batch, one))))
        wanted = cache_shardings(mesh, whole)
        report[name] = {
            "logits": error(got, expected),
            "cache": error(first, whole),
            "as wanted": [same_layout(cache, wanted) for cache in (first, second)],
            "held": [held(first), held(second)],
            "whole": whole.nbytes,
            "seen": whole.seen.nbytes * config.layers,
        }
    return report


def main():
    params, batch = {config: params_of(config) for config in (DENSE, MIXED)}, rows(B)
    expected = {
        config: values(config, Dense() if config.moe else None, params[config], batch) for config in (DENSE, MIXED)
    }
    report = {
        name: compare(config, experts, make_mesh(**sizes), batch, params[config], expected[config])
        for name, (config, experts, sizes) in MESHES.items()
    }
    mixed = make_mesh(data=2, fsdp=2, tensor=2)
    params, batch = stack_layers(params_of(SMALL)), rows(6)
    report["stacked, 6 rows"] = compare(SMALL, None, mixed, batch, params, values(SMALL, None, params, batch))
    report["train"] = train(mixed)
    report |= decode(
        {
            "decode, tensor=4": make_mesh(tensor=4, devices=jax.devices()[:4]),
            "decode, data=2,tensor=4": make_mesh(data=2, tensor=4),
        }
    )
    print(json.dumps(report))


if __name__ == "__main__":
    main()
