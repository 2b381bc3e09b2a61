"""Next-token prediction: the loss of a decoder on windows of tokens, and its value on held-out ones."""

import dataclasses
from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxfw.core.shapes import Array, Float, Int, PRNGKeyArray, PyTree
from jaxfw.models import DecoderConfig, forward
from jaxfw.ops.losses import token_log_probs
from jaxfw.train.step import Aux


@dataclasses.dataclass(frozen=True)
class NextTokenLoss:
    """Mean negative log-likelihood in nats of every token but the first of each window; a `LossFn`."""

    config: DecoderConfig

    def __call__(
        self, params: PyTree, batch: dict[str, Int[Array, "B T+1"]], key: PRNGKeyArray, *, state: PyTree
    ) -> tuple[Float[Array, ""], Aux]:
        return -jnp.mean(_log_probs(self.config, params, batch["tokens"])), Aux({}, state)


def _log_probs(config: DecoderConfig, params: PyTree, tokens: Int[Array, "B T+1"]) -> Float[Array, "B T"]:
    return token_log_probs(forward(config, params, tokens[:, :-1]).logits, tokens[:, 1:])


_window_nll = jax.jit(lambda config, params, tokens: -jnp.mean(_log_probs(config, params, tokens), axis=1),
                      static_argnums=0)  # fmt: skip


def evaluate_tokens(
    config: DecoderConfig, params: PyTree, batches: Iterable[Int[np.ndarray, "B T+1"]]
) -> Float[np.ndarray, "N"]:
    """Mean negative log-likelihood in nats a token, of each window of the batches (equal shapes compile once)."""
    run = partial(_window_nll, config, params)
    return np.concatenate([np.asarray(run(jnp.asarray(tokens))) for tokens in batches])
