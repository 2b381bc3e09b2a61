"""Who goes where: tokens choose experts, experts choose tokens, or everything is mixed a little.

What padding holds never reaches a choice, a loss or a gradient: it is set to zero on the way in.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxfw.core.errors import InputError, unknown
from jaxfw.core.keys import fold
from jaxfw.core.shapes import Array, Bool, Float, Int, PRNGKeyArray, PyTree
from jaxfw.models.routing.route import RouteContext, RouterAux, SlotRoute, SoftRoute, TokenRoute, in_groups
from jaxfw.ops import routing

SCORES = ("softmax", "sigmoid")
BALANCES = ("all", "first")


def _normal_kernel(key: PRNGKeyArray, shape: tuple[int, int], std: float, dtype: Any) -> PyTree:
    return {"kernel": (std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)}


def _logits(params: PyTree, x: Float[Array, "B T D"], valid: Bool[Array, "B T"]) -> Float[Array, "B T R"]:
    return routing.router_logits(jnp.where(valid[..., None], x, 0), params["kernel"])


@dataclasses.dataclass(frozen=True)
class TokenChoice:
    """Each token goes to the k experts with its largest scores; parameters {"kernel": [D E]}.

    | | scores | renormalize | bias_rate |
    |---|---|---|---|
    | Mixtral, GShard | softmax | True: the softmax over the chosen logits alone | None |
    | Switch (k=1), Qwen-MoE with norm_topk_prob false | softmax | False: the softmax over all experts | None |
    | BASE, StableMoE | sigmoid | False: sigmoid of the chosen logits | None |
    | DeepSeek-V3 | sigmoid | True: divided by their sum | 0.001 |

    With a `bias_rate`, experts are chosen by score plus a bias that is no part of the weights: the state {"bias": [E]},
    zeros at first, which each batch moves by `bias_rate` against the sign of each expert's surplus (Wang et al. 2024,
    arXiv:2408.15664). With `noise`, normal noise of that deviation is added to the logits wherever the context has a
    key. `balance` counts "all" choices or the "first" ones (GShard).

    Raises:
        InputError: a value outside its range; k=1 with renormalize=True, whose weight is always 1: no gradient.
    """

    k: int
    scores: str = "softmax"
    renormalize: bool = True
    balance: str = "all"
    noise: float = 0.0
    bias_rate: float | None = None
    is_causal: ClassVar[bool] = True

    def __post_init__(self):
        if self.k < 1:
            raise InputError(f"router.k={self.k!r} must be at least 1: the experts that a token goes to.")
        for name, known in (("scores", SCORES), ("balance", BALANCES)):
            if getattr(self, name) not in known:
                raise unknown(f"router.{name}", getattr(self, name), known)
        if self.k == 1 and self.renormalize:
            raise InputError(
                "router.k=1 with router.renormalize=True gives every token the weight 1, and the router no gradient: "
                "set renormalize=False."
            )
        if self.noise < 0:
            raise InputError(f"router.noise={self.noise} must be at least 0: it is a standard deviation.")

    def init(self, key: PRNGKeyArray, width: int, experts: int, *, std: float, dtype: Any) -> PyTree:
        """{"kernel": [D E]}, normal of deviation `std`."""
        return _normal_kernel(key, (width, experts), std, dtype)

    def init_state(self, experts: int) -> PyTree | None:
        """{"bias": [E]} of zeros with a `bias_rate`, else None."""
        return None if self.bias_rate is None else {"bias": jnp.zeros(experts, jnp.float32)}

    def __call__(self, params: PyTree, x: Float[Array, "B T D"], context: RouteContext) -> tuple[TokenRoute, RouterAux]:
        clean = _logits(params, x, context.valid)
        E = clean.shape[-1]
        if self.k > E:
            raise InputError(f"router.k={self.k} exceeds the {E} experts of this layer.")
        logits = clean + self._noise(clean, context)
        probs = jax.nn.softmax(logits, axis=-1) if self.scores == "softmax" else jax.nn.sigmoid(logits)
        bias = self._bias(context, E)
        ids = routing.choose(probs if bias is None else probs + bias, self.k)
        load = routing.load(ids, context.valid, E)
        shares = probs if self.scores == "softmax" else _normalized(probs)
        counted = ids[..., :1] if self.balance == "first" else ids
        losses = {
            "balance": routing.balance_loss(shares, counted, context.valid),
            "z": routing.z_loss(clean, context.valid),
        }
        return TokenRoute(ids, self._weights(logits, probs, ids)), RouterAux(
            losses, probs, load, self._moved(bias, load), routing.importance(shares, context.valid)
        )

    def _weights(self, logits: Array, probs: Array, ids: Int[Array, "B T k"]) -> Float[Array, "B T k"]:
        if self.renormalize and self.scores == "softmax":
            return jax.nn.softmax(routing.take(logits, ids), axis=-1)
        weights = routing.take(probs, ids)
        return _normalized(weights) if self.renormalize else weights

    def _bias(self, context: RouteContext, E: int) -> Float[Array, "E"] | None:
        if self.bias_rate is None:
            return None
        return jnp.zeros(E, jnp.float32) if context.state is None else context.state["bias"]

    def _moved(self, bias: Float[Array, "E"] | None, load: Float[Array, "E"]) -> dict[str, Array] | None:
        if bias is None or self.bias_rate is None:
            return None
        return {"bias": bias + self.bias_rate * jnp.sign(jnp.mean(load) - load)}

    def _noise(self, logits: Float[Array, "B T E"], context: RouteContext) -> Float[Array, "B T E"] | float:
        if self.noise == 0 or context.key is None:
            return 0.0
        keys = fold(context.key, context.layer)
        return self.noise * jax.vmap(lambda key: jax.random.normal(key, logits.shape[1:], jnp.float32))(keys)


@dataclasses.dataclass(frozen=True)
class ExpertChoice:
    """Each expert takes the tokens with its largest scores, `factor` experts a token on average; {"kernel": [D E]}.

    Softmax over experts, then the top C = ceil(tokens / E * factor) of a group's valid tokens for each (Zhou et al.
    2022, arXiv:2202.09368). Loads are even without a loss; a token may get no expert or all. A group is B / `groups`
    rows. A token's fate hangs on later ones: not causal.
    """

    factor: float = 2.0
    groups: int = 1
    is_causal: ClassVar[bool] = False

    def __post_init__(self):
        if not self.factor >= routing.LEAST_FACTOR:
            least = f"at least {routing.LEAST_FACTOR}"
            raise InputError(f"router.factor={self.factor} must be {least}: the average number of experts a token.")
        if self.groups < 1:
            raise InputError(f"router.groups={self.groups} must be at least 1.")

    def init(self, key: PRNGKeyArray, width: int, experts: int, *, std: float, dtype: Any) -> PyTree:
        """{"kernel": [D E]}, normal of deviation `std`."""
        return _normal_kernel(key, (width, experts), std, dtype)

    def init_state(self, experts: int) -> None:
        """Remembers nothing."""

    def __call__(self, params: PyTree, x: Float[Array, "B T D"], context: RouteContext) -> tuple[SlotRoute, RouterAux]:
        logits = _logits(params, x, context.valid)
        probs = jax.nn.softmax(logits, axis=-1)
        E = probs.shape[-1]
        valid, by_expert = in_groups(self.groups, context.valid), in_groups(self.groups, probs).swapaxes(1, 2)
        N = valid.shape[1]

        def room(tokens):
            return routing.capacity(tokens, k=1, experts=E, factor=self.factor)

        tokens = routing.choose(jnp.where(valid[:, None], by_expert, -jnp.inf), min(room(N), N))
        count = jnp.sum(valid, axis=1, dtype=jnp.int32)
        # Padding must not raise what an expert takes: the count of valid tokens rules, N only bounds the shape.
        taken = jnp.arange(tokens.shape[-1]) < jnp.minimum(room(count), count)[:, None]
        taken = jnp.broadcast_to(taken[:, None], tokens.shape)
        weights = jnp.where(taken, routing.take(by_expert, tokens), 0)
        load = jnp.sum(taken, axis=(0, 2), dtype=jnp.float32)
        losses, importance = {"z": routing.z_loss(logits, context.valid)}, routing.importance(probs, context.valid)
        aux = RouterAux(losses, probs, load, importance=importance)
        return SlotRoute(jnp.where(taken, tokens, -1), weights), aux


@dataclasses.dataclass(frozen=True)
class SoftChoice:
    """Every expert sees `slots` mixtures of a row's tokens (Puigcerver et al. 2023, arXiv:2308.00951); not causal.

    Parameters {"kernel": [D E*P], "scale": []}: logits are scale times the cosine of token and slot, their softmax over
    the row's valid tokens makes the mixtures, their softmax over all slots the answers.
    """

    slots: int
    is_causal: ClassVar[bool] = False

    def __post_init__(self):
        if self.slots < 1:
            raise InputError(f"router.slots={self.slots} must be at least 1: the slots of each expert.")

    def init(self, key: PRNGKeyArray, width: int, experts: int, *, std: float, dtype: Any) -> PyTree:
        """{"kernel": [D E*P]}, normal of deviation `std`, and "scale" 1."""
        return _normal_kernel(key, (width, experts * self.slots), std, dtype) | {"scale": jnp.ones((), dtype)}

    def init_state(self, experts: int) -> None:
        """Remembers nothing."""

    def __call__(self, params: PyTree, x: Float[Array, "B T D"], context: RouteContext) -> tuple[SoftRoute, RouterAux]:
        valid = context.valid[..., None]
        x, kernel = jnp.where(valid, x, 0).astype(jnp.float32), params["kernel"].astype(jnp.float32)
        if kernel.shape[1] % self.slots:
            raise InputError(f"router.slots={self.slots} does not divide the {kernel.shape[1]} slots of this layer.")
        cosines = routing.router_logits(_unit(x, axis=-1), _unit(kernel, axis=0))
        logits = params["scale"].astype(jnp.float32) * cosines
        dispatch = jax.nn.softmax(jnp.where(valid, logits, jnp.finfo(jnp.float32).min), axis=1) * valid
        combine = jax.nn.softmax(logits, axis=-1) * valid
        E = kernel.shape[1] // self.slots
        dispatch, combine = (weights.reshape(*x.shape[:2], E, self.slots) for weights in (dispatch, combine))
        load = jnp.broadcast_to(jnp.sum(valid, dtype=jnp.float32), (E,))
        return SoftRoute(dispatch, combine), RouterAux({}, jnp.sum(combine, axis=-1), load)


def _normalized(weights: Float[Array, "..."]) -> Float[Array, "..."]:
    # Sigmoids of very negative logits are zero in float32.
    return weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1e-20)


def _unit(x: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    # The root's gradient at zero is infinite, and padding is zero.
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=axis, keepdims=True), 1e-12))
