"""What one expert computes, for all of them at once."""

import jax
import jax.numpy as jnp

from jaxfw.core.shapes import Array, Float, PyTree
from jaxfw.ops.quant import Quantised, product


def experts_of(params: PyTree) -> int:
    """E, the number of experts that the parameters hold."""
    return params["up"].shape[0]


def expert_ffn(params: PyTree, x: Float[Array, "E ... D"]) -> Float[Array, "E ... D"]:
    """down(silu(gate(x)) * up(x)) of each expert, in x's dtype; down(gelu(up(x))) where there is no "gate".

    `params` are "gate" and "up" [E D F] and "down" [E F D], arrays or `Quantised`.
    """
    # Gradients recompute the product, as in a dense feed-forward: kept, it would double what a layer holds of [E C F].
    hidden = _products(x, params["up"])
    if "gate" not in params:
        hidden = jax.nn.gelu(hidden)
    else:
        gated = jax.checkpoint(lambda gate, up: jax.nn.silu(gate) * up)
        hidden = gated(_products(x, params["gate"]), hidden)
    return _products(hidden, params["down"])


def _products(x: Float[Array, "E ... D"], matrices: Array | Quantised) -> Float[Array, "E ... F"]:
    if isinstance(matrices, Quantised):
        return product(x, matrices)
    return jnp.einsum("e...d,edf->e...f", x, matrices.astype(x.dtype))


def slots_ffn(params: PyTree, x: Float[Array, "g E C D"], axis: str | None) -> Float[Array, "g E C D"]:
    """`expert_ffn` of what lies in every group's slots.

    In a `shard_map`, `axis` is the mesh axis over which `params` are cut: one all-to-all takes the slots of each expert
    to the device that holds it, another brings the answers back.
    """
    x = jnp.swapaxes(x, 0, 1)
    if axis is not None:
        x = jax.lax.all_to_all(x, axis, split_axis=0, concat_axis=1, tiled=True)
    x = expert_ffn(params, x)
    if axis is not None:
        x = jax.lax.all_to_all(x, axis, split_axis=1, concat_axis=0, tiled=True)
    return jnp.swapaxes(x, 0, 1)
