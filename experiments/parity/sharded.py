"""The same logits on a mesh of four devices, in a process of its own: jax fixes the number of devices as it starts.

Parameters are loaded straight to where the rules of `jaxfw.models.sharding` lay them.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.parity.case import Oracle
from jaxfw.core.mesh import make_mesh
from jaxfw.models import forward
from jaxfw.models.sharding import batch_shardings
from jaxfw.weights import load

MESH = {"fsdp": 2, "tensor": 2}


def sharded_errors(oracles: Mapping[str, Oracle]) -> list[dict[str, Any]]:
    """For each case: its error of logits on the mesh, and the share of all parameter bytes that each device holds."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    with tempfile.TemporaryDirectory() as folder:
        for i, oracle in enumerate(oracles.values()):
            oracle.model.save_pretrained(Path(folder, f"{i:02d}"))
            np.savez(Path(folder, f"{i:02d}.npz"), tokens=oracle.tokens, lengths=oracle.lengths)
        done = subprocess.run(
            [sys.executable, "-m", "experiments.parity.sharded", folder], capture_output=True, text=True, check=False,
            env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}, cwd=Path(__file__).parents[2],
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        shares = json.loads(done.stdout.splitlines()[-1])
        rows = []
        for i, (name, oracle) in enumerate(oracles.items()):
            difference = np.abs(np.load(Path(folder, f"{i:02d}.npy")) - oracle.logits)[oracle.valid].max()
            rows.append({"case": name, "error": float(difference / oracle.deviation), "bytes_share": shares[i]})
    return rows


def _program(folder: Path) -> list[float]:
    """Logits of each model in the folder beside it; the share of its bytes that a device holds."""
    mesh, shares = make_mesh(fsdp=MESH["fsdp"], tensor=MESH["tensor"]), []
    for directory in sorted(path for path in folder.iterdir() if path.is_dir()):
        checkpoint, batch = load(directory, mesh=mesh), dict(np.load(directory.with_suffix(".npz")))
        leaves = jax.tree.leaves(checkpoint.params)
        held = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
        shares.append(held / sum(leaf.nbytes for leaf in leaves))

        def logits(params, batch, config=checkpoint.config):
            return forward(config, params, batch["tokens"], lengths=batch["lengths"]).logits

        with jax.set_mesh(mesh):
            placed = jax.device_put(batch, batch_shardings(mesh, batch))
            out = jax.jit(logits)(checkpoint.params, placed)
        np.save(directory.with_suffix(".npy"), np.asarray(out, np.float32))
    return shares


if __name__ == "__main__":
    print(json.dumps(_program(Path(sys.argv[1]))))
