"""AdamW with warm-up, cosine decay and clipping, from a config."""

import dataclasses

import jax
import optax

from jaxfw.core.errors import InputError
from jaxfw.core.shapes import PyTree


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The learning rate rises for `warmup` steps, then follows a cosine to `final` times its peak.

    `weight_decay` acts on matrices only: norm scales and biases are left alone.
    """

    learning_rate: float = 1e-3
    warmup: int = 100
    final: float = 0.1
    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    clip_norm: float = 1.0

    def __post_init__(self):
        if not self.learning_rate > 0:
            raise InputError(f"optimizer.learning_rate={self.learning_rate} must be above 0.")
        if self.warmup < 0:
            raise InputError(f"optimizer.warmup={self.warmup} must be 0 or more steps.")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"optimizer.{name}={getattr(self, name)} must be in [0, 1).")
        if not self.clip_norm > 0:
            raise InputError(f"optimizer.clip_norm={self.clip_norm} must be above 0 (a large value never clips).")


def make_schedule(config: OptimizerConfig, *, steps: int) -> optax.Schedule:
    """The learning rate by step, for a run of `steps` updates."""
    if config.warmup >= steps:
        raise InputError(f"optimizer.warmup={config.warmup} must be below the run's {steps} steps.")
    peak = config.learning_rate
    return optax.warmup_cosine_decay_schedule(
        peak / max(config.warmup, 1), peak, config.warmup, steps, end_value=peak * config.final
    )


def make_optimizer(config: OptimizerConfig, *, steps: int) -> optax.GradientTransformation:
    """Clip by the global norm, then AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) on the schedule."""
    schedule = make_schedule(config, steps=steps)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(schedule, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay, mask=is_matrix),
    )


def is_matrix(params: PyTree) -> PyTree:
    """True for every leaf with at least two axes."""
    return jax.tree.map(lambda x: x.ndim >= 2, params)
