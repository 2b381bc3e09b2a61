"""Training: one contract for losses, one step, one loop.

step      LossFn, Aux, TrainState; `update` (pure) and `make_step` (its jit)
optimizer OptimizerConfig -> an optax transformation; `schedule` is its learning rate, `average` that of parameters
language  the next-token loss of a decoder, and its evaluation on held-out tokens
loop      `train`: batches in, metrics, checkpoints and a trained state out
"""

from jaxfw.train.average import averaged_params
from jaxfw.train.language import NextTokenLoss, evaluate_tokens
from jaxfw.train.loop import train
from jaxfw.train.optimizer import OptimizerConfig, make_optimizer
from jaxfw.train.step import Aux, LossFn, TrainState, init_state, make_step, update

__all__ = [
    "Aux", "LossFn", "NextTokenLoss", "OptimizerConfig", "TrainState", "averaged_params",
    "evaluate_tokens", "init_state", "make_optimizer", "make_step", "train", "update",
]  # fmt: skip
