"""Training on eight devices beside one: what tests/test_train_mesh.py compares, in a process that has them.

Two batches make an update, the gradient's norm is clipped, the parameters are averaged. The gradients compared are
those that accumulate: behind an odd step they are of that step's batch alone. AdamW divides by the root of its second
moment, which for gradients near 0 turns float noise into whole updates; an eps of the size of the clipped gradients
(1e-4) leaves an error of the updates near that of the gradients, and the optimiser is AdamW all the same.
"""

import dataclasses
import functools
import json
import sys

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxfw.core.mesh import make_mesh
from jaxfw.core.sharding import shardings, state_shardings, table
from jaxfw.models import DecoderConfig, MoEConfig, init
from jaxfw.models.routing import ExpertParallel, Sorted
from jaxfw.models.sharding import ROUTER_STATES, batch_shardings, decoder_rules
from jaxfw.train import NextTokenLoss, OptimizerConfig, init_state, make_optimizer, make_step
from jaxfw.train.average import averaged_params

B, T, STEPS = 8, 6, 5
DENSE = DecoderConfig(
    vocab=40, width=32, ffn=48, layers=1, heads=8, kv_heads=8, head_dim=4, positions=16, mlp_bias=True
)
MIXED = dataclasses.replace(DENSE, mlp_bias=False, tie_embeddings=True, moe=MoEConfig(experts=4, per_token=2, ffn=16))
MESHES = {
    "data=8": (DENSE, None, dict(data=8)),
    "fsdp=8": (DENSE, None, dict(fsdp=8)),
    "tensor=8": (DENSE, None, dict(tensor=8)),
    "data=2,fsdp=2,tensor=2": (MIXED, Sorted(), dict(data=2, fsdp=2, tensor=2)),
    "data=2,expert=4": (MIXED, ExpertParallel(), dict(data=2, expert=4)),
    "fsdp=2,tensor=2,expert=2": (MIXED, ExpertParallel(), dict(fsdp=2, tensor=2, expert=2)),
}
OPTIMIZER = OptimizerConfig(
    learning_rate=0.02, warmup=1, schedule="constant", eps=1e-4, clip_norm=0.3, accumulate=2, average=0.5
)
MUON = dataclasses.replace(OPTIMIZER, kind="muon", accumulate=1)


def params_of(config):
    """Parameters with every bias and norm scale moved off its neutral value."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    return jax.tree.map(lambda x: np.float32((x.ndim == 1) + 0.3 * rng.standard_normal(x.shape)), shapes)


def batches(step):
    """Rows of unequal weight: a mean of the devices' means would be another loss."""
    rng = np.random.default_rng(step)
    weights = rng.uniform(0, 1, (B, T + 1)) * np.linspace(0.1, 1, B)[:, None]
    return {"tokens": rng.integers(0, DENSE.vocab, (B, T + 1), np.int32), "weights": np.float32(weights)}


def run(step, state, place):
    """`STEPS` steps from `state`: {what: whole arrays}; then the state itself."""
    found = {}
    for number in range(1, STEPS + 1):
        state, metrics = step(state, place(batches(number)), jax.random.key(0))
        found[f"loss {number}"], found[f"norm {number}"] = metrics["train/loss"], metrics["train/grad_norm"]
        if number % 2:
            found[f"gradients {number}"] = jax.device_get(state.opt_state.acc_grads)
        else:
            found[f"parameters {number}"] = jax.device_get(state.params)
    found["average"] = averaged_params(state.opt_state)
    return jax.device_get(found), state


def loss_of(config, experts):
    return NextTokenLoss(config, experts=experts, router_losses=(("balance", 0.1), ("z", 0.01)) if config.moe else ())


def alone(config):
    """One device, without a mesh."""
    optimizer = make_optimizer(OPTIMIZER, steps=2 * STEPS)
    step = make_step(loss_of(config, Sorted() if config.moe else None), optimizer)
    return run(step, jax.jit(functools.partial(init_state, optimizer=optimizer))(params_of(config)), lambda x: x)[0]


def on_mesh(config, experts, mesh, expected):
    """Errors against one device, and what lies where."""
    optimizer, rules, params = make_optimizer(OPTIMIZER, steps=2 * STEPS), decoder_rules(config), params_of(config)
    places = shardings(rules, mesh, params)
    start = functools.partial(init_state, optimizer=optimizer)
    layout = state_shardings(places, params, jax.eval_shape(start, params), rules=ROUTER_STATES)
    with jax.set_mesh(mesh):
        state = jax.jit(start, out_shardings=layout)(jax.device_put(params, places))
        step = make_step(loss_of(config, experts), optimizer)
        found, after = run(step, state, lambda batch: jax.device_put(batch, batch_shardings(mesh, batch)))
    moved = jax.tree_util.tree_leaves_with_path(
        jax.tree.map(lambda x, place: not x.sharding.is_equivalent_to(place, x.ndim), after, layout)
    )
    return {
        "errors": {name: error(found[name], expected[name]) for name in expected},
        "norms": [float(found[f"norm {n}"]) for n in (1, 3, 5)],
        "norms in numpy": [norm(found[f"gradients {n}"]) for n in (1, 3, 5)],
        "moved": [jax.tree_util.keystr(path) for path, is_moved in moved if is_moved],
        "state": held(after.opt_state),
        "whole state": sum(leaf.nbytes for leaf in jax.tree.leaves(after.opt_state)),
        "parameters": table(rules, mesh, params).bytes_per_device,
    }


def orthogonalised(config, mesh):
    """An update by Muon of random gradients: its iterations multiply matrices that are cut both ways."""
    optimizer, params = make_optimizer(MUON, steps=4), params_of(config)
    rng = np.random.default_rng(3)
    grads = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), params)
    places = shardings(decoder_rules(config), mesh, params)
    layout = state_shardings(places, params, jax.eval_shape(optimizer.init, params))

    def change(grads, params):
        return optimizer.update(grads, optimizer.init(params), params)

    expected = jax.jit(change)(grads, params)[0]
    with jax.set_mesh(mesh):
        whole = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), params)
        found = jax.jit(change, out_shardings=(whole, layout))(*jax.device_put((grads, params), (places, places)))[0]
    return error(found, expected)


def error(ours, theirs):
    """Of every leaf, the largest difference in units of its largest value; the worst of them."""

    def of(ours, theirs):
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        assert np.abs(theirs).max() > 0
        return float(np.abs(ours - theirs).max() / np.abs(theirs).max())

    return max(jax.tree.leaves(jax.tree.map(of, ours, theirs)))


def norm(tree):
    return float(np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(tree))))


def held(tree):
    """The most bytes of `tree` on any device."""
    totals = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            totals[shard.device] = totals.get(shard.device, 0) + shard.data.nbytes
    return max(totals.values())


def main(names):
    expected = {config: alone(config) for config in (DENSE, MIXED)}
    report = {
        name: on_mesh(config, experts, make_mesh(**sizes), expected[config])
        for name, (config, experts, sizes) in MESHES.items()
        if not names or name in names
    }
    report["muon"] = orthogonalised(MIXED, make_mesh(fsdp=2, tensor=2, expert=2))
    print(json.dumps(report, default=float))


if __name__ == "__main__":
    main(sys.argv[1:])
