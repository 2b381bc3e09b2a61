"""Parameters with all layers in one array: what a scan over the layers takes, for training deep models."""

import jax
import jax.numpy as jnp

from jaxfw.core.errors import InputError
from jaxfw.core.shapes import PyTree


def stack_layers(params: PyTree) -> PyTree:
    """`layers_0`, `layers_1`, ... as one `layers` with a leading axis L; works on abstract values under `eval_shape`.

    Raises:
        InputError: layers of several kinds (some dense, some with experts), which no single array holds.
    """
    names = sorted((name for name in params if name.startswith("layers_")), key=lambda name: int(name[7:]))
    if not names:
        raise InputError(f"params have no layers_0, layers_1, ...: they hold {', '.join(params)}.")
    layers = [params[name] for name in names]

    def forms(layer):
        return jax.tree.map(lambda x: (x.shape, x.dtype), layer)

    for name, layer in zip(names, layers, strict=True):
        if jax.tree.structure(layer) != jax.tree.structure(layers[0]) or forms(layer) != forms(layers[0]):
            raise InputError(f"{name} differs from layers_0 in its parameters: only layers of one kind can be stacked.")
    rest = {name: value for name, value in params.items() if name not in names}
    return rest | {"layers": jax.tree.map(lambda *x: jnp.stack(x), *layers)}


def unstack_layers(params: PyTree) -> PyTree:
    """The inverse of `stack_layers`."""
    if "layers" not in params:
        raise InputError(f"params have no stacked layers: they hold {', '.join(params)}.")
    L = jax.tree.leaves(params["layers"])[0].shape[0]
    rest = {name: value for name, value in params.items() if name != "layers"}
    return rest | {f"layers_{i}": jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(L)}
