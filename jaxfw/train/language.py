"""Next-token prediction: the loss of a decoder on windows of tokens, and its value on held-out ones."""

import dataclasses
from collections.abc import Iterable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxfw.core.errors import InputError, unknown
from jaxfw.core.shapes import Array, Float, Int, PRNGKeyArray, PyTree
from jaxfw.models import DecoderConfig, Output, final, forward, head, layer, remat_layer, router_states, vocabulary
from jaxfw.models.decoder import HEADS
from jaxfw.models.routing import Experts, Router
from jaxfw.ops import routing
from jaxfw.ops.losses import chunked_log_probs, summed_nll, token_log_probs
from jaxfw.train.step import Aux

Batch = Mapping[str, Array]
_policies = jax.checkpoint_policies
_HEADS = _policies.save_only_these_names(HEADS)
REMAT = {
    "layer": None,
    "attention": _HEADS,
    "products": _policies.save_from_both_policies(_policies.dots_with_no_batch_dims_saveable, _HEADS),
}
LEAST_WEIGHT = 1e-6  # of a batch that trains on nothing
ROUTERS = "routers"  # where a training state keeps the routers' own


@dataclasses.dataclass(frozen=True)
class NextTokenLoss:
    """Mean negative log-likelihood in nats of every token but the first of each window; a `LossFn`.

    A batch holds `tokens` [B T+1] and perhaps `weights` (of the prediction of each token, [B T+1]) and `segment_ids`
    [B T+1] (the documents of packed rows, 1, 2, ..., 0 for padding; nothing is predicted across their borders).

    A model with experts adds `weight` x each router loss in `router_losses`, pairs of name and weight such as
    ("balance", 0.01), and logs all of them and the experts' metrics as means over layers:

    | name | of `TokenChoice` |
    |---|---|
    | "balance" | mean over layers of each layer's own balance (`routing.balance_loss`); 1 where loads are even |
    | "joint_balance" | balance of sums over layers (`routing.joint_balance_loss`); `per_token` where those are even |
    | "z" | mean over layers of logsumexp(logits)^2 |

    With `chunk`, the logits of so many tokens of a row exist at once (`jaxfw.ops.losses.summed_nll`). `remat` says what
    a layer keeps for its gradient, and what it computes again:

    | remat | kept of a layer | computed again |
    |---|---|---|
    | None | everything that the gradient reads, but attention's weights | attention's weights |
    | "products" | its input, results of its products with kernels, what attention returns | all else: norms, gates |
    | "attention" | its input, what attention returns | all but attention's way forward |
    | "layer" | its input | the whole layer: a third more operations |

    Fine-tuning in transformers adds `router_aux_loss_coef` x "joint_balance" for Mixtral, Qwen-MoE and OLMoE.
    """

    config: DecoderConfig
    router: Router | None = None
    experts: Experts | None = None
    router_losses: tuple[tuple[str, float], ...] = ()
    chunk: int | None = None
    remat: str | None = None

    def __post_init__(self):
        if self.remat is not None and self.remat not in REMAT:
            raise unknown("loss.remat", self.remat, REMAT)
        if self.chunk is not None and self.chunk < 1:
            raise InputError(f"loss.chunk={self.chunk} must be at least 1 token of a row, or None for all at once.")

    def init_state(self) -> PyTree:
        """The training state's `state` before the first batch."""
        routers = router_states(self.config, self.router)
        return {ROUTERS: routers} if routers else {}

    def __call__(
        self, params: PyTree, batch: Batch, key: PRNGKeyArray, *, state: PyTree
    ) -> tuple[Float[Array, ""], Aux]:
        out, targets, weights = self._forward(params, batch, state, key), batch["tokens"][:, 1:], target_weights(batch)
        if self.chunk is None:
            total = -jnp.sum(weights * token_log_probs(out.logits, targets))
        else:
            total = summed_nll(out.logits, vocabulary(self.config, params), targets, weights, chunk=self.chunk)
        nll = total / jnp.maximum(jnp.sum(weights), LEAST_WEIGHT)
        losses, total = _router_losses(out), nll
        for name, weight in self.router_losses:
            if name not in losses:
                raise unknown("router_losses", name, losses)
            total += weight * losses[name]
        state = state | {ROUTERS: out.state} if out.state else state
        metrics = {"train/nll": nll} | _metrics(losses, out) if losses else {}
        return total, Aux(metrics, state)

    def rows(self, params: PyTree, batch: Batch, *, state: PyTree) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
        """Of each row, the weighted sum of negative log-likelihoods in nats, and the sum of the weights."""
        out, targets, weights = self._forward(params, batch, state, None), batch["tokens"][:, 1:], target_weights(batch)
        if self.chunk is None:
            log_probs = token_log_probs(out.logits, targets)
        else:
            log_probs = chunked_log_probs(out.logits, vocabulary(self.config, params), targets, chunk=self.chunk)
        return -jnp.sum(weights * log_probs, axis=1), jnp.sum(weights, axis=1)

    def _forward(self, params: PyTree, batch: Batch, state: PyTree, key: PRNGKeyArray | None) -> Output:
        """What the model makes of a batch: logits, or with `chunk` the hidden states in their place."""
        segment_ids = batch.get("segment_ids")
        return forward(
            self.config, params, batch["tokens"][:, :-1], router=self.router, experts=self.experts,
            state=state.get(ROUTERS), key=key, segment_ids=None if segment_ids is None else segment_ids[:, :-1],
            run_layer=layer if self.remat is None else partial(remat_layer, saveable=REMAT[self.remat]),
            run_head=head if self.chunk is None else final,
        )  # fmt: skip


def target_weights(batch: Batch) -> Float[Array, "B T"]:
    """What the prediction of each token but the first counts: by `weights`, and only inside a document."""
    tokens, segment_ids, weights = batch["tokens"], batch.get("segment_ids"), batch.get("weights")
    found = jnp.ones(tokens[:, 1:].shape, jnp.float32) if weights is None else weights[:, 1:].astype(jnp.float32)
    if segment_ids is None:
        return found
    is_inside = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] > 0)
    return jnp.where(is_inside, found, 0)


def _router_losses(out: Output) -> dict[str, Float[Array, ""]]:
    """Every loss of the routers by name, unweighted: means over layers, and "joint_balance" over all at once."""
    losses = {name: jnp.mean(value) for name, value in out.losses.items()}
    if "importance" in out.metrics:
        losses["joint_balance"] = routing.joint_balance_loss(out.metrics["importance"], out.metrics["load"])
    return losses


def _metrics(losses: dict[str, Array], out: Output) -> dict[str, Float[Array, ""]]:
    means = {name: jnp.mean(value) for name, value in out.metrics.items() if value.ndim == 1}
    return {f"router/{name}": value for name, value in (losses | means).items()}


@partial(jax.jit, static_argnames=("loss",))
def _score_rows(loss: NextTokenLoss, params, batch, state) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    return loss.rows(params, batch, state=state)


def evaluate_tokens(
    config: DecoderConfig,
    params: PyTree,
    batches: Iterable[Int[np.ndarray, "B T+1"] | Batch],
    *,
    router: Router | None = None,
    experts: Experts | None = None,
    router_states: PyTree | None = None,
    chunk: int | None = None,
) -> Float[np.ndarray, "N"]:
    """Mean negative log-likelihood in nats a token, of each window of the batches (equal shapes compile once).

    A batch is tokens alone, or as `NextTokenLoss` takes it; a row without anything to predict is left out. A model with
    experts is scored by the router, experts and states that are given, as `NextTokenLoss` trains it; `chunk` as there.
    """
    loss = NextTokenLoss(config, router, experts, chunk=chunk)
    state, means = {ROUTERS: router_states} if router_states else {}, []
    for batch in batches:
        given = dict(batch) if isinstance(batch, Mapping) else {"tokens": jnp.asarray(batch)}
        nll, weights = map(np.asarray, _score_rows(loss, params, given, state))
        means.append(nll[weights > 0] / weights[weights > 0])
    return np.concatenate(means)
