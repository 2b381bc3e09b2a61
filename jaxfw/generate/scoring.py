"""How likely a text is: the log-probability of each token given those before it, behind a shared prefix or alone."""

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxfw.core.keys import row_keys
from jaxfw.core.mesh import constrain
from jaxfw.core.shapes import Array, Float, Int, PRNGKeyArray, PyTree
from jaxfw.generate import programs
from jaxfw.generate.prefix import Prefix
from jaxfw.generate.prompts import bucket, pack
from jaxfw.models import DecoderConfig, embed, first_step, head, trunk
from jaxfw.models.cache import Cache, CachePolicy
from jaxfw.ops.losses import token_log_probs

# A call scores at most this many rows and padded tokens. The logits of fewer tokens are alive at once: with a large
# vocabulary they are the largest arrays by far.
SCORED_ROWS, SCORED_TOKENS, LOGIT_TOKENS = 8, 4096, 1024


@partial(jax.jit, static_argnames="config")
def logprobs(
    config: DecoderConfig, params: PyTree, tokens: Int[Array, "B T"], *, lengths: Int[Array, "B"]
) -> Float[Array, "B T-1"]:
    """Log-probability of each token from the second on, given those before it, float32.

    Entries from a row's length on mean nothing. The logits of a block of tokens at a time are alive, never all.
    """
    T = tokens.shape[1]
    x = trunk(config, params, embed(config, params, tokens), first_step(lengths, T)).x
    return constrain(_scores(config, params, x, tokens), None, None)


@partial(jax.jit, static_argnames=("config", "policy"))
def continuation_logprobs(
    config: DecoderConfig,
    params: PyTree,
    tokens: Int[Array, "B T"],
    *,
    lengths: Int[Array, "B"],
    policy: CachePolicy,
    cache: Cache,
    logits: Float[Array, "1 V"],
    key: PRNGKeyArray,
) -> Float[Array, "B T"]:
    """`logprobs` of every token of rows that all continue a cache of one row, which is only read.

    `logits` are those behind that row's last token, `key` is for policies that draw, [B].
    """
    B, T = tokens.shape
    cache = cache.rows(jnp.zeros(B, jnp.int32))
    step = first_step(lengths, T)
    step = dataclasses.replace(step, positions=step.positions + cache.seen[:, None], tokens=tokens, key=key)
    x = embed(config, params, tokens, positions=step.positions)
    x = trunk(config, params, x, step, policy=policy, cache=cache, write=False).x
    first = token_log_probs(jnp.broadcast_to(logits, (B, logits.shape[1])), tokens[:, 0])
    scores = jnp.concatenate([first[:, None], _scores(config, params, x, tokens)], axis=1)
    return constrain(scores, None, None)


def _scores(config, params, x, tokens) -> Float[Array, "B T-1"]:
    """Of the tokens from the second on, from the residual stream behind the last layer."""
    B, T = tokens.shape
    block = min(T, max(1, LOGIT_TOKENS // B))
    blocks = -(-T // block)
    targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, blocks * block - T + 1))).reshape(B, blocks, block)
    x = jnp.pad(x, ((0, 0), (0, blocks * block - T), (0, 0))).reshape(B, blocks, block, -1)

    def score(part):
        return token_log_probs(head(config, params, part[0]), part[1])

    scores = jax.lax.map(score, (jnp.swapaxes(x, 0, 1), jnp.swapaxes(targets, 0, 1)))
    return jnp.swapaxes(scores, 0, 1).reshape(B, -1)[:, : T - 1]


def score_rows(
    config: DecoderConfig, params: PyTree, rows: Sequence[Sequence[int]], *, prefix: Prefix | None = None
) -> list[Float[np.ndarray, "n"]]:
    """An array a row: of its tokens from the second on; behind a prefix, of all.

    Rows are padded to a few sizes, so that all lengths share a few compiled programs.
    """
    out: list[np.ndarray] = [np.zeros(0, np.float32)] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))  # rows of like lengths share a call
    while order:
        count = max(1, min(SCORED_ROWS, SCORED_TOKENS // bucket(len(rows[order[0]]))))
        chosen, order = order[:count], order[count:]
        for i, scores in zip(chosen, _batch(config, params, [rows[i] for i in chosen], prefix), strict=True):
            out[i] = scores
    return out


def _batch(config, params, rows, prefix: Prefix | None) -> list[Float[np.ndarray, "n"]]:
    B = 1 << (len(rows) - 1).bit_length()
    tokens, lengths = pack([*rows, *[[0]] * (B - len(rows))], bucket(max(map(len, rows))))
    if prefix is None:
        scores, first = logprobs(config, params, tokens, lengths=lengths), 1
    else:
        scores, first = continuation_logprobs(
            config, params, tokens, lengths=lengths, policy=prefix.policy, cache=prefix.cache, logits=prefix.logits,
            key=programs.cache_keys(row_keys(jax.random.key(0), B)),
        ), 0  # fmt: skip
    scores = np.asarray(scores)
    return [scores[i, : len(row) - first].copy() for i, row in enumerate(rows)]
