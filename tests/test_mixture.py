"""A decoder with experts: by parts as whole, trained, generated from, and refused where it would be wrong."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxfw.core.errors import InputError
from jaxfw.generate import engine
from jaxfw.models import (
    DecoderConfig,
    MoEConfig,
    attend_half,
    embed,
    first_step,
    forward,
    head,
    init,
    layer,
    mlp_half,
    remat_layer,
    router_states,
)
from jaxfw.models.accounting import forward_flops, parameter_count
from jaxfw.models.cache import FullCache
from jaxfw.models.routing import Dense, ExpertChoice, SoftChoice, Sorted, TokenChoice
from jaxfw.train import NextTokenLoss, evaluate_tokens, init_state, make_step

CONFIG = DecoderConfig(
    vocab=31, width=16, ffn=24, layers=3, heads=4, kv_heads=2, head_dim=8, positions=64, init_std=0.3,
    moe=MoEConfig(experts=4, per_token=2, ffn=12, first=1, every=1),
)  # fmt: skip
LENGTHS = np.array([7, 3], np.int32)
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab, (2, 7), np.int32)
BIASED = TokenChoice(2, scores="sigmoid", bias_rate=0.01)


@functools.cache
def params_of(config=CONFIG, router=None):
    return jax.jit(init, static_argnames=("config", "router"))(config, jax.random.key(0), router=router)


run = jax.jit(
    forward, static_argnames=("config", "policy", "room", "router", "experts"),
    compiler_options={"xla_backend_optimization_level": 0},
)  # fmt: skip


def test_layers_are_of_two_kinds():
    params = params_of()
    assert "mlp" in params["layers_0"] and "moe" not in params["layers_0"]
    for i in (1, 2):
        assert set(params[f"layers_{i}"]) == {"attn", "attn_norm", "mlp_norm", "moe"}
        shapes = jax.tree.map(lambda x: x.shape, params[f"layers_{i}"]["moe"])
        assert shapes["experts"] == {"gate": (4, 16, 12), "up": (4, 16, 12), "down": (4, 12, 16)}
        assert shapes["router"] == {"kernel": (16, 4)}
    assert not np.allclose(*(params[f"layers_{i}"]["moe"]["experts"]["up"] for i in (1, 2)))


def test_parts_equal_the_whole_and_what_is_reported_has_a_layer_axis():
    params, step = params_of(), first_step(jnp.asarray(LENGTHS), 7)
    x = embed(CONFIG, params, TOKENS)
    for i in range(3):
        weights, here = params[f"layers_{i}"], dataclasses.replace(step, layer=jnp.int32(i))
        x = mlp_half(CONFIG, weights, attend_half(CONFIG, weights, x, here).x, here).x
    out = run(CONFIG, params, TOKENS, lengths=LENGTHS)
    for b, n in enumerate(LENGTHS):
        np.testing.assert_allclose(head(CONFIG, params, x)[b, :n], out.logits[b, :n], atol=2e-5)
    assert {name: value.shape for name, value in out.losses.items()} == {"balance": (2,), "z": (2,)}
    assert out.metrics["load"].shape == (2, 4) and out.metrics["load"].sum(axis=1).tolist() == [20, 20]
    assert {name: out.metrics[name].shape for name in ("dropped", "max_load", "dead")} == {
        "dropped": (2,), "max_load": (2,), "dead": (2,),
    }  # fmt: skip
    assert out.state == {}


def test_dense_and_sorted_experts_give_the_same_model():
    logits = [run(CONFIG, params_of(), TOKENS, lengths=LENGTHS, experts=e).logits for e in (Dense(), Sorted(), None)]
    for other in logits[1:]:
        np.testing.assert_allclose(other[0], logits[0][0], atol=2e-5)


def test_decoding_equals_one_forward_and_a_row_does_not_see_its_neighbours():
    prompts = [TOKENS[b, :n].tolist() for b, n in enumerate(LENGTHS)]
    together = engine.generate(CONFIG, params_of(), prompts, max_new_tokens=6)
    assert engine.generate(CONFIG, params_of(), prompts[1:], max_new_tokens=6).tokens == together.tokens[1:]
    for row, prompt in zip(together.tokens, prompts, strict=True):
        tokens = np.array([(prompt + list(row) + [0] * 4)[:13]], np.int32)
        logits = np.asarray(run(CONFIG, params_of(), tokens).logits)[0, len(prompt) - 1 :][: len(row)]
        assert logits.argmax(axis=-1).tolist() == list(row)


def test_a_value_that_is_equal_but_new_does_not_retrace():
    traces = 0

    @functools.partial(jax.jit, static_argnames=("router", "experts"))
    def traced(params, tokens, *, router, experts):
        nonlocal traces
        traces += 1
        return forward(CONFIG, params, tokens, router=router, experts=experts).logits

    for _ in range(3):
        traced(params_of(), TOKENS, router=TokenChoice(2), experts=Sorted())
    assert traces == 1


def test_training_lowers_the_loss_and_logs_the_router():
    loss = NextTokenLoss(CONFIG, router=BIASED, experts=Dense(), router_losses=(("balance", 0.01), ("z", 1e-3)))
    optimizer = optax.adam(3e-2)
    params = jax.tree.map(jnp.copy, params_of(CONFIG, BIASED))
    state = init_state(params, optimizer, state=loss.init_state())
    step = make_step(loss, optimizer)
    batch, losses = {"tokens": jnp.asarray(np.resize(TOKENS, (2, 8)))}, []
    for _ in range(20):
        state, metrics = step(state, batch, jax.random.key(1))
        losses.append(float(metrics["train/loss"]))
    assert step._cache_size() == 1, "the routers' state keeps its tree from the first step on"
    assert losses[-1] < 0.7 * losses[0]
    assert {"router/balance", "router/z", "router/dropped", "router/max_load", "router/dead"} <= set(metrics)
    bias = state.state["routers"]["layers_1"]["bias"]
    moves = np.asarray(bias) / BIASED.bias_rate
    np.testing.assert_allclose(moves, moves.round(), atol=1e-3)
    assert np.any(moves.round() != 0)


def test_layers_run_again_for_their_gradients_give_the_same_ones():
    params = params_of()

    def loss(run_layer, params):
        out = forward(
            CONFIG, params, TOKENS, lengths=LENGTHS, experts=Dense(), router=TokenChoice(2), run_layer=run_layer
        )
        return jnp.sum(out.logits[:, :3] ** 2) + jnp.sum(out.losses["z"])

    kept, again = (jax.jit(jax.grad(functools.partial(loss, f)))(params) for f in (layer, remat_layer))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), again, kept)


def test_held_out_windows_are_scored_by_the_router_that_was_trained():
    params, windows = params_of(CONFIG, BIASED), np.resize(TOKENS, (2, 8))
    states = {name: {"bias": jnp.array([3.0, 0, 0, 0])} for name in ("layers_1", "layers_2")}
    values = {"router": BIASED, "experts": Dense()}
    nll = evaluate_tokens(CONFIG, params, [windows], **values, router_states=states)
    out = run(CONFIG, params, windows[:, :-1], **values, state=states)
    logits = np.asarray(out.logits, np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    expected = -np.take_along_axis(log_probs, windows[:, 1:, None], axis=2).mean(axis=(1, 2))
    np.testing.assert_allclose(nll, expected, rtol=1e-5)
    assert np.abs(nll - evaluate_tokens(CONFIG, params, [windows], **values)).max() > 1e-4


def test_router_losses_reach_the_gradient_of_the_router_only():
    params = params_of()

    def balance(params):
        return jnp.sum(forward(CONFIG, params, TOKENS, lengths=LENGTHS, experts=Dense()).losses["balance"])

    grads = jax.jit(jax.grad(balance))(params)
    assert np.any(np.asarray(grads["layers_2"]["moe"]["router"]["kernel"]) != 0)
    assert not np.any(np.asarray(grads["layers_2"]["moe"]["experts"]["down"])), "nothing reads it"


def test_the_state_of_routers_starts_where_they_say():
    state = router_states(CONFIG, BIASED)
    assert set(state) == {"layers_1", "layers_2"} and state["layers_1"]["bias"].tolist() == [0] * 4
    assert router_states(CONFIG) == {} and router_states(dataclasses.replace(CONFIG, moe=None)) == {}
    params = params_of(CONFIG, BIASED)
    out = run(CONFIG, params, TOKENS, lengths=LENGTHS, router=BIASED, state=state)
    assert jax.tree.structure(out.state) == jax.tree.structure(state)


def test_a_router_draws_while_it_is_trained_and_not_while_it_generates():
    noisy, key = TokenChoice(2, noise=1.0), jax.random.key(3)
    run_ = functools.partial(run, CONFIG, params_of(), TOKENS, experts=Dense())
    plain = run_().logits
    assert np.abs(np.asarray(run_(router=noisy, key=key).logits - plain)).max() > 1e-3
    np.testing.assert_array_equal(run_(router=noisy).logits, plain)
    beside = run_(router=noisy, key=key, policy=FullCache()).logits
    np.testing.assert_allclose(beside, plain, atol=2e-5)


def test_parameters_and_operations_count_what_runs():
    dense = dataclasses.replace(CONFIG, moe=None)
    per_layer = 4 * 3 * 16 * 12 + 16 * 4 - 3 * 16 * 24
    assert parameter_count(CONFIG) - parameter_count(dense) == 2 * per_layer
    active = 2 * (2 * 3 * 16 * 12 + 16 * 4 - 3 * 16 * 24)
    difference = forward_flops(CONFIG, batch=2, length=8) - forward_flops(dense, batch=2, length=8)
    assert difference == 2 * 16 * active


@pytest.mark.parametrize(
    "change, message",
    [
        ({"experts": 0}, r"model.moe.experts=0 must be a whole number from 1"),
        ({"per_token": 5}, r"model.moe.per_token=5 exceeds model.moe.experts=4"),
        ({"ffn": 2.5}, r"model.moe.ffn=2.5 must be a whole number"),
        ({"first": 3}, r"model.moe.first=3 is beyond the last of 3 layers"),
        ({"every": 0}, r"model.moe.every=0 must be a whole number"),
    ],
)
def test_a_mixture_that_means_nothing_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(CONFIG, moe=dataclasses.replace(CONFIG.moe, **change))


def test_what_would_be_wrong_is_refused():
    dense, params = dataclasses.replace(CONFIG, moe=None), params_of()
    with pytest.raises(InputError, match=r"router=TokenChoice.*config.moe is None"):
        forward(dense, params_of(dense), TOKENS, router=TokenChoice(2))
    with pytest.raises(InputError, match=r"experts=Sorted.*config.moe is None"):
        forward(dense, params_of(dense), TOKENS, experts=Sorted())
    with pytest.raises(InputError, match=r"experts=Sorted\(.*capacity=None"):
        forward(CONFIG, params, TOKENS, policy=FullCache(), experts=Sorted(capacity=1.25))
    with pytest.raises(InputError, match=r"experts=Sorted\(.*dropless"):
        engine.generate(CONFIG, params, [[1]], max_new_tokens=1, experts=Sorted(capacity=1.25))
    with pytest.raises(InputError, match=r"ExpertChoice.*looks at later tokens.*allow_noncausal"):
        forward(CONFIG, params, TOKENS, router=ExpertChoice())
    with pytest.raises(InputError, match=r"router_losses='balnce' is unknown.*Did you mean 'balance'"):
        NextTokenLoss(CONFIG, router_losses=(("balnce", 1.0),))(params, {"tokens": TOKENS}, jax.random.key(0), state={})


@pytest.mark.parametrize("router", [ExpertChoice(), SoftChoice(slots=2)], ids=["expert choice", "soft"])
def test_routers_that_look_ahead_run_where_they_are_allowed_but_never_beside_a_cache(router):
    config = dataclasses.replace(CONFIG, moe=dataclasses.replace(CONFIG.moe, allow_noncausal=True))
    params = params_of(config, router)
    out = run(config, params, TOKENS, lengths=LENGTHS, router=router)
    assert np.all(np.isfinite(np.asarray(out.logits)))
    with pytest.raises(InputError, match=r"cannot run beside a cache"):
        engine.generate(config, params, [[1]], max_new_tokens=1, router=router)
