"""An exponential moving average of the parameters, kept in the optimiser's state.

The last link of a chain sees the updates as they will be added, so it knows the parameters that come next. The average
lies on a mesh and in a checkpoint as the parameters do, in float32: bfloat16 loses a step of one part in a thousand.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxfw.core.errors import InputError
from jaxfw.core.shapes import Array, Int, PyTree


class AverageState(NamedTuple):
    """`average` has the parameters' tree; `count` is how many updates are in it."""

    count: Int[Array, ""]
    average: PyTree


def average_params(decay: float) -> optax.GradientTransformation:
    """Weighs the parameters behind update n of N by decay^(N-n), weights summing to 1; the updates pass unchanged.

    So the parameters before the first update are forgotten with it, as in a bias-corrected average (Kingma & Ba 2015).
    """

    def init(params: PyTree) -> optax.OptState:
        # Copies: a step donates its state, and cannot donate a buffer twice.
        return AverageState(jnp.int32(0), jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), params))

    def update(updates: PyTree, state: PyTree, params: PyTree | None = None) -> tuple[PyTree, optax.OptState]:
        assert params is not None
        count = jnp.asarray(optax.safe_increment(state.count))
        share = (1 - decay) / (1 - jnp.float32(decay) ** count)
        after = optax.apply_updates(params, updates)
        average = jax.tree.map(lambda old, x: old + share * (x.astype(jnp.float32) - old), state.average, after)
        return updates, AverageState(count, average)

    return optax.GradientTransformation(init, update)


def averaged_params(opt_state: PyTree, params: PyTree | None = None) -> PyTree:
    """The average that an optimiser's state holds: before the first update, the parameters.

    Args:
        opt_state: of an optimiser with `OptimizerConfig.average`.
        params: the parameters of now, for their dtypes and for those that are frozen, which are in no average.

    Raises:
        InputError: there is no average; some parameters are frozen and `params` is not given.
    """
    found = [x for x in jax.tree.leaves(opt_state, is_leaf=_is_average) if _is_average(x)]
    if not found:
        raise InputError("the optimiser keeps no average: set optimizer.average, to 0.999 say.")
    average = found[0].average
    frozen = [x for x in jax.tree.leaves(average, is_leaf=_is_masked) if _is_masked(x)]
    if params is None:
        if frozen:
            raise InputError(f"{len(frozen)} parameters are frozen and in no average: give averaged_params the params.")
        return average
    # What is frozen is a whole array in `params`, and an empty node in the average.
    return jax.tree.map(
        lambda mean, x: x if _is_masked(mean) else mean.astype(x.dtype), average, params, is_leaf=_is_masked
    )


def _is_average(x: Any) -> bool:
    return isinstance(x, AverageState)


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)
