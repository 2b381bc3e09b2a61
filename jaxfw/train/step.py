"""The training contract: a loss function, a state, and the pure update between two states.

`update` has no jit in it: it can be vmapped over clients, differentiated through or mapped over candidates.
`make_step` is its jit with the state donated.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
import optax

from jaxfw.core.shapes import Array, Float, Int, PRNGKeyArray, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Aux:
    """What a loss function returns beside the loss: scalars to log, and its state after this batch."""

    metrics: dict[str, Float[Array, ""]]
    state: PyTree


class LossFn(Protocol):
    """`(params, batch, key, *, state) -> (loss, Aux)`; `state` is what is neither trained nor data, or {}."""

    def __call__(
        self, params: PyTree, batch: PyTree, key: PRNGKeyArray, *, state: PyTree
    ) -> tuple[Float[Array, ""], Aux]: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a run must keep to go on: `step` counts updates done."""

    step: Int[Array, ""]
    params: PyTree
    opt_state: PyTree
    state: PyTree


Metrics = dict[str, Float[Array, ""]]


def init_state(params: PyTree, optimizer: optax.GradientTransformation, *, state: PyTree | None = None) -> TrainState:
    """The state before the first update. Works under `jax.eval_shape`."""
    return TrainState(jnp.int32(0), params, optimizer.init(params), {} if state is None else state)


def update(
    loss_fn: LossFn, optimizer: optax.GradientTransformation, train_state: TrainState, batch: PyTree, key: PRNGKeyArray
) -> tuple[TrainState, Metrics]:
    """One update. The loss draws from `key` folded with the step, so that a resumed run draws the same."""
    key = jax.random.fold_in(key, train_state.step)
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, aux), grads = value_and_grad(train_state.params, batch, key, state=train_state.state)
    updates, opt_state = optimizer.update(grads, train_state.opt_state, train_state.params)
    params = optax.apply_updates(train_state.params, updates)
    metrics = {"train/loss": loss, "train/grad_norm": optax.tree.norm(grads)} | aux.metrics
    return TrainState(train_state.step + 1, params, opt_state, aux.state), metrics


def make_step(
    loss_fn: LossFn, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, PyTree, PRNGKeyArray], tuple[TrainState, Metrics]]:
    """`update` compiled: `step(train_state, batch, key)`; the state that goes in is donated, and gone."""

    def step(train_state: TrainState, batch: PyTree, key: PRNGKeyArray) -> tuple[TrainState, Metrics]:
        return update(loss_fn, optimizer, train_state, batch, key)

    return jax.jit(step, donate_argnums=0)
