"""A Switch-style decoder: one expert a token, weighted by its probability, in every second layer; it trains."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxfw.core.errors import InputError
from jaxfw.models import first_step, forward, init, mlp_half
from jaxfw.models.presets import preset
from jaxfw.train import NextTokenLoss, init_state, make_step

PRESET = preset("switch-8")
assert PRESET.moe is not None
GATED = dataclasses.replace(
    PRESET, vocab=32, width=16, ffn=24, layers=4, heads=2, kv_heads=2, head_dim=8, positions=32, init_std=0.3,
    param_dtype="float32", dtype="float32", moe=dataclasses.replace(PRESET.moe, ffn=12),
)  # fmt: skip
PLAIN = dataclasses.replace(GATED, gated=False, activation="gelu_tanh")
LENGTHS = np.array([9, 5], np.int32)


def answer(p, e, x):
    """What expert e makes of one token."""
    hidden = x @ p["up"][e]
    if "gate" in p:
        gate = x @ p["gate"][e]
        hidden = gate / (1 + math.e**-gate) * hidden
    else:
        hidden = 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
    return hidden @ p["down"][e]


@pytest.mark.parametrize("config", [GATED, PLAIN], ids=["gated", "plain"])
def test_a_layer_equals_numpy(config):
    params = init(config, jax.random.key(0))["layers_1"]
    assert ("gate" in params["moe"]["experts"]) is config.gated
    x = np.random.default_rng(0).standard_normal((2, 9, 16)).astype(np.float32)
    out = jax.jit(mlp_half, static_argnums=0)(config, params, x, first_step(jnp.asarray(LENGTHS), 9)).x
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    chosen = set()
    for b, t in np.argwhere(np.arange(9) < LENGTHS[:, None]):
        token = x[b, t].astype(np.float64)
        hidden = token / np.sqrt((token**2).mean() + config.norm_eps) * wide["mlp_norm"]["scale"]
        logits = hidden @ wide["moe"]["router"]["kernel"]
        probs = np.exp(logits) / np.exp(logits).sum()
        e = int(probs.argmax())
        chosen.add(e)
        expected = token + probs[e] * answer(wide["moe"]["experts"], e, hidden)
        np.testing.assert_allclose(out[b, t], expected, atol=1e-5)
    assert len(chosen) > 3, "experts that differ"


def test_every_second_layer_has_experts():
    params = jax.eval_shape(lambda: init(GATED, jax.random.key(0)))
    assert ["moe" in params[f"layers_{i}"] for i in range(4)] == [False, True, False, True]


def test_it_trains():
    tokens = np.random.default_rng(1).integers(0, 32, (4, 17)).astype(np.int32)
    loss = NextTokenLoss(GATED, router_losses=(("balance", 0.01),))
    optimizer = optax.adam(1e-2)
    first = init_state(init(GATED, jax.random.key(0)), optimizer, state=loss.init_state())
    kernel = np.array(first.params["layers_1"]["moe"]["router"]["kernel"])
    step, state, losses = make_step(loss, optimizer), first, []
    for number in range(3):
        state, metrics = step(state, {"tokens": tokens}, jax.random.key(number))
        losses.append(float(metrics["train/nll"]))
    assert losses[2] < losses[1] < losses[0]
    assert float(metrics["router/balance"]) >= 1 - 1e-5, "its least value, of even loads"
    moved = np.abs(state.params["layers_1"]["moe"]["router"]["kernel"] - kernel)
    assert moved.max() > 1e-3, "not renormalised, the router has a gradient"


def test_a_weight_of_one_is_refused():
    assert GATED.moe is not None
    config = dataclasses.replace(GATED, moe=dataclasses.replace(GATED.moe, renormalize=True))
    with pytest.raises(InputError, match=r"router\.k=1 with router\.renormalize=True"):
        forward(config, init(GATED, jax.random.key(0)), jnp.zeros((1, 3), jnp.int32))
