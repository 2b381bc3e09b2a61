"""What one process and several must agree on: logits of a small decoder, and two training steps that make an update."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxfw.core.mesh import make_mesh
from jaxfw.core.sharding import shardings, state_shardings
from jaxfw.models import DecoderConfig, forward, init
from jaxfw.models.sharding import batch_shardings, decoder_rules
from jaxfw.train import NextTokenLoss, OptimizerConfig, init_state, make_optimizer, make_step
from jaxfw.train.average import averaged_params

B, T = 4, 8
CONFIG = DecoderConfig(
    vocab=48, width=16, ffn=24, layers=1, heads=4, kv_heads=4, head_dim=4, positions=64, init_std=0.3
)
OPTIMIZER = make_optimizer(
    OptimizerConfig(learning_rate=0.01, warmup=0, eps=1e-4, clip_norm=0.1, accumulate=2, average=0.9), steps=4
)
# Two processes of two devices each: the first mesh is cut between processes by rows, the second by heads and widths.
MESHES = {"data=2,tensor=2": dict(data=2, tensor=2), "tensor=4": dict(tensor=4)}


def params_of():
    """Parameters from numpy, the same in every process."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda: init(CONFIG, jax.random.key(0)))
    return jax.tree.map(lambda x: np.float32((x.ndim == 1) + 0.3 * rng.standard_normal(x.shape)), shapes)


def tokens(step):
    """Other windows each step."""
    return np.random.default_rng(2 + step).integers(0, CONFIG.vocab, (B, T + 1), np.int32)


def place(tree, places):
    """Every process has all of `tree`, and puts the parts of its devices there."""
    return jax.tree.map(
        lambda x, at: jax.make_array_from_callback(np.shape(x), at, lambda index: x[index]), tree, places
    )


def trained(state, place_tokens):
    """The metrics of both steps, and the parameters and their average behind the update that they make."""
    step, metrics = make_step(NextTokenLoss(CONFIG), OPTIMIZER), [{}, {}]
    for number in range(2):
        state, metrics[number] = step(state, {"tokens": place_tokens(tokens(number))}, jax.random.key(0))
    return metrics, state.params, averaged_params(state.opt_state)


def on_one():
    """The answers of one device."""
    params = params_of()
    logits = jax.jit(functools.partial(forward, CONFIG))(params, tokens(0)[:, :-1]).logits
    return _named(logits, trained(init_state(jax.tree.map(jnp.asarray, params), OPTIMIZER), jnp.asarray))


def on_mesh(name, out: Path):
    """The answers of all devices of all processes, gathered on each."""
    mesh = make_mesh(**MESHES[name])
    params, whole = params_of(), NamedSharding(mesh, PartitionSpec())
    places = shardings(decoder_rules(CONFIG), mesh, params)
    start = functools.partial(init_state, optimizer=OPTIMIZER)
    layout = state_shardings(places, params, jax.eval_shape(start, params))
    with jax.set_mesh(mesh):
        placed = place(params, places)
        run = jax.jit(lambda params, tokens: forward(CONFIG, params, tokens).logits, out_shardings=whole)
        logits = run(placed, own_rows(mesh, tokens(0))[:, :-1])
        found = trained(jax.jit(start, out_shardings=layout)(placed), functools.partial(own_rows, mesh))
        gathered = jax.jit(lambda tree: tree, out_shardings=whole)(found)
    return _named(logits, gathered)


def own_rows(mesh, rows):
    """Each process gives the rows of its own devices only."""
    sharding = batch_shardings(mesh, rows)
    taken = sharding.addressable_devices_indices_map(rows.shape).values()
    first, last = min(index[0].start or 0 for index in taken), max(index[0].stop or len(rows) for index in taken)
    return jax.make_array_from_process_local_data(sharding, rows[first:last], rows.shape)


def _named(logits, found):
    """Arrays by path; the number of a bad leaf, -1 for none, compares as any other."""
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(found)}
    return {name: np.asarray(value) for name, value in ({"logits": logits} | leaves).items()}
