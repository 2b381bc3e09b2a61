"""A program for four devices: two steps of adapters, with dropout, beside a model in 4 bits.

They are those of one device, and lie by the rules. Run by tests/test_lora_mesh.py in a process of its own; prints a
report.
"""

import json
import os

if __name__ == "__main__":  # whatever imports this keeps its own devices
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
import optax

from jaxfw.core.mesh import make_mesh
from jaxfw.core.sharding import shardings, state_shardings
from jaxfw.models import DecoderConfig, init
from jaxfw.models.sharding import batch_shardings, decoder_rules
from jaxfw.train import NextTokenLoss, init_state, make_step
from jaxfw.train.lora import LoRAConfig, LoRALoss, init_adapters
from jaxfw.weights import quantise_params

CONFIG = DecoderConfig(
    vocab=64, width=32, ffn=48, layers=1, heads=4, kv_heads=2, head_dim=8, positions=16, init_std=0.3, qkv_bias=True
)
LORA = LoRAConfig(rank=3, alpha=6.0, dropout=0.2, targets="all")


def begin(optimizer):
    """The state on one device: a base in 4 bits, adapters away from zero."""
    params = jax.jit(lambda: quantise_params(init(CONFIG, jax.random.key(0)), "int4"))()
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_adapters(LORA, params, jax.random.key(0)))
    adapters = jax.tree.map(lambda x: np.float32(0.2 * rng.standard_normal(x.shape)), shapes)
    return init_state(adapters, optimizer, state=LoRALoss(NextTokenLoss(CONFIG), LORA).init_state(params))


def run(state, batch):
    """Two steps of gradient descent; the losses and the state."""
    step, losses = make_step(LoRALoss(NextTokenLoss(CONFIG), LORA), optax.sgd(0.1, momentum=0.9)), []
    for _ in range(2):
        state, metrics = step(state, batch, jax.random.key(5))
        losses.append(float(metrics["train/loss"]))
    return losses, state


def error(ours, theirs):
    """The largest difference of a leaf, in units of its largest value; the worst of all."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return max(float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max()) for a, b in pairs)


def main():
    batch = {"tokens": np.random.default_rng(1).integers(0, 64, (4, 9), np.int32)}
    mesh, rules = make_mesh(tensor=2, fsdp=2), decoder_rules(CONFIG)
    state = begin(optax.sgd(0.1, momentum=0.9))
    alone, expected = run(jax.tree.map(jax.numpy.array, state), batch)
    places = state_shardings(shardings(rules, mesh, state.params), state.params, state, rules=rules)
    with jax.set_mesh(mesh):
        losses, found = run(jax.device_put(state, places), jax.device_put(batch, batch_shardings(mesh, batch)))
    attn = found.params["layers_0"]["attn"]
    lies = jax.tree.map(lambda x, place: x.sharding.is_equivalent_to(place, x.ndim), found, places)
    report = {
        "loss": error(losses, alone), "params": error(found.params, expected.params),
        "moved": error(expected.params, state.params), "laid_out": jax.tree.all(lies),
        "specs": {f"{m}/{part}": tuple(attn[m]["kernel"][part].sharding.spec) for m in "qo" for part in "ab"},
    }  # fmt: skip
    print(json.dumps(report))


if __name__ == "__main__":
    main()
