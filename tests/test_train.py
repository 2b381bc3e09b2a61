"""The training contract: a pure update, one compilation, a loop that resumes as if it had never stopped."""

import dataclasses
import json
import math
import operator

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxfw.core.checkpoint import Checkpoints
from jaxfw.core.errors import InputError, Preempted, RunError
from jaxfw.core.log import Metrics
from jaxfw.data import RandomWindows, consecutive_windows
from jaxfw.models import DecoderConfig, forward, init
from jaxfw.train import (
    Aux,
    NextTokenLoss,
    OptimizerConfig,
    evaluate_tokens,
    init_state,
    make_optimizer,
    make_step,
    train,
    update,
)
from jaxfw.train.optimizer import make_schedule
from jaxfw.train.step import trained_part, with_frozen

CONFIG = DecoderConfig(
    vocab=32, width=16, ffn=24, layers=2, heads=4, kv_heads=2, head_dim=4, positions=64, qkv_bias=True, out_bias=True
)
TOKENS = np.random.default_rng(0).integers(0, 32, 2000).astype(np.int32)
BATCHES = RandomWindows(TOKENS, batch=4, length=16)
OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup=2), steps=10)


def fresh():
    return init_state(init(CONFIG, jax.random.key(0)), OPTIMIZER)


def quadratic(params, batch, key, *, state):
    """A loss whose update can be done by hand; it counts its calls in `state`."""
    noise = jax.random.normal(key, ())
    loss = jnp.sum((params["w"] - batch) ** 2) / 2
    return loss, Aux({"train/noise": noise}, {"seen": state["seen"] + 1})


def test_an_update_by_hand():
    optimizer = optax.sgd(0.1)
    start = init_state({"w": jnp.array([1.0, 2.0])}, optimizer, state={"seen": jnp.int32(0)})
    after, metrics = update(quadratic, optimizer, start, jnp.array([0.0, 4.0]), jax.random.key(3))
    np.testing.assert_allclose(after.params["w"], [0.9, 2.2], rtol=1e-6)
    assert (int(after.step), int(after.state["seen"]), float(metrics["train/loss"])) == (1, 1, 2.5)
    assert float(metrics["train/grad_norm"]) == pytest.approx(math.sqrt(1 + 4))


def test_randomness_follows_the_step_not_the_history():
    optimizer = optax.sgd(0.1)
    start = init_state({"w": jnp.zeros(2)}, optimizer, state={"seen": jnp.int32(0)})
    at_five = dataclasses.replace(start, step=jnp.int32(5))
    noises = [
        float(update(quadratic, optimizer, s, jnp.zeros(2), jax.random.key(3))[1]["train/noise"])
        for s in (start, at_five, at_five)
    ]
    assert noises[1] == noises[2] != noises[0]


def test_updates_can_be_vmapped_over_clients():
    optimizer = optax.adam(0.1)
    start = jax.vmap(lambda w: init_state({"w": w}, optimizer, state={"seen": jnp.int32(0)}))
    clients = start(jnp.arange(6.0).reshape(3, 2))

    def run(client, batch):
        return update(quadratic, optimizer, client, batch, jax.random.key(0))[0]

    together = jax.vmap(run)(clients, jnp.ones((3, 2)))
    alone = [run(jax.tree.map(operator.itemgetter(m), clients), jnp.ones(2)) for m in range(3)]
    chex.assert_trees_all_close(jax.tree.map(lambda *x: jnp.stack(x), *alone), together, rtol=1e-6)


def test_the_compiled_step_is_the_update():
    loss_fn = NextTokenLoss(dataclasses.replace(CONFIG, layers=1))
    start = init_state(init(loss_fn.config, jax.random.key(0)), OPTIMIZER)
    expected, expected_metrics = update(loss_fn, OPTIMIZER, start, BATCHES(1), jax.random.key(0))
    got, metrics = make_step(loss_fn, OPTIMIZER)(start, BATCHES(1), jax.random.key(0))
    # Adam divides by the root of the second moment, so gradients of about eps may end an update apart.
    chex.assert_trees_all_close(got.params, expected.params, atol=2e-5)
    chex.assert_trees_all_close(metrics, expected_metrics, rtol=1e-5)


def test_the_step_is_traced_once():
    chex.clear_trace_counter()
    loss_fn = NextTokenLoss(CONFIG)

    @chex.assert_max_traces(1)
    def counted(params, batch, key, *, state):
        return loss_fn(params, batch, key, state=state)

    step = make_step(counted, OPTIMIZER)
    state = fresh()
    for number in range(1, 6):
        state, _ = step(state, BATCHES(number), jax.random.key(0))
    assert int(state.step) == 5


def test_the_loss_is_the_mean_over_all_predicted_tokens():
    params, tokens = init(CONFIG, jax.random.key(1)), BATCHES(1)["tokens"]
    loss, aux = NextTokenLoss(CONFIG)(params, {"tokens": tokens}, jax.random.key(0), state={})
    logits = np.asarray(forward(CONFIG, params, tokens[:, :-1]).logits, np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    expected = -np.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1).mean()
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    assert aux.state == {}
    rows = evaluate_tokens(CONFIG, params, [tokens, tokens])
    assert rows.shape == (8,) and rows.mean() == pytest.approx(expected, rel=1e-5)


def test_training_learns_what_can_be_learned():
    """A text that repeats every 5 tokens: its entropy is 0 once the first few are seen, that of a token ln 5."""
    tokens = np.tile(np.arange(5, dtype=np.int32), 200)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup=5), steps=60)
    step, state = make_step(NextTokenLoss(CONFIG), optimizer), init_state(init(CONFIG, jax.random.key(0)), optimizer)
    with Metrics(None) as metrics:
        state = train(state, step, RandomWindows(tokens, 4, 16), jax.random.key(0), steps=60, metrics=metrics,
                      checkpoints=Checkpoints(None), log_every=10)  # fmt: skip
    assert metrics.history[-1]["train/loss"] < 0.1 < math.log(5)
    held_out = list(consecutive_windows(tokens, batch=2, length=16, most=1))
    assert evaluate_tokens(CONFIG, state.params, held_out).mean() < 0.2


def run_loop(folder, steps, *, batches=BATCHES, step=None, stops_at=None):
    step = step or make_step(NextTokenLoss(CONFIG), OPTIMIZER)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        state, newest = fresh(), checkpoints.latest_step
        if newest is not None:
            state = checkpoints.restore(state)
        with Metrics(folder, resume_at=newest or 0) as metrics:
            state = train(state, step, batches, jax.random.key(7), steps=steps, metrics=metrics,
                          checkpoints=checkpoints, evaluate=lambda state: {"validation/loss": 1.0}, log_every=2,
                          evaluate_every=4, save_every=4, stops_at=stops_at)  # fmt: skip
    return state


def test_a_resumed_run_equals_an_uninterrupted_one_bit_by_bit(tmp_path):
    straight = run_loop(tmp_path / "straight", 10)
    seen = []

    def interrupted(number):
        seen.append(number)
        if number == 7:
            raise KeyboardInterrupt
        return BATCHES(number)

    with pytest.raises(KeyboardInterrupt):
        run_loop(tmp_path / "stopped", 10, batches=interrupted)
    resumed = run_loop(tmp_path / "stopped", 10, batches=lambda number: seen.append(-number) or BATCHES(number))
    assert seen == [1, 2, 3, 4, 5, 6, 7, -5, -6, -7, -8, -9, -10]
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), straight, resumed))
    written = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("straight", "stopped")]
    assert written[0] == written[1]
    rows = [json.loads(line) for line in written[0].splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10]
    assert [row["step"] for row in rows if "validation/loss" in row] == [4, 8, 10]
    timing = [json.loads(line) for line in (tmp_path / "stopped" / "timing.jsonl").read_text().splitlines()]
    assert [row["step"] for row in timing] == [2, 4, 6, 8, 10]
    assert all(row["perf/steps_per_s"] > 0 for row in timing)


def test_a_finished_run_does_nothing_again(tmp_path):
    first = run_loop(tmp_path, 4)
    again = run_loop(tmp_path, 4, batches=lambda number: pytest.fail("a batch was asked for"))
    chex.assert_trees_all_equal(first, again)


@pytest.mark.parametrize(
    "spoilt, log_every, save_every, bad_from, kept, message",
    [
        ("train/loss", 2, 4, 5, 4, r"train/loss=nan, train/grad_norm=1.0 in step 5 \(of steps 5 to 6,"),
        ("train/loss", 10, 3, 5, 3, r"train/loss=nan, train/grad_norm=1.0 in step 5 \(of steps 4 to 6,"),
        ("train/grad_norm", 3, 3, 6, 3, r"train/loss=1.0, train/grad_norm=nan in step 6 \(of steps 4 to 6,"),
        ("train/loss", 10, 10, 2, None, r"in step 2 \(of steps 1 to 10, .*There is no checkpoint yet"),
    ],
)
def test_a_run_that_is_not_finite_stops_and_saves_nothing_bad(
    tmp_path, spoilt, log_every, save_every, bad_from, kept, message
):
    def step(state, batch, key):
        number = int(state.step) + 1
        measured = {"train/loss": 1.0, "train/grad_norm": 1.0} | ({spoilt: jnp.nan} if number >= bad_from else {})
        return dataclasses.replace(state, step=state.step + 1), measured

    with (
        Checkpoints(tmp_path) as checkpoints,
        Metrics(None) as metrics,
        pytest.raises(RunError, match=message),
    ):
        train(fresh(), step, BATCHES, jax.random.key(0), steps=10, metrics=metrics, checkpoints=checkpoints,
              log_every=log_every, save_every=save_every)  # fmt: skip
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step == kept


def test_the_first_gradient_that_is_not_finite_is_named(tmp_path):
    """Of steps that are looked at together, the one whose batch makes a leaf's gradient infinite is found."""

    def loss_fn(params, batch, key, *, state):
        return jnp.sum(params["a"]["w"] ** 2) + jnp.sum(jnp.sqrt(params["b"]["w"] * batch)), Aux({}, state)

    optimizer = optax.sgd(0.0)
    start = init_state({"a": {"w": jnp.ones(2)}, "b": {"w": jnp.ones(3)}}, optimizer)
    with (
        Metrics(None) as metrics,
        pytest.raises(RunError, match=r"in step 3 \(of steps 1 to 4, looked at together\), first in that of b/w:"),
    ):
        train(start, make_step(loss_fn, optimizer), lambda number: 0.0 if number == 3 else 1.0, jax.random.key(0),
              steps=4, metrics=metrics, checkpoints=Checkpoints(None), log_every=4)  # fmt: skip


@pytest.mark.parametrize("stop", [3, 4, 6])
def test_a_run_that_is_told_to_stop_saves_first_and_goes_on_as_if_it_had_not(tmp_path, stop):
    straight = run_loop(tmp_path / "straight", 8)
    with pytest.raises(Preempted, match=f"behind step {stop} of 8: step {stop} is saved"):
        run_loop(tmp_path / "stopped", 8, stops_at=lambda number: number >= stop)
    with Checkpoints(tmp_path / "stopped" / "checkpoints") as checkpoints:
        assert checkpoints.latest_step == stop
    resumed = run_loop(tmp_path / "stopped", 8)
    chex.assert_trees_all_equal(straight, resumed)
    straight, stopped = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("straight", "stopped"))
    assert straight == stopped


def test_gradients_pass_through_grad_reduce_before_the_optimiser():
    optimizer = optax.sgd(0.1)
    start = init_state({"w": jnp.array([1.0, 2.0])}, optimizer, state={"seen": jnp.int32(0)})
    halved = lambda grads: jax.tree.map(lambda g: g / 2, grads)  # noqa: E731
    after, metrics = make_step(quadratic, optimizer, grad_reduce=halved)(start, jnp.zeros(2), jax.random.key(0))
    np.testing.assert_allclose(after.params["w"], [0.95, 1.9], rtol=1e-6)
    assert float(metrics["train/grad_norm"]) == pytest.approx(math.sqrt(5) / 2)


def test_the_step_takes_options_of_the_compiler():
    start = init_state({"w": jnp.ones(2)}, optax.sgd(0.1), state={"seen": jnp.int32(0)})
    step = make_step(quadratic, optax.sgd(0.1), compiler_options={"xla_no_such_option": True})
    with pytest.raises(Exception, match="xla_no_such_option"):
        step(start, jnp.zeros(2), jax.random.key(0))


def test_what_is_frozen_is_in_no_checkpoint(tmp_path):
    state = with_frozen(init_state({"w": jnp.ones(2)}, OPTIMIZER, state={"seen": jnp.int32(0)}), {"base": jnp.ones(9)})
    assert set(trained_part(state).state) == {"seen"}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, trained_part(state))
    with Checkpoints(tmp_path) as checkpoints:
        again = with_frozen(checkpoints.restore(trained_part(state)), {"base": jnp.ones(9)})
    chex.assert_trees_all_equal(again, state)


def test_the_schedule_rises_and_falls():
    rate = make_schedule(OptimizerConfig(learning_rate=1.0, warmup=10, final=0.1), steps=110)
    assert [round(float(rate(n)), 3) for n in (0, 10, 60, 110)] == [0.1, 1.0, 0.55, 0.1]
    assert float(rate(5)) == pytest.approx(0.55)


def test_weight_decay_leaves_vectors_alone():
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1, warmup=0, weight_decay=0.5), steps=10)
    params = {"kernel": jnp.ones((2, 2)), "scale": jnp.ones(2)}
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.05, rtol=1e-6)
    np.testing.assert_array_equal(updates["scale"], 0)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"learning_rate": 0.0}, "optimizer.learning_rate=0.0 must be above 0"),
        ({"warmup": -1}, "optimizer.warmup=-1 must be 0 or more"),
        ({"warmup": 10}, "optimizer.warmup=10 must be below the run's 10 steps"),
        ({"clip_norm": 0.0}, "optimizer.clip_norm=0.0 must be above 0"),
    ],
)
def test_optimizers_that_mean_nothing_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        make_optimizer(OptimizerConfig(**fields), steps=10)


def test_the_step_lowers_for_cuda():
    """Without a GPU at hand: every operation of the compiled program has a rule there."""
    loss_fn = NextTokenLoss(dataclasses.replace(CONFIG, dtype="bfloat16"))
    arguments = (fresh(), BATCHES(1), jax.random.key(0))
    lowered = make_step(loss_fn, OPTIMIZER).trace(*arguments).lower(lowering_platforms=("cuda",))
    assert "bf16" in lowered.as_text()
