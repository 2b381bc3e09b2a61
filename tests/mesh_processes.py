"""What one process and several must agree on: logits, a training step and generated tokens of a small decoder."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jaxfw.core.mesh import make_mesh
from jaxfw.core.sharding import shardings, state_shardings
from jaxfw.models import DecoderConfig, forward, init
from jaxfw.models.sharding import batch_shardings, decoder_rules
from jaxfw.train import NextTokenLoss, init_state, make_step

B, T = 4, 8
CONFIG = DecoderConfig(
    vocab=48, width=16, ffn=24, layers=1, heads=4, kv_heads=4, head_dim=4, positions=64, init_std=0.3
)
OPTIMIZER = optax.adamw(0.01)
# Two processes of two devices each: the first mesh is cut between processes by rows, the second by heads and widths.
MESHES = {"data=2,tensor=2": dict(data=2, tensor=2), "tensor=4": dict(tensor=4)}


def params_of():
    """Parameters from numpy, the same in every process."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda: init(CONFIG, jax.random.key(0)))
    return jax.tree.map(lambda x: np.float32((x.ndim == 1) + 0.3 * rng.standard_normal(x.shape)), shapes)


def tokens():
    """Two windows of the same rows."""
    return np.random.default_rng(2).integers(0, CONFIG.vocab, (B, T + 1), np.int32)


def place(tree, places):
    """Every process has all of `tree`, and puts the parts of its devices there."""
    return jax.tree.map(
        lambda x, at: jax.make_array_from_callback(np.shape(x), at, lambda index: x[index]), tree, places
    )


def trained(state, batch, **options):
    """One update's state and metrics."""
    return make_step(NextTokenLoss(CONFIG), OPTIMIZER)(state, batch, jax.random.key(0))


def on_one():
    """The answers of one device."""
    params, batch = params_of(), {"tokens": tokens()}
    logits = jax.jit(functools.partial(forward, CONFIG))(params, batch["tokens"][:, :-1]).logits
    state, metrics = trained(init_state(jax.tree.map(jnp.asarray, params), OPTIMIZER), batch)
    return _named(logits, metrics, state.params)


def on_mesh(name, out: Path):
    """The answers of all devices of all processes, gathered on each."""
    mesh = make_mesh(**MESHES[name])
    params, whole = params_of(), NamedSharding(mesh, PartitionSpec())
    places = shardings(decoder_rules(CONFIG), mesh, params)
    shapes = jax.eval_shape(lambda: init_state(params, OPTIMIZER))
    layout = state_shardings(places, params, shapes)
    with jax.set_mesh(mesh):
        placed, batch = place(params, places), {"tokens": own_rows(mesh, tokens())}
        run = jax.jit(lambda params, tokens: forward(CONFIG, params, tokens).logits, out_shardings=whole)
        logits = run(placed, batch["tokens"][:, :-1])
        state = jax.jit(functools.partial(init_state, optimizer=OPTIMIZER), out_shardings=layout)(placed)
        state, metrics = trained(state, batch)
        gathered = jax.jit(lambda tree: tree, out_shardings=whole)((metrics, state.params))
    return _named(logits, *gathered)


def own_rows(mesh, rows):
    """Each process gives the rows of its own devices only."""
    sharding = batch_shardings(mesh, rows)
    taken = sharding.addressable_devices_indices_map(rows.shape).values()
    first, last = min(index[0].start or 0 for index in taken), max(index[0].stop or len(rows) for index in taken)
    return jax.make_array_from_process_local_data(sharding, rows[first:last], rows.shape)


def _named(logits, metrics, params):
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path((metrics, params))}
    return {name: np.asarray(value) for name, value in ({"logits": logits} | leaves).items()}
