"""Three training steps of a small model over every device of every process: try a cluster with it first."""

from jaxfw.core.distributed import barrier, join

processes = join()  # before anything touches a device

import jax  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

from jaxfw.core.mesh import make_mesh  # noqa: E402
from jaxfw.core.sharding import shardings, state_shardings  # noqa: E402
from jaxfw.models import DecoderConfig, init  # noqa: E402
from jaxfw.models.sharding import batch_shardings, decoder_rules  # noqa: E402
from jaxfw.train import NextTokenLoss, init_state, make_step  # noqa: E402

config = DecoderConfig(vocab=256, width=64, ffn=128, layers=1, heads=4, kv_heads=4, head_dim=16, positions=64)
optimizer = optax.adamw(1e-2)
mesh = make_mesh(data=jax.device_count())

with jax.set_mesh(mesh):
    # Parameters and optimiser are made where they live: no process ever holds what its devices do not.
    fresh = lambda: init_state(init(config, jax.random.key(0)), optimizer)  # noqa: E731
    shapes = jax.eval_shape(fresh)
    layout = state_shardings(shardings(decoder_rules(config), mesh, shapes.params), shapes.params, shapes)
    state = jax.jit(fresh, out_shardings=layout)()

    # Here each process reads its own rows of the global batch: row r is the same whoever reads it.
    rows_here = 4 * jax.local_device_count()
    first = rows_here * processes.index
    rows = np.stack([np.random.default_rng(row).integers(0, 256, 33) for row in range(first, first + rows_here)])
    shape = (rows_here * processes.count, 33)
    sharding = batch_shardings(mesh, jax.ShapeDtypeStruct(shape, "int32"))
    batch = {"tokens": jax.make_array_from_process_local_data(sharding, rows.astype("int32"), shape)}

    step = make_step(NextTokenLoss(config), optimizer)
    losses = []
    for _ in range(3):
        state, metrics = step(state, batch, jax.random.key(1))
        losses.append(float(metrics["train/loss"]))

if processes.is_main:
    print(f"{jax.device_count()} devices of {processes.count} processes: loss " + ", ".join(f"{x:.4f}" for x in losses))
barrier("done")
