"""What a forward is given and cannot use is refused by name, before anything runs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfw.core.errors import InputError
from jaxfw.core.mesh import make_mesh
from jaxfw.core.sharding import shardings
from jaxfw.generate import engine
from jaxfw.models import DecoderConfig, Edit, MoEConfig, forward, init, stack_layers
from jaxfw.models.cache import FullCache, Int8Cache, RingCache
from jaxfw.models.routing import TokenChoice
from jaxfw.models.sharding import decoder_rules

CONFIG = DecoderConfig(vocab=13, width=8, ffn=12, layers=2, heads=2, kv_heads=1, head_dim=4, positions=64)
MIXED = dataclasses.replace(CONFIG, moe=MoEConfig(experts=4, per_token=2, ffn=6))
TOKENS = jnp.ones((2, 3), jnp.int32)


@functools.cache
def params_of(config=CONFIG):
    return jax.jit(init, static_argnums=0)(config, jax.random.key(0))


@functools.cache
def cache_of():
    return forward(CONFIG, params_of(), TOKENS, policy=FullCache(), room=5).cache


WRONG = {
    "a list of tokens": (dict(tokens=[[1, 2]]), r"tokens=\[\[1, 2\]\] must be an array"),
    "one row": (dict(tokens=TOKENS[0]), r"tokens is int32 of shape \[3\].*one row is tokens\[None\]"),
    "tokens that are no integers": (dict(tokens=TOKENS * 1.0), r"tokens is float32.*give integers"),
    "no token": (dict(tokens=TOKENS[:, :0]), r"tokens has shape \(2, 0\): give at least one"),
    "lengths of other rows": (dict(lengths=jnp.ones(3, jnp.int32)), r"lengths is int32 of shape \[3\].*each of 2 rows"),
    "lengths that are no integers": (dict(lengths=jnp.ones(2)), r"lengths is float32 of shape \[2\]: give integers"),
    "units of other tokens": (dict(unit_id=TOKENS[:, :2]), r"unit_id is int32 of shape \[2, 2\]"),
    "a policy by name": (dict(policy="ring"), r"policy='ring' is no cache policy: give a value such as FullCache\(\)"),
    "a policy's class": (dict(policy=FullCache), r"policy=<class.*is no cache policy"),
    "too little room": (dict(policy=FullCache(), room=2), r"room=2 must be.*prompt's 3 tokens"),
    "room that is no number": (dict(policy=FullCache(), room=4.5), r"room=4.5 must be a whole number"),
    "a cache alone": (dict(cache="held"), r"a cache is given without its policy"),
    "a router by name": (dict(config=MIXED, router="topk"), r"router='topk' is none: give a value such as TokenChoice"),
    "another k": (dict(config=MIXED, router=TokenChoice(3)), r"router.k=3 and model.moe.per_token=2 differ"),
    "a tap without a list": (dict(taps=Edit("embed", 1.0)), r"taps=Edit.* must be a list of taps"),
    "one layer": (dict(taps=[Edit("resid/in", 1.0, layers=1)]), r"taps\[0\].layers=1 must be \(first, last\)"),
    "a list as a value": (dict(taps=[Edit("embed", [1.0] * 8)]), r"taps\[0\].value=\[1.0.* must be a number or a real"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_it_is_refused_by_name(name):
    options, message = WRONG[name]
    if options.get("cache") == "held":
        options = options | {"cache": cache_of()}
    config = options.get("config", CONFIG)
    call = {"config": config, "params": params_of(config), "tokens": TOKENS} | options
    with pytest.raises(InputError, match=message):
        forward(**call)


def test_parameters_of_another_model_are_refused():
    with pytest.raises(InputError, match=r"layers_0 holds a dense feed-forward, config.moe=MoEConfig.* says otherwise"):
        forward(MIXED, params_of(), TOKENS)
    with pytest.raises(InputError, match=r"layers_0 holds experts, config.moe=None says otherwise"):
        forward(CONFIG, params_of(MIXED), TOKENS)
    with pytest.raises(InputError, match=r"params have no layers_2, but config.layers=3"):
        forward(dataclasses.replace(CONFIG, layers=3), params_of(), TOKENS)
    with pytest.raises(InputError, match=r"stacked layers are of one kind"):
        forward(MIXED, stack_layers(params_of()), TOKENS)


def test_a_cache_belongs_to_its_policy_and_its_rows():
    for policy in (RingCache(4), Int8Cache()):
        with pytest.raises(InputError, match=r"a cache of FullStates was not made by (Ring|Int8)Cache"):
            forward(CONFIG, params_of(), TOKENS, policy=policy, cache=cache_of())
    with pytest.raises(InputError, match=r"the cache has 2 rows, the tokens 1: see Cache.rows"):
        forward(CONFIG, params_of(), TOKENS[:1], policy=FullCache(), cache=cache_of())


@pytest.mark.parametrize("policy", [FullCache(), Int8Cache()], ids=repr)
def test_a_cache_that_is_full_says_so(policy):
    cache = forward(CONFIG, params_of(), TOKENS, policy=policy, room=5).cache
    forward(CONFIG, params_of(), TOKENS[:, :2], policy=policy, cache=cache)
    with pytest.raises(InputError, match=r"the cache has 5 slots, a row now needs 6: give the prompt more room="):
        forward(CONFIG, params_of(), TOKENS, policy=policy, cache=cache)


def test_a_routers_state_is_its_own():
    router = TokenChoice(2, scores="sigmoid", bias_rate=0.1)
    with pytest.raises(InputError, match=r"state has layer_0, but TokenChoice.* remembers layers_0, layers_1"):
        forward(MIXED, params_of(MIXED), TOKENS, router=router, state={"layer_0": {}})
    with pytest.raises(InputError, match=r"remembers what it learned in training.*router_states="):
        engine.generate(MIXED, params_of(MIXED), [[1]], max_new_tokens=1, router=router)


def test_prompts_and_units_of_a_generation():
    with pytest.raises(InputError, match=r"prompts\[0\]='Return' must be a list of token ids"):
        engine.generate(CONFIG, params_of(), ["Return"], max_new_tokens=1)
    with pytest.raises(InputError, match=r"unit_ids have \[1\] numbers a row, the prompts \[2\] tokens"):
        engine.generate(CONFIG, params_of(), [[1, 2]], max_new_tokens=1, unit_ids=[[0]])


def test_a_mesh_of_other_names_is_refused():
    mesh = jax.make_mesh((1, 1), ("data", "model"))
    with pytest.raises(
        InputError, match=r"the mesh has axes data, model, rule .* names fsdp, tensor: make the mesh by"
    ):
        shardings(decoder_rules(CONFIG), mesh, params_of())
    assert shardings(decoder_rules(CONFIG), make_mesh(devices=jax.devices()[:1]), params_of())


@dataclasses.dataclass(frozen=True)
class ReadsUnits(FullCache):
    """Refuses prompts whose units are not those that the test gives."""

    def prefill(self, qkv, step, **options):
        out, state = super().prefill(qkv, step, **options)
        return out, dataclasses.replace(state, v=state.v + jnp.sum(step.unit_id * step.valid))


def test_units_reach_the_policy_padded():
    prompts, units = [[1, 2, 3], [4]], [[0, 2, 1], [0]]
    tokens, lengths = jnp.array([[1, 2, 3, 0], [4, 0, 0, 0]]), jnp.array([3, 1])
    padded = jnp.array([[0, 2, 1, -1], [0, -1, -1, -1]])
    whole = forward(CONFIG, params_of(), tokens, lengths=lengths, policy=ReadsUnits(), room=8, unit_id=padded)
    plain = forward(CONFIG, params_of(), tokens, lengths=lengths, policy=FullCache(), room=8)
    np.testing.assert_allclose(whole.cache.layers[0].v - plain.cache.layers[0].v, 3)
    rows = engine.generate(CONFIG, params_of(), prompts, max_new_tokens=2, unit_ids=units, policy=ReadsUnits())
    assert [len(row) for row in rows.tokens] == [2, 2]
