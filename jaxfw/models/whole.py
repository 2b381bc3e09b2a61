"""The whole decoder: `trunk` is the loop over the layers, `forward` goes from tokens to logits.

`trunk` runs the layers in one trace, or part by part when it is given the jit of `layer`, or as a scan when the
parameters are stacked.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxfw.core.errors import InputError
from jaxfw.core.keys import row_keys
from jaxfw.core.mesh import constrain
from jaxfw.core.shapes import Array, Float, Int, PRNGKeyArray, PyTree
from jaxfw.models import taps as tap
from jaxfw.models.cache.policy import Cache, CachePolicy, Step
from jaxfw.models.checks import check_cache, check_layers, check_mixture, check_packing, check_tokens
from jaxfw.models.decoder import LayerOutput, default_router, embed, first_step, head, layer
from jaxfw.models.routing import Experts, Router
from jaxfw.models.sharding import state_spec
from jaxfw.models.taps import Sites, Taps
from jaxfw.nn.config import DecoderConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrunkOutput:
    """What the layers return together: the residual stream behind the last, and the rest as in `Output`."""

    x: Float[Array, "B T D"]
    cache: Cache | None
    losses: dict[str, Float[Array, "L"]]
    metrics: dict[str, Float[Array, "L ..."]]
    state: PyTree
    collected: tuple[Any, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """What a forward returns.

    Attributes:
        logits: in the compute dtype.
        cache: after these tokens; None without a policy.
        losses: of the routers, by name, one entry a layer with experts; unweighted means over valid tokens.
        metrics: of the experts, by name, one entry a layer with experts: "dropped" (share of the assignments),
            "max_load" (share of the fullest expert), "dead" (experts without a token), "load" [L E] and, of
            most routers, "importance" [L E] (sums of probabilities).
        state: of the routers that have one, {"layers_0": ..., ...}; else {}.
        taps: one entry for each `Collect` that was asked for.
    """

    logits: Float[Array, "B T V"]
    cache: Cache | None
    losses: dict[str, Float[Array, "L"]] = dataclasses.field(default_factory=dict)
    metrics: dict[str, Float[Array, "L ..."]] = dataclasses.field(default_factory=dict)
    state: PyTree = dataclasses.field(default_factory=dict)
    taps: tuple[Any, ...] = ()


def trunk(
    config: DecoderConfig,
    params: PyTree,
    x: Float[Array, "B T D"],
    step: Step,
    *,
    policy: CachePolicy | None = None,
    cache: Cache | None = None,
    room: int | None = None,
    write: bool = True,
    router: Router | None = None,
    experts: Experts | None = None,
    state: PyTree | None = None,
    taps: Taps = (),
    collected: tuple[Any, ...] = (),
    run_layer: Callable[..., LayerOutput] = layer,
    run_finish: Callable[..., Cache] | None = None,
) -> TrunkOutput:
    """All layers: from the residual stream that `embed` returns to the one that `head` takes.

    `run_layer` stands in for `layer`, its jit or `remat_layer` for instance, and `run_finish(policy, states, step)` for
    the policy's `finish`: with both jitted, the layers run part by part.

    Raises:
        InputError: what does not fit together, see `jaxfw.models.checks`; a policy on stacked layers.
    """
    check_layers(config, params)
    check_cache(config, x.shape[:2], policy, cache, room)
    check_mixture(config, policy, router, experts, state)
    if step.segment_ids is not None:
        check_packing(policy, router or default_router(config), taps)
    held_by: Any = state or {}
    options = {"router": router, "experts": experts, "taps": taps}
    if "layers" in params:
        if policy is not None:
            raise InputError("stacked layers cannot fill or read a cache: unstack_layers(params) first.")
        return _scan(params["layers"], config.at(0), x, step, options, held_by, collected, run_layer)
    outs: list[LayerOutput] = []
    for i in range(config.layers):
        name, reads_previous = f"layers_{i}", policy is not None and policy.reads_previous
        out = run_layer(
            config.at(i), params[name], x, dataclasses.replace(step, layer=np.int32(i)),
            policy=None if policy is None else policy.at(i),
            state=None if cache is None else cache.layers[i],
            room=x.shape[1] if room is None else room,
            previous=outs[-1].state if outs and reads_previous else None,
            shared=None if cache is None else cache.shared,
            write=write, router_state=held_by.get(name), collected=collected, **options,
        )  # fmt: skip
        x, collected = out.x, out.collected
        outs.append(dataclasses.replace(out, x=None, collected=()))
    if policy is None:
        held = None
    elif cache is None:
        states = tuple(out.state for out in outs)
        held = (run_finish or finish)(policy, states, step)
    else:
        held = dataclasses.replace(cache, layers=tuple(out.state for out in outs))
    states = {f"layers_{i}": out.router_state for i, out in enumerate(outs) if out.router_state is not None}
    return TrunkOutput(
        x, held, _stack([out.losses for out in outs]), _stack([out.metrics for out in outs]), states, collected
    )


def finish(policy: CachePolicy, states: tuple[Any, ...], step: Step) -> Cache:
    """What the policy makes of the states of all layers behind a prompt, laid out on a mesh as every state is."""
    cache = policy.finish(states, step)
    return jax.tree.map(lambda x: constrain(x, *state_spec(x.ndim)), cache)


def remat_layer(
    config: DecoderConfig,
    params: PyTree,
    x: Float[Array, "B T D"],
    step: Step,
    *,
    router: Router | None = None,
    experts: Experts | None = None,
    policy: CachePolicy | None = None,
    room: int = 0,
    write: bool = True,
    saveable: Callable[..., bool] | None = None,
    **arrays: Any,
) -> LayerOutput:
    """`layer`, run again for its gradient instead of keeping what is inside of it (`jax.checkpoint`).

    `saveable`, of `jax.checkpoint_policies`, says what is kept all the same; None keeps the layer's input alone.
    """

    def run(params, x, step, arrays):
        values = {"router": router, "experts": experts, "policy": policy, "room": room, "write": write}
        return layer(config, params, x, step, **values, **arrays)

    return jax.checkpoint(run, policy=saveable)(params, x, step, arrays)


def _stack(layers: list[dict[str, Array]]) -> dict[str, Array]:
    """Entries of the layers that have any, by name, with a layer axis in front."""
    having = [entries for entries in layers if entries]
    return jax.tree.map(lambda *x: jnp.stack(x), *having) if having else {}


def _scan(stacked, config, x, step, options, held_by, collected, run_layer) -> TrunkOutput:
    """The layers as one `lax.scan`: traced and compiled once, whatever their number."""
    names = [f"layers_{i}" for i in range(config.layers)]
    given = [held_by[name] for name in names] if held_by else None
    stacked_states = jax.tree.map(lambda *x: jnp.stack(x), *given) if given else None

    def body(carry, part):
        x, collected = carry
        params, i, router_state = part
        here = dataclasses.replace(step, layer=i)
        out = run_layer(config, params, x, here, router_state=router_state, collected=collected, **options)
        return (out.x, out.collected), (out.losses, out.metrics, out.router_state)

    parts = (stacked, jnp.arange(config.layers, dtype=jnp.int32), stacked_states)
    (x, collected), (losses, metrics, states) = jax.lax.scan(body, (x, collected), parts)
    if states is not None:
        states = {name: jax.tree.map(lambda leaf, i=i: leaf[i], states) for i, name in enumerate(names)}
    return TrunkOutput(x, None, losses, metrics, states or {}, collected)


def forward(
    config: DecoderConfig,
    params: PyTree,
    tokens: Int[Array, "B T"],
    *,
    lengths: Int[Array, "B"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    policy: CachePolicy | None = None,
    cache: Cache | None = None,
    room: int | None = None,
    write: bool = True,
    router: Router | None = None,
    experts: Experts | None = None,
    state: PyTree | None = None,
    taps: Taps = (),
    unit_id: Int[Array, "B T"] | None = None,
    key: PRNGKeyArray | None = None,
    run_layer: Callable[..., LayerOutput] = layer,
    run_head: Callable[..., Array] = head,
) -> Output:
    """Logits of every token, in one trace.

    Rows are canonical: valid tokens first, `lengths` of them (all, by default); logits beyond a row's length mean
    nothing. With a `policy`, the result holds a cache: a fresh one with `room` slots (T by default), or the given one
    extended; that it has room is for the caller to see to, as lengths are known only when this runs.

    Args:
        config: the model, static.
        params: its parameters, a key per layer or stacked by `stack_layers`.
        tokens: ids.
        lengths: valid tokens of each row.
        segment_ids: of packed rows, the number of each token's document: 1, 2, ... from the left, 0 for padding at the
            end. Attention stays inside a document, positions restart in each (so does what RoPE or a table makes of
            them). Without a cache only; on a GPU see `jaxfw.ops.attention` for the cost.
        policy: what a cache keeps, static; None keeps none.
        cache: of earlier tokens, which these extend.
        room: slots of a fresh cache.
        write: False leaves a given cache as it is: it is read only.
        router: who decides which experts a token goes to, static; None is `default_router`.
        experts: who runs them, static; None is `Sorted()`, dropless.
        state: of the routers, as `Output.state` returned it.
        taps: edits and collections, see `jaxfw.models.taps`.
        unit_id: which unit each token belongs to, for policies that keep whole units.
        key: for policies that draw and, without a cache, for routers that do; one, or one a row.
        run_layer: stands in for `layer`: `remat_layer`, for instance.
        run_head: stands in for `head`: with `final`, `Output.logits` are the hidden states that meet the vocabulary.
    """
    check_tokens(config, tokens, lengths, unit_id, segment_ids)
    B, T = tokens.shape
    tap.validate(config, taps, B, T)
    step = first_step(jnp.full(B, T, jnp.int32) if lengths is None else lengths, T, segment_ids=segment_ids)
    step = dataclasses.replace(step, tokens=tokens, unit_id=unit_id, key=None if key is None else row_keys(key, B))
    if cache is not None:
        step = dataclasses.replace(step, positions=step.positions + cache.seen[:, None])
    sites = Sites(taps, step, tap.empty(config, taps, B, T))
    x = embed(config, params, tokens, positions=step.positions, sites=sites)
    out = trunk(
        config, params, x, step, policy=policy, cache=cache, room=room, write=write, router=router, experts=experts,
        state=state, taps=taps, collected=tuple(sites.collected), run_layer=run_layer,
    )  # fmt: skip
    sites = Sites(taps, step, out.collected)
    logits = run_head(config, params, out.x, sites=sites)
    return Output(logits, out.cache, out.losses, out.metrics, out.state, tuple(sites.collected))
