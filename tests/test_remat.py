"""Layers that run again for their gradient: routers draw and remember the same; and scoring by the same contract."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from jaxfw.models import DecoderConfig, MoEConfig, forward, init, stack_layers, unstack_layers
from jaxfw.models.routing import TokenChoice
from jaxfw.train import NextTokenLoss, evaluate_tokens

DENSE = DecoderConfig(vocab=23, width=16, ffn=24, layers=2, heads=4, kv_heads=2, head_dim=4, positions=64, init_std=0.4)
EXPERTS = dataclasses.replace(DENSE, moe=MoEConfig(experts=3, per_token=2, ffn=8))
ROUTER = TokenChoice(2, scores="sigmoid", noise=0.3, bias_rate=0.01)
RNG = np.random.default_rng(0)
BATCH = {
    "tokens": RNG.integers(0, 23, (3, 13), np.int32),
    "segment_ids": np.array([[1] * 13, [1] * 4 + [2] * 6 + [0] * 3, [1] * 2 + [2] * 1 + [3] * 10], np.int32),
    "weights": (RNG.random((3, 13)) * (RNG.random((3, 13)) < 0.7)).astype(np.float32),
}
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def params_of(config):
    return compiled(init, static_argnums=0)(config, jax.random.key(0))


@functools.cache
def results(*, stacked=False, **options):
    """((loss, aux), gradients) of a router that draws and has a state, layers apart."""
    loss, params = NextTokenLoss(EXPERTS, ROUTER, router_losses=(("balance", 0.1),), **options), params_of(EXPERTS)
    run = compiled(jax.value_and_grad(loss, has_aux=True))
    given, state = stack_layers(params) if stacked else params, loss.init_state()
    value, gradients = run(given, BATCH, jax.random.key(1), state=state)
    return value, unstack_layers(gradients) if stacked else gradients


def close(ours, theirs, tolerance=1e-5):
    """Of every leaf, in units of its largest value."""

    def check(ours, theirs):
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()

    jax.tree.map(check, ours, theirs)


@pytest.mark.parametrize(
    "options", [{"remat": "attention"}, {"remat": "products", "stacked": True, "chunk": 4}], ids=str
)
def test_routers_draw_and_remember_the_same(options):
    """Losses, metrics and states too; "layer" is in tests/test_loss_options.py."""
    close(results(**options), results())


def test_windows_are_scored_by_weights_inside_documents():
    """By loops over the logits; rows without anything to predict are left out; tokens alone count all."""
    tokens, ids, weights = BATCH["tokens"], BATCH["segment_ids"], BATCH["weights"]
    params, sums = params_of(DENSE), np.zeros((3, 2))
    logits = np.asarray(forward(DENSE, params, tokens[:, :-1], segment_ids=ids[:, :-1]).logits, np.float64)
    for b, t in np.ndindex(3, 12):
        if ids[b, t] == ids[b, t + 1] > 0:
            nll = np.logaddexp.reduce(logits[b, t]) - logits[b, t, tokens[b, t + 1]]
            sums[b] += weights[b, t + 1] * nll, weights[b, t + 1]
    for chunk in (None, 5):
        close(evaluate_tokens(DENSE, params, [BATCH], chunk=chunk), sums[:, 0] / sums[:, 1], 1e-6)
    some = {"tokens": tokens, "weights": np.repeat(np.array([[1], [0], [1]], np.float32), 13, axis=1)}
    close(evaluate_tokens(DENSE, params, [some]), evaluate_tokens(DENSE, params, [tokens])[[0, 2]], 1e-6)


def test_each_setting_keeps_what_the_table_says():
    """Of each layer, in numbers held between forward and backward: what XLA makes of them, a GPU's program shows."""
    layers, tokens = DENSE.layers, 3 * 12
    q, kv, ffn, D = 16, 8, DENSE.ffn, DENSE.width

    def kept(remat):
        def backward(params):
            return jax.vjp(
                lambda p: NextTokenLoss(DENSE, remat=remat)(p, BATCH, jax.random.key(0), state={})[0], params
            )[1]

        return sum(x.size for x in jax.tree.leaves(jax.eval_shape(backward, params_of(DENSE))) if x.size >= tokens * kv)

    assert kept("attention") - kept("layer") == layers * tokens * q
    assert kept("products") - kept("attention") == layers * tokens * (q + 2 * kv + D + 2 * ffn)
    assert kept(None) > kept("products")
