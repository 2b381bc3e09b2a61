"""The loss in chunks on eight devices: run by tests/test_chunked_loss.py in a process that has them."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxfw.core import hlo
from jaxfw.core.mesh import BATCH_AXES, fit, make_mesh
from jaxfw.ops.losses import summed_nll

B, T, D, V, CHUNK = 8, 24, 16, 64, 6
RNG = np.random.default_rng(0)
TARGETS, WEIGHTS = RNG.integers(0, V, (B, T), np.int32), RNG.random((B, T)).astype(np.float32)
X = RNG.normal(size=(B, T, D)).astype(np.float32)
GRADED = jax.value_and_grad(functools.partial(summed_nll, chunk=CHUNK), (0, 1))


@pytest.mark.parametrize("sizes", [dict(fsdp=8), dict(data=2, fsdp=2, tensor=2)], ids=str)
@pytest.mark.parametrize("vocab", [V, 41])
def test_one_device_and_what_moves(sizes, vocab):
    """The matrix is gathered once and its gradient summed once; in each chunk, only sums over `tensor`."""
    matrix = RNG.normal(size=(vocab, D)).astype(np.float32)
    targets = TARGETS % vocab
    expected = jax.jit(GRADED)(X, matrix, targets, WEIGHTS)
    mesh = make_mesh(**sizes)
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, P(BATCH_AXES))
        places = NamedSharding(mesh, fit(mesh.shape, matrix.shape, ("tensor", "fsdp")))
        layout = (rows, places, rows, rows)
        run = jax.jit(GRADED, in_shardings=layout, out_shardings=(None, (rows, places)))
        program = run.lower(X, matrix, targets, WEIGHTS).compile()
        got = program(*jax.device_put((X, matrix, targets, WEIGHTS), layout))
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert np.abs(np.asarray(ours) - theirs).max() <= 1e-5 * np.abs(theirs).max()
    shards = sizes.get("data", 1) * sizes.get("fsdp", 1)
    in_chunks = [c for c in hlo.collectives(program.as_text()) if c.times > 1]
    cut = sizes.get("tensor", 1) > 1 and vocab == V
    assert bool(in_chunks) == cut
    assert all(c.kind == "all-reduce" and c.bytes <= 4 * B // shards * T // 4 * D for c in in_chunks)
