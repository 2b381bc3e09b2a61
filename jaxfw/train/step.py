"""The training contract: a loss function, a state, and the pure update between two states.

`update` has no jit in it: it can be vmapped over clients, differentiated through or mapped over candidates.
`make_step` is its jit with the state donated.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

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
FROZEN = "frozen"  # where `TrainState.state` keeps arrays that are read and never change: a base model under adapters


def init_state(params: PyTree, optimizer: optax.GradientTransformation, *, state: PyTree | None = None) -> TrainState:
    """The state before the first update. Works under `jax.eval_shape`."""
    return TrainState(jnp.int32(0), params, optimizer.init(params), {} if state is None else state)


def trained_part(train_state: TrainState) -> TrainState:
    """What a checkpoint keeps: all but `state["frozen"]`, which comes again from where it was loaded."""
    return dataclasses.replace(train_state, state={k: v for k, v in train_state.state.items() if k != FROZEN})


def with_frozen(train_state: TrainState, frozen: PyTree | None) -> TrainState:
    """A state as `trained_part` leaves it, whole again."""
    return dataclasses.replace(train_state, state=train_state.state | ({} if frozen is None else {FROZEN: frozen}))


BAD_LEAF = "train/bad_leaf"  # a number, for `bad_leaf_name`: the first gradient that is not finite, -1 for none
GradReduce = Callable[[PyTree], PyTree]


def update(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    train_state: TrainState,
    batch: PyTree,
    key: PRNGKeyArray,
    *,
    grad_reduce: GradReduce | None = None,
) -> tuple[TrainState, Metrics]:
    """One update. The loss draws from `key` folded with the step, so that a resumed run draws the same.

    Args:
        loss_fn: what to lower.
        optimizer: how.
        train_state: where from.
        batch: what the loss is of.
        key: of the whole run.
        grad_reduce: what happens to gradients before the optimiser sees them (compression, a mean over clients); None
            leaves them as differentiation made them: under jit on a mesh, that is the gradient of the whole batch.
    """
    key = jax.random.fold_in(key, train_state.step)
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, aux), grads = value_and_grad(train_state.params, batch, key, state=train_state.state)
    if grad_reduce is not None:
        grads = grad_reduce(grads)
    updates, opt_state = optimizer.update(grads, train_state.opt_state, train_state.params)
    params = optax.apply_updates(train_state.params, updates)
    measured = {"train/loss": loss, "train/grad_norm": optax.tree.norm(grads), BAD_LEAF: _first_bad(grads)}
    return TrainState(train_state.step + 1, params, opt_state, aux.state), measured | aux.metrics


def _first_bad(grads: PyTree) -> Int[Array, ""]:
    bad = jnp.stack([~jnp.isfinite(jnp.sum(jnp.square(g.astype(jnp.float32)))) for g in jax.tree.leaves(grads)])
    return jnp.where(jnp.any(bad), jnp.argmax(bad), -1)


def bad_leaf_name(params: PyTree, index: int) -> str | None:
    """The path of the parameter behind the metric `BAD_LEAF`; None for -1."""
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
    return paths[index] if index >= 0 else None


def make_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    grad_reduce: GradReduce | None = None,
    compiler_options: Mapping[str, Any] | None = None,
) -> Callable[[TrainState, PyTree, PRNGKeyArray], tuple[TrainState, Metrics]]:
    """`update` compiled: `step(train_state, batch, key)`; the state that goes in is donated, and gone.

    `compiler_options` are XLA's, by name (schedulers, collectives); they act on a jit that is not called in another.
    """

    def step(train_state: TrainState, batch: PyTree, key: PRNGKeyArray) -> tuple[TrainState, Metrics]:
        return update(loss_fn, optimizer, train_state, batch, key, grad_reduce=grad_reduce)

    return jax.jit(
        step, donate_argnums=0, compiler_options=None if compiler_options is None else dict(compiler_options)
    )
