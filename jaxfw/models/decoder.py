"""The parts of a decoder: `embed`, `layer` (`attend_half`, then `mlp_half`), `head`.

The second half of a layer is dense, or `route` and `run_experts`. All are pure functions `(config, params, ...)`;
parameters are plain nested dicts, a key per layer (`layers_0`, ...).
What varies comes as values: a cache policy, a router and the function that runs experts, taps. `jaxfw.models.whole`
composes the parts.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxfw.core.errors import InputError
from jaxfw.core.mesh import BATCH_AXES, constrain
from jaxfw.core.shapes import Array, Float, Int, PRNGKeyArray, PyTree
from jaxfw.models import taps as tap
from jaxfw.models.cache.policy import QKV, AttentionSpec, CachePolicy, Step
from jaxfw.models.routing import Experts, ExpertStats, RouteContext, Router, RouterAux, Sorted, TokenChoice, TokenRoute
from jaxfw.models.sharding import state_spec
from jaxfw.models.taps import Sites, Taps
from jaxfw.nn.config import DecoderConfig
from jaxfw.nn.layers import Block, Decoder, Embedding, Head, Norm
from jaxfw.ops.attention import attend
from jaxfw.ops.attention_rows import attention_lse
from jaxfw.ops.quant import Quantised
from jaxfw.ops.rope import rotate, rotation
from jaxfw.ops.segments import document_lengths, starts


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerOutput:
    """What a layer, or a half of it, returns: the residual stream, and what was asked for beside it.

    `state` is the cache's state of this layer; `losses`, `metrics` and `router_state` are its router's and experts',
    empty or None in a dense layer; `collected` is what taps hold so far.
    """

    x: Float[Array, "B T D"]
    state: Any = None
    losses: dict[str, Float[Array, ""]] = dataclasses.field(default_factory=dict)
    metrics: dict[str, Array] = dataclasses.field(default_factory=dict)
    router_state: PyTree | None = None
    collected: tuple[Any, ...] = ()


def default_router(config: DecoderConfig) -> Router | None:
    """The token choice that the config describes; None for a dense model."""
    moe = config.moe
    if moe is None:
        return None
    renormalize = moe.per_token > 1 if moe.renormalize is None else moe.renormalize
    return TokenChoice(moe.per_token, scores=moe.scores, renormalize=renormalize)


def init(config: DecoderConfig, key: PRNGKeyArray, *, router: Router | None = None) -> PyTree:
    """Fresh parameters: normal(init_std) matrices, unit norms, zero biases. Works under `jax.eval_shape`.

    A router declares its own; None is `default_router`.
    """

    def mix(q, k, v, hidden, w_o):
        return q, None

    return Decoder(config, router or default_router(config)).init(key, jnp.zeros((1, 1), jnp.int32), mix)["params"]


def router_states(config: DecoderConfig, router: Router | None = None) -> PyTree:
    """What the routers of all layers remember before the first batch, {"layers_0": ..., ...}; {} for most routers."""
    router = router or default_router(config)
    if config.moe is None or router is None:
        return {}
    states = {f"layers_{i}": router.init_state(config.moe.experts) for i in range(config.layers) if config.moe.is_in(i)}
    return {name: state for name, state in states.items() if state is not None}


def _apply(module: Any, params: PyTree, *arguments: Any, method: str | None = None) -> Any:
    return module.apply({"params": params}, *arguments, method=method)


def attention_spec(config: DecoderConfig) -> AttentionSpec:
    """The static description of a layer's attention: of `config.at(layer)`, where layers differ."""
    return AttentionSpec(
        config.kv_heads, config.head_dim, config.head_dim**-0.5, config.rope, config.softmax_dtype, config.window
    )


HEADS = "heads"  # the name by which a `saveable` of `remat_layer` keeps what attention returns
_HEADS = (BATCH_AXES, None, "tensor", None)  # [B T K d]
SiteFn = Callable[[str, Array], Array]


def _no_sites(site: str, x: Array) -> Array:
    return x


def embed(
    config: DecoderConfig,
    params: PyTree,
    tokens: Int[Array, "B T"],
    *,
    positions: Int[Array, "B T"] | None = None,
    sites: SiteFn = _no_sites,
) -> Float[Array, "B T D"]:
    """The residual stream before the first layer; `params` is the whole tree, `sites` a `Sites` for taps.

    `positions` are 0..T-1 if not given; what extends a cache has others.
    """
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    x = sites("embed", _apply(Embedding(config), params["embed"], tokens, positions))
    return constrain(x, BATCH_AXES, None, None)


def head(
    config: DecoderConfig, params: PyTree, x: Float[Array, "B T D"], *, sites: SiteFn = _no_sites
) -> Float[Array, "B T V"]:
    """Logits from the residual stream after the last layer; `params` is the whole tree, `sites` a `Sites` for taps."""
    table = params["embed"]["embedding"] if config.tie_embeddings else None
    return constrain(_apply(Head(config), params["head"], x, table, sites), BATCH_AXES, None, "tensor")


def final(
    config: DecoderConfig, params: PyTree, x: Float[Array, "B T D"], *, sites: SiteFn = _no_sites
) -> Float[Array, "B T D"]:
    """`head` without its product: hidden states behind the last norm, for `vocabulary` to meet in parts."""
    return sites("final", _apply(Norm(config, config.norm), params["head"]["norm"], x))


def vocabulary(config: DecoderConfig, params: PyTree) -> Float[Array, "V D"] | Quantised:
    """The matrix that `head` multiplies by: the embedding where tied."""
    return params["embed"]["embedding"] if config.tie_embeddings else params["head"]["lm_head"]


def attend_half(
    config: DecoderConfig,
    params: PyTree,
    x: Float[Array, "B T D"],
    step: Step,
    *,
    policy: CachePolicy | None = None,
    state: Any = None,
    room: int = 0,
    previous: Any = None,
    shared: PyTree | None = None,
    write: bool = True,
    taps: Taps = (),
    collected: tuple[Any, ...] = (),
) -> LayerOutput:
    """The attention half of a layer; `params` is that layer's tree.

    Without a `policy`, causal attention among these tokens, inside each document where the step has several. With one
    and no `state`, the prefill of a cache with `room` slots. With both, the tokens extend the state.
    """
    spec, sites = attention_spec(config), Sites(taps, step, collected)
    x = sites("resid/in", x)

    def mix(q_pre, k_pre, v, hidden, w_o):
        q_pre, k_pre = sites("attn/q_pre", q_pre), sites("attn/k_pre", k_pre)
        q, k = _rotated(config, q_pre, k_pre, step)
        q, k = sites("attn/q", q), sites("attn/k", k)
        q = constrain(q, *_HEADS, shape=k.shape)  # a query head lies where its key head does
        k, v = constrain(k, *_HEADS), constrain(sites("attn/v", v), *_HEADS)
        if policy is None:
            keys, values = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
            heads, new = checkpoint_name(attend(q, keys, values, starts=step.starts, **spec.options), HEADS), None
            if tap.wants(taps, "attn/lse"):
                lse = attention_lse(q, keys, scale=spec.scale, window=spec.window, starts=step.starts)
                sites("attn/lse", lse)
        else:
            if tap.wants(taps, "attn/lse"):
                raise InputError("site 'attn/lse' cannot be collected beside a cache: leave out policy=.")
            qkv = QKV(q, k, v, q_pre, k_pre, hidden, w_o)
            if state is None:
                heads, new = policy.prefill(qkv, step, spec=spec, room=room, previous=previous)
            else:
                heads, new = policy.extend(state, qkv, step, spec=spec, previous=previous, shared=shared, write=write)
                _check_state(policy, state, new)
            new = jax.tree.map(lambda x: constrain(x, *state_spec(x.ndim)), new)
        return sites("attn/head_out", heads), new

    x, new = _apply(Block(config), params, x, mix, sites, method="attend_half")
    return LayerOutput(constrain(x, BATCH_AXES, None, None), new, collected=tuple(sites.collected))


def _rotated(config: DecoderConfig, q: Array, k: Array, step: Step) -> tuple[Array, Array]:
    if config.rope is None:
        return q, k
    turn = functools.partial(rotation, config.rope, width=config.head_dim)
    if step.segment_ids is None:
        cos, sin = turn(step.positions, seq_len=step.positions[:, 0] + step.lengths)
    else:  # a kind that stretches by length does so by each document's own
        lengths = document_lengths(step.segment_ids)
        cos, sin = jax.vmap(lambda at, n: turn(at[:, None], seq_len=n), (1, 1), 1)(step.positions, lengths)
        cos, sin = cos[:, :, 0], sin[:, :, 0]
    return rotate(q, cos, sin), rotate(k, cos, sin)


def _check_state(policy: CachePolicy, before: Any, after: Any) -> None:
    def forms(state):
        leaves, tree = jax.tree_util.tree_flatten_with_path(state)
        return tree, {jax.tree_util.keystr(path): (tuple(x.shape), str(x.dtype)) for path, x in leaves}

    (tree, given), (new_tree, found) = forms(before), forms(after)
    if tree != new_tree or given != found:
        changed = [f"{name} {form} became {found.get(name)}" for name, form in given.items() if found.get(name) != form]
        raise InputError(
            f"{policy!r}.extend must return the tree, shapes and dtypes of the state that it was given, since a loop "
            f"carries it: {'; '.join(changed) or f'{tree} became {new_tree}'}."
        )


def route(
    config: DecoderConfig, params: PyTree, hidden: Float[Array, "B T D"], context: RouteContext, *, router: Router
) -> tuple[Any, RouterAux]:
    """Which experts a layer's tokens go to; `params` is that layer's tree, `hidden` its normalised residual."""
    return router(params["moe"]["router"], hidden, context)


def run_experts(
    config: DecoderConfig,
    params: PyTree,
    hidden: Float[Array, "B T D"],
    route: Any,
    context: RouteContext,
    *,
    experts: Experts,
) -> tuple[Float[Array, "B T D"], ExpertStats]:
    """What a layer's experts add to the residual; `params` is that layer's tree."""
    return experts(params["moe"]["experts"], hidden, route, context)


def mlp_half(
    config: DecoderConfig,
    params: PyTree,
    x: Float[Array, "B T D"],
    step: Step,
    *,
    router: Router | None = None,
    experts: Experts | None = None,
    router_state: PyTree | None = None,
    taps: Taps = (),
    collected: tuple[Any, ...] = (),
) -> LayerOutput:
    """The feed-forward half of a layer, dense or `route` and `run_experts`; `params` is that layer's tree.

    None is `default_router` and the sorted experts. A router that draws does so by the step's key, if there is one.
    """
    sites = Sites(taps, step, collected)
    x = sites("resid/mid", x)
    if "moe" not in params:
        x = sites("resid/out", _apply(Block(config), params, x, sites, method="mlp_half"))
        return LayerOutput(constrain(x, BATCH_AXES, None, None), collected=tuple(sites.collected))
    router, experts = router or default_router(config), experts or Sorted()
    assert router is not None
    hidden = _apply(Block(config, router), params, x, sites, method="mlp_input")
    context = RouteContext(step.valid, jnp.asarray(step.layer), step.tokens, step.key, router_state)
    chosen, aux = route(config, params, hidden, context, router=router)
    sites("moe/probs", aux.probs)
    if isinstance(chosen, TokenRoute):
        sites("moe/ids", chosen.ids)
    elif tap.wants(taps, "moe/ids"):
        raise InputError(
            f"site 'moe/ids' needs a router by which tokens choose: {router!r} gives {type(chosen).__name__}."
        )
    out, stats = run_experts(config, params, hidden, chosen, context, experts=experts)
    if config.moe is not None and config.moe.shared:
        out += _apply(Block(config, router), params, hidden, method="shared_expert")
    x = sites("resid/out", x + sites("mlp/out", out))
    return LayerOutput(
        constrain(x, BATCH_AXES, None, None), None, aux.losses, _expert_metrics(aux, stats), aux.state,
        tuple(sites.collected),
    )  # fmt: skip


def _expert_metrics(aux: RouterAux, stats: ExpertStats) -> dict[str, Array]:
    share = stats.dropped / jnp.maximum(stats.kept + stats.dropped, 1)
    dead = jnp.sum(aux.load == 0, dtype=jnp.float32)
    counts = {"load": aux.load} | ({} if aux.importance is None else {"importance": aux.importance})
    return {"dropped": share, "max_load": stats.max_load, "dead": dead} | counts


def layer(
    config: DecoderConfig,
    params: PyTree,
    x: Float[Array, "B T D"],
    step: Step,
    *,
    router: Router | None = None,
    experts: Experts | None = None,
    router_state: PyTree | None = None,
    taps: Taps = (),
    collected: tuple[Any, ...] = (),
    **cache: Any,
) -> LayerOutput:
    """One layer: `attend_half` (with its keywords), then `mlp_half`; `params` is that layer's tree.

    Beside a cache, routers do not draw: the step's key is the policy's alone.
    """
    half = attend_half(config, params, x, step, taps=taps, collected=collected, **cache)
    if cache.get("policy") is not None:
        step = dataclasses.replace(step, key=None)
    out = mlp_half(
        config, params, half.x, step, router=router, experts=experts, router_state=router_state, taps=taps,
        collected=half.collected,
    )  # fmt: skip
    return dataclasses.replace(out, state=half.state)


def first_step(lengths: Int[Array, "B"], T: int, *, segment_ids: Int[Array, "B T"] | None = None) -> Step:
    """The step of a prompt: positions 0..T-1 in every row or, of packed rows, in every document."""
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (lengths.shape[0], T))
    if segment_ids is not None:
        positions -= starts(segment_ids)
    return Step(positions, lengths, jnp.int32(0), segment_ids=segment_ids)
