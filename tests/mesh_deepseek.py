"""A program for four devices: a DeepSeek-MoE loaded onto fsdp=2,tensor=2, and its logits: `DIRECTORY TOKENS OUT`."""

import os
import sys

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np

from jaxfw.core.mesh import make_mesh
from jaxfw.models import forward
from jaxfw.weights import load


def main(directory, tokens, out):
    """Rows whole, as those of tests/test_deepseek.py; loaded and quantised under the mesh, too."""
    mesh, tokens = make_mesh(fsdp=2, tensor=2), np.load(tokens)
    with jax.set_mesh(mesh):
        found = load(directory, mesh=mesh)
        logits = jax.jit(lambda params: forward(found.config, params, tokens).logits)(found.params)
        small = [load(directory, mesh=where, quantise="int8").params for where in (mesh, None)]
    same = jax.tree.map(lambda a, b: np.array_equal(np.asarray(a), np.asarray(b)), *small)
    np.savez(out, logits=np.asarray(logits), same=jax.tree.all(same))


if __name__ == "__main__":
    main(*sys.argv[1:])
