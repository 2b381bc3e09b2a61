"""Stacked layers: the same model as a scan, with the same outputs, gradients and taps, traced once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfw.core.errors import InputError
from jaxfw.models import Collect, Edit, embed, first_step, forward, init, layer, stack_layers, trunk, unstack_layers
from jaxfw.models.cache import FullCache
from jaxfw.models.routing import TokenChoice
from tests.taps_program import (
    DENSE,
    EXPERTS,
    LENGTHS,
    MIXED,
    TOKENS,
    VALID,
    WEIGHTS,
    all_collects,
    as_dicts,
    close,
    compiled,
    loss,
    numpy_collected,
    numpy_loss,
    one_at_a_time,
    params_of,
    stacked,
    without_padding,
)  # fmt: skip

BOTH = pytest.mark.parametrize("config", [DENSE, EXPERTS], ids=["dense", "experts"])
BALANCED = TokenChoice(2, scores="sigmoid", bias_rate=0.01)


def objective(config, params, state, taps):
    """A loss of logits and router losses, and everything else that a forward returns."""
    router = BALANCED if config.moe else None
    out = forward(config, params, TOKENS, lengths=LENGTHS, router=router, state=state, taps=taps)
    total = jnp.sum(out.logits * WEIGHTS) + sum(jnp.sum(x) for x in out.losses.values())
    return total, dataclasses.replace(out, logits=jnp.where(VALID[..., None], out.logits, 0))


@BOTH
def test_outputs_gradients_and_state_equal_those_of_layers_apart(config):
    params, taps = params_of(config), (Edit("resid/mid", jnp.float32(0.5), "scale", layers=(1, 1)), Collect("attn/lse"))
    state = {f"layers_{i}": {"bias": jnp.array([0.3, -0.2, 0.1]) * i} for i in range(2)} if config.moe else {}
    run = compiled(jax.value_and_grad(objective, 1, has_aux=True), static_argnums=0)
    (total, apart), gradient = run(config, params, state, taps)
    (stacked_total, together), stacked_gradient = run(config, stack_layers(params), state, taps)
    close(stacked_total, total)
    jax.tree.map(close, unstack_layers(stacked_gradient), gradient)
    assert set(apart.losses) == ({"balance", "z"} if config.moe else set()) and set(apart.state) == set(state)
    jax.tree.map(close, together, apart)


def test_a_router_state_that_is_not_given_starts_and_is_stacked():
    params = stack_layers(params_of(EXPERTS))
    _, out = jax.eval_shape(functools.partial(objective, EXPERTS), params, {}, ())
    assert jax.tree.map(lambda x: x.shape, out.state) == {f"layers_{i}": {"bias": (3,)} for i in range(2)}


@BOTH
def test_every_edit_equals_numpy_and_its_gradient_finite_differences(config):
    """Of the dense model also every value's and weight's gradient: one program, mapped over which edit is at work."""
    params, alone = stack_layers(params_of(config)), one_at_a_time(config)
    run = functools.partial(loss, config, params)
    if config.moe:
        losses = compiled(jax.vmap(run))(stacked(alone))
    else:
        losses, gradients = compiled(jax.vmap(jax.value_and_grad(run, allow_int=True)))(stacked(alone))
        check_gradients(config, alone, jax.device_get(gradients))
    for n, edits in enumerate(alone):
        expected = numpy_loss(config, as_dicts(edits))
        assert abs(losses[n] - expected) < 1e-4, (edits[n].site, edits[n].op, losses[n], expected)


def check_gradients(config, alone, gradients):
    """Along a random direction; edits that are idle have none."""
    rng, step = np.random.default_rng(0), 1e-5
    for n, edits in enumerate(alone):
        edit, (acting,) = edits[n], as_dicts(edits)
        for field in ("value", "weight") if edit.op == "lerp" else ("value",):
            x = getattr(edit, field)
            along = rng.normal(size=x.shape)
            there, back = (numpy_loss(config, [acting | {field: x + way * step * along}]) for way in (1, -1))
            expected = (there - back) / (2 * step)
            got = np.sum(getattr(gradients[n], field)[n] * along)
            assert abs(got - expected) < 2e-4 * max(1, abs(expected)), (edit.site, edit.op, field, got, expected)
        assert not np.any(np.delete(gradients[n].value, n, axis=0))


@BOTH
def test_everything_that_can_be_collected_equals_numpy(config):
    params, collects = stack_layers(params_of(config)), all_collects(config)
    taps = compiled(lambda p: forward(config, p, TOKENS, lengths=LENGTHS, taps=collects).taps)(params)
    expected = numpy_collected(config, collects, [(TOKENS, LENGTHS)])
    jax.tree.map(close, without_padding(collects, taps), expected)


def test_layers_are_in_their_order_and_come_back():
    """layers_10 is behind layers_9."""
    config = dataclasses.replace(DENSE, layers=12, width=4, ffn=4, vocab=5)
    params = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
    shapes = jax.tree.map(lambda x: x.shape, jax.eval_shape(stack_layers, params))
    assert shapes["layers"] == jax.tree.map(lambda x: (12, *x.shape), params["layers_0"])
    assert shapes["embed"] == jax.tree.map(lambda x: x.shape, params["embed"])
    numbered = {f"layers_{i}": {"w": jnp.float32(i)} for i in reversed(range(12))} | {"head": {"w": jnp.float32(99)}}
    together = stack_layers(numbered)
    np.testing.assert_array_equal(together["layers"]["w"], np.arange(12))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, unstack_layers(together), dict(numbered)))


@pytest.mark.parametrize("layers", [2, 5])
def test_a_layer_is_traced_once_whatever_their_number(layers):
    traces = []

    def counted(config, params, x, step, **options):
        traces.append(step.layer)
        return layer(config, params, x, step, **options)

    config = dataclasses.replace(DENSE, layers=layers)
    params = jax.eval_shape(lambda key: stack_layers(init(config, key)), jax.random.key(0))
    step = first_step(jnp.asarray(LENGTHS), TOKENS.shape[1])

    def run(params):
        x = embed(config, params, TOKENS)
        return trunk(config, params, x, step, run_layer=counted).x

    jaxpr = jax.make_jaxpr(run)(params)
    assert len(traces) == 1
    assert [e.params["length"] for e in jaxpr.eqns if e.primitive.name == "scan"] == [layers]


def shapes_of(config):
    return jax.eval_shape(functools.partial(init, config), jax.random.key(0))


def test_what_cannot_be_stacked_is_refused():
    with pytest.raises(InputError, match="layers_1 differs from layers_0 in its parameters: only layers of one kind"):
        stack_layers(shapes_of(MIXED))
    dense = shapes_of(DENSE)
    together = jax.eval_shape(stack_layers, dense)
    with pytest.raises(InputError, match="stacked layers cannot fill or read a cache: unstack_layers"):
        jax.eval_shape(lambda params: forward(DENSE, params, TOKENS, policy=FullCache()).logits, together)
    with pytest.raises(InputError, match=r"params have no layers_0, layers_1, \.\.\.: they hold embed, head, layers"):
        stack_layers(together)
    with pytest.raises(InputError, match=r"params have no stacked layers: they hold .*layers_0"):
        unstack_layers(dense)
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), dense["layers_1"])
    with pytest.raises(InputError, match="layers_1 differs from layers_0"):
        stack_layers({**dense, "layers_1": half})
