"""Optimisers against numpy in float64, and what holds for every option: layouts on meshes, vmap, abstract values."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxfw.core.errors import InputError
from jaxfw.core.mesh import abstract_mesh
from jaxfw.core.shapes import PyTree
from jaxfw.core.sharding import shardings, state_shardings
from jaxfw.models import DecoderConfig, MoEConfig, init, stack_layers
from jaxfw.models.sharding import decoder_rules
from jaxfw.train import Aux, OptimizerConfig, init_state, make_optimizer, make_step, update
from jaxfw.train.average import averaged_params
from jaxfw.train.optimizer import make_schedule

# Names as a decoder's: an embedding, an attention matrix, experts [E D F] and [E F D], a norm.
SHAPES = {
    "embed": {"embedding": (5, 4)},
    "layers_0": {"attn": {"q": {"kernel": (4, 6)}}, "moe": {"experts": {"up": (2, 4, 3), "down": (2, 3, 4)}},
                 "norm": {"scale": (4,)}},
}  # fmt: skip
STEPS = 6
CONFIG = OptimizerConfig(learning_rate=0.05, warmup=1, eps=1e-6, clip_norm=0.5)
OPTIONS = {
    "adamw": CONFIG,
    "muon": dataclasses.replace(CONFIG, kind="muon"),
    "sgd": dataclasses.replace(CONFIG, kind="sgd", schedule="wsd"),
    "plain sgd, never clipped": dataclasses.replace(CONFIG, kind="sgd", momentum=0.0, clip_norm=None),
    "accumulated": dataclasses.replace(CONFIG, accumulate=2),
    "averaged": dataclasses.replace(CONFIG, average=0.9, schedule="constant"),
    "frozen": dataclasses.replace(CONFIG, freeze="embed/.*"),
    "muon with everything": dataclasses.replace(
        CONFIG, kind="muon", accumulate=2, average=0.9, freeze="embed/.*|.*/q/kernel", schedule="linear"
    ),
}
# Compiling is most of what these tests do, and compiles fastest unoptimised.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def draw(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: np.float32(scale * rng.standard_normal(shape)), SHAPES, is_leaf=lambda x: isinstance(x, tuple)
    )


PARAMS, GRADS = draw(0), [draw(seed, scale=0.4) for seed in range(1, STEPS + 1)]


def named(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@functools.cache
def trained(config):
    """Parameters before and after each of the steps, and the last state."""
    optimizer = make_optimizer(config, steps=STEPS)
    step, state, params = jit(optimizer.update), optimizer.init(PARAMS), PARAMS
    seen = [params]
    for grads in GRADS:
        updates, state = step(grads, state, params)
        params = jax.tree.map(lambda p, u: np.asarray(p + u), params, updates)
        seen.append(params)
    return seen, state


# --- numpy


def newton_schulz(x):
    """Five quintic iterations on one matrix, as published (Jordan et al. 2024)."""
    x = x / (np.linalg.norm(x) + 1e-8)
    is_tall = x.shape[0] > x.shape[1]
    x = x.T if is_tall else x
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if is_tall else x


def muon_direction(g, memory, t, config):
    """Nesterov's momentum with Nadam's corrections, orthogonalised matrix by matrix, of the size of Adam's updates."""
    b = config.momentum
    memory["m"] = b * memory.get("m", 0) + (1 - b) * g
    ahead = b * memory["m"] / (1 - b ** (t + 2)) + (1 - b) * g / (1 - b ** (t + 1))
    matrices = ahead.reshape(-1, *g.shape[-2:])
    return 0.2 * np.sqrt(max(g.shape[-2:])) * np.stack([newton_schulz(x) for x in matrices]).reshape(g.shape)


def adam_direction(g, memory, t, config):
    memory["m"] = config.b1 * memory.get("m", 0) + (1 - config.b1) * g
    memory["v"] = config.b2 * memory.get("v", 0) + (1 - config.b2) * g**2
    m, v = memory["m"] / (1 - config.b1 ** (t + 1)), memory["v"] / (1 - config.b2 ** (t + 1))
    return m / (np.sqrt(v) + config.eps)


def sgd_direction(g, memory, t, config):
    memory["m"] = config.momentum * memory.get("m", 0) + g
    return memory["m"]


def in_numpy(config):
    """Parameters after all steps and their average, in float64; the schedule's numbers are optax's."""
    params = {name: x.astype(np.float64) for name, x in named(PARAMS).items()}
    frozen = {"embed/embedding"} if config.freeze else set()
    frozen |= {"layers_0/attn/q/kernel"} if config.freeze and "/q/" in config.freeze else set()
    rates = np.asarray(make_schedule(config, steps=STEPS)(np.arange(STEPS)), np.float64)
    memories, history = {name: {} for name in params}, []
    k = config.accumulate
    for t in range(STEPS // k):
        batches = [named(g) for g in GRADS[t * k : (t + 1) * k]]
        grads = {n: np.mean([b[n].astype(np.float64) for b in batches], 0) for n in params if n not in frozen}
        norm = np.sqrt(sum(np.sum(g**2) for g in grads.values()))
        share = 1.0 if config.clip_norm is None else min(1.0, config.clip_norm / norm)
        assert config.clip_norm is None or share < 0.9, "it must clip"
        for name, g in grads.items():
            is_hidden = name.startswith("layers") and g.ndim >= 2
            direction = {"adamw": adam_direction, "sgd": sgd_direction}.get(config.kind)
            direction = direction or (muon_direction if is_hidden else adam_direction)
            found = direction(share * g, memories[name], t, config)
            params[name] = params[name] - rates[t] * (
                found + (config.weight_decay * params[name] if g.ndim >= 2 else 0)
            )
        history.append(dict(params))
    N, d = len(history), config.average or 0.0
    weights = np.array([d ** (N - n) for n in range(1, N + 1)])
    average = {name: np.tensordot(weights / weights.sum(), [h[name] for h in history], 1) for name in params}
    return params, average


@pytest.mark.parametrize("name", OPTIONS)
def test_parameters_and_average_are_those_of_numpy(name):
    config = OPTIONS[name]
    seen, state = trained(config)
    params, average = in_numpy(config)
    for path, found in named(seen[-1]).items():
        np.testing.assert_allclose(found, params[path], rtol=2e-5, atol=2e-6, err_msg=path)
    if config.average:
        for path, found in named(averaged_params(state, seen[-1])).items():
            np.testing.assert_allclose(found, average[path], rtol=2e-5, atol=2e-6, err_msg=path)


def test_the_default_is_what_it_was():
    """The quickstart's committed figures are of this chain: bit by bit."""
    config = OptimizerConfig(warmup=2)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(make_schedule(config, steps=STEPS), b1=0.9, b2=0.95, weight_decay=0.1,
                    mask=lambda p: jax.tree.map(lambda x: x.ndim >= 2, p)),
    )  # fmt: skip
    step, state, params = jit(optimizer.update), optimizer.init(PARAMS), PARAMS
    for grads in GRADS:
        updates, state = step(grads, state, params)
        params = jax.tree.map(lambda p, u: np.asarray(p + u), params, updates)
    jax.tree.map(np.testing.assert_array_equal, params, trained(config)[0][-1])


# --- accumulation, freezing, averages


def test_parameters_change_behind_every_second_batch_only():
    seen, state = trained(OPTIONS["muon with everything"])
    for before, after, is_update in zip(seen, seen[1:], [False, True] * 3):
        changed = {path for path, x in named(after).items() if not np.array_equal(x, named(before)[path])}
        trained_paths = set(named(PARAMS)) - {"embed/embedding", "layers_0/attn/q/kernel"}
        assert changed == (trained_paths if is_update else set())
    counts = {name: int(x) for name, x in named(state).items() if name.endswith(("count", "_step"))}
    assert counts.pop("inner_states/trained/inner_state/mini_step") == 0
    assert set(counts.values()) == {3}, "the schedule, the moments and the average count updates"


def test_frozen_parameters_have_no_state_and_no_part_in_the_norm():
    config = OPTIONS["muon with everything"]
    state = make_optimizer(config, steps=STEPS).init(PARAMS)
    assert not [name for name in named(state) if name.endswith(("embedding", "q/kernel"))]
    assert [name for name in named(state) if name.endswith("experts/up") and "acc_grads" in name]
    huge = GRADS[0] | {"embed": {"embedding": np.full((5, 4), 1e6, np.float32)}}
    optimizer = make_optimizer(OPTIONS["frozen"], steps=STEPS)
    step, state = jit(optimizer.update), optimizer.init(PARAMS)
    small, large = (step(grads, state, PARAMS)[0] for grads in (GRADS[0], huge))
    jax.tree.map(np.testing.assert_array_equal, small, large)


def test_the_average_is_held_in_float32_and_given_in_the_parameters_dtype():
    """Steps of 1e-3 around 1 vanish in bfloat16, and not in what is averaged."""
    config = OptimizerConfig(learning_rate=1e-3, warmup=0, kind="sgd", momentum=0.0, weight_decay=0.0, average=0.5,
                             schedule="constant", clip_norm=None)  # fmt: skip
    params: PyTree = {"w": jnp.array([1.0, 2.0], jnp.bfloat16)}
    optimizer = make_optimizer(config, steps=4)
    state = optimizer.init(params)
    begun = averaged_params(state)["w"]
    assert begun.dtype == jnp.float32 and begun.tolist() == [1.0, 2.0], "before the first update, the parameters"
    for _ in range(2):
        updates, state = optimizer.update({"w": jnp.array([8.0, 0.0], jnp.bfloat16)}, state, params)
        params = optax.apply_updates(params, updates)
    first, second = 1 - 1 / 128, 1 - 2 / 128  # 0.992 in bfloat16 is 127/128
    assert params["w"].astype(jnp.float32).tolist() == [second, 2.0]
    np.testing.assert_allclose(averaged_params(state)["w"], [(first + 2 * second) / 3, 2.0], rtol=1e-6)
    assert averaged_params(state, params)["w"].dtype == jnp.bfloat16


def test_the_state_can_be_donated():
    """A copy that shared its buffer with the parameters could not."""
    optimizer = make_optimizer(OptimizerConfig(warmup=1, average=0.9), steps=4)

    def loss(params, batch, key, *, state):
        return jnp.sum(params["w"] ** 2), Aux({}, state)

    for make in (lambda f: f, jax.jit):
        state = make(lambda params: init_state(params, optimizer))({"w": jnp.ones((2, 3))})
        state, _ = make_step(loss, optimizer)(state, None, jax.random.key(0))
        assert float(averaged_params(state.opt_state)["w"][0, 0]) < 1


def test_stacked_layers_change_as_single_ones():
    """A stacked scale [L D] is no matrix to decay, nor to orthogonalise; a stacked matrix [L D F] is L of them."""

    def tree(seed):
        layers = [draw(seed + i)["layers_0"] for i in range(2)]
        return {f"layers_{i}": layer | {"bias": layer["norm"]["scale"] + 1} for i, layer in enumerate(layers)}

    params, grads = tree(3), tree(5)
    optimizer = make_optimizer(dataclasses.replace(OPTIONS["muon"], weight_decay=0.5, warmup=0), steps=4)
    step = jit(lambda grads, params: optimizer.update(grads, optimizer.init(params), params)[0])
    single, stacked = step(grads, params), step(stack_layers(grads), stack_layers(params))
    for path, x in named(stack_layers(single)).items():
        np.testing.assert_allclose(named(stacked)[path], x, rtol=1e-4, atol=1e-6, err_msg=path)


# --- every option on meshes and under transformations

DECODER = DecoderConfig(
    vocab=64, width=16, ffn=32, layers=2, heads=4, kv_heads=4, head_dim=4, positions=16, qkv_bias=True, mlp_bias=True,
    moe=MoEConfig(experts=4, per_token=2, ffn=16, first=1, shared=32, shared_gate=True),
)  # fmt: skip
DENSE = dataclasses.replace(DECODER, moe=None)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("sizes", [dict(fsdp=2, tensor=2, expert=2), dict(data=2, fsdp=2, tensor=2)], ids=str)
@pytest.mark.parametrize("is_stacked", [False, True])
def test_no_matrix_of_an_optimisers_state_is_whole_on_a_mesh(name, sizes, is_stacked):
    config, mesh = DENSE if is_stacked else DECODER, abstract_mesh(**sizes)
    params = jax.eval_shape(lambda: (stack_layers if is_stacked else dict)(init(config, jax.random.key(0))))
    optimizer = make_optimizer(OPTIONS[name], steps=STEPS)
    places = shardings(decoder_rules(config), mesh, params)
    state = jax.eval_shape(functools.partial(init_state, optimizer=optimizer), params)
    layout, of, parts = named(state_shardings(places, params, state)), named(places), 0
    for path, leaf in named(state.opt_state).items():
        place = layout[f"opt_state/{path}"]
        if leaf.ndim == 0:
            continue
        (parameter,) = (name for name in of if path.endswith(f"/{name}"))
        assert place == of[parameter], path
        if leaf.ndim - is_stacked * parameter.startswith("layers/") >= 2:
            assert place.shard_shape(leaf.shape) != leaf.shape, path
        parts += 1
    # A share of 1e-3 a copy of the parameters: moments, momentum, accumulated gradients, average.
    copies = {"adamw": 2, "sgd": 1, "accumulated": 3, "averaged": 3, "plain sgd, never clipped": 0}
    assert name not in copies or parts == copies[name] * len(of)


def test_what_muon_takes_are_hidden_matrices():
    params = jax.eval_shape(lambda: init(DECODER, jax.random.key(0)))
    state = jax.eval_shape(make_optimizer(OPTIONS["muon"], steps=STEPS).init, params)
    taken = {path.split("/mu/")[1] for path in named(state) if "/muon/" in path and "/mu/" in path}
    attention = {f"attn/{name}/kernel" for name in "qkvo"}
    dense = {f"mlp/{name}/kernel" for name in ("gate", "up", "down")}
    shared = {f"moe/shared/{name}/kernel" for name in ("gate", "up", "down")}
    experts = {f"moe/experts/{name}" for name in ("gate", "up", "down")}
    assert taken == {f"layers_0/{x}" for x in attention | dense} | {
        f"layers_1/{x}" for x in attention | shared | experts
    }


@pytest.mark.parametrize("name", ["adamw", "muon with everything"])
def test_clients_are_updated_together_as_alone(name):
    optimizer = make_optimizer(OPTIONS[name], steps=STEPS)

    def loss(params, batch, key, *, state):
        return jnp.asarray(optax.tree.vdot(params, batch)), Aux({}, state)

    def run(params, batch):
        state = init_state(params, optimizer)
        for _ in range(2):
            state, _ = update(loss, optimizer, state, batch, jax.random.key(0))
        return state.params

    def stack(*trees):
        return jax.tree.map(lambda *x: np.stack(x), *trees)

    alone, clients = jit(run), (PARAMS, draw(7))
    together = jit(jax.vmap(run))(stack(*clients), stack(*GRADS[:2]))
    alone = stack(*[alone(params, grads) for params, grads in zip(clients, GRADS)])
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), together, alone)


# --- wrong input


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(kind="adam"), r"optimizer\.kind='adam' is unknown\. Known: adamw, muon, sgd\. Did you mean 'adamw'\?"),
        (dict(schedule="cos"), r"optimizer\.schedule='cos' is unknown\. Known: cosine, linear, constant, wsd"),
        (dict(learning_rate=0.0), r"optimizer\.learning_rate=0\.0 must be above 0"),
        (dict(eps=0.0), r"optimizer\.eps=0\.0 must be above 0"),
        (dict(warmup=-1), r"optimizer\.warmup=-1 must be 0 or more"),
        (dict(weight_decay=-0.1), r"optimizer\.weight_decay=-0\.1 must be 0 or more"),
        (dict(b2=1.0), r"optimizer\.b2=1\.0 must be in \[0, 1\)"),
        (dict(momentum=float("nan")), r"optimizer\.momentum=nan must be in \[0, 1\)"),
        (dict(final=1.5), r"optimizer\.final=1\.5 must be in \[0, 1\]"),
        (dict(decay=0.0), r"optimizer\.decay=0\.0 must be in \(0, 1\]"),
        (dict(clip_norm=0.0), r"optimizer\.clip_norm=0\.0 must be above 0, or None"),
        (dict(accumulate=0), r"optimizer\.accumulate=0 must be at least 1"),
        (dict(average=1.0), r"optimizer\.average=1\.0 must be between 0 and 1"),
        (dict(freeze="embed/(.*"), r"optimizer\.freeze='embed/\(\.\*' is no regular expression: missing \)"),
    ],
)
def test_wrong_settings_are_named(change, said):
    with pytest.raises(InputError, match=said):
        OptimizerConfig(**change)


@pytest.mark.parametrize(("pattern", "said"), [("embed", "none of the 5"), (".*", "all of the 5")])
def test_freezing_nothing_or_everything_is_refused(pattern, said):
    optimizer = make_optimizer(OptimizerConfig(warmup=1, freeze=pattern), steps=4)
    with pytest.raises(InputError, match=rf"optimizer\.freeze='{pattern}' matches {said} .* embed/embedding"):
        optimizer.init(PARAMS)


def test_an_average_that_is_not_there_is_refused():
    with pytest.raises(InputError, match=r"keeps no average: set optimizer\.average"):
        averaged_params(optax.adam(0.1).init(PARAMS))
    state = make_optimizer(OPTIONS["muon with everything"], steps=STEPS).init(PARAMS)
    with pytest.raises(InputError, match="2 parameters are frozen and in no average"):
        averaged_params(state)
