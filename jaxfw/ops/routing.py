"""The mathematics of routing: choice, capacity, who comes when at an expert, and the routers' losses; float32.

Tokens lie in g groups of N; a capacity and a token's turn are per group. Turns are k-major, as in GShard (Lepikhin et
al. 2020, arXiv:2006.16668): all first choices in the order of tokens, then all second choices. Tokens that are not
valid take no turn and no part in losses.
"""

from fractions import Fraction
from typing import TypeVar

import jax
import jax.numpy as jnp

from jaxfw.core.errors import InputError
from jaxfw.core.shapes import Array, Bool, Float, Int

Count = TypeVar("Count", int, Array)
FINEST_FACTOR = 1000  # a capacity factor is taken as the nearest fraction with a denominator up to this
LEAST_FACTOR = 1 / FINEST_FACTOR  # below, it would be taken as 0 or twice itself


def router_logits(x: Float[Array, "B T D"], kernel: Float[Array, "D R"]) -> Float[Array, "B T R"]:
    """X times kernel in float32: a router's choices turn on differences that bfloat16 or TF32 do not hold."""
    return jnp.einsum("btd,dr->btr", x.astype(jnp.float32), kernel.astype(jnp.float32), precision="highest")


def choose(scores: Float[Array, "... E"], k: int) -> Int[Array, "... k"]:
    """The k largest in descending order; of equal ones the lower index. Nothing is differentiated.

    >>> choose(jnp.array([0.1, 0.4, 0.1, 0.4]), 3).tolist()
    [1, 3, 0]
    """
    scores = jax.lax.stop_gradient(scores)
    if jax.sharding.get_abstract_mesh().size > 1:
        # XLA cuts a sort along its rows; for a top_k it gathers all of them on every device.
        return jnp.argsort(scores, axis=-1, descending=True, stable=True)[..., :k]
    return jax.lax.top_k(scores, k)[1]


def take(values: Float[Array, "... E"], ids: Int[Array, "... k"]) -> Float[Array, "... k"]:
    """The values at `ids` along the last axis, differentiable."""
    return jnp.take_along_axis(values, ids, axis=-1)


def capacity(tokens: Count, *, k: int, experts: int, factor: float) -> Count:
    """Tokens that an expert takes of a group: ceil(tokens * k / experts * factor).

    Exact integer arithmetic for a host number and for traced counts alike.

    >>> capacity(64, k=2, experts=8, factor=1.25), capacity(65, k=2, experts=8, factor=1.25)
    (20, 21)

    Raises:
        InputError: the factor is so fine that 32 bits do not hold the products.
    """
    share = Fraction(factor).limit_denominator(FINEST_FACTOR) * k / experts
    above, below = share.numerator, share.denominator
    if above * below >= 2**31:
        raise InputError(f"capacity={factor} is too fine for {experts} experts: give fewer digits, e.g. {factor:.2f}.")
    # Whole parts first: tokens * above would leave 32 bits at a few million tokens.
    return tokens // below * above - -(tokens % below * above) // below


def order_by_expert(
    ids: Int[Array, "g N k"], valid: Bool[Array, "g N"], experts: int
) -> tuple[Int[Array, "g k*N"], Int[Array, "g E"], Int[Array, "g E"]]:
    """Assignments (k-major: number j * N + n) sorted by expert and in turn within each, every expert's start and count.

    Those of tokens that are not valid come last, behind every expert's.
    """
    g, N, k = ids.shape
    by_choice = jnp.where(valid[..., None], ids, experts).swapaxes(1, 2).reshape(g, k * N)
    order = jnp.argsort(by_choice, axis=-1, stable=True)
    sorted_ids = jnp.take_along_axis(by_choice, order, axis=-1)
    edges = jax.vmap(lambda row: jnp.searchsorted(row, jnp.arange(experts + 1), method="compare_all"))(sorted_ids)
    edges = edges.astype(jnp.int32)
    return order.astype(jnp.int32), edges[:, :-1], edges[:, 1:] - edges[:, :-1]


def turns(ids: Int[Array, "g N k"], valid: Bool[Array, "g N"], experts: int) -> Int[Array, "g N k"]:
    """Each assignment's turn at its expert, from 0; -1 for tokens that are not valid.

    >>> turns(jnp.array([[[0, 1], [0, 1], [1, 0]]]), jnp.array([[True, False, True]]), 2).tolist()
    [[[0, 1], [-1, -1], [0, 1]]]
    """
    g, N, k = ids.shape
    order, starts, _ = order_by_expert(ids, valid, experts)
    place = jnp.argsort(order, axis=-1).reshape(g, k, N).swapaxes(1, 2)
    first = jnp.take_along_axis(starts, jnp.clip(ids, 0, experts - 1).reshape(g, -1), axis=-1).reshape(ids.shape)
    return jnp.where(valid[..., None], place - first, -1)


def load(ids: Int[Array, "B T k"], valid: Bool[Array, "B T"], experts: int) -> Float[Array, "E"]:
    """Assignments of valid tokens to each expert."""
    chosen = (ids[..., None] == jnp.arange(experts)) & valid[..., None, None]
    return jnp.sum(chosen, axis=(0, 1, 2), dtype=jnp.float32)


def masked_mean(values: Float[Array, "B T ..."], valid: Bool[Array, "B T"]) -> Float[Array, "..."]:
    """The mean over valid tokens, 0 where there are none."""
    mask = valid.reshape(*valid.shape, *[1] * (values.ndim - 2))
    return jnp.sum(jnp.where(mask, values, 0), axis=(0, 1)) / jnp.maximum(jnp.sum(valid), 1)


def balance_loss(probs: Float[Array, "B T E"], ids: Int[Array, "B T k"], valid: Bool[Array, "B T"]) -> Float[Array, ""]:
    """E times the sum over experts of mean probability times share of all k choices; 1 where all is even.

    With k = 1 Switch's loss (Fedus et al. 2021, arXiv:2101.03961), with all k Megatron's; GShard's over the first
    choices only is this with `ids[..., :1]`; transformers' `load_balancing_loss_func` is k times this.
    """
    E, k = probs.shape[-1], ids.shape[-1]
    share = load(ids, valid, E) / jnp.maximum(k * jnp.sum(valid), 1)
    return E * jnp.sum(masked_mean(probs, valid) * share)


def importance(probs: Float[Array, "B T E"], valid: Bool[Array, "B T"]) -> Float[Array, "E"]:
    """Each expert's sum of probabilities over valid tokens (Shazeer et al. 2017, arXiv:1701.06538)."""
    return jnp.sum(jnp.where(valid[..., None], probs, 0), axis=(0, 1))


def joint_balance_loss(importance: Float[Array, "L E"], load: Float[Array, "L E"]) -> Float[Array, ""]:
    """E times the sum over experts of mean probability times choices a token, both over the tokens of all layers.

    transformers' `load_balancing_loss_func`, with which Mixtral, Qwen-MoE and OLMoE are fine-tuned there: k where all
    is even. Only the experts' loads summed over layers matter to it: a layer that sends all tokens to expert 0 and one
    that sends them all to expert 1 balance each other, which `balance_loss`, layer by layer, does not let pass.
    """
    E = load.shape[-1]
    total, given = jnp.sum(importance, axis=0), jnp.sum(load, axis=0)
    # The probabilities of a token sum to 1, those of all to their number.
    tokens = jax.lax.stop_gradient(jnp.maximum(jnp.round(jnp.sum(total)), 1))
    return E * jnp.sum(total / tokens * (given / tokens))


def z_loss(logits: Float[Array, "B T E"], valid: Bool[Array, "B T"]) -> Float[Array, ""]:
    """Mean of logsumexp(logits)^2, which keeps logits small (Zoph et al. 2022, arXiv:2202.08906)."""
    return masked_mean(jax.nn.logsumexp(logits, axis=-1) ** 2, valid)
