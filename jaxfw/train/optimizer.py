"""An optimiser from a config: direction (AdamW, Muon, SGD), learning rate, clipping, weight decay, what is frozen,
accumulation over batches, an average of the parameters.

Everything is a chain of optax transformations, so that its state lies on a mesh by
`jaxfw.core.sharding.state_shardings`: what it keeps has the parameters' paths and shapes, or is a scalar.
"""

import dataclasses
import re
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from jaxfw.core.errors import InputError, unknown
from jaxfw.core.shapes import PyTree
from jaxfw.train.average import average_params
from jaxfw.train.schedule import SCHEDULES
from jaxfw.train.schedule import make_schedule as schedule_of

KINDS = ("adamw", "muon", "sgd")
# Matrices that are looked up, read out or routed by; their rows are not features of one space (Jordan et al. 2024).
_NOT_MUON = re.compile(r"(.*/)?(embed|embedding|head|lm_head|router|shared_gate)(/.*)?")
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_ADAM_RMS = 0.2


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How parameters change. An update is made of `accumulate` steps (batches); all else counts updates.

    The learning rate rises for `warmup` updates and goes on by `schedule` (`jaxfw.train.schedule`), to `final` times
    its peak; `decay` is the share of all updates in which `wsd` falls. `weight_decay` is decoupled and acts on matrices
    only: norm scales and biases are left alone.

    Attributes:
        b1: of AdamW's first moment.
        b2: of its second.
        clip_norm: largest global norm of the gradient; None never clips.
        kind: "adamw" (arXiv:1711.05101); "muon" for hidden matrices, with AdamW for embeddings, head, routers, norms
            and biases, one learning rate fitting both (arXiv:2502.16982); "sgd".
        eps: added to the root of AdamW's second moment.
        momentum: of Muon and SGD; 0 for plain SGD.
        accumulate: batches whose mean gradient makes one update; each counts alike, whatever its weights sum to.
        freeze: parameters whose whole path matches this regular expression stay as they are: they have no state and
            do not count in the norm that clips.
        average: decay, per update, of a moving average of the parameters (`averaged_params`).
    """

    learning_rate: float = 1e-3
    warmup: int = 100
    final: float = 0.1
    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    clip_norm: float | None = 1.0
    kind: str = "adamw"
    eps: float = 1e-8
    momentum: float = 0.95
    schedule: str = "cosine"
    decay: float = 0.2
    accumulate: int = 1
    freeze: str | None = None
    average: float | None = None

    def __post_init__(self):
        if self.kind not in KINDS:
            raise unknown("optimizer.kind", self.kind, KINDS)
        if self.schedule not in SCHEDULES:
            raise unknown("optimizer.schedule", self.schedule, SCHEDULES)
        for name in ("learning_rate", "eps"):
            if not getattr(self, name) > 0:
                raise InputError(f"optimizer.{name}={getattr(self, name)} must be above 0.")
        if self.warmup < 0:
            raise InputError(f"optimizer.warmup={self.warmup} must be 0 or more steps.")
        if not self.weight_decay >= 0:
            raise InputError(f"optimizer.weight_decay={self.weight_decay} must be 0 or more.")
        for name in ("b1", "b2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"optimizer.{name}={getattr(self, name)} must be in [0, 1).")
        if not 0 <= self.final <= 1:
            raise InputError(f"optimizer.final={self.final} must be in [0, 1]: it is a share of the peak.")
        if not 0 < self.decay <= 1:
            raise InputError(f"optimizer.decay={self.decay} must be in (0, 1]: it is a share of the updates.")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise InputError(f"optimizer.clip_norm={self.clip_norm} must be above 0, or None, which never clips.")
        if self.accumulate < 1:
            raise InputError(f"optimizer.accumulate={self.accumulate} must be at least 1 batch an update.")
        if self.average is not None and not 0 < self.average < 1:
            raise InputError(f"optimizer.average={self.average} must be between 0 and 1 (0.999, say), or None.")
        if self.freeze is not None:
            try:
                re.compile(self.freeze)
            except re.error as error:
                raise InputError(f"optimizer.freeze={self.freeze!r} is no regular expression: {error}.") from None


def make_schedule(config: OptimizerConfig, *, steps: int) -> optax.Schedule:
    """The learning rate by update, for a run of `steps` batches.

    Raises:
        InputError: steps that leave batches over behind the last update; a warm-up that does not fit.
    """
    updates, left = divmod(steps, config.accumulate)
    if left:
        near = f"{steps - left} or " if updates else ""
        raise InputError(
            f"train.steps={steps} is no multiple of optimizer.accumulate={config.accumulate}: the last {left} would "
            f"change nothing. Take {near}{steps - left + config.accumulate} steps."
        )
    if config.accumulate > 1 and config.warmup >= updates:
        raise InputError(
            f"optimizer.warmup={config.warmup} must be below the run's {updates} updates (of {config.accumulate} steps "
            "each)."
        )
    return schedule_of(
        config.schedule, peak=config.learning_rate, warmup=config.warmup, updates=updates, final=config.final,
        decay=config.decay,
    )  # fmt: skip


def make_optimizer(config: OptimizerConfig, *, steps: int) -> optax.GradientTransformation:
    """Clip, direction, weight decay, learning rate, average; an update behind every `accumulate`-th of `steps`.

    With `freeze`, the transformation raises an `InputError` at `init` if that matches no parameter, or all.
    """
    links = [
        *([] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]),
        _direction(config),
        optax.add_decayed_weights(config.weight_decay, is_matrix),
        optax.scale_by_learning_rate(make_schedule(config, steps=steps)),
        *([] if config.average is None else [average_params(config.average)]),
    ]
    optimizer: optax.GradientTransformation = optax.chain(*links)
    if config.accumulate > 1:
        optimizer = optax.MultiSteps(optimizer, config.accumulate).gradient_transformation()
    if config.freeze is None:
        return optimizer
    # Around everything: what is frozen then has no accumulated gradients, and is in no norm.
    return optax.partition({"trained": optimizer, "frozen": optax.set_to_zero()}, _frozen_labels(config.freeze))


def is_matrix(params: PyTree) -> PyTree:
    """True for every parameter with at least two axes; the one that stacked layers lead with does not count."""
    return jax.tree_util.tree_map_with_path(lambda path, x: _axes(_name(path), x) >= 2, params)


def _axes(name: str, x: jax.Array) -> int:
    return x.ndim - name.startswith("layers/")


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _direction(config: OptimizerConfig) -> optax.GradientTransformation:
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    if config.kind == "muon":
        return optax.partition({"muon": _muon(config.momentum), "adam": adam}, _muon_labels)
    if config.kind == "sgd":
        return optax.trace(config.momentum) if config.momentum else optax.identity()
    return adam


def _muon_labels(params: PyTree) -> PyTree:
    def label(path, x):
        name = _name(path)
        return "adam" if _axes(name, x) < 2 or _NOT_MUON.fullmatch(name) else "muon"

    return jax.tree_util.tree_map_with_path(label, params)


def _muon(momentum: float) -> optax.GradientTransformation:
    """Nesterov momentum made near-orthogonal by five Newton-Schulz iterations, its entries of the size of Adam's.

    The last two axes are a matrix [in out], all before them count matrices: experts [E D F], stacked layers [L D F].
    The factor 0.2 sqrt(max(in, out)) is of Liu et al. 2025 (arXiv:2502.16982, section 2.2).
    """

    def dimensions(params: PyTree) -> PyTree:
        return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(-2, -1), params)

    inner = optax.contrib.scale_by_muon(_NEWTON_SCHULZ, beta=momentum, weight_dimension_numbers=dimensions)

    # optax keeps the coefficients in its state: there they would need a layout on meshes and come from checkpoints.
    def init(params: PyTree) -> optax.OptState:
        return cast(optax.contrib.MuonState, inner.init(params))._replace(ns_coeffs=())

    def update(updates: PyTree, state: PyTree, params: PyTree | None = None) -> tuple[PyTree, optax.OptState]:
        updates, state = inner.update(updates, state._replace(ns_coeffs=jnp.asarray(_NEWTON_SCHULZ)), params)
        scaled = jax.tree.map(lambda x: _ADAM_RMS * max(x.shape[-2:]) ** 0.5 * x, updates)
        return scaled, state._replace(ns_coeffs=())

    return optax.GradientTransformation(init, update)


def _frozen_labels(pattern: str):
    compiled = re.compile(pattern)

    def labels(params: PyTree) -> PyTree:
        names = [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        frozen = sum(compiled.fullmatch(name) is not None for name in names)
        if frozen in (0, len(names)):
            raise InputError(
                f"optimizer.freeze={pattern!r} matches {'all' if frozen else 'none'} of the {len(names)} parameters, "
                f"such as {', '.join(names[:3])}: the whole path must match."
            )
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "frozen" if compiled.fullmatch(_name(path)) else "trained", params
        )

    return labels
